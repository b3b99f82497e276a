"""`headrace snapshot rollback`: scorers go back to an older version, and the trainer too where it is asked to."""

from __future__ import annotations

import re
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from deploy.cli.common import ask_kafka, echo_json, format_option, on_named_track
from deploy.cli.snapshot_common import ABOUT, command_settings, number_or_alias, operations_of, resolve
from deploy.cli.times import DURATION, TIME, clock, duration, is_ago

if TYPE_CHECKING:
    from collections.abc import Sequence

    from state.changes import Held
    from state.rewinds import SkippedRange
    from stream.registry.heartbeat import Silent
    from stream.registry.requests import ChampionMoved, Plan, RollbackRequest
    from stream.registry.skipping import AskedRange

__all__ = ["EXIT_UNCONFIRMED", "rollback", "say_silent", "silent_json", "skipped_json", "skipped_text", "undo_command"]

# Some scorer, or the trainer, didn't confirm in time. The rollback is written, but that worker may still go its old way.
EXIT_UNCONFIRMED = 3


class _Offsets(click.ParamType):
    """`0:1000-2500` → a range of offsets."""

    name = "partition:from-to"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> SkippedRange:
        from state.rewinds import SkippedRange

        if isinstance(value, SkippedRange):
            return value
        match = re.fullmatch(r"(\d{1,9}):(\d{1,18})-(\d{1,18})", str(value).strip())
        if match is None or int(match[2]) >= int(match[3]):
            self.fail(
                f"expected a partition, its first offset to skip and the offset after the last, such as 0:1000-2500, found "
                f"{value!r}",
                param,
                ctx,
            )
        return SkippedRange(partition=int(match[1]), first=int(match[2]), to=int(match[3]))


class _Times(click.ParamType):
    """`2024-05-01T12:00Z..2024-05-01T12:01Z`, or `12m..11m` → from one time up to another."""

    name = "from..to"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> AskedRange:
        from stream.registry.skipping import AskedRange, Moment

        if isinstance(value, AskedRange):
            return value
        parts = str(value).split("..")
        if len(parts) != 2:
            self.fail(f"expected two times with .. between them, such as 12m..11m, found {value!r}", param, ctx)
        # How long ago counts from the operation, by Kafka's clock: this machine's may be wrong.
        first, to = (
            Moment(DURATION.convert(part, param, ctx), ago=True) if is_ago(part) else Moment(TIME.convert(part, param, ctx))
            for part in parts
        )
        if first.ago == to.ago and (first.ms <= to.ms if first.ago else first.ms >= to.ms):
            self.fail(f"expected the earlier time first, found {value!r}", param, ctx)
        return AskedRange(first, to)


