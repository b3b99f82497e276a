"""Freshness is measured from the moment at which a label may be given, and its parts add up."""

from __future__ import annotations

import numpy as np

from bench.freshness_figures import due_ms, figures
from deploy.demo.freshness import Clicks, Followed

HOLD_MS, LATENESS_MS = 100, 50


def followed(*rows: tuple[int, int, int, int, int, int, int]) -> Followed:
    """Clicks by impression, arrival, label written, correction, delta taken, delta logged, answer; all in ms."""
    impression_ms, arrived_ms, written_ms, corrects, taken_ms, logged_ms, answered_ms = np.array(rows).T
    nought = np.zeros(len(rows), np.int64)
    clicks = Clicks(nought, nought, impression_ms, arrived_ms, written_ms, corrects)
    return Followed(len(rows) + 1, clicks, taken_ms, logged_ms, answered_ms)


def test_a_correction_is_due_when_its_click_arrives_and_the_first_label_at_the_watermark():
    found = followed((0, 40, 0, 0, 0, 0, 0), (0, 149, 0, 1, 0, 0, 0), (0, 700, 0, 1, 0, 0, 0))
    assert due_ms(found, HOLD_MS, LATENESS_MS).tolist() == [150, 150, 700]


def test_parts_add_up_to_the_whole():
    found = followed((0, 40, 170, 0, 200, 230, 300), (1_000, 1_900, 1_907, 1, 1_950, 1_980, 2_000))
    due = due_ms(found, HOLD_MS, LATENESS_MS)
    for from_ms, whole, click, parts in ((0, 125, 180, (13.5, 36.5, 30, 45)), (151, 100, 100, (7, 43, 30, 20))):
        got = figures(found, due, from_ms)
        assert (got["p50_ms"], got["click_p50_ms"]) == (whole, click)
        assert tuple(got[f"{part}_p50_ms"] for part in ("join", "train", "delta", "apply")) == parts
        assert sum(parts) == whole  # of two clicks, medians are means
    assert figures(found, due, 0)["clicks"] == 2
    assert figures(found, due, 701)["clicks"] == 1


def test_no_click_is_no_number():
    got = figures(followed((0, 40, 170, 0, 200, 230, 300)), np.array([150]), 151)
    assert got["clicks"] == 0
    assert np.isnan(got["p50_ms"])
