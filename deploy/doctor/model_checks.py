"""Checks of the models, the trainer and the scorers: champion, gate, calibration, skew, scorers, publishing."""

from __future__ import annotations

import math
from collections.abc import Iterator

from deploy.doctor.finding import Finding
from deploy.doctor.readings import Readings
from state.registry import VersionRecord
from stream.records.times import clock, duration

__all__ = [
    "calibration",
    "challengers",
    "champion",
    "gate",
    "hold",
    "publishes_nothing",
    "publishing",
    "scorers",
    "skew",
    "versions",
]

# Nearly every version becomes champion. Now and then the gate rejects one by chance, but not twenty in a row.
MAX_VERSIONS_SINCE = 20
MAX_CHAMPION_AGE_MS = 600_000
# Whoever holds promotion by hand looks at it again within the hour; a longer hold was probably forgotten.
MAX_HOLD_MS = 3_600_000
# The gate needs several blocks of clicks to release versions again; a model that recovers does so in minutes.
MAX_WITHHELD_MS = 1_800_000
# A trainer may be silent for as long as this many versions take, and at least a minute: a large model takes longer.
MISSED_VERSIONS, MIN_SILENCE_MS = 5, 60_000
# A trainer that runs goes back within seconds; one of 10 M rows that has to be started takes a minute.
MAX_REWIND_MS = 300_000
# A challenger's trainer writes its figures every 5 s, and takes a minute to start with 10 M rows.
MAX_COUNT_MS = 120_000
# Fewer served impressions are too few to judge a mean, and fewer compared scores to judge a share.
MIN_SERVED, MIN_COMPARED = 1_000, 100
# Share of compared scores whose logit differs by more than 0.02; it is 0 if requests and impressions agree.
MAX_SKEWED = 0.01


def _newest(readings: Readings) -> VersionRecord | None:
    versions = readings.registry.versions
    return versions[max(versions)] if versions else None


def champion(readings: Readings) -> Iterator[Finding]:
    """New versions stay candidates while the trainer goes on learning."""
    state, newest = readings.registry, _newest(readings)
    served = state.champion_record
    if newest is None or state.champion.hold or not readings.snapshots.auto_promote or state.withheld is not None:
        return  # somebody wants it so, or `gate` reports it
    if served is None:
        if readings.now_ms - min(record.announced_at_ms for record in state.versions.values()) > MAX_CHAMPION_AGE_MS:
            yield Finding(
                check="champion",
                what="no champion",
                expected=f"a champion within {duration(MAX_CHAMPION_AGE_MS)} of the first version",
                found=f"{len(state.versions)} versions announced, none promoted; the newest, {newest.version}: {newest.gate}",
                cure="see why each version stays a candidate: `headrace snapshot list`",
            )
        return
    since = sum(version > served.version for version in state.versions)
    age_ms = newest.announced_at_ms - state.champion.at_ms
    if newest.examples_seen <= served.examples_seen or (since < MAX_VERSIONS_SINCE and age_ms < MAX_CHAMPION_AGE_MS):
        return
    yield Finding(
        check="champion",
        what=f"champion {served.version}",
        expected=f"another champion within {MAX_VERSIONS_SINCE} versions and {duration(MAX_CHAMPION_AGE_MS)}, while examples "
        "are learned",
        found=f"champion since {clock(state.champion.at_ms)}; {since} versions have been announced since, with "
        f"{newest.examples_seen - served.examples_seen:,} more examples. The newest, {newest.version}: {newest.gate}",
        cure="see why the gate rejects the newest versions (`headrace snapshot list`); if they are better than the champion, "
        f"run `headrace snapshot promote {newest.version} --reason …`",
    )


def gate(readings: Readings) -> Iterator[Finding]:
    """The gate has withheld new versions for too long."""
    withheld = readings.registry.withheld
    if withheld is None or readings.now_ms - withheld.since_ms <= MAX_WITHHELD_MS:
        return
    compared = "" if withheld.anchor is None else f"; compared with version {withheld.anchor}"
    if withheld.loss_change is not None:
        compared += f", log loss {withheld.loss_change:+.1%} over {withheld.compared_clicks:,} clicks"
    yield Finding(
        check="gate",
        what=f"champion {readings.registry.champion.version}",
        expected=f"new versions that are released, or withheld for at most {duration(MAX_WITHHELD_MS)}",
        found=f"new versions withheld since {clock(withheld.since_ms)}: {withheld.reason}{compared}",
        cure='find what changed at that time: settings, features, a replay (docs/operations.md, "When no version becomes '
        'champion"). `headrace snapshot rollback` goes back to a good version; `headrace snapshot promote N --reason …` makes '
        "version N the champion, whatever the gate says",
    )


