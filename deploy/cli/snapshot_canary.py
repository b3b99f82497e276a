"""`headrace snapshot shadow`, `canary` and `watch`: try a version on a share of the requests, and see what comes of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from deploy.cli.common import ask_kafka, echo_json, format_option
from deploy.cli.snapshot_common import ABOUT, command_settings, require_serving, resolve, topic_names
from deploy.cli.times import DURATION, duration

if TYPE_CHECKING:
    from deploy.settings import Settings
    from state.canary import Mode
    from stream.registry.canary_operations import CanaryOperations, CanaryPlan, CanaryRequest, CanaryStopped

__all__ = ["SHARE", "canary", "shadow", "watch"]

# A scorer didn't confirm in time that the candidate takes no part any more, as after `headrace snapshot rollback`.
EXIT_UNCONFIRMED = 3
# How `headrace snapshot watch` ends when the candidate isn't promoted, and when it isn't decided in time.
EXIT_TAKEN_BACK, EXIT_WATCH_TIMEOUT = 4, 5


class _Share(click.ParamType):
    """`5%` or `0.05` → 0.05."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value).strip()
        try:
            number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            number = -1.0
        if not 0 <= number <= 1:
            self.fail(f"expected a share such as 5% or 0.05, found {value!r}", param, ctx)
        return number


SHARE = _Share()


