"""What a minute of flipped labels costs: when the gate withholds, and how much of 1 - NE the served scores lose.

    .venv/bin/python bench/flipped.py                       # 300 impressions/s, CTR 3 %, 2 seeds: some 10 minutes
    .venv/bin/python bench/flipped.py --rate 2000 --warm-up-m 15 --after-m 10 --seeds 0

By event time, without Kafka: a simulated stream, labels as the join sends them (window 60 s), and the trainer's own parts,
`Training` with `Learner`, `Judge`, `Sanity` and `Anchors`. A delta every 250 ms goes to a `Predictor`, which checks its digest
and scores the impressions of the next 250 ms. A version every minute goes through the rules of the registry.

For one minute, every label of the impressions shown in it is flipped. There are these runs of each stream:

- `clean`: no label is flipped;
- `gate`: labels are flipped, and the gate does all by itself;
- `blocks`: the same without the check of score shifts, so that only blocks of clicks withhold;
- `rollback`: as `gate`, until an operator goes back `--operator-s` after the minute's end, to the version before it, and
  leaves the minute out (`--skip-time`). What comes then are the scores of a run that never learned that minute's labels, once
  it has learned the others again at 10,000 examples/s.

- `never`: the minute's labels are left out.

Lost is the share of the clean run's 1 - NE that a run doesn't have, of served scores and true labels, from the beginning of the
flipped minute on: in the first 10 minutes, and to the end. `never` says how much of it is lost by not having those labels at
all. The last line is one JSON object: `value` is the share of the 1 - NE of `never` that the better of `gate` and `rollback`
doesn't have over the whole time, in the worst seed, and `lost` has the shares of that of `clean`.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import torch
from prometheus_client import CollectorRegistry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report
from deploy.evaluate.labels import Labels, cut, held
from deploy.evaluate.stream import Stream, simulated
from deploy.feeding.simulation import Simulation
from model.learner import Learner
from model.predictor import Predictor
from model.settings import ModelSettings
from state import decisions
from state.gate import GateState
from state.manifest import Manifest
from state.registry import KeyedRecord, RegistryState, encode_record
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.trainer.anchors import Anchors
from stream.trainer.batching import BatchCutter
from stream.trainer.evaluation import Evaluation
from stream.trainer.examples import DecodedRun
from stream.trainer.judge import Judge
from stream.trainer.metrics import TrainerMetrics
from stream.trainer.sanity import Sanity
from stream.trainer.score_shift import ScoreShift
from stream.trainer.training import Training

WINDOW_MS = 60_000
LATENESS_MS = 1_000
FLIPPED_MS = 60_000
FIRST_WINDOW_MS = 600_000
FOLLOW_MS = 5_000
VERSION_MS = 60_000
GOOD_MS = 10_000
CATCH_UP_RATE = 10_000
NO_LIMIT = 1e9


@dataclass
class Turn:
    """The gate's flow, since an event time after the beginning of the flipped minute."""

    after_s: float
    flow: str
    reason: str


@dataclass
class Played:
    """The scores that were served (N,), NaN before the first version, and what the gate did."""

    scores: npt.NDArray[np.float32]
    turns: list[Turn] = field(default_factory=list)
    largest_shift: float = 0.0  # before the flipped minute, with an anchor


