"""The output of `headrace snapshot`: versions as rows of a table, and as JSON with the same names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import click
import msgspec

from deploy.cli.tables import print_pairs, print_table
from deploy.cli.times import clock, duration
from model.errors import SnapshotMismatch
from model.schema import FeatureSchema
from state.alias_records import TagChange
from state.canary import Canary
from state.history import History
from state.manifest import Manifest, finite_or_null
from state.pieces import piece_kind
from state.registry import RegistryState, VersionRecord
from stream.records.heartbeat import Heartbeat
from stream.trainer.schemas import schema_change

__all__ = [
    "beat_json",
    "canary_json",
    "fields_now",
    "is_count",
    "print_version",
    "print_versions",
    "registry_json",
    "tagged_json",
    "version_json",
    "weights_text",
]


def registry_json(state: RegistryState, in_store: set[int], last: int) -> dict[str, Any]:
    """The registry, with its newest `last` versions (0: all) in ascending order."""
    champion = state.champion
    numbers = sorted(state.versions)
    return {
        "champion": champion.version,
        "previous": champion.previous,
        "since_ms": champion.at_ms,
        "who": champion.who,
        "reason": champion.reason,
        "held": champion.hold,
        "hold_reason": champion.hold_reason,
        "hold_who": champion.hold_who,
        "hold_at_ms": champion.hold_at_ms,
        "gate": _verdict(state),
        "aliases": {name: alias.version for name, alias in sorted(state.aliases.items()) if alias.version is not None},
        "canary": canary_json(state.canary),
        "deleting": [doomed.version for doomed in state.deletion.versions],
        "trainer_epoch": state.trainer.epoch,
        "rewinds": [msgspec.to_builtins(each) for each in state.rewinds.rewinds],
        "skipped": [msgspec.to_builtins(each) for each in state.rewinds.skipped],
        "malformed_records": state.problem_count,
        "versions": [
            version_json(state.versions[number], state, number in in_store) for number in numbers[-last if last else 0 :]
        ],
    }


def canary_json(canary: Canary) -> dict[str, Any] | None:
    """The shadow or canary that runs, or the last one; None where there was none."""
    if not canary.version:
        return None
    return {**msgspec.to_builtins(canary), "outcome": canary.outcome or "running"}


def version_json(record: VersionRecord, state: RegistryState, in_store: bool) -> dict[str, Any]:
    """One announced version."""
    return {
        "version": record.version,
        "tags": _tags(record, state),
        "aliases": state.aliases_of(record.version),
        "tagged": tagged_json(state.tags_of(record.version)),
        "kind": record.kind,
        "parent": record.parent,
        "epoch": record.epoch,
        "created_at_ms": record.created_at_ms,
        "announced_at_ms": record.announced_at_ms,
        "announced_by": record.who,
        "champion_at_ms": list(record.champion_at_ms),
        "good_at_ms": record.good_at_ms,
        "watermark_ms": record.watermark_ms,
        "examples_seen": record.examples_seen,
        "bytes": record.size,
        "chain": record.chain or None,
        "sequence": record.sequence,
        "digest": record.digest or None,
        "deltas_offset": record.deltas_offset,
        "metrics": finite_or_null(record.metrics),
        "gate": record.gate,
        "verdict": None if record.verdict is None else msgspec.to_builtins(record.verdict),
        "skipped": [msgspec.to_builtins(each) for each in record.skipped],
        "in_store": in_store,
    }


def tagged_json(tags: Mapping[str, TagChange]) -> dict[str, Any]:
    """Tags that people or programs have put on a version, by name."""
    return {
        name: {"value": each.value, "who": each.who, "at_ms": each.at_ms, "reason": each.reason} for name, each in tags.items()
    }


def beat_json(beat: Heartbeat) -> dict[str, Any]:
    """What one scorer reports. `version` is null while the scorer has none."""
    return {
        "worker": beat.worker,
        "host": beat.host,
        "version": None if beat.version < 0 else beat.version,
        "stale": beat.stale,
        "fallback_of": beat.fallback_of,
        "fallback_reason": beat.fallback_reason,
        "following": beat.following,
        "chain": beat.chain or None,
        "sequence": beat.sequence,
        "digest": beat.digest or None,
        "delta": beat.delta,
        "weights_age_ms": beat.weights_age_ms,
        "problem": beat.problem,
        "candidate": beat.candidate,
        "candidate_problem": beat.candidate_problem,
        "track": beat.track,
        "shadows": [shadow.track for shadow in beat.shadows if shadow.version >= 0],
    }


def weights_text(beat: Heartbeat) -> str:
    """The weights that a scorer answers with, in words."""
    if beat.version < 0:
        return "no version"
    words = f"version {beat.version}"
    if beat.delta:
        words += f" and {beat.delta:,} deltas"
    if beat.chain:
        words += f" ({beat.chain} at {beat.sequence:,}, digest {beat.digest})"
    return words


def print_versions(document: dict[str, Any]) -> None:
    """The table of `headrace snapshot list`, newest first."""
    numbers = ("examples", "log loss", "auc", "calibration", "MB")
    rows = []
    for version in reversed(document["versions"]):
        metrics = version["metrics"]
        tags = [*_all_tags(version), *([] if version["in_store"] else ["not in store"])]
        rows.append(
            [
                str(version["version"]),
                ", ".join(tags),
                version["kind"],
                f"{version['examples_seen']:,}",
                *(_number(metrics, f"window_{name}") for name in ("log_loss", "auc", "calibration")),
                f"{version['bytes'] / 1e6:.1f}",
                clock(version["created_at_ms"]),
                version["gate"],
            ]
        )
    print_table(("version", "tags", "kind", *numbers, "created (UTC)", "why"), rows, right=numbers)
    held = "auto-promotion on"
    if document["held"]:
        held = f"auto-promotion held by {document['hold_who']} at {clock(document['hold_at_ms'])}: {document['hold_reason']}"
    champion = "none" if document["champion"] is None else document["champion"]
    since = f" since {clock(document['since_ms'])}" if document["since_ms"] else ""
    click.echo(f"champion {champion}{since}, {held}")
    gate = document["gate"]
    if gate is not None:
        click.echo(f"gate {_flow_text(gate)}")
    _print_rewind(document.get("rewinds", [])[-1:], document.get("skipped", []))
    canary = document["canary"]
    if canary is not None and canary["outcome"] == "running":
        said = "" if canary["progress"] is None else f": {canary['progress']['verdict']}"
        click.echo(
            f"{canary['mode']} of version {canary['version']}, {canary['share'] * 100:g} % of the requests since "
            f"{clock(canary['at_ms'])}{said}"
        )
    if document["deleting"]:
        click.echo(f"being deleted: {len(document['deleting'])} versions; if no deletion runs, `headrace snapshot gc` ends it")
    for beat in document["scorers"]:
        version = "no version" if beat["version"] is None else f"version {beat['version']}"
        if beat["following"]:
            version += f" and {beat['delta']:,} deltas, {duration(beat['weights_age_ms'])} old"
        line = f"scorer {beat['worker']} on {beat['host']}: {version}{', stale' if beat['stale'] else ''}"
        if beat["candidate_problem"]:
            line += f"; its candidate takes no part: {beat['candidate_problem']}"
        if beat["problem"]:
            line += f"; it goes no further: {beat['problem']}"
        if beat["fallback_of"] is not None:
            line += f"; it can't read version {beat['fallback_of']}: {beat['fallback_reason']}"
        click.echo(line)
    for beat in document.get("silent", []):
        silent = f"silent for {duration(beat['silent_ms'])}: it stands still or was killed"
        click.echo(f"scorer {beat['worker']} on {beat['host']}: version {beat['version']}, {silent}")


def _print_rewind(last: list[dict[str, Any]], skipped: list[dict[str, Any]]) -> None:
    for rewind in last:
        asked = f"as {rewind['who']} asked at {clock(rewind['at_ms'])}: {rewind['reason']}"
        if rewind["up_to"] is None:
            click.echo(f"trainer: is to go back to version {rewind['version']}, {asked}")
        else:
            done = f"went back to version {rewind['version']} at {clock(rewind['done_at_ms'])}"
            click.echo(f"trainer: {done} ({rewind['chain']} began), {asked}")
    for each in skipped:
        click.echo(f"not learned: {_skipped_text(each)}")


def _skipped_text(each: dict[str, Any]) -> str:
    where = f"partition {each['partition']}, offsets {each['from']:,} up to {each['to']:,} ({each['to'] - each['from']:,})"
    return f"{where}, left out by {each['who']} at {clock(each['at_ms'])}: {each['why']}"


def _history_text(history: History) -> str:
    learned = f"{history.examples:,} examples of {history.source} up to {clock(history.until_ms)}"
    return f"{learned}; the stream's up to then are skipped"


def fields_now(manifest: Manifest, schema: FeatureSchema) -> dict[str, Any] | None:
    """What a trainer whose settings have this schema makes of a version of another one; None for settings without fields."""
    if not schema.fields:
        return None
    try:
        change = schema_change(manifest, schema)
    except SnapshotMismatch as error:
        return {"goes_on": False, "changes": str(error).splitlines()}
    return {"goes_on": True, "changes": [] if change.is_none else change.explained()}


def print_version(manifest: Manifest | None, announced: dict[str, Any] | None, fields: dict[str, Any] | None) -> None:
    """Everything known about one version, one fact a line."""
    pairs = _pairs(manifest, announced)
    if fields is not None:
        can = "a trainer with these settings goes on" if fields["goes_on"] else "a trainer with these settings doesn't go on"
        pairs.append(("fields", f"{can}: {'; '.join(fields['changes'])}" if fields["changes"] else "those of these settings"))
    print_pairs(pairs)


def _pairs(manifest: Manifest | None, announced: dict[str, Any] | None) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    if announced is not None:
        pairs += [
            ("version", str(announced["version"])),
            ("tags", ", ".join(_all_tags(announced))),
            ("gate", announced["gate"]),
            *_verdict_pairs(announced["verdict"]),
            ("announced", f"{clock(announced['announced_at_ms'])} by {announced['announced_by']}"),
            ("champion at", ", ".join(clock(at) for at in announced["champion_at_ms"]) or "never"),
            ("good since", clock(announced["good_at_ms"])),
        ]
    if manifest is None:
        return [*pairs, ("in store", "no: it can't be promoted")]
    if announced is None:
        pairs += [("version", str(manifest.version)), ("tags", "not announced")]
    pairs += [
        ("kind", manifest.kind),
        ("parent", "-" if manifest.parent is None else str(manifest.parent)),
        ("epoch", str(manifest.epoch)),
        ("created", clock(manifest.created_at_ms)),
        ("watermark", clock(manifest.watermark_ms)),
        ("examples seen", f"{manifest.examples_seen:,}"),
        ("negative rate", f"{manifest.negative_rate:g}"),
        ("offsets", ", ".join(f"{part}: {offset}" for part, offset in sorted(manifest.offsets.items())) or "-"),
        *(() if manifest.history is None else (("history", _history_text(manifest.history)),)),
        *(("not learned", _skipped_text(msgspec.to_builtins(each))) for each in manifest.skipped),
        ("point of chain", "-" if manifest.sequence is None else f"{manifest.chain}, delta {manifest.sequence}"),
        ("digest", manifest.digest or "-"),
        ("rows of scorers", manifest.row_precision),
        ("schema", manifest.schema_hash),
    ]
    pairs += [(name, _number(manifest.metrics, name)) for name in sorted(manifest.metrics)]
    return pairs + _file_pairs(manifest)


def _file_pairs(manifest: Manifest) -> list[tuple[str, str]]:
    """The files of a version; those of one kind of piece, of which there can be hundreds, in one line."""
    pairs = []
    for kind in ("serving", "trainer"):
        pieces = [entry.size for name, entry in manifest.files.items() if piece_kind(name) == kind]
        if pieces:
            pairs.append((f"pieces {kind}", f"{len(pieces):,} files, {sum(pieces):,} bytes"))
    return pairs + [
        (f"file {name}", f"{entry.size:,} bytes, SHA-256 {entry.sha256}")
        for name, entry in sorted(manifest.files.items())
        if piece_kind(name) is None
    ]


def _verdict(state: RegistryState) -> dict[str, Any] | None:
    """The gate's report on the newest version; None when that version has none."""
    record = state.versions.get(max(state.versions, default=0))
    return None if record is None or record.verdict is None else dict(msgspec.to_builtins(record.verdict))