def _trial_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `shadow` and `canary` share."""
    options: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = [
        click.argument("what", metavar="VERSION|stop"),
        click.option("--share", type=SHARE, help="Part of the requests, such as 5%."),
        click.option("--reason", default="no reason given", help="Why; it stays in the registry."),
        click.option("--clicks", type=click.IntRange(min=1), help="Least clicks before it is promoted.  [default: 500]"),
        click.option("--loss-margin", type=SHARE, help="How much worse its log loss may be.  [default: 1%]"),
        click.option("--calibration-margin", type=SHARE, help="How far its calibration may be from 1.  [default: 10%]"),
        click.option("--ctr-margin", type=SHARE, help="How much lower a canary's click rate may be.  [default: 5%]"),
        click.option("--limit", "limit_ms", type=DURATION, help="Time after which it is taken back undecided.  [default: 1d]"),
        click.option(
            "--timeout",
            "timeout_ms",
            type=DURATION,
            default="10s",
            show_default=True,
            help="stop: longest wait for scorers.",
        ),
        click.option("--unchecked", is_flag=True, help="Don't check first that the store has the version."),
        click.option("--dry-run", is_flag=True, help="Say what would happen; write nothing."),
        click.option("--yes", is_flag=True, help="Don't ask."),
        format_option,
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command()
@_trial_options
def shadow(**options: Any) -> None:
    """Let VERSION score a share of the requests beside the champion, which answers them.

    Answers carry both scores, and impressions that carry them too let the trainer compare the two. The trainer promotes VERSION
    when it is not worse, and ends the shadow when it is; `headrace snapshot watch` shows it. VERSION is a number or an alias.

    \b
    Examples:
      headrace snapshot shadow 42 --share 5% --reason "wider network"
      headrace snapshot shadow candidate --share 100% --clicks 2000
      headrace snapshot shadow stop --reason "wrong version"
    """
    _try("shadow", **options)


@click.command()
@_trial_options
def canary(**options: Any) -> None:
    """Let VERSION answer a share of the requests.

    The share is chosen by a hash of the request's id, the same in every scorer. The trainer compares the log loss, calibration
    and click rate of what both versions have answered. It promotes VERSION when that is not worse, and takes it back when it
    is, or when time is over. VERSION is a number or an alias.

    `canary stop` ends a canary or a shadow, and waits for the scorers: exit code 3 when one didn't confirm in time.

    \b
    Examples:
      headrace snapshot canary 42 --share 5% --reason "wider network"
      headrace snapshot canary candidate --share 1% --clicks 2000 --limit 12h --dry-run
      headrace snapshot canary stop --reason "CTR fell"
    """
    _try("canary", **options)


def _try(
    mode: Mode,
    *,
    what: str,
    share: float | None,
    reason: str,
    timeout_ms: int,
    unchecked: bool,
    dry_run: bool,
    yes: bool,
    output: str,
    **limits: Any,
) -> None:
    from state.canary import Thresholds
    from stream.registry.canary_operations import CanaryRequest

    if what == "stop" and share is not None:
        raise click.UsageError("stop: expected no --share, found one.")
    if what != "stop" and share is None:
        raise click.UsageError("expected --share, such as --share 5%, found none.")
    settings = command_settings()
    require_serving(settings, mode)
    operations = _operations(settings, unchecked=unchecked)
    if share is None:
        _stop(settings, operations, reason, timeout_ms, dry_run, yes, output)
        return
    given = {name: value for name, value in limits.items() if value is not None}
    thresholds = Thresholds(**given)
    request = CanaryRequest(mode, resolve(settings, what)[0], share, reason, thresholds)
    if dry_run or (not yes and sys.stdin.isatty()):
        plan = ask_kafka(settings, operations.plan_canary(request), ABOUT)
        if dry_run:
            _show_plan(plan, output)
            return
        click.confirm(_question(request, plan), abort=True, err=True)
    begun = ask_kafka(settings, operations.begin_canary(request), ABOUT)
    if output == "json":
        from deploy.cli.snapshot_view import canary_json

        echo_json({**(canary_json(begun.canary) or {}), "undo": begun.undo, "dry_run": False})
        return
    who = "is scored by it too" if mode == "shadow" else "is answered by it"
    click.echo(f"{mode} of version {request.version}: {share * 100:g} % of the requests {who}, as soon as a scorer has read it")
    click.echo("watch it: headrace snapshot watch")
    click.echo(f"undo: {begun.undo}")


def _stop(
    settings: Settings, operations: CanaryOperations, reason: str, timeout_ms: int, dry_run: bool, yes: bool, output: str
) -> None:
    if dry_run or (not yes and sys.stdin.isatty()):
        seen = ask_kafka(settings, operations.look(), ABOUT)
        running = seen.state.canary
        if dry_run:
            if output == "json":
                from deploy.cli.snapshot_view import canary_json

                echo_json({**(canary_json(running) or {}), "dry_run": True})
            elif running.runs:
                click.echo(f"{running.mode} of version {running.version}: would be stopped (dry run: nothing was written)")
            else:
                click.echo("no shadow or canary runs (dry run: nothing was written)")
            return
        if running.runs:
            click.confirm(f"Stop the {running.mode} of version {running.version}?", abort=True, err=True)
    stopped = ask_kafka(settings, operations.stop_canary(reason, timeout_ms=timeout_ms), ABOUT)
    _show_stopped(stopped, timeout_ms, output)
    if stopped.unconfirmed:
        sys.exit(EXIT_UNCONFIRMED)


def _question(request: CanaryRequest, plan: CanaryPlan) -> str:
    what = "scored by it too" if request.mode == "shadow" else "answered by it"
    return (
        f"Try version {request.version} beside the champion, {plan.champion}: {request.share * 100:g} % of the requests {what} "
        f"({len(plan.live)} live scorers)?"
    )


def _show_plan(plan: CanaryPlan, output: str) -> None:
    from deploy.cli.snapshot_view import canary_json

    found = plan.change.canary
    workers = [beat.worker for beat in plan.live]
    if output == "json":
        echo_json({**(canary_json(found) or {}), "champion": plan.champion, "live": workers, "dry_run": True})
        return
    click.echo(f"{found.mode} of version {found.version}, {found.share * 100:g} % (dry run: nothing was written)")
    click.echo(f"beside the champion, {plan.champion}")
    click.echo(f"live scorers: {', '.join(workers) or 'none'}")


def _show_stopped(stopped: CanaryStopped, timeout_ms: int, output: str) -> None:
    from deploy.cli.snapshot_view import canary_json

    found, change = stopped.change.canary, stopped.change
    if output == "json":
        echo_json(
            {
                **(canary_json(found) or {}),
                "changed": change.changed,
                "confirmed": stopped.confirmed,
                "unconfirmed": [beat.worker for beat in stopped.unconfirmed],
                "stop_ms": stopped.took_ms,
                "undo": change.undo,
            }
        )
    elif not change.changed:
        click.echo("No shadow or canary runs; nothing was written.")
    else:
        everyone = len(stopped.confirmed) + len(stopped.unconfirmed)
        click.echo(f"{found.mode} of version {found.version}: stopped")
        click.echo(f"{len(stopped.confirmed)} of {everyone} scorers confirmed, {duration(stopped.took_ms)} after the command")
        click.echo(f"undo: {change.undo}")
    for beat in stopped.unconfirmed:
        click.echo(
            f"scorer {beat.worker} on {beat.host}: expected no candidate within {duration(timeout_ms)}, found version "
            f"{beat.candidate} at registry offset {beat.registry_offset}. The stop stands; look at that scorer's log.",
            err=True,
        )


@click.command()
@click.option("--timeout", "timeout_ms", type=DURATION, help="Stop watching after this time; otherwise when the trial ends.")
@format_option
def watch(timeout_ms: int | None, output: str) -> None:
    """Watch a shadow or canary until it ends. Writes nothing.

    Shows champion, candidate and share, the clicks so far, the log loss of each with its standard error, what the rule says of
    it, and which scorers have the candidate ready. `--format json` prints one line for each change.

    Exit code 0 when the candidate was promoted, 4 when it was taken back or stopped, 5 when `--timeout` is over. A trial that
    has ended already is shown once.

    \b
    Examples:
      headrace snapshot watch
      headrace snapshot watch --timeout 2h --format json
    """
    from deploy.cli.snapshot_canary_view import watch_trial

    settings = command_settings()
    outcome = ask_kafka(settings, watch_trial(_operations(settings), timeout_ms, json=output == "json"), ABOUT)
    if outcome is None:
        click.echo(f"expected the trial to end within {duration(timeout_ms or 0)}, found it running. It goes on.", err=True)
        sys.exit(EXIT_WATCH_TIMEOUT)
    if outcome != "promoted":
        sys.exit(EXIT_TAKEN_BACK)


def _operations(settings: Settings, *, unchecked: bool = False) -> CanaryOperations:
    from deploy.cli.common import who
    from state.store import SnapshotStore
    from stream.registry.canary_operations import CanaryOperations

    store = None if unchecked else SnapshotStore(settings.snapshots)
    return CanaryOperations(settings.kafka, topic_names(settings), who(), store=store)