@click.command()
@click.option("--to", metavar="VERSION", callback=number_or_alias, help="This version: a number or an alias.")
@click.option("--back", "back_ms", type=DURATION, metavar="DURATION", help="The champion this long ago, such as 10m.")
@click.option("--before", "before_ms", type=TIME, metavar="TIME", help="The champion at this time; UTC without an offset.")
@click.option("--reason", default="no reason given", help="Why; it stays in the registry.")
@click.option(
    "--rewind-trainer",
    "rewind",
    is_flag=True,
    help="The trainer goes back too: its weights, its optimizer, its offsets. It learns again from there.",
)
@click.option(
    "--skip-to-latest",
    "to_latest",
    is_flag=True,
    help="With --rewind-trainer: learn nothing that is in the log now after the version's offsets.",
)
@click.option(
    "--skip",
    "ranges",
    type=_Offsets(),
    multiple=True,
    metavar="P:A-B",
    help="With --rewind-trainer: don't learn these examples: in partition P of `examples` offsets A up to but not including B. "
    "May be given several times.",
)
@click.option(
    "--skip-time",
    "times",
    type=_Times(),
    multiple=True,
    metavar="FROM..TO",
    help="With --rewind-trainer: don't learn examples that Kafka stored from FROM up to but not including TO, by the times of "
    "its records in `examples`: two times, or how long ago (12m..11m). May be given several times.",
)
@click.option(
    "--timeout",
    "timeout_ms",
    type=DURATION,
    default="10s",
    show_default=True,
    help="How long to wait for the scorers, and for the trainer if it goes back.",
)
@click.option("--unchecked", is_flag=True, help="Don't check first that the store has the version.")
@click.option("--dry-run", is_flag=True, help="Say what would happen; write nothing.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@format_option
def rollback(
    to: str | None,
    back_ms: int | None,
    before_ms: int | None,
    reason: str,
    rewind: bool,
    to_latest: bool,
    ranges: tuple[SkippedRange, ...],
    times: tuple[AskedRange, ...],
    timeout_ms: int,
    unchecked: bool,
    dry_run: bool,
    yes: bool,
    output: str,
) -> None:
    """Put an older version back, everywhere, and hold auto-promotion until `resume`.

    By default the newest version older than the champion that is tagged good. Waits until every live scorer serves it.

    The trainer goes on learning from what it has learned, unless --rewind-trainer sends it back, too. That also works after a
    rollback, with --to champion, and while no trainer runs: the next one that starts goes back. Undoing the rollback doesn't
    undo that. Offsets of --skip and --skip-time must not be in the version's weights already.

    Times and durations go by Kafka's clock, not by this machine's. Running the same command with --to again does no harm: where
    that version is champion already by a rollback, it only waits for the scorers.

    Exit code 3 when a scorer, or the trainer that was sent back, didn't confirm in time; 0 when all did (or none is live). A
    scorer that has sent no heartbeat for some seconds isn't waited for. If that is less than 5 minutes ago it is named, and the
    exit code is 3.

    \b
    Examples:
      headrace snapshot rollback --reason "CTR fell"
      headrace snapshot rollback --to 39
      headrace snapshot rollback --back 10m --dry-run
      headrace snapshot rollback --before 2024-05-01T12:00:00Z --yes --format json
      headrace snapshot rollback --back 15m --rewind-trainer --skip-time 12m..11m --reason "labels were flipped"
      headrace snapshot rollback --to 39 --rewind-trainer --skip 0:120000-125000
    """
    from stream.registry.requests import RollbackRequest
    from stream.registry.skipping import SkipRequest

    skip = SkipRequest(to_latest, ranges, times)
    if skip and not rewind:
        raise click.UsageError(
            "--skip, --skip-time and --skip-to-latest say what the trainer leaves out once it has gone back: expected "
            "--rewind-trainer beside them, found none."
        )
    if skip and unchecked:
        raise click.UsageError(
            "--unchecked: expected no --skip, --skip-time or --skip-to-latest beside it, since what the version has learned is "
            "read from the store, found one."
        )
    if sum(each is not None for each in (to, back_ms, before_ms)) > 1:
        raise click.UsageError("expected one of --to, --back and --before, found several.")
    settings = command_settings()
    began = time.monotonic()
    operations = operations_of(settings, unchecked=unchecked)
    target = None if to is None else resolve(settings, to)[0]
    request = RollbackRequest(reason, target, back_ms, before_ms, timeout_ms, rewind=rewind, skip=skip)
    what: RollbackRequest | Plan = request
    if dry_run or (not yes and sys.stdin.isatty()):
        what = plan = ask_kafka(settings, operations.plan(request), ABOUT)
        if dry_run:
            _show_plan(plan, output)
            return
        for line in _trainer_lines(plan.version, plan.skipped):
            click.echo(line, err=True)
        click.confirm(
            f"Roll back from version {plan.previous} to {plan.version} ({len(plan.live)} live scorers)?", abort=True, err=True
        )
        began = time.monotonic()  # the time for thinking it over doesn't count
    done = ask_kafka(settings, operations.rollback(what, began=began), ABOUT)
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
    say_silent(done.silent)
    late = rewind and done.trainer is None
    if late:
        click.echo(
            f"trainer: expected it to go back to version {done.version} within {duration(timeout_ms)}, found that it hasn't. "
            "The request stands: the trainer that leads, or the next one that starts, goes back. `headrace snapshot list` "
            "shows when it has.",
            err=True,
        )
    if done.unconfirmed or done.silent or late:
        sys.exit(EXIT_UNCONFIRMED)


def skipped_text(each: SkippedRange) -> str:
    """A range that is not learned, in words."""
    return f"partition {each.partition}, offsets {each.first:,} up to {each.to:,} ({len(each):,})"


def skipped_json(skipped: Sequence[SkippedRange]) -> list[dict[str, Any]]:
    """Ranges that are not learned."""
    return [
        {"partition": each.partition, "from": each.first, "to": each.to, "who": each.who, "why": each.why, "at_ms": each.at_ms}
        for each in skipped
    ]


def say_silent(silent: Sequence[Silent]) -> None:
    """Name the scorers that nobody waited for, on stderr."""
    for beat, for_ms in silent:
        click.echo(
            f"scorer {beat.worker} on {beat.host}: expected a heartbeat every {duration(beat.heartbeat_ms)}, found the last "
            f"one {duration(for_ms)} old, of version {beat.version}. So it hasn't confirmed: it stands still or was killed. If "
            "it goes on, it reads the registry before it answers. Look at its machine.",
            err=True,
        )


def silent_json(silent: Sequence[Silent]) -> list[dict[str, Any]]:
    """The scorers that nobody waited for."""
    return [{"worker": beat.worker, "host": beat.host, "version": beat.version, "silent_ms": for_ms} for beat, for_ms in silent]


def undo_command(done: ChampionMoved | Plan | Held) -> str | None:
    """The command that restores what was before, on the track that was named."""
    return None if done.undo is None else on_named_track(done.undo.command)


def _trainer_lines(version: int, skipped: tuple[SkippedRange, ...] | None) -> list[str]:
    """What becomes of the trainer, one fact a line."""
    if skipped is None:
        return []
    lines = [f"trainer: goes back to version {version}, and learns again from its offsets"]
    lines += [f"  not learned: {skipped_text(each)}" for each in skipped]
    if skipped:
        lines.append(f"  not learned: {sum(map(len, skipped)):,} offsets of the log together, markers of Kafka's included")
    return lines


def _show_plan(plan: Plan, output: str) -> None:
    workers = [beat.worker for beat in plan.live]
    if output == "json":
        echo_json(
            {
                "from": plan.previous,
                "to": plan.version,
                "held_already": plan.held_already,
                "live": workers,
                "checked": plan.checked,
                "rewind": plan.skipped is not None,
                "skipped": skipped_json(plan.skipped or ()),
                "offsets": plan.offsets,
                "dry_run": True,
            }
        )
        return
    click.echo(f"champion: {plan.previous} → {plan.version} (dry run: nothing was written)")
    click.echo(f"auto-promotion: {'held already' if plan.held_already else 'would be held'}")
    click.echo(f"live scorers: {', '.join(workers) or 'none'}")
    click.echo(f"files of version {plan.version}: {plan.checked} checked")
    for line in _trainer_lines(plan.version, plan.skipped):
        click.echo(line)


def _show_rollback(done: ChampionMoved, output: str) -> None:
    from deploy.cli.snapshot_view import beat_json

    if output == "json":
        echo_json(
            {
                "from": done.previous,
                "to": done.version,
                "held": done.held,
                "confirmed": [{"worker": each.worker, "after_ms": each.after_ms} for each in done.confirmed],
                "unconfirmed": [beat_json(beat) for beat in done.unconfirmed],
                "silent": silent_json(done.silent),
                "rollback_ms": done.took_ms,
                "rewind": done.skipped is not None,
                "skipped": skipped_json(done.skipped or ()),
                "trainer_ms": done.trainer_ms,
                "undo": undo_command(done),
            }
        )
        return
    click.echo(f"champion: {done.previous} → {done.version}, auto-promotion held until `headrace snapshot resume`")
    everyone = len(done.confirmed) + len(done.unconfirmed)
    if not everyone:
        click.echo(f"no scorer is live: nobody had to confirm ({duration(done.took_ms)})")
    else:
        names = ", ".join(each.worker for each in done.confirmed)
        confirmed = f"{len(done.confirmed)} of {everyone} scorers confirmed{f' ({names})' if names else ''}"
        click.echo(f"{confirmed}, {duration(done.took_ms)} after the command")
    for line in _trainer_lines(done.version, done.skipped):
        click.echo(line)
    if done.trainer is not None and done.trainer_ms is not None:
        at = clock(done.trainer.done_at_ms)
        click.echo(f"{done.trainer.done_by}: went back at {at}, {duration(done.trainer_ms)} after the command")
    if done.undo is None:
        click.echo("That was so already, by an earlier rollback: nothing was written.")
    else:
        click.echo(f"undo: {undo_command(done)}")
    if done.skipped is not None:
        click.echo("The undo moves the scorers; the trainer stays with what it has gone back to.")
