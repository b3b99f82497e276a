"""Where a scorer goes on."""

from __future__ import annotations

import logging

import pytest

from stream.scorer.start import choose_positions


def test_positions(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        starts = {0: 10, 1: 10, 2: 10, 3: 10, 4: 10}
        ends = dict.fromkeys(starts, 20)
        chosen = choose_positions("score-requests", {0: 10, 1: 20, 2: 9, 3: 21, 4: -1}, starts, ends)
    assert chosen == {0: 10, 1: 20, 2: 10, 3: 10, 4: 10}
    assert caplog.messages == [
        "score-requests, partition 2: committed up to 9, but the log holds 10 to 20; going on at 10",
        "score-requests, partition 3: committed up to 21, but the log holds 10 to 20; going on at 10",
    ]


def test_first_start_begins_at_the_start_of_the_log() -> None:
    assert choose_positions("score-requests", {}, {0: 0, 1: 5}, {0: 3, 1: 5}) == {0: 0, 1: 5}
