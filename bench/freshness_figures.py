"""The figures of `bench/freshness.py`, from the clicks that were followed through the topics."""

from __future__ import annotations

import numpy as np

from deploy.demo.freshness import Followed, Int64s

__all__ = ["due_ms", "figures"]

# Percentiles that are reported, by the ends of their keys.
_PERCENTILES = {"p50_ms": 50, "p99_ms": 99}


def due_ms(followed: Followed, hold_ms: int, lateness_ms: int) -> Int64s:
    """When each click's label was due: int64 (N,).

    A first label is due at its impression's event time + hold + lateness. A correction is due at the arrival of its click, if
    that is later, since the join gives a correction without waiting for the watermark.
    """
    first_ms = followed.clicks.impression_ms + hold_ms + lateness_ms
    return np.where(followed.clicks.corrects == 1, np.maximum(first_ms, followed.clicks.arrived_ms), first_ms)


def figures(followed: Followed, due: Int64s, from_ms: int) -> dict[str, float]:
    """Freshness of the clicks whose labels were due from `from_ms` on, and where its time goes.

    Returns:
        p50_ms, p99_ms: from the time at which a label was due to the first answer that knows it.
        click_…: from the click's arrival in Kafka to that answer.
        join_…, train_…, delta_…, apply_…: the parts of the first: from due to the example in the log, from there to the delta
        that is taken, from there to the delta in the log, and from there to the answer.
        clicks: number of clicks measured.
    """
    rows = np.flatnonzero(due >= from_ms)
    written_ms = followed.clicks.written_ms
    parts = {
        "": followed.answered_ms - due,
        "click_": followed.click_to_answer_ms,
        "join_": written_ms - due,
        "train_": followed.taken_ms - written_ms,
        "delta_": followed.logged_ms - followed.taken_ms,
        "apply_": followed.answered_ms - followed.logged_ms,
    }
    found: dict[str, float] = {
        f"{part}{name}": round(float(np.percentile(times[rows], percent)), 1) if len(rows) else float("nan")
        for part, times in parts.items()
        for name, percent in _PERCENTILES.items()
    }
    return {**found, "clicks": len(rows)}