def _flow_text(verdict: dict[str, Any]) -> str:
    """Whether versions flow, since when (0: since the line began) and why."""
    since = f" since {clock(verdict['since_ms'])}" if verdict["since_ms"] else ""
    return f"{verdict['flow']}{since}: {verdict['reason']}"


def _verdict_pairs(verdict: dict[str, Any] | None) -> list[tuple[str, str]]:
    if verdict is None:
        return []
    compared = "nothing" if verdict["anchor"] is None else f"version {verdict['anchor']}"
    if verdict["loss_change"] is not None:
        compared += f", log loss {verdict['loss_change'] * 100:+.2f} % ± {verdict['loss_error'] * 100:.2f} %"
    return [
        ("flow", _flow_text(verdict)),
        ("compared with", compared),
        ("line", f"{verdict['line']}, {verdict['clicks']:,} clicks and {verdict['negatives']:,} non-clicks seen"),
        ("problems", "; ".join(verdict["problems"]) or "none"),
    ]


def _tags(record: VersionRecord, state: RegistryState) -> list[str]:
    tags = []
    if record.version == state.champion.version:
        tags.append("champion")
    if state.rewinds.left(record.version):
        tags.append("left by the trainer")
    if state.champion.was_rolled_back(record.version):
        tags.append("rolled back")
    elif record.good_at_ms is not None:
        tags.append("good")
    if not record.champion_at_ms:
        tags.append("candidate")
    return tags


def _all_tags(version: dict[str, Any]) -> list[str]:
    """What the registry says of a version, its aliases as @NAME, and its tags as NAME=VALUE."""
    tagged = [f"{name}={each['value']}" if each["value"] else name for name, each in version["tagged"].items()]
    return [*version["tags"], *(f"@{name}" for name in version["aliases"]), *tagged]


def is_count(metric: str) -> bool:
    """Whether a metric of a manifest is a number of things, or of bytes."""
    return metric.endswith("examples") or metric.startswith("table_")


def _number(metrics: Mapping[str, float | None], name: str) -> str:
    value = metrics.get(name)
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if is_count(name) else f"{value:.4f}"