def versions(readings: Readings) -> Iterator[Finding]:
    """The newest version is broken: its scores don't vary, or its weights aren't finite."""
    newest = _newest(readings)
    if newest is not None and newest.verdict is not None and newest.verdict.problems:
        yield Finding(
            check="versions",
            what=f"version {newest.version}",
            expected="finite weights and metrics, and scores that vary",
            found="; ".join(newest.verdict.problems),
            cure="it isn't promoted. Check whether impressions carry the features of the schema (`headrace config show`); if "
            "learning has diverged, lower model.row_learning_rate or model.dense_learning_rate and restart the trainer",
        )


def hold(readings: Readings) -> Iterator[Finding]:
    """Auto-promotion was put on hold by hand and never resumed."""
    alias = readings.registry.champion
    if alias.hold and readings.now_ms - alias.hold_at_ms > MAX_HOLD_MS:
        yield Finding(
            check="hold",
            what=f"champion {alias.version}",
            expected=f"auto-promotion held for at most {duration(MAX_HOLD_MS)}",
            found=f"held since {clock(alias.hold_at_ms)} by {alias.hold_who}: {alias.hold_reason}",
            cure="`headrace snapshot resume` lets the next version that passes the gate become champion",
        )


def calibration(readings: Readings) -> Iterator[Finding]:
    """Served scores are too high or too low, compared with the labels."""
    newest = _newest(readings)
    if newest is None:
        return
    count, value = newest.metrics.get("served_examples", 0), newest.metrics.get("served_calibration", math.nan)
    low, high = readings.snapshots.served_calibration_band
    if count >= MIN_SERVED and not math.isnan(value) and not low <= value <= high:
        yield Finding(
            check="calibration",
            what=f"scores served, as of version {newest.version}",
            expected=f"predicted clicks divided by actual clicks between {low:g} and {high:g}",
            found=f"{value:.3g} over the last {count:,.0f} impressions with a score",
            cure="fix what `skew` and `champion` found, if they are listed; otherwise go back (`headrace snapshot rollback`) "
            "and check whether clicks are missing or come twice",
        )


def served(readings: Readings) -> Iterator[Finding]:
    """Served scores are worse than they were, in several blocks of clicks in a row."""
    newest = _newest(readings)
    if newest is None or newest.metrics.get("served_alarm", 0.0) != 1.0:
        return
    block, before = newest.metrics.get("served_block_ne", math.nan), newest.metrics.get("served_history_ne", math.nan)
    yield Finding(
        check="served",
        what=f"scores served, as of version {newest.version}",
        expected="blocks of clicks whose calibration and normalised entropy are in their band (snapshots.served_ne_margin, "
        "snapshots.served_calibration_band)",
        found=f"{readings.snapshots.served_blocks} or more in a row that aren't; the newest has a normalised entropy of "
        f"{block:.4g}, those before {before:.4g}",
        cure="go back (`headrace snapshot rollback`) and see what changed: the trainer's log says which metric it is. If "
        "labels were wrong for a while, leave them out (`--rewind-trainer --skip-time FROM..TO`). If scores are as they should "
        "be, `headrace snapshot hold` and `resume` begin the comparison anew",
    )


def rewind(readings: Readings) -> Iterator[Finding]:
    """The trainer was sent back, and hasn't gone."""
    pending = readings.registry.rewinds.pending
    if pending is None or readings.now_ms - pending.at_ms <= MAX_REWIND_MS:
        return
    yield Finding(
        check="rewind",
        what=f"the trainer, sent back to version {pending.version}",
        expected=f"a trainer that has gone back within {duration(MAX_REWIND_MS)}",
        found=f"none since {clock(pending.at_ms)}, when {pending.who} asked for it: {pending.reason}",
        cure="start a trainer (`headrace run trainer`), or see in its log why it can't go back",
    )


def skew(readings: Readings) -> Iterator[Finding]:
    """Impressions carry other features than the score requests that they were scored with."""
    newest = _newest(readings)
    if newest is None:
        return
    count, share = newest.metrics.get("skew_examples", 0), newest.metrics.get("skew_share", 0.0)
    if count >= MIN_COMPARED and share > MAX_SKEWED:
        yield Finding(
            check="skew",
            what="score requests against impressions",
            expected="served scores that equal what the same version computes from the impressions' features",
            found=f"{share:.1%} of {count:,.0f} differ by more than 0.02 in the logit, on average by "
            f"{newest.metrics.get('skew_logit_mean', math.nan):.3g}, 99 % of them by at most "
            f"{newest.metrics.get('skew_logit_p99', math.nan):.3g}",
            cure="compare the features of a request with those of its impression: they must have the same names, units and "
            "defaults, and the values of the request's time; `score`, `model_version` and `delta` must be "
            "the answer's, not rounded",
        )


