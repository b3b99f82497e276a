"""Several runs of one data set, each with its own settings, over one or more seeds, judged on the same impressions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from deploy.errors import EvaluationError
from deploy.evaluate import groups as grouped
from deploy.evaluate.figures import Figures, Judged, blocks_of, estimate
from deploy.evaluate.groups import Group
from deploy.evaluate.history import HistoryFigures, history_figures
from deploy.evaluate.labels import Labels, joined
from deploy.evaluate.play import Played, Serving, play
from deploy.evaluate.stream import Int64s, Stream
from deploy.settings import Settings
from model.learner import Learner

__all__ = ["Evaluated", "Judgement", "Judging", "Line", "Plan", "Progress", "Reads", "evaluate"]

Progress = Callable[[str, int, int], None]
"""Called with what runs, the number of labels learned, and their number in all."""

LEAST_MEASURED = 100
"""Impressions to judge, at least: with fewer no figure says anything."""


class Reads(Protocol):
    """Reads the data set for the settings of a run."""

    def __call__(self, settings: Settings, permuted: str | None = None) -> Stream: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """One run: its name, and its settings, whose `features` are those of the data set where the user's settings name none."""

    name: str
    settings: Settings


@dataclass(frozen=True, slots=True)
class Judging:
    """How runs are made and judged.

    start         number of the first impression that is judged; those before it are only learned
    seeds         runs of each plan, whose `model.seed` counts up
    serving       ways to serve; each makes a line of its own
    batch_age_ms  how long a batch waits for more labels, event time; None: until it is full
    permute       fields whose values are exchanged when the first plan's model scores; each makes a line of its own
    history       whether to show what row history of the first plan says, which has to have it
    by            fields whose top values are judged alone
    top           number of these values
    """

    start: int
    seeds: int = 1
    serving: tuple[Serving, ...] = (Serving(),)
    batch_age_ms: int | None = None
    permute: tuple[str, ...] = ()
    history: bool = False
    by: tuple[str, ...] = ()
    top: int = 10


@dataclass(frozen=True, slots=True)
class Judgement:
    """Figures of one group of impressions, one for each seed."""

    group: Group
    figures: list[Figures]


@dataclass(slots=True)
class Line:
    """What one way to serve one plan has given, with a figure for each seed.

    weights_age_s        mean time from the capture of the weights to the impression that they answered
    served, progressive  over all impressions that are judged
    pieces               over event time
    deciles              by rising score
    by                   by field, the top values
    rare                 by field, the rare values
    scores               (seeds, N)
    """

    name: str
    plan: Plan
    serving: Serving
    weights_age_s: float
    scores: npt.NDArray[np.float32]
    served: list[Figures]
    progressive: list[Figures]
    learned: int
    learn_s: float
    seconds: float
    set_aside: int
    table_rows: int
    pieces: list[Judgement]
    deciles: list[Judgement]
    by: dict[str, list[Judgement]]
    rare: list[Judgement]

    @property
    def rows_per_s(self) -> float:
        """Labels learned in a second, scoring not counted."""
        return self.learned / self.learn_s if self.learn_s > 0 else math.nan


@dataclass(slots=True)
class _Pass:
    """One pass of a plan with one seed."""

    plan: Plan
    labels: Labels
    rates: float
    played: Played
    seconds: float


class _Run(NamedTuple):
    """What becomes a line: a pass for each seed, and which of the passes' ways to serve it is."""

    name: str
    passes: list[_Pass]
    number: int
    serving: Serving


@dataclass(frozen=True, slots=True)
class Evaluated:
    """All lines, the impressions that were judged, the base's stream, and what its row history says, by field."""

    lines: list[Line]
    measured: Int64s
    stream: Stream
    history: list[HistoryFigures] = field(default_factory=list)


def evaluate(plans: Sequence[Plan], read: Reads, judging: Judging, on_progress: Progress | None = None) -> Evaluated:
    """Run every plan with every seed, and judge all of them on the impressions that all of them scored.

    The first plan is the base: its labels and its fields make the groups.

    Raises:
        EvaluationError: too few impressions are judged, or a field isn't there.
    """
    base = read(plans[0].settings)
    _require(len(base) - judging.start, base)
    _require_fields(plans[0], base, judging)
    others = replace(judging, permute=(), history=False)
    served_by = [judging if index == 0 else others for index in range(len(plans))]
    runs: list[_Run] = []
    stream, streams_of = base, plans[0].settings
    for plan, each in zip(plans, served_by, strict=True):
        if plan.settings.features != streams_of.features or plan.settings.join != streams_of.join:
            stream, streams_of = read(plan.settings), plan.settings
        ways = [*each.serving, *_permuted(each, read, plan)]
        passes = [_run(stream, plan, seed, ways, judging, on_progress) for seed in range(judging.seeds)]
        runs += [_Run(_named(plan, way, each), passes, number, way) for number, way in enumerate(ways)]
    scored = np.ones(len(base), np.bool_)
    for run in runs:
        for one in run.passes:
            scored &= ~np.isnan(one.played.scores[run.number])
    measured = np.flatnonzero(scored & (np.arange(len(base)) >= judging.start))
    _require(len(measured), base)
    clicked = base.labels(plans[0].settings.join.window_ms)
    judge = _Judge(base, measured, clicked, judging)
    lifts = runs[0].passes[0].played.lifts
    history = [] if lifts is None else list(history_figures(base.schema, lifts, measured, clicked))
    return Evaluated([judge.line(each) for each in runs], measured, base, history)


def _require(measured: int, stream: Stream) -> None:
    if measured < LEAST_MEASURED:
        raise EvaluationError(
            f"{stream.name}: expected at least {LEAST_MEASURED} impressions to judge, found {measured} of {len(stream)}. Read "
            "more of the data set (--until, --limit), judge from an earlier one on (--from), or serve sooner (--serve-every)."
        )


