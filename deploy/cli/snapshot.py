"""`headrace snapshot …`: look at versions, move the champion, go back. More commands of the group are in `snapshot_*.py`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from deploy.cli.common import ask_kafka, echo_json, format_option, track_option
from deploy.cli.snapshot_aliases import alias, history, tag
from deploy.cli.snapshot_canary import canary, shadow, watch
from deploy.cli.snapshot_common import (
    ABOUT,
    command_settings,
    number_or_alias,
    operations_of,
    resolve,
    settings_for,
    topic_names,
    version_argument,
)
from deploy.cli.snapshot_compare import diff, export
from deploy.cli.snapshot_gate import gate, release
from deploy.cli.snapshot_rollback import EXIT_UNCONFIRMED, rollback, say_silent, silent_json, undo_command
from deploy.cli.snapshot_upkeep import gc, reindex
from deploy.cli.times import DURATION, clock, duration

if TYPE_CHECKING:
    from state.changes import Held
    from stream.registry.requests import ChampionMoved, Plan, Resumed

__all__ = ["snapshot"]


@click.group()
@track_option
def snapshot() -> None:
    """Look at versions, move the champion, go back; name versions, compare, delete, export them.

    \b
    Examples:
      headrace snapshot list                                 what there is, and what is served
      headrace snapshot rollback --reason "CTR fell"         the last good version, at once, everywhere
      headrace snapshot rollback --back 10m                  what was served ten minutes ago
      headrace snapshot promote 41 --reason "undo" --resume  and back again
      headrace snapshot canary 42 --share 5%                 try a version on a share of the requests
      headrace snapshot history                              who moved the champion, when and why
      headrace snapshot diff 41 42                           what changed
      headrace snapshot gc --dry-run                         what can be deleted
      headrace snapshot --track wide list                    versions of the challenger `wide`
    """


@snapshot.command("list")
@click.option("--last", type=click.IntRange(min=0), default=20, show_default=True, help="Newest versions shown; 0: all.")
@format_option
def list_(last: int, output: str) -> None:
    """List the announced versions, newest first, and what each live scorer answers with.

    \b
    Examples:
      headrace snapshot list
      headrace snapshot list --last 0 --format json
    """
    from deploy.cli.snapshot_view import beat_json, print_versions, registry_json
    from state.store import SnapshotStore

    settings = command_settings()
    seen = ask_kafka(settings, operations_of(settings).look(), ABOUT)
    document = registry_json(seen.state, set(SnapshotStore(settings.snapshots).versions()), last)
    document["scorers"] = [beat_json(beat) for beat in seen.live]
    document["silent"] = silent_json(seen.silent)
    if output == "json":
        echo_json(document)
    else:
        print_versions(document)


@snapshot.command()
@version_argument
@format_option
def show(version: str, output: str) -> None:
    """Show everything known about VERSION, and what a trainer with these settings' features makes of it.

    VERSION is a number or an alias.

    \b
    Examples:
      headrace snapshot show 41
      headrace snapshot show champion
      headrace snapshot show 41 --format json | jq .fields   after a change of features.fields, before the trainer's restart
    """
    from deploy.cli.snapshot_view import fields_now, print_version, version_json
    from state.errors import SnapshotNotFound
    from state.manifest import finite_or_null
    from state.store import SnapshotStore
    from stream.registry.log import read_registry

    settings = command_settings()
    (number,) = resolve(settings, version)
    state = ask_kafka(settings, read_registry(settings.kafka, topic_names(settings)), ABOUT)
    record = state.versions.get(number)
    try:
        manifest = SnapshotStore(settings.snapshots).manifest(number)
    except SnapshotNotFound:
        if record is None:
            raise
        manifest = None
    announced = None if record is None else version_json(record, state, manifest is not None)
    fields = None if manifest is None else fields_now(manifest, settings.features)
    if output == "json":
        import msgspec

        document = None if manifest is None else msgspec.to_builtins(manifest)
        if document is not None and manifest is not None:
            document["metrics"] = finite_or_null(manifest.metrics)
        echo_json({"version": number, "announced": announced, "manifest": document, "fields": fields})
    else:
        print_version(manifest, announced, fields)


@snapshot.command()
@click.argument("version", metavar="[VERSION]", required=False, callback=number_or_alias)
@click.option("--live", is_flag=True, help="Compare the weights of all live scorers, not the files of a version.")
@click.option(
    "--wait", "wait_ms", type=DURATION, default="10s", show_default=True, help="With --live: how long to look at heartbeats."
)
@format_option
def verify(version: str | None, live: bool, wait_ms: int, output: str) -> None:
    """Read every file of VERSION and compare it with the manifest. Exit code 1 when anything differs.

    VERSION is a number or an alias.

    With --live, compare the digests of the weights that scorers have in memory, at equal points of a chain, with each other,
    with the trainer's deltas and with the announced versions.

    \b
    Examples:
      headrace snapshot verify 41
      headrace snapshot verify champion
      headrace snapshot verify --live
    """
    if live == (version is not None):
        raise click.UsageError(
            "expected VERSION or --live, found both." if live else "expected VERSION or --live, found neither."
        )
    if version is None:
        from deploy.cli.snapshot_live import verify_live

        verify_live(wait_ms, output)
        return
    from state.store import SnapshotStore

    settings = settings_for(version)
    (number,) = resolve(settings, version)
    store = SnapshotStore(settings.snapshots)
    problems = store.verify(number)
    if output == "json":
        echo_json({"version": number, "whole": not problems, "problems": problems})
    elif not problems:
        manifest = store.manifest(number)
        click.echo(f"version {number} is whole: {len(manifest.files)} files, {manifest.size:,} bytes, every SHA-256 right")
    for problem in problems:
        click.echo(problem, err=True)
    if problems:
        sys.exit(1)


@snapshot.command()
@version_argument
@click.option("--reason", required=True, help="Why; it stays in the registry.")
@click.option("--hold", "hold_reason", metavar="WHY", help="Also hold auto-promotion, for this reason.")
@click.option("--resume", is_flag=True, help="Also let auto-promotion go on.")
@click.option("--unchecked", is_flag=True, help="Don't check first that the store has the version.")
@click.option("--dry-run", is_flag=True, help="Say what would happen; write nothing.")
@format_option
def promote(
    version: str, reason: str, hold_reason: str | None, resume: bool, unchecked: bool, dry_run: bool, output: str
) -> None:
    """Make VERSION the champion. VERSION is a number or an alias.

    Unless auto-promotion is held, the next version that passes the gate takes its place.

    \b
    Examples:
      headrace snapshot promote 41 --reason "better on the hold-out"
      headrace snapshot promote 41 --reason "undo of 39" --resume
      headrace snapshot promote 41 --reason "pin for the sale" --hold "until Monday"
      headrace snapshot promote candidate --reason "better on the hold-out" --dry-run
    """
    if resume and hold_reason is not None:
        raise click.UsageError("--hold and --resume: expected one of them, found both.")
    from stream.registry.operations import PromoteRequest

    settings = command_settings()
    operations = operations_of(settings, unchecked=unchecked)
    hold = True if hold_reason is not None else False if resume else None
    (number,) = resolve(settings, version)
    request = PromoteRequest(number, reason, hold, hold_reason or "")
    moved: Plan | ChampionMoved
    if dry_run:
        moved = ask_kafka(settings, operations.plan(request), ABOUT)
    else:
        moved = ask_kafka(settings, operations.promote(request), ABOUT)
    if output == "json":
        echo_json(
            {"from": moved.previous, "to": moved.version, "held": moved.held, "undo": undo_command(moved), "dry_run": dry_run}
        )
        return
    previous = "none" if moved.previous is None else moved.previous
    click.echo(f"champion: {previous} → {moved.version}{' (dry run: nothing was written)' if dry_run else ''}")
    click.echo(f"auto-promotion: {'would be ' if dry_run else ''}{'held' if moved.held else 'on'}")
    click.echo(f"undo: {undo_command(moved) or 'there was no champion before'}")


@snapshot.command()
@click.option("--reason", required=True, help="Why; it stays in the registry.")
@format_option
def hold(reason: str, output: str) -> None:
    """Hold auto-promotion: new versions stay candidates.

    \b
    Examples:
      headrace snapshot hold --reason "sale until Monday"
    """
    settings = command_settings()
    _show_hold(ask_kafka(settings, operations_of(settings).hold(reason), ABOUT), output)


@snapshot.command()
@click.option(
    "--timeout", "timeout_ms", type=DURATION, default="10s", show_default=True, help="How long to wait for the scorers."
)
@format_option
def resume(timeout_ms: int, output: str) -> None:
    """Let auto-promotion go on with the next version that passes the gate, and scorers follow the champion's chain again.

    Waits until every live scorer does. Exit code 3 when someone didn't confirm in time, or is silent, as for `rollback`.
    Refused while a trainer that was sent back hasn't gone yet.

    \b
    Examples:
      headrace snapshot resume
    """
    settings = command_settings()
    began = time.monotonic()
    done = ask_kafka(settings, operations_of(settings).resume_everywhere(timeout_ms, began=began), ABOUT)
    _show_hold(done.held, output, done)
    for beat in done.unconfirmed:
        click.echo(
            f"scorer {beat.worker} on {beat.host}: expected it to follow the champion's chain within {duration(timeout_ms)}, "
            f"found version {beat.version} at registry offset {beat.registry_offset}{', stale' if beat.stale else ''}"
            f"{f' ({beat.problem})' if beat.problem else ''}. It follows as soon as it can; look at that scorer's log.",
            err=True,
        )
    say_silent(done.silent)
    if done.unconfirmed or done.silent:
        sys.exit(EXIT_UNCONFIRMED)


def _show_hold(held: Held, output: str, resumed: Resumed | None = None) -> None:
    if output == "json":
        waited: dict[str, object] = {}
        if resumed is not None:
            waited = {
                "confirmed": [{"worker": each.worker, "after_ms": each.after_ms} for each in resumed.confirmed],
                "unconfirmed": [each.worker for each in resumed.unconfirmed],
                "silent": silent_json(resumed.silent),
                "resume_ms": resumed.took_ms,
            }
        echo_json(
            {
                **waited,
                "held": held.held,
                "reason": held.reason,
                "who": held.who,
                "since_ms": held.at_ms,
                "changed": held.changed,
                "undo": undo_command(held),
            }
        )
        return
    by = f" (by {held.who} at {clock(held.at_ms)})" if held.who else ""
    click.echo(f"auto-promotion: {f'held: {held.reason}' if held.held else 'on'}{by}")
    if not held.changed:
        click.echo("It was so already; nothing was written.")
    if resumed is not None and (everyone := len(resumed.confirmed) + len(resumed.unconfirmed)):
        follow = f"{len(resumed.confirmed)} of {everyone} scorers follow"
        click.echo(f"{follow}, {duration(resumed.took_ms)} after the command")
    if held.undo:
        click.echo(f"undo: {undo_command(held)}")


for command in (rollback, shadow, canary, watch, alias, tag, history, diff, gc, reindex, export, gate, release):
    snapshot.add_command(command)