def scorers(readings: Readings) -> Iterator[Finding]:
    """A scorer can't read the champion, or the registry."""
    for beat in readings.scorers:
        what = f"scorer {beat.worker} on {beat.host}"
        if beat.fallback_of is not None:
            answers = (
                "it has no version and takes no requests" if beat.version < 0 else f"it answers with version {beat.version}"
            )
            yield Finding(
                check="scorers",
                what=what,
                expected=f"the champion, version {beat.fallback_of}",
                found=f"{answers}, since it can't read the champion: {beat.fallback_reason}",
                cure=f"`headrace snapshot verify {beat.fallback_of}` says whether the version is whole; if it is, check that "
                "scorer's snapshots.url and credentials; if it isn't, run `headrace snapshot rollback`",
            )
        if beat.problem:
            yield Finding(
                check="scorers",
                what=what,
                expected="the deltas of the champion's chain, applied to the last",
                found=f"it answers with version {beat.version} and {beat.delta} deltas, and goes no further: {beat.problem}",
                cure="it goes on by itself with the next version; if none comes, see the trainer's log. If only this scorer "
                "stays behind, check its snapshots.url and its connection to Kafka",
            )
        if beat.candidate_problem:
            yield Finding(
                check="scorers",
                what=what,
                expected="the candidate of the shadow or canary, ready beside the champion",
                found=f"the champion answers its share: {beat.candidate_problem}",
                cure="a smaller share is tried; raise scorer.spare_mb if it is a matter of room, or end the trial: "
                "`headrace snapshot canary stop`",
            )
        if beat.stale:
            yield Finding(
                check="scorers",
                what=what,
                expected="the registry read to its end within scorer.lease_ms",
                found=f"it has read the registry only up to offset {beat.registry_offset}: the champion may have changed",
                cure="see that scorer's log, and check its connection to Kafka",
            )


def challengers(readings: Readings) -> Iterator[Finding]:
    """A track has a share of the requests, and nobody scores or counts them."""
    for each in readings.challengers:
        name = each.track.name
        since_ms = max(each.counted_ms, each.track.share_at_ms)
        if readings.now_ms - since_ms > MAX_COUNT_MS:
            last = "never" if not each.counted_ms else f"last at {clock(each.counted_ms)}"
            yield Finding(
                check="challengers",
                what=f"track {name}",
                expected="a trainer that counts what the track's share of the requests is worth, every few seconds",
                found=f"{last}, for {each.track.share:.3g} of the requests",
                cure=f"start its trainer (`headrace run trainer --track {name}`, with its settings), or end the share: "
                f"`headrace model shadow {name} --share 0`",
            )
    for beat in readings.scorers:
        for shadow in beat.shadows:
            if shadow.problem and shadow.version < 0:
                yield Finding(
                    check="challengers",
                    what=f"scorer {beat.worker} on {beat.host}",
                    expected=f"track {shadow.track}, ready beside the one that serves",
                    found=f"its share isn't scored here: {shadow.problem}",
                    cure="raise scorer.spare_mb if it is a matter of room; else see that scorer's log",
                )


def publishes_nothing(readings: Readings) -> VersionRecord | None:
    """The newest version, if a trainer runs and has announced no other one for too long although examples have come."""
    newest = _newest(readings)
    if newest is None or not readings.members.get("trainer") or "trainer" in readings.unread_positions:
        return None
    limit_ms = max(MISSED_VERSIONS * readings.snapshots.interval_ms, MIN_SILENCE_MS)
    if readings.now_ms - newest.announced_at_ms <= limit_ms:
        return None
    for (topic, number), log in readings.logs.items():
        position = readings.trainer.get(number)
        if topic != "examples" or position is None or position >= log.stable_end:
            continue
        arrived = readings.arrived(topic, number, max(position, log.start))
        if arrived is not None and readings.now_ms - arrived > limit_ms:
            return newest
    return None


def publishing(readings: Readings) -> Iterator[Finding]:
    """A trainer runs and publishes no version, although there are new examples."""
    newest = publishes_nothing(readings)
    if newest is not None:
        yield Finding(
            check="publishing",
            what=f"trainer, newest version {newest.version}",
            expected=f"a version every {duration(readings.snapshots.interval_ms)} (snapshots.interval_ms) while examples come",
            found=f"the last one was announced {duration(readings.now_ms - newest.announced_at_ms)} ago, by {newest.who}",
            cure="see the trainer's log, and whether headrace_trainer_snapshots_total counts failed snapshots (a full disk, a "
            "store or a registry that can't be reached); otherwise the trainer learns more slowly than examples come",
        )
