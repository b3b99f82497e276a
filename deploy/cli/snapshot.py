"""`headrace snapshot …`: look at versions, move the champion, go back."""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from deploy.cli.common import ask_kafka, echo_json, format_option, who
from deploy.cli.times import DURATION, TIME, clock, duration

if TYPE_CHECKING:
    from deploy.settings import Settings
    from stream.records.heartbeat import Heartbeat
    from stream.registry.operations import Rollback
    from stream.registry.writer import RegistryWriter

__all__ = ["snapshot"]

# Not everyone confirmed: the rollback stands, but somebody may serve something else.
EXIT_UNCONFIRMED = 3

ABOUT = "the registry of versions"

T = TypeVar("T")


@click.group()
def snapshot() -> None:
    """Look at versions, move the champion, go back.

    \b
    Examples:
      headrace snapshot list                                 what there is, and what is served
      headrace snapshot rollback --reason "CTR fell"         the last good version, at once, everywhere
      headrace snapshot rollback --back 10m                  what was served ten minutes ago
      headrace snapshot promote 41 --reason "undo" --resume  and back again
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
    from stream.registry.operations import look

    settings = _settings()
    state, live = ask_kafka(settings, look(settings.kafka, _names(settings)), ABOUT)
    document = registry_json(state, set(SnapshotStore(settings.snapshots).versions()), last)
    document["scorers"] = [beat_json(beat) for beat in live]
    if output == "json":
        echo_json(document)
    else:
        print_versions(document)


@snapshot.command()
@click.argument("version", type=click.IntRange(min=1))
@format_option
def show(version: int, output: str) -> None:
    """Show everything that is known of VERSION.

    \b
    Examples:
      headrace snapshot show 41
    """
    from deploy.cli.snapshot_view import print_version, version_json
    from state.errors import SnapshotNotFound
    from state.manifest import finite_or_null
    from state.store import SnapshotStore
    from stream.registry.log import read_registry

    settings = _settings()
    state = ask_kafka(settings, read_registry(settings.kafka, _names(settings)), ABOUT)
    record = state.versions.get(version)
    try:
        manifest = SnapshotStore(settings.snapshots).manifest(version)
    except SnapshotNotFound:
        if record is None:
            raise
        manifest = None
    announced = None if record is None else version_json(record, state, manifest is not None)
    if output == "json":
        import msgspec

        document = None if manifest is None else msgspec.to_builtins(manifest)
        if document is not None and manifest is not None:
            document["metrics"] = finite_or_null(manifest.metrics)
        echo_json({"version": version, "announced": announced, "manifest": document})
    else:
        print_version(manifest, announced)


@snapshot.command()
@click.argument("version", type=click.IntRange(min=1))
@format_option
def verify(version: int, output: str) -> None:
    """Read every file of VERSION and compare it with the manifest. Exit code 1 when anything differs.

    \b
    Examples:
      headrace snapshot verify 41
    """
    from state.store import SnapshotStore

    store = SnapshotStore(_settings().snapshots)
    problems = store.verify(version)
    if output == "json":
        echo_json({"version": version, "whole": not problems, "problems": problems})
    elif not problems:
        manifest = store.manifest(version)
        click.echo(f"version {version} is whole: {len(manifest.files)} files, {manifest.size:,} bytes, every SHA-256 right")
    for problem in problems:
        click.echo(problem, err=True)
    if problems:
        sys.exit(1)


@snapshot.command()
@click.argument("version", type=click.IntRange(min=1))
@click.option("--reason", required=True, help="Why; it stays in the registry.")
@click.option("--hold", "hold_reason", metavar="WHY", help="Stop auto-promotion too, and say why.")
@click.option("--resume", is_flag=True, help="Let auto-promotion go on too.")
@click.option("--unchecked", is_flag=True, help="Don't look first whether the store has the version.")
@click.option("--dry-run", is_flag=True, help="Say what would happen; write nothing.")
@format_option
def promote(
    version: int, reason: str, hold_reason: str | None, resume: bool, unchecked: bool, dry_run: bool, output: str
) -> None:
    """Make VERSION the champion.

    Unless auto-promotion is held, the next version that passes the gate takes its place.

    \b
    Examples:
      headrace snapshot promote 41 --reason "better on the hold-out"
      headrace snapshot promote 41 --reason "undo of 39" --resume
      headrace snapshot promote 41 --reason "pin for the sale" --hold "until Monday"
    """
    if resume and hold_reason is not None:
        raise click.UsageError("--hold and --resume: expected one of them, found both.")
    settings = _settings()
    if not unchecked:
        _check_store(settings)(version)
    hold = True if hold_reason is not None else False if resume else None

    async def move(writer: RegistryWriter) -> Any:
        return (await writer.promote(version, reason, hold=hold, hold_reason=hold_reason or "")).outcome

    moved = _rehearse(settings, version, reason, hold, hold_reason or "") if dry_run else _write(settings, move)
    if output == "json":
        echo_json({"from": moved.previous, "to": moved.version, "held": moved.held, "undo": moved.undo, "dry_run": dry_run})
        return
    click.echo(f"champion: {_or_none(moved.previous)} → {moved.version}{' (dry run: nothing was written)' if dry_run else ''}")
    click.echo(f"auto-promotion: {'held' if moved.held else 'on'}")
    click.echo(f"undo: {moved.undo}" if moved.undo else "undo: there was no champion before")


@snapshot.command()
@click.option("--to", type=click.IntRange(min=1), metavar="VERSION", help="This version.")
@click.option("--back", "back_ms", type=DURATION, metavar="DURATION", help="The champion this long ago, such as 10m.")
@click.option("--before", "before_ms", type=TIME, metavar="TIME", help="The champion at this time; UTC without an offset.")
@click.option("--reason", default="no reason given", help="Why; it stays in the registry.")
@click.option(
    "--timeout", "timeout_ms", type=DURATION, default="10s", show_default=True, help="How long to wait for the scorers."
)
@click.option("--unchecked", is_flag=True, help="Don't look first whether the store has the version.")
@click.option("--dry-run", is_flag=True, help="Say what would happen; write nothing.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@format_option
def rollback(
    to: int | None,
    back_ms: int | None,
    before_ms: int | None,
    reason: str,
    timeout_ms: int,
    unchecked: bool,
    dry_run: bool,
    yes: bool,
    output: str,
) -> None:
    """Put an older version back, everywhere, and hold auto-promotion until `resume`.

    By default the newest version older than the champion that is tagged good. Waits until every live scorer serves it.
    Exit code 3 when someone didn't confirm in time, 0 when all did (or none is live).

    \b
    Examples:
      headrace snapshot rollback --reason "CTR fell"
      headrace snapshot rollback --to 39
      headrace snapshot rollback --back 10m --dry-run
      headrace snapshot rollback --before 2024-05-01T12:00:00Z --yes --format json
    """
    from stream.registry.operations import plan_rollback, roll_back

    settings = _settings()
    began = time.monotonic()
    wanted: dict[str, Any] = {"to": to, "back_ms": back_ms, "before_ms": before_ms}
    reach = (settings.kafka, _names(settings))
    if dry_run or (not yes and sys.stdin.isatty()):
        plan = ask_kafka(settings, plan_rollback(*reach, **wanted), ABOUT)
        if dry_run:
            if not unchecked:
                _check_store(settings)(plan.version)
            _show_plan(plan.previous, plan.version, plan.held_already, plan.live, output)
            return
        click.confirm(
            f"Roll back from version {plan.previous} to {plan.version} ({len(plan.live)} live scorers)?", abort=True, err=True
        )
        # What was shown is what is done; and the time that someone thought it over is not the rollback's.
        wanted = {"to": plan.version, "back_ms": None, "before_ms": None}
        began = time.monotonic()
    check = None if unchecked else _check_store(settings)
    doing = roll_back(*reach, who=who(), reason=reason, timeout_ms=timeout_ms, check=check, began=began, **wanted)
    done = ask_kafka(settings, doing, ABOUT)
    _show_rollback(done, output)
    for beat in done.unconfirmed:
        why = ", stale" if beat.stale else ""
        if beat.fallback_of is not None:
            why += f", since it can't read version {beat.fallback_of} ({beat.fallback_reason})"
        click.echo(
            f"scorer {beat.worker} on {beat.host}: expected version {done.version} within {duration(timeout_ms)}, found "
            f"version {beat.version} at registry offset {beat.registry_offset}{why}. The rollback stands; look at that "
            "scorer's log, or stop it.",
            err=True,
        )
    if done.unconfirmed:
        sys.exit(EXIT_UNCONFIRMED)


@snapshot.command()
@click.option("--reason", required=True, help="Why; it stays in the registry.")
@format_option
def hold(reason: str, output: str) -> None:
    """Stop auto-promotion: new versions stay candidates.

    \b
    Examples:
      headrace snapshot hold --reason "sale until Monday"
    """
    _hold_or_resume(lambda writer: writer.hold(reason), output)


@snapshot.command()
@format_option
def resume(output: str) -> None:
    """Let auto-promotion go on with the next version that passes the gate.

    \b
    Examples:
      headrace snapshot resume
    """
    _hold_or_resume(lambda writer: writer.resume(), output)


def _hold_or_resume(change: Callable[[RegistryWriter], Awaitable[Any]], output: str) -> None:
    held = _write(_settings(), change).outcome
    if output == "json":
        echo_json(
            {
                "held": held.held,
                "reason": held.reason,
                "who": held.who,
                "since_ms": held.at_ms,
                "changed": held.changed,
                "undo": held.undo,
            }
        )
        return
    by = f" (by {held.who} at {clock(held.at_ms)})" if held.who else ""
    click.echo(f"auto-promotion: {f'held: {held.reason}' if held.held else 'on'}{by}")
    if not held.changed:
        click.echo("It was so already; nothing was written.")
    if held.undo:
        click.echo(f"undo: {held.undo}")


def _show_plan(previous: int, version: int, held: bool, live: list[Heartbeat], output: str) -> None:
    workers = [beat.worker for beat in live]
    if output == "json":
        echo_json({"from": previous, "to": version, "held_already": held, "live": workers, "dry_run": True})
        return
    click.echo(f"champion: {previous} → {version} (dry run: nothing was written)")
    click.echo(f"auto-promotion: {'held already' if held else 'would be held'}")
    click.echo(f"live scorers: {', '.join(workers) or 'none'}")


def _show_rollback(done: Rollback, output: str) -> None:
    from deploy.cli.snapshot_view import beat_json

    if output == "json":
        echo_json(
            {
                "from": done.previous,
                "to": done.version,
                "held": done.held,
                "confirmed": [{"worker": each.worker, "after_ms": each.after_ms} for each in done.confirmed],
                "unconfirmed": [beat_json(beat) for beat in done.unconfirmed],
                "rollback_ms": done.rollback_ms,
                "undo": done.undo,
            }
        )
        return
    click.echo(f"champion: {done.previous} → {done.version}, auto-promotion held until `headrace snapshot resume`")
    everyone = len(done.confirmed) + len(done.unconfirmed)
    if not everyone:
        click.echo(f"no scorer is live: nobody had to confirm ({duration(done.rollback_ms)})")
    else:
        names = ", ".join(each.worker for each in done.confirmed)
        confirmed = f"{len(done.confirmed)} of {everyone} scorers confirmed{f' ({names})' if names else ''}"
        click.echo(f"{confirmed}, {duration(done.rollback_ms)} after the command")
    click.echo(f"undo: {done.undo}")


def _rehearse(settings: Settings, version: int, reason: str, hold: bool | None, hold_reason: str) -> Any:
    from state.decisions import Cause
    from state.decisions import promote as decide
    from stream.registry.log import read_registry

    state = ask_kafka(settings, read_registry(settings.kafka, _names(settings)), ABOUT)
    cause = Cause(who(), time.time_ns() // 1_000_000, reason, "dry-run")
    return decide(state, version, cause, hold=hold, hold_reason=hold_reason).outcome


def _write(settings: Settings, change: Callable[[RegistryWriter], Awaitable[T]]) -> T:
    from stream.registry.writer import RegistryWriter

    async def run() -> T:
        writer = RegistryWriter(settings.kafka, _names(settings), who=who())
        try:
            return await change(writer)
        finally:
            await writer.close()

    return ask_kafka(settings, run(), ABOUT)


def _check_store(settings: Settings) -> Callable[[int], None]:
    """Nobody is sent to a version that the store doesn't have whole. Names and sizes only: a rollback must be quick."""
    from state.errors import SnapshotCorrupt, SnapshotError
    from state.store import SnapshotStore

    store = SnapshotStore(settings.snapshots)

    def check(version: int) -> None:
        try:
            problems = store.verify(version, hashes=False)
            if problems:
                raise SnapshotCorrupt(problems[0])
        except SnapshotError as error:
            raise type(error)(f"{error} Nothing was changed; --unchecked goes there all the same.") from error

    return check


def _settings() -> Settings:
    from deploy.settings import load_settings

    return load_settings()


def _names(settings: Settings) -> Any:
    from stream.topics.names import TopicNames

    return TopicNames.of(settings.topics)


def _or_none(version: int | None) -> str:
    return "none" if version is None else str(version)
