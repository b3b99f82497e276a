"""What is captured between two batches: for a delta, for a version. Everything in one capture is of the same moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from model.frozen import FrozenModel
from model.rows import ModelDelta
from state.gate_report import GateReport
from stream.trainer.evaluation import FrozenEvaluation

__all__ = ["CapturedDelta", "CapturedVersion", "Position"]


@dataclass(frozen=True, slots=True)
class Position:
    """How far training has come.

    offsets        by partition of `examples`: the next offset to train
    watermark_ms   event time of the newest impression trained
    examples_seen  examples in the weights
    negative_rate  share of negatives that the weights were learned from
    letters        dead letters, counted from the first one, that must be written before `offsets` are published
    at_ms          wall clock, ms since epoch
    """

    offsets: Mapping[int, int]
    watermark_ms: int
    examples_seen: int
    negative_rate: float
    letters: int
    at_ms: int


@dataclass(frozen=True, slots=True)
class CapturedDelta:
    """What changed since the delta before, and how far training had come."""

    delta: ModelDelta
    position: Position


@dataclass(frozen=True, slots=True)
class CapturedVersion:
    """Everything that a version holds.

    frozen       the model; its rows are copied while training goes on, so it must be closed when the version is written
    bookkeeping  what the trainer keeps besides the model (`stream.trainer.bookkeeping`)
    evaluation   the scores so far
    verdict      the gate's report; None without a gate
    delta        what brings scorers to this version; None when nothing changed since the last delta, or deltas are withheld
    on_chain     whether the version is a point of the chain; False while deltas are withheld
    digest       of the serving weights (`model.digest`); only right when it is a point of the chain
    """

    frozen: FrozenModel
    bookkeeping: Mapping[str, torch.Tensor]
    evaluation: FrozenEvaluation
    verdict: GateReport | None
    position: Position
    delta: CapturedDelta | None
    on_chain: bool
    digest: int
