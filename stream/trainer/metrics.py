"""The trainer's metrics, with names and units as Prometheus recommends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from model.metrics import Metrics
from state.gate_report import GateReport
from state.manifest import Manifest
from stream.trainer.calibration import GroupCalibration
from stream.trainer.columns import ExampleColumns
from stream.trainer.drift import Drift
from stream.trainer.evaluation import Report

__all__ = ["StandbyMetrics", "TrainerMetrics"]

# Clicks needed to judge served calibration: with 100 its standard error is 10 %, half the width of the default band.
SERVED_CLICKS = 100
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class TrainerMetrics:
    """Registered once in a worker. Counters may be used in any thread."""

    def __init__(self, prometheus: CollectorRegistry) -> None:
        self.examples = Counter("headrace_trainer_examples", "Examples learned, by label.", ["label"], registry=prometheus)
        self.batches = Counter("headrace_trainer_batches", "Updates of the model.", registry=prometheus)
        self.not_finite_batches = Counter(
            "headrace_trainer_not_finite_batches",
            "Batches whose update was not finite, so that some of their examples were set aside.",
            registry=prometheus,
        )
        self.dead_letters = Counter(
            "headrace_trainer_dead_letters",
            "Examples that became dead letters, by reason; of a track that does not serve, those that it passed over.",
            ["reason"],
            registry=prometheus,
        )
        self.skipped_examples = Counter(
            "headrace_trainer_skipped_examples",
            "Examples that were not learned because they are in a range that was left out when the trainer was sent back.",
            registry=prometheus,
        )
        self.past_examples = Counter(
            "headrace_trainer_past_examples",
            "Examples that were not learned because the model knows them from history (`headrace bootstrap`).",
            registry=prometheus,
        )
        self.served_alarm = Gauge(
            "headrace_trainer_served_alarm",
            "1 while served scores are out of their band in several blocks of clicks in a row (snapshots.auto_rollback).",
            registry=prometheus,
        )
        self.own_rollbacks = Counter(
            "headrace_trainer_own_rollbacks",
            "Rollbacks that the trainer did by itself, because served scores were out of their band.",
            registry=prometheus,
        )
        self.rewinds = Counter(
            "headrace_trainer_rewinds", "Times that this trainer went back to an older version.", registry=prometheus
        )
        self.learn_seconds = Histogram(
            "headrace_trainer_learn_seconds", "Time to score and learn one batch.", registry=prometheus, buckets=_SECONDS
        )
        self.decode_seconds = Histogram(
            "headrace_trainer_decode_seconds", "Time to decode one run.", registry=prometheus, buckets=_SECONDS
        )
        self.queue = Gauge(
            "headrace_trainer_queue_runs",
            "Runs taken from Kafka that the training thread does not have yet.",
            registry=prometheus,
        )
        self.lag = Gauge(
            "headrace_trainer_lag_records",
            "Records of a partition that are not trained yet.",
            ["partition"],
            registry=prometheus,
        )
        self.watermark = Gauge(
            "headrace_trainer_watermark_timestamp_seconds", "Event time of the newest impression trained.", registry=prometheus
        )
        # One gauge for each figure and kind: Prometheus advises against mixing kinds under one name.
        self.scores = {
            (kind, field): Gauge(f"headrace_trainer_{kind}_{name}", f"{help}, {meaning}.", ["scope"], registry=prometheus)
            for kind, meaning in (
                ("progressive", "of the model's score just before it learned the example, with features as they were sent"),
                ("served", "of the score that the impression was shown with, for which fields with serve_as had that value"),
            )
            for field, name, help in (
                ("examples", "examples", "Examples counted"),
                ("log_loss", "log_loss", "Mean log loss"),
                ("auc", "auc", "Area under the ROC curve"),
                ("normalised_entropy", "normalised_entropy", "Log loss over the log loss of the base rate"),
                ("calibration", "calibration", "Expected clicks over actual clicks"),
            )
        }
        self.snapshots = Counter(
            "headrace_trainer_snapshots",
            "Versions, by outcome: promoted, candidate, or failed.",
            ["outcome"],
            registry=prometheus,
        )
        self.snapshot_seconds = Histogram(
            "headrace_trainer_snapshot_seconds",
            "Time of each stage of a version: capture (training waits), write, announce; of a delta: capture_delta (training "
            "waits), delta (to its commit).",
            ["stage"],
            registry=prometheus,
            buckets=_SECONDS,
        )
        self.deltas = Counter(
            "headrace_trainer_deltas",
            "Deltas, by outcome: sent; failed attempts, which are tried again; withheld because the weights were not sane.",
            ["outcome"],
            registry=prometheus,
        )
        self.delta_rows = Counter("headrace_trainer_delta_rows", "Rows of weights sent in deltas.", registry=prometheus)
        self.delta_bytes = Counter("headrace_trainer_delta_bytes", "Bytes sent in deltas.", registry=prometheus)
        self.delta_time = Gauge(
            "headrace_trainer_delta_timestamp_seconds", "Time at which the newest delta was committed.", registry=prometheus
        )
        self.deleted_versions = Counter(
            "headrace_trainer_deleted_versions", "Versions deleted because nothing needs them any more.", registry=prometheus
        )
        self.snapshot_version = Gauge("headrace_trainer_snapshot_version", "Newest version announced.", registry=prometheus)
        self.snapshot_bytes = Gauge("headrace_trainer_snapshot_bytes", "Size of the newest version.", registry=prometheus)
        self.snapshot_time = Gauge(
            "headrace_trainer_snapshot_timestamp_seconds", "Time at which the newest version was captured.", registry=prometheus
        )
        self.skew_checked = Counter(
            "headrace_trainer_skew_checked", "Served scores that were computed again to find skew.", registry=prometheus
        )
        self.skew_failures = Counter(
            "headrace_trainer_skew_failures",
            "Versions that could not be read to compute served scores again.",
            registry=prometheus,
        )
        self.skew_examples = Gauge(
            "headrace_trainer_skew_examples", "Served scores that count for the figures of skew.", registry=prometheus
        )
        self.skew_mean = Gauge(
            "headrace_trainer_skew_logit_mean", "Mean absolute difference of served and recomputed logits.", registry=prometheus
        )
        self.skew_p99 = Gauge(
            "headrace_trainer_skew_logit_p99",
            "99th percentile of the absolute difference of served and recomputed logits.",
            registry=prometheus,
        )
        self.skew_share = Gauge(
            "headrace_trainer_skew_ratio",
            "Share of the compared scores whose logit differs by more than 0.02.",
            registry=prometheus,
        )
        self.promoted_version = Gauge(
            "headrace_trainer_promoted_version", "Newest version that was promoted when it was announced.", registry=prometheus
        )
        self.promoted_time = Gauge(
            "headrace_trainer_promoted_timestamp_seconds",
            "Time at which a version was last promoted when it was announced.",
            registry=prometheus,
        )

        self.gate_flowing = Gauge(
            "headrace_trainer_gate_flowing",
            "1 while new versions may become champion, 0 while they are withheld.",
            registry=prometheus,
        )
        self.gate_loss_change = Gauge(
            "headrace_trainer_gate_loss_change",
            "Log loss of the live weights over the anchor's on the same examples, less 1, in the newest blocks judged.",
            registry=prometheus,
        )
        self.gate_clicks = Gauge(
            "headrace_trainer_gate_clicks", "Clicks in the blocks judged since the gate last turned.", registry=prometheus
        )
        self.gate_anchor = Gauge(
            "headrace_trainer_gate_anchor_version",
            "Version that the live weights are compared with, 0 when there is none.",
            registry=prometheus,
        )
        self.anchor_rows = Gauge(
            "headrace_trainer_gate_saved_rows",
            "Rows of weights held for the gate because they have changed since the anchor, or since the next one.",
            registry=prometheus,
        )
        self.score_shift = Gauge(
            "headrace_trainer_score_shift",
            "Mean absolute change of recent requests' logits within up to 2,000 examples. NaN while it isn't measured.",
            registry=prometheus,
        )
        self.gate_doubt = Gauge(
            "headrace_trainer_gate_doubt",
            "1 while deltas are withheld because one of them alone wasn't sane, whatever the clicks say.",
            registry=prometheus,
        )
        self.null_rate_change = Gauge(
            "headrace_trainer_null_rate_change",
            "Largest change of a feature's share of nulls, from the usual to the newest 1,000 examples.",
            registry=prometheus,
        )
        self.score_distribution_change = Gauge(
            "headrace_trainer_score_distribution_change",
            "Population stability index of the newest 1,000 scores against the usual ones, without what clicks explain.",
            registry=prometheus,
        )
        self.click_rate_factor = Gauge(
            "headrace_trainer_click_rate_factor",
            "Click rate of the newest 1,000 examples over the usual one.",
            registry=prometheus,
        )
        self.click_rate_alarm = Gauge(
            "headrace_trainer_click_rate_alarm",
            "1 while the click rate has changed abruptly by more than snapshots.drift_click_alarm, and not by chance.",
            registry=prometheus,
        )
        self.score_spread = Gauge(
            "headrace_trainer_score_spread",
            "Standard deviation of the logits of the newest 1,000 scores or so.",
            registry=prometheus,
        )
        self.behind = Gauge(
            "headrace_trainer_versions_since_champion",
            "Announced versions that are newer than the champion.",
            registry=prometheus,
        )
        self.served_out_of_band = Gauge(
            "headrace_trainer_served_out_of_band",
            "1 while the calibration of served scores is outside snapshots.served_calibration_band, judged from 100 clicks on.",
            registry=prometheus,
        )

        self._groups = {
            field: Gauge(f"headrace_trainer_group_{name}", help, ["field", "value"], registry=prometheus)
            for field, name, help in (
                (
                    "calibration",
                    "calibration",
                    "Expected clicks over actual clicks of served scores, of settled impressions: by decile of the score, and "
                    "by top values of trainer.calibration_fields.",
                ),
                ("clicks", "clicks", "Clicks from which the calibration of the group is computed."),
            )
        }
        self._shown_groups: set[tuple[str, str]] = set()
        self.groups_off = Gauge(
            "headrace_trainer_groups_off",
            "Groups whose calibration is away from 1 by more than 5 % and by more than 3 standard errors.",
            registry=prometheus,
        )

    def watch_queue(self, waiting: Callable[[], int]) -> None:
        """Set the function that gives the length of the queue at each scrape."""
        self.queue.set_function(waiting)

    def learned(self, batch: ExampleColumns, seconds: float) -> None:
        """Count one batch."""
        positives = int(batch.labels.sum())
        self.examples.labels("1").inc(positives)
        self.examples.labels("0").inc(len(batch) - positives)
        self.batches.inc()
        self.learn_seconds.observe(seconds)

    def report(self, report: Report) -> None:
        """Set the gauges of the evaluation."""
        for (kind, scope), metrics in report.items():
            for (gauge_kind, field), gauge in self.scores.items():
                if gauge_kind == kind:
                    gauge.labels(scope).set(getattr(metrics, field))

    def calibrated(self, groups: Sequence[GroupCalibration]) -> None:
        """Set the gauges of calibration by group. Groups that are no longer among them lose theirs."""
        shown = {(group.field, group.value) for group in groups}
        for labels in self._shown_groups - shown:
            for gauge in self._groups.values():
                gauge.remove(*labels)
        self._shown_groups = shown
        for group in groups:
            for field, gauge in self._groups.items():
                gauge.labels(group.field, group.value).set(getattr(group, field))
        self.groups_off.set(sum(group.off for group in groups))

    def skewed(self, examples: int, mean: float, p99: float, share: float) -> None:
        """Set the gauges of skew."""
        self.skew_examples.set(examples)
        self.skew_mean.set(mean)
        self.skew_p99.set(p99)
        self.skew_share.set(share)

    def judged(self, verdict: GateReport, versions_since_champion: int) -> None:
        """Set the gauges of the gate."""
        self.gate_flowing.set(verdict.flow == "flowing")
        self.gate_loss_change.set(math.nan if verdict.loss_change is None else verdict.loss_change)
        self.gate_clicks.set(verdict.compared_clicks)
        self.gate_anchor.set(verdict.anchor or 0)
        self.score_spread.set(math.nan if verdict.spread is None else verdict.spread)
        self.behind.set(versions_since_champion)

    def checked(self, score_shift: float | None, *, in_doubt: bool) -> None:
        """Set the gauges of the checks of a delta."""
        self.score_shift.set(math.nan if score_shift is None else score_shift)
        self.gate_doubt.set(in_doubt)

    def drifted(self, drift: Drift) -> None:
        """Set the gauges of drift."""
        self.null_rate_change.set(drift.watch.null_change)
        self.score_distribution_change.set(drift.watch.score_change)
        self.click_rate_factor.set(drift.watch.click_factor)
        self.click_rate_alarm.set(bool(drift.alarm))

    def served(self, metrics: Metrics, band: tuple[float, float]) -> None:
        """Set whether the calibration of served scores is out of the band."""
        enough = metrics.positives >= SERVED_CLICKS
        self.served_out_of_band.set(enough and not band[0] <= metrics.calibration <= band[1])

    def delta_sent(self, rows: int, size: int, seconds: float) -> None:
        """Count a delta that is in the log."""
        self.deltas.labels("sent").inc()
        self.delta_rows.inc(rows)
        self.delta_bytes.inc(size)
        self.snapshot_seconds.labels("delta").observe(seconds)
        self.delta_time.set_to_current_time()

    def announced(self, manifest: Manifest, *, promoted: bool) -> None:
        """Count a version that is in the registry."""
        self.snapshots.labels("promoted" if promoted else "candidate").inc()
        self.snapshot_version.set(manifest.version)
        self.snapshot_bytes.set(manifest.size)
        self.snapshot_time.set(manifest.created_at_ms / 1000)
        if promoted:
            self.promoted_version.set(manifest.version)
            self.promoted_time.set_to_current_time()


class StandbyMetrics:
    """Of a trainer's role: whether it leads, what a standby has loaded, how long a takeover took.

    Registered once in a trainer's process, before it leads or stands by.
    """

    def __init__(self, prometheus: CollectorRegistry) -> None:
        self._leading = Gauge(
            "headrace_trainer_leading", "1 while this trainer leads and learns, 0 while it stands by.", registry=prometheus
        )
        self._version = Gauge(
            "headrace_trainer_standby_version",
            "Version whose state a standby has loaded, -1 for none. NaN in the trainer that leads.",
            registry=prometheus,
        )
        self._age = Gauge(
            "headrace_trainer_standby_age_seconds",
            "Age of the version that a standby has loaded. NaN without one, and in the trainer that leads.",
            registry=prometheus,
        )
        self.loads = Counter(
            "headrace_trainer_standby_loads",
            "Versions that a standby loaded or tried to load, by outcome: loaded or failed.",
            ["outcome"],
            registry=prometheus,
        )
        self._takeover = Gauge(
            "headrace_trainer_takeover_seconds",
            "Time from being chosen to lead until the trainer began to learn; 0 before that.",
            registry=prometheus,
        )
        self._catch_up = Gauge(
            "headrace_trainer_catch_up_seconds",
            "Time from being chosen to lead until all examples that were in the log by then were learned; 0 before that.",
            registry=prometheus,
        )
        self._created_at_s = math.nan
        self._version.set(-1)
        self._age.set_function(lambda: time.time() - self._created_at_s)

    def loaded(self, version: int | None, created_at_ms: int) -> None:
        """The state of a version is loaded; None for that of a new model."""
        self._version.set(-1 if version is None else version)
        self._created_at_s = math.nan if version is None else created_at_ms / 1000

    def began(self, after_s: float) -> None:
        """The trainer leads and learns."""
        self._leading.set(1)
        self._takeover.set(after_s)
        self._version.set(math.nan)
        self._created_at_s = math.nan

    def caught_up(self, after_s: float) -> None:
        """Everything that was in the log when the trainer was chosen is learned."""
        self._catch_up.set(after_s)
