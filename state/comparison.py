"""What is known of a track beside the one that serves: served metrics of both on the same impressions, and what they mean.

The track's trainer writes the record into the track's own registry (`stream.trainer.challenge`), `headrace model compare` reads
it. Older releases ignore its key.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import msgspec

__all__ = ["COMPARISON_KEY", "FIRST_CLICKS", "Comparison", "Finding", "ServedSide", "finding_of"]

COMPARISON_KEY = "alias/compare/current"

FIRST_CLICKS = 100
"""Clicks from which a difference is judged. With fewer, standard errors are themselves uncertain."""

# Standard errors in half of a two-sided 95 % interval.
_Z95 = 1.96


class ServedSide(msgspec.Struct, frozen=True, kw_only=True):
    """Served metrics of one side over the same impressions. NaN would not be JSON: a figure that isn't known is None."""

    log_loss: float | None = None
    normalised_entropy: float | None = None
    auc: float | None = None
    calibration: float | None = None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A track against the one that serves, on the impressions that both have scored.

    of             the change of the track's share since which impressions count, and the turn of the serving track, if any
    against        the track that serves
    since_ms       event time of the first impression; 0 before it
    at_ms          when the trainer wrote this
    impressions    number of impressions; a correction of a label isn't one
    clicks         those of them that were clicked
    track, serving metrics of both
    change, error  log loss of the track over that of the serving one, less 1, and the standard error. The change of the
                   normalised entropy is the same, since both sides have the same clicks
    version        newest version of the track that gave a score
    """

    of: str = ""
    against: str = ""
    since_ms: int = 0
    at_ms: int = 0
    impressions: float = 0.0
    clicks: float = 0.0
    track: ServedSide = ServedSide()
    serving: ServedSide = ServedSide()
    change: float | None = None
    error: float | None = None
    version: int | None = None


class Finding(NamedTuple):
    """What a comparison means.

    verdict    as a code
    low, high  95 % interval of the change; None while it isn't known
    words      the verdict as a sentence
    """

    verdict: Literal["better", "worse", "undecided", "too_early", "nothing"]
    low: float | None
    high: float | None
    words: str


def finding_of(found: Comparison, name: str) -> Finding:
    """What the figures say of the track `name`."""
    if not found.impressions:
        return Finding("nothing", None, None, f"No impression that both tracks have scored has its label yet; {_ECHO}")
    if found.change is None or found.error is None or found.clicks < FIRST_CLICKS or not math.isfinite(found.error):
        return Finding("too_early", None, None, f"Too early: {found.clicks:,.0f} of the first {FIRST_CLICKS} clicks are there.")
    low, high = found.change - _Z95 * found.error, found.change + _Z95 * found.error
    measured = f"{found.change * 100:+.2f} % log loss (95 % interval {low * 100:+.2f} to {high * 100:+.2f} %)"
    measured += f" over {found.clicks:,.0f} clicks"
    if high < 0:
        return Finding("better", low, high, f"{name} predicts better than {found.against}: {measured}.")
    if low > 0:
        return Finding("worse", low, high, f"{name} predicts worse than {found.against}: {measured}.")
    return Finding("undecided", low, high, f"No difference between {name} and {found.against} is shown: {measured}.")


_ECHO = "impressions must carry the answers' `shadow_version` and `shadow`."
