"""Groups hold the impressions that they say, each once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from deploy.errors import EvaluationError
from deploy.evaluate.groups import by_value, deciles, pieces_of_time, rare
from deploy.evaluate.stream import Stream, from_data_set
from tests.deploy.made_up import MadeUp


@pytest.fixture
def stream() -> Stream:
    """Users u0 to u6 in turns, items i0 to i4 in turns."""
    return from_data_set(MadeUp([(row, row % 3 - 1) for row in range(1_000)]), named=("u", "item"))


def test_top_values_have_their_names_and_their_impressions(stream: Stream) -> None:
    measured = np.arange(100, 1_000)
    groups = by_value(stream, "item", measured, top=3)
    assert [len(each.rows) for each in groups] == [180, 180, 180, 360]
    assert groups[-1].name == "others"
    for group in groups[:-1]:
        assert (group.rows % 5 == int(group.name.removeprefix("i"))).all()
    assert np.array_equal(np.sort(np.concatenate([each.rows for each in groups])), measured)


def test_a_field_that_is_not_there_is_an_error(stream: Stream) -> None:
    with pytest.raises(EvaluationError, match=r"field 'price': expected one of the fields .*u, item.*found another name"):
        by_value(stream, "price", np.arange(10), 3)


def test_rare_values_were_shown_under_100_times_before(stream: Stream) -> None:
    found = {group.name: group.rows for group in rare(stream, np.arange(200, 1_000))}
    assert np.array_equal(found["u"], np.arange(200, 700))  # seven users: 100 impressions of each
    assert np.array_equal(found["item"], np.arange(200, 500))
    assert list(rare(stream, np.arange(700, 1_000))) == []


def test_deciles_and_pieces_part_what_is_measured(stream: Stream) -> None:
    measured = np.arange(33, 1_000)
    scores = np.random.default_rng(0).random(1_000).astype(np.float32)
    tenths = deciles(scores, measured)
    assert len(tenths) == 10
    for lower, upper in itertools.pairwise(tenths):
        assert scores[lower.rows].max() <= scores[upper.rows].min()
    for groups in (tenths, pieces_of_time(measured)):
        assert np.array_equal(np.sort(np.concatenate([each.rows for each in groups])), measured)