class Trainer:
    """A trainer with its gate, and a scorer that follows its deltas."""

    def __init__(self, stream: Stream, model: ModelSettings, snapshots: SnapshotSettings) -> None:
        self.stream, self.model, self.snapshots = stream, model, snapshots
        self.learner = Learner(stream.schema, model, device="cpu")
        self.judge = Judge(snapshots, GateState(line=1))
        self.shift = ScoreShift(self.learner)
        self.anchors = Anchors(self.judge, SnapshotStore(snapshots), snapshots, stream.schema, model, self.learner, "cpu")
        self.training = Training(
            self.learner,
            BatchCutter(model.batch_rows, {0: 0}),
            Evaluation(20_000),
            TrainerMetrics(CollectorRegistry()),
            max_batch_age_s=0.0,
            judge=self.judge,
            sanity=Sanity(self.judge, self.shift, snapshots),
            anchors=self.anchors,
        )
        self.registry = RegistryState()
        self._apply(decisions.take_epoch(self.registry, who="bench", now_ms=1).records)
        self.scorer: Predictor | None = None
        self._version = self._at = 0

    def learn(self, rows: npt.NDArray[np.int64], labels: Labels, part: slice) -> None:
        stream, count = self.stream, len(rows)
        self._at += count
        shown_ms = stream.shown_ms[rows]
        self.training.add(
            DecodedRun(
                partition=0,
                after=self._at,
                batch=stream.batch.take(rows),
                offsets=np.arange(self._at - count, self._at),
                labels=labels.labels[part],
                weights=np.ones(count, np.float32),
                impression_ms=shown_ms,
                reached_ms=shown_ms,
                served=np.full(count, np.nan, np.float32),
                versions=np.full(count, -1),
                deltas=np.full(count, -1),
                id_hashes=rows * 0x1F3D_5B79_9E37_79B9,
                letters=[],
                records=[],
                corrects=labels.corrects[part] if labels.corrects[part].any() else None,
            )
        )
        while self.training.step(0.0):
            pass

    def delta(self) -> None:
        """Take a delta to the scorer, if the gate lets it."""
        if self.scorer is None:
            return
        captured = self.training.capture_delta()
        if captured is not None:
            self.scorer.apply(self.scorer.prepare(captured.delta))

    def version(self, now_ms: int) -> None:
        """Announce a version; the first one is also the scorer's."""
        captured = self.training.capture_version()
        captured.frozen.close()
        if captured.delta is not None and self.scorer is not None:
            self.scorer.apply(self.scorer.prepare(captured.delta.delta))
        if self.scorer is None:
            self.scorer = Predictor.of(self.stream.schema, self.model, self.learner.serving_state(), device="cpu")
        self._version += 1
        position = captured.position
        manifest = Manifest(
            version=self._version,
            epoch=1,
            created_at_ms=position.at_ms,
            watermark_ms=position.watermark_ms,
            examples_seen=position.examples_seen,
            verdict=captured.verdict,
        )
        wall_ms = time.time_ns() // 1_000_000
        self._apply(
            decisions.announce(
                self.registry, manifest, settings=self.snapshots, who="bench", now_ms=wall_ms, operation=f"{now_ms}"
            ).records
        )

    def tag_good(self) -> None:
        """Tag what is due, as `decisions.due_good` finds it, which has been champion long enough by event time."""
        due = decisions.due_good(self.registry, time.time_ns() // 1_000_000 + GOOD_MS, self.snapshots)
        self._apply(decisions.tag_good(self.registry, due, now_ms=1).records)

    def _apply(self, records: Iterable[KeyedRecord]) -> None:
        for key, record in records:
            assert self.registry.apply(key.encode(), encode_record(record), 0) is None


async def play(stream: Stream, labels: Labels, model: ModelSettings, snapshots: SnapshotSettings, *, flip_ms: int) -> Played:
    """Learn all labels and serve all impressions."""
    trainer = Trainer(stream, model, snapshots)
    played = Played(np.full(len(stream), np.nan, np.float32))
    start_ms = int(labels.known_ms[0])
    delta_ms = start_ms + snapshots.delta_interval_ms
    version_ms, follow_ms = start_ms + 5_000, start_ms
    flow, served = "flowing", 0
    for part, now_ms in cut(labels, model.batch_rows, 500):
        if now_ms > stream.shown_ms[-1]:
            break  # what comes then are corrections alone, which no stream has
        while delta_ms <= now_ms:
            if delta_ms >= version_ms:
                trainer.version(version_ms)
                version_ms += VERSION_MS
            else:
                trainer.delta()
            if delta_ms >= follow_ms:
                trainer.tag_good()
                await trainer.anchors.follow(trainer.registry, trainer.training.watermark_ms)
                follow_ms += FOLLOW_MS
            verdict = trainer.judge.report()
            if verdict.flow != flow:
                flow = verdict.flow
                played.turns.append(Turn(round((delta_ms - flip_ms) / 1_000, 2), flow, verdict.reason))
            if delta_ms < flip_ms and trainer.judge.anchor is not None:
                played.largest_shift = max(played.largest_shift, trainer.shift.last or 0.0)
            delta_ms += snapshots.delta_interval_ms
            until = int(np.searchsorted(stream.shown_ms, delta_ms))
            if trainer.scorer is not None and until > served:
                played.scores[served:until] = trainer.scorer.predict(stream.batch.slice(served, until))
            served = max(served, until)
        trainer.learn(labels.rows[part], labels, part)
    return played


def flipped(stream: Stream, labels: Labels, flip_ms: int) -> Labels:
    """The labels of the impressions of one minute, turned round: what was a click is none, and each other one is."""
    shown_ms = stream.shown_ms[labels.rows]
    within = (shown_ms >= flip_ms) & (shown_ms < flip_ms + FLIPPED_MS)
    return Labels(labels.rows, np.where(within, 1 - labels.labels, labels.labels), labels.corrects, labels.known_ms)


def without(stream: Stream, labels: Labels, flip_ms: int) -> Labels:
    """The labels without those of one minute."""
    shown_ms = stream.shown_ms[labels.rows]
    kept = (shown_ms < flip_ms) | (shown_ms >= flip_ms + FLIPPED_MS)
    return Labels(labels.rows[kept], labels.labels[kept], labels.corrects[kept], labels.known_ms[kept])


def gain(scores: npt.NDArray[np.float32], clicked: npt.NDArray[np.bool_]) -> float:
    """1 - NE."""
    p = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    loss = -np.where(clicked, np.log(p), np.log1p(-p)).mean()
    base = clicked.mean()
    return float(1 - loss / -(base * np.log(base) + (1 - base) * np.log1p(-base)))


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--rate", default=300, show_default=True, help="Impressions a second.")
@click.option("--ctr", default=0.03, show_default=True, help="Mean click probability.")
@click.option("--warm-up-m", default=15, show_default=True, help="Minutes before the flipped minute.")
@click.option("--after-m", default=30, show_default=True, help="Minutes from its beginning to the end.")
@click.option("--hold-s", default=20, show_default=True, help="How long labels are held (`join.hold_ms`).")
@click.option("--operator-s", default=60, show_default=True, help="Seconds from the minute's end to the rollback.")
@click.option("--seeds", default="0,1", show_default=True, help="Seeds of the streams.")
@click.option("--limit", default=SnapshotSettings().score_shift_limit, show_default=True, help="`snapshots.score_shift_limit`.")
def main(rate: int, ctr: float, warm_up_m: int, after_m: int, hold_s: int, operator_s: int, seeds: str, limit: float) -> None:
    torch.set_num_threads(1)
    model = ModelSettings(hidden=(64, 32))
    settings = SnapshotSettings(url="/nowhere", score_shift_limit=limit)
    no_shift = settings.model_copy(update={"score_shift_limit": NO_LIMIT})
    lost: dict[str, list[tuple[float, float]]] = {}
    found: list[dict[str, object]] = []
    for seed in (int(each) for each in seeds.split(",")):
        simulation = Simulation(
            rate=rate,
            count=rate * 60 * (warm_up_m + after_m),
            ctr=ctr,
            delay="lognormal",
            delay_ms=10_000,
            new_items=0.5,
            new_item_share=0.1,
            seed=seed,
        )
        stream = simulated(simulation)
        labels = held(stream, WINDOW_MS, hold_s * 1_000, lateness_ms=LATENESS_MS)
        flip_ms = int(stream.shown_ms[0]) + warm_up_m * 60_000
        wrong = flipped(stream, labels, flip_ms)

        def run(labels: Labels, settings: SnapshotSettings = settings) -> Played:
            return asyncio.run(play(stream, labels, model, settings, flip_ms=flip_ms))  # noqa: B023

        runs = {"clean": run(labels), "gate": run(wrong), "blocks": run(wrong, no_shift)}
        relearned = rate * (60 + FLIPPED_MS / 1_000 + operator_s + hold_s)
        back_ms = flip_ms + FLIPPED_MS + operator_s * 1_000 + int(1_000 * relearned / CATCH_UP_RATE)
        never = run(without(stream, labels, flip_ms))
        scores = np.where(stream.shown_ms < back_ms, runs["gate"].scores, never.scores)
        runs |= {"rollback": Played(scores), "never": never}
        clicked = stream.labels(WINDOW_MS)
        # The last impressions have no scores in a run whose labels end before them.
        scored = np.isfinite([played.scores for played in runs.values()]).all(0)
        for name, played in runs.items():
            parts = []
            for until_ms in (flip_ms + FIRST_WINDOW_MS, int(stream.shown_ms[-1])):
                at = scored & (stream.shown_ms >= flip_ms) & (stream.shown_ms < until_ms)
                best = gain(runs["clean"].scores[at], clicked[at])
                parts.append(1 - gain(played.scores[at], clicked[at]) / best)
            lost.setdefault(name, []).append((parts[0], parts[1]))
            for turn in played.turns:
                click.echo(f"seed {seed} {name}: {turn.flow} at {turn.after_s:+.2f} s: {turn.reason}", err=True)
            click.echo(
                f"seed {seed} {name}: lost {parts[0]:.2%} in 10 minutes, {parts[1]:.2%} in {after_m}; "
                f"largest shift before {played.largest_shift:.3f}",
                err=True,
            )
        held_at = [turn.after_s for turn in runs["gate"].turns if turn.flow == "withheld" and turn.after_s >= 0]
        freed_at = [turn.after_s for turn in runs["gate"].turns if turn.flow == "flowing" and turn.after_s >= 0]
        found.append(
            {
                "seed": seed,
                "clean_gain": round(gain(runs["clean"].scores[at], clicked[at]), 4),
                "withheld_s": held_at[0] if held_at else None,
                "released_s": freed_at[-1] if freed_at else None,
                "largest_shift_before": round(runs["clean"].largest_shift, 3),
                "clean_holds": sum(turn.flow == "withheld" for turn in runs["clean"].turns),
            }
        )
    worst = {name: max(whole for _, whole in each) for name, each in lost.items()}
    # Of what `never` has, as that is what the better way could have at most.
    against_never = {
        name: max(1 - (1 - whole) / (1 - never) for (_, whole), (_, never) in zip(lost[name], lost["never"], strict=True))
        for name in ("gate", "rollback")
    }
    report(
        benchmark="flipped",
        value=round(min(against_never.values()), 4),
        unit="share of the 1 - NE of a run without the minute that is lost to the end, the worst seed of the better way",
        against_never={name: round(share, 4) for name, share in against_never.items()},
        rate=rate,
        ctr=ctr,
        warm_up_m=warm_up_m,
        after_m=after_m,
        hold_s=hold_s,
        operator_s=operator_s,
        score_shift_limit=limit,
        lost={name: round(worst[name], 4) for name in lost},
        lost_10_minutes={name: round(max(first for first, _ in each), 4) for name, each in lost.items()},
        lost_median={name: round(statistics.median(whole for _, whole in each), 4) for name, each in lost.items()},
        seeds=found,
    )


if __name__ == "__main__":
    main()
