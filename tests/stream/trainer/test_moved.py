"""After a move to another cluster the trainer goes on at offsets that somebody has chosen, once, and never by itself."""

from __future__ import annotations

import pytest

from state.manifest import Manifest
from stream.errors import PositionError
from stream.settings import TrainerSettings
from stream.trainer.moved import moved
from stream.trainer.start import Start

BEGINNINGS, ENDS = {0: 3, 1: 0}, {0: 90, 1: 70}


def start(trained: str | None) -> Start:
    ids = {} if trained is None else {"examples": trained}
    return Start(Manifest(version=7, offsets={"0": 1_000, "1": 2_000}, topic_ids=ids), newest=7)


def placed(examples_from: str, *, trained: str | None = "old", now: str = "new") -> Start:
    return moved(start(trained), examples_from, {"examples": now}, BEGINNINGS, ENDS)


@pytest.mark.parametrize(("chosen", "offsets"), [("start", {0: 3, 1: 0}), ("end", {0: 90, 1: 70}), ("0:40,1:8", {0: 40, 1: 8})])
def test_the_offsets_are_those_that_were_chosen(chosen: str, offsets: dict[int, int]) -> None:
    assert TrainerSettings(examples_from=chosen).examples_from == chosen
    found = placed(chosen)
    assert (found.offsets, found.moved, found.version) == (offsets, True, 7)


def test_the_choice_counts_for_another_topic_only() -> None:
    """So a setting that somebody forgets skips nothing, and nothing is learned twice, at the next start."""
    for found in (placed("end", trained="new"), placed("end", trained=None), placed("version")):
        assert found.offsets == {0: 1_000, 1: 2_000} and not found.moved
    new_model = Start(None, newest=7)
    assert moved(new_model, "end", {"examples": "new"}, BEGINNINGS, ENDS) is new_model


@pytest.mark.parametrize("chosen", ["0:40", "0:1,1:2,2:3"])
def test_every_partition_is_named(chosen: str) -> None:
    with pytest.raises(PositionError, match=r"expected an offset for each of the partitions \[0, 1\]"):
        placed(chosen)


def test_what_is_no_choice_is_rejected() -> None:
    for wrong in ("", "middle", "0", "0:x", "0:1;1:2"):
        with pytest.raises(ValueError, match="examples_from"):
            TrainerSettings(examples_from=wrong)
