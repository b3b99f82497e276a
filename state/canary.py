"""The record of a shadow or a canary: a candidate version that gets a share of the requests beside the champion.

It is one record of the topic `snapshots`, under `CANARY_KEY`. The slash in the name keeps readers that don't know the record
from taking it for an alias. The record stays when the trial has ended, with its outcome, until the next trial replaces it.

`state.canary_running` says whether a trial goes on, `state.canary_rule` when it ends, `state.canary_decisions` changes the
record.
"""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = [
    "CANARY_KEY",
    "HASH_SPACE",
    "Canary",
    "CanaryOutcome",
    "Mode",
    "Progress",
    "Side",
    "Thresholds",
]

CANARY_KEY = "alias/canary/current"

HASH_SPACE = "canary"
"""Space of the hash (`model.hashing`) of a request's id. A request is in the share if the hash, read as an unsigned number, is
below share × 2**64. The hash doesn't depend on the version, so a larger share contains every smaller one."""

Mode = Literal["shadow", "canary"]
CanaryOutcome = Literal["", "promoted", "taken_back", "undecided", "stopped"]


class Thresholds(msgspec.Struct, frozen=True, kw_only=True):
    """When a trial ends by itself (`state.canary_rule`). `docs/experiments.md` has the error rates of the defaults.

    clicks              least clicks of the candidate's share before it is promoted
    loss_margin         part by which the log loss may be worse than the champion's
    calibration_margin  how far from 1 the ratio of predictions to clicks may be, if the champion's isn't further
    ctr_margin          part by which the candidate's click rate may be lower than the champion's; of a canary only
    limit_ms            time after which a trial that isn't decided is taken back
    """

    clicks: int = 500
    loss_margin: float = 0.01
    calibration_margin: float = 0.1
    ctr_margin: float = 0.05
    limit_ms: int = 86_400_000


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """Served metrics of one side. NaN would not be JSON: a figure that isn't known is None."""

    examples: float = 0.0
    clicks: float = 0.0
    log_loss: float | None = None
    log_loss_error: float | None = None
    calibration: float | None = None


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """What the trainer knows of a trial.

    change, error  log loss of the candidate against the champion's, as a part of it, and the standard error
    verdict        what the rule says of it, in words
    """

    at_ms: int
    candidate: Side = Side()
    champion: Side = Side()
    change: float | None = None
    error: float | None = None
    verdict: str = ""


class Canary(msgspec.Struct, frozen=True, kw_only=True):
    """A trial, and how it ended.

    mode                 shadow: the champion answers, the candidate's scores are noted beside; canary: the candidate answers
    share                part of the requests that the candidate gets
    at_ms, who, reason   when it began, who began it, and why
    operation            random id of the trial. The trainer's evidence belongs to the trial of this id
    hold_operation       operation that had last held auto-promotion, or let it go on, when the trial began
    outcome              empty while it runs
    ended_…              how it ended; `ended_operation` is the random id of the change
    progress             what the trainer knew last; None before it has seen an example
    """

    mode: Mode = "shadow"
    version: int = 0
    share: float = 0.0
    at_ms: int = 0
    who: str = ""
    reason: str = ""
    operation: str = ""
    hold_operation: str = ""
    thresholds: Thresholds = Thresholds()
    outcome: CanaryOutcome = ""
    ended_at_ms: int = 0
    ended_who: str = ""
    ended_reason: str = ""
    ended_operation: str = ""
    progress: Progress | None = None

    @property
    def runs(self) -> bool:
        """Whether the record says that the trial runs. `state.canary_running` also asks whether something else has ended it."""
        return self.version > 0 and not self.outcome
