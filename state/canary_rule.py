"""When a shadow or canary ends: promoted, taken back, or taken back undecided. Pure: no Kafka, no clock.

| the candidate is | if |
| --- | --- |
| taken back | its log loss is worse than the champion's by more than `loss_margin`, at 4 standard errors |
| taken back | its calibration is further from 1 than `calibration_margin` and the champion's, at 4 standard errors |
| taken back | it is a canary whose click rate is lower by more than `ctr_margin`, at 4 standard errors |
| promoted | it has `clicks` clicks, its log loss is at most `loss_margin` worse at 3 standard errors, the rest is in bounds |
| taken back, undecided | `limit_ms` have passed |

The rule looks at the evidence after every stretch of clicks, some hundred times in a trial. Looking often makes chance
decisions more frequent than the normal distribution says, which is why the limits are 4 and 3 standard errors and not 2.
`docs/experiments.md` has the rates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from state.canary import Canary, CanaryOutcome, Progress
from state.canary_evidence import Difference, Evidence

__all__ = ["Verdict", "judge_canary"]

TAKE_BACK_ERRORS = 4.0
PROMOTE_ERRORS = 3.0
# Clicks of the candidate from which it may be taken back. With fewer, standard errors are themselves uncertain.
FIRST_LOOK_CLICKS = 100


class Verdict(NamedTuple):
    """How the trial ends now, and why; an empty outcome while it goes on. `progress` is what is known."""

    outcome: CanaryOutcome
    reason: str
    progress: Progress


def judge_canary(canary: Canary, evidence: Evidence, now_ms: int) -> Verdict:
    """Decide whether a trial ends, by the table at the top of this module."""
    found = evidence.difference()
    outcome, reason = _decide(canary, evidence, found, now_ms)
    known = math.isfinite(found.error)
    progress = Progress(
        at_ms=now_ms,
        candidate=evidence.candidate.side(),
        champion=evidence.champion.side(),
        change=found.change if known else None,
        error=found.error if known else None,
        verdict=reason,
    )
    return Verdict(outcome, reason, progress)


class _Decision(NamedTuple):
    outcome: CanaryOutcome
    reason: str


def _decide(canary: Canary, evidence: Evidence, found: Difference, now_ms: int) -> _Decision:
    limits, clicks = canary.thresholds, evidence.clicks
    measured = f"log loss {found.change * 100:+.2f} % ± {found.error * 100:.2f} % over {clicks:,.0f} clicks"
    if not math.isfinite(found.error):
        measured = f"{evidence.candidate.clicks:,.0f} clicks"
    calibration, error = evidence.candidate.calibration, evidence.candidate.calibration_error
    off = abs(calibration - 1)
    allowed_off = max(limits.calibration_margin, _or_zero(abs(evidence.champion.calibration - 1)))
    rate_change, rate_error = _rate_change(evidence)
    is_canary = canary.mode == "canary"
    if clicks >= FIRST_LOOK_CLICKS:
        if found.change - TAKE_BACK_ERRORS * found.error > limits.loss_margin:
            return _Decision("taken_back", f"{measured} (allowed {limits.loss_margin * 100:+.1f} %)")
        if off - TAKE_BACK_ERRORS * error > allowed_off:
            return _Decision(
                "taken_back",
                f"calibration {calibration:.3f} ± {error:.3f} (allowed {1 - allowed_off:.3f} to {1 + allowed_off:.3f}); "
                f"{measured}",
            )
        if is_canary and -rate_change - TAKE_BACK_ERRORS * rate_error > limits.ctr_margin:
            return _Decision(
                "taken_back",
                f"click rate {rate_change * 100:+.1f} % ± {rate_error * 100:.1f} % "
                f"(allowed {-limits.ctr_margin * 100:+.1f} %); {measured}",
            )
    waits = ""
    if clicks < limits.clicks:
        waits = f"{limits.clicks - clicks:,.0f} more clicks are needed"
    elif found.change + PROMOTE_ERRORS * found.error > limits.loss_margin:
        waits = f"not certain yet that it is at most {limits.loss_margin * 100:g} % worse"
    elif off > allowed_off:
        waits = f"its calibration is {calibration:.3f}"
    elif is_canary and rate_change < -limits.ctr_margin:
        waits = f"its click rate is {rate_change * 100:+.1f} % ± {rate_error * 100:.1f} %"
    if not waits:
        return _Decision("promoted", f"{measured}, calibration {calibration:.3f}")
    if now_ms - canary.at_ms >= limits.limit_ms:
        return _Decision("undecided", f"the time is over: {measured}, {waits}")
    return _Decision("", f"{measured}, {waits}")


class _Relative(NamedTuple):
    change: float
    error: float


def _rate_change(evidence: Evidence) -> _Relative:
    """The candidate's click rate against the champion's; the error by the numbers of clicks."""
    candidate, champion = evidence.candidate, evidence.champion
    if candidate.clicks <= 0 or champion.clicks <= 0:
        return _Relative(0.0, math.inf)
    ratio = candidate.click_rate / champion.click_rate
    parts = (max(side.click_squares, 0.0) / side.clicks**2 for side in (candidate, champion))
    return _Relative(ratio - 1, ratio * math.sqrt(sum(parts)))


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