def _require_fields(plan: Plan, base: Stream, judging: Judging) -> None:
    """Reject unknown fields before anything is learned."""
    for name in judging.by:
        grouped.column_of(base, name)
    specs = {spec.name: spec for spec in plan.settings.features.fields}
    for name in judging.permute:
        spec = specs.get(name)
        if spec is None:
            raise EvaluationError(
                f"--permute: expected one of the fields ({', '.join(specs)}), found {name!r}. Correct the option."
            )
        if not spec.is_sent:
            made_of = ", ".join(spec.of) or "the time of the impression"
            raise EvaluationError(
                f"--permute: expected a field whose values impressions carry, found {name!r}, which is made of {made_of}. "
                f"Use --without {name}" + (", or permute the fields that it is made of." if spec.of else ".")
            )
    if judging.history and not plan.settings.model.row_history:
        raise EvaluationError(
            "--history: expected a first run with row history, found model.row_history off. Add --set model.row_history=true."
        )


def _permuted(judging: Judging, read: Reads, plan: Plan) -> Iterable[Serving]:
    first = judging.serving[0]
    for name in judging.permute:
        yield replace(first, name=f"permuted {name}", batch=read(plan.settings, name).batch)


def _named(plan: Plan, way: Serving, judging: Judging) -> str:
    if way.batch is not None:
        return way.name
    return plan.name if len(judging.serving) == 1 else f"{plan.name}, {way.name}"


def _run(
    stream: Stream, plan: Plan, seed: int, ways: Sequence[Serving], judging: Judging, on_progress: Progress | None
) -> _Pass:
    began = time.perf_counter()
    settings = plan.settings
    model = settings.model.model_copy(update={"seed": settings.model.seed + seed})
    labels = joined(stream, settings.join)
    if not len(labels):
        raise EvaluationError(
            f"{stream.name}: expected labels to learn, found none: nothing was clicked, and join.negative_rate "
            f"({settings.join.negative_rate:g}) left out all negatives. Raise it."
        )
    if settings.trainer.threads:
        torch.set_num_threads(settings.trainer.threads)
    learner = Learner(settings.features, model, table=settings.table, device=settings.trainer.device)
    about = plan.name if judging.seeds == 1 else f"{plan.name}, seed {model.seed}"
    played = play(
        stream,
        labels,
        learner,
        serving=ways,
        batch_age_ms=judging.batch_age_ms,
        negative_rate=settings.join.negative_rate,
        history=judging.history and seed == 0,
        on_progress=None if on_progress is None else lambda done: on_progress(about, done, len(labels)),
    )
    return _Pass(plan, labels, settings.join.negative_rate, played, time.perf_counter() - began)


class _Judge:
    """Judges runs on the same impressions and in the same groups."""

    def __init__(self, base: Stream, measured: Int64s, clicked: npt.NDArray[np.bool_], judging: Judging) -> None:
        self._measured, self._clicked, self._shown_ms = measured, clicked, base.shown_ms
        self._block = np.full(len(base), -1, np.int64)
        self._block[measured] = blocks_of(len(measured))
        self._blocks = int(self._block.max()) + 1
        self._pieces = grouped.pieces_of_time(measured)
        self._by = {field: grouped.by_value(base, field, measured, judging.top) for field in judging.by}
        self._rare = list(grouped.rare(base, measured))

    def line(self, run: _Run) -> Line:
        passes, measured = run.passes, self._measured
        scores = np.stack([one.played.scores[run.number] for one in passes])
        first = passes[0]
        ages_ms = self._shown_ms[measured] - first.played.captured_ms[run.number][measured]
        deciles = [grouped.deciles(each, measured) for each in scores]
        return Line(
            name=run.name,
            plan=first.plan,
            serving=run.serving,
            weights_age_s=float(ages_ms.mean()) / 1_000,
            scores=scores,
            served=[self._served(each, measured) for each in scores],
            progressive=[self._progressive(one) for one in passes],
            learned=sum(one.played.learned for one in passes),
            learn_s=sum(one.played.learn_s for one in passes),
            seconds=sum(one.seconds for one in passes),
            set_aside=sum(one.played.set_aside for one in passes),
            table_rows=first.played.table_rows,
            pieces=[self._judged(group, scores) for group in self._pieces],
            deciles=[
                Judgement(own[0], [self._served(each, group.rows) for each, group in zip(scores, own, strict=True)])
                for own in zip(*deciles, strict=True)
            ],
            by={field: [self._judged(group, scores) for group in groups] for field, groups in self._by.items()},
            rare=[self._judged(group, scores) for group in self._rare],
        )

    def _judged(self, group: Group, scores: npt.NDArray[np.float32]) -> Judgement:
        return Judgement(group, [self._served(each, group.rows) for each in scores])

    def _served(self, scores: npt.NDArray[np.float32], rows: Int64s) -> Figures:
        labels = self._clicked[rows].astype(np.float64)
        judged = Judged(scores[rows].astype(np.float64), labels, np.ones(len(rows)), None, self._block[rows])
        return estimate(judged, self._blocks)

    def _progressive(self, one: _Pass) -> Figures:
        labels, scores = one.labels, one.played.progressive
        there = (self._block[labels.rows] >= 0) & ~np.isnan(scores)
        weights = np.where((labels.labels > 0.5) | labels.corrects, 1.0, 1.0 / one.rates)[there]
        corrects = labels.corrects[there]
        judged = Judged(
            scores[there].astype(np.float64),
            labels.labels[there].astype(np.float64),
            weights,
            corrects if corrects.any() else None,
            self._block[labels.rows[there]],
        )
        return estimate(judged, self._blocks)
