"""`headrace model compare`, `promote` and `shadow`: challengers beside the track that serves."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from deploy.cli.common import ask_kafka, echo_json, format_option
from deploy.cli.snapshot_canary import SHARE
from deploy.cli.snapshot_common import ABOUT, reason_option
from deploy.cli.times import DURATION, duration

if TYPE_CHECKING:
    from deploy.settings import Settings
    from stream.registry.track_operations import TrackOperations

__all__ = ["compare", "promote", "shadow"]

# Some scorer didn't confirm in time, as after `headrace snapshot rollback`.
EXIT_UNCONFIRMED = 3
# Time between two looks of --watch. Trainers write their figures every 5 s.
WATCH_S = 2.0

_timeout = click.option(
    "--timeout", "timeout_ms", type=DURATION, default="10s", show_default=True, help="How long to wait for the scorers."
)


@click.command()
@click.argument("name", required=False)
@click.option("--watch", is_flag=True, help="Show it again every 2 s, until Ctrl-C.")
@format_option
def compare(name: str | None, watch: bool, output: str) -> None:
    """Compare challengers with the track that serves, by what both have scored: all of them, or NAME.

    For each challenger with a share of the requests: impressions and clicks that both sides have scored, log loss, normalised
    entropy (NE), AUC and calibration of both, the difference with its 95 % interval, how old each side's weights are, which
    scorers have it ready, and a verdict. The challenger's trainer counts and writes the figures every 5 s. Writes nothing.

    \b
    Examples:
      headrace model compare
      headrace model compare wide --watch
      headrace model compare --format json | jq '.challengers[].verdict'
    """
    from deploy.cli.model_tracks_view import compared_json, print_compared

    settings = _settings()
    operations = _operations(settings)
    while True:
        seen = ask_kafka(settings, operations.look(), ABOUT)
        document = compared_json(seen, name, time.time_ns() // 1_000_000)
        if output == "json":
            echo_json(document)
        else:
            print_compared(document)
        if not watch:
            return
        time.sleep(WATCH_S)
        if output == "text":
            click.echo()


@click.command()
@click.argument("name")
@reason_option
@_timeout
@click.option("--unchecked", is_flag=True, help="Don't check first that its newest version is whole and that its gate is open.")
@click.option("--dry-run", is_flag=True, help="Say what would happen; write nothing.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@format_option
def promote(name: str, reason: str, timeout_ms: int, unchecked: bool, dry_run: bool, yes: bool, output: str) -> None:
    """Let track NAME serve: scorers follow its chain from now on.

    The track that served before gets the share of the requests that NAME had, so that `compare` goes on the other way round.
    Its trainer goes on, and the printed command undoes the promotion. Waits until every live scorer answers with NAME.

    Exit code 3 when a scorer didn't confirm in time; 0 when all did (or none is live).

    \b
    Examples:
      headrace model promote wide --reason "0.6 % less log loss over 20,000 clicks"
      headrace model promote wide --reason "try" --dry-run
      headrace model promote main --reason "back again" --yes --format json
    """
    settings = _settings()
    operations = _operations(settings, unchecked=unchecked)
    if dry_run or (not yes and sys.stdin.isatty()):
        plan = ask_kafka(settings, operations.plan_promotion(name, reason), ABOUT)
        workers = [beat.worker for beat in plan.live]
        if dry_run:
            if output == "json":
                found = {"from": plan.promoted.previous, "to": name, "version": plan.version, "live": workers, "dry_run": True}
                echo_json(found)
                return
            click.echo(f"serving: {plan.promoted.previous} → {name}, version {plan.version} (dry run: nothing was written)")
            click.echo(f"live scorers: {', '.join(workers) or 'none'}")
            return
        click.confirm(
            f"Let {name} serve instead of {plan.promoted.previous} ({len(workers)} live scorers)?", abort=True, err=True
        )
    done = ask_kafka(settings, operations.promote(name, reason, timeout_ms=timeout_ms), ABOUT)
    promoted = done.promoted
    if output == "json":
        echo_json(
            {
                "from": promoted.previous,
                "to": promoted.track,
                "version": done.version,
                "share_of_former": promoted.shadow.share,
                "confirmed": done.confirmed,
                "unconfirmed": [beat.worker for beat in done.unconfirmed],
                "promote_ms": done.took_ms,
                "undo": promoted.undo,
            }
        )
    else:
        click.echo(f"serving: {promoted.previous} → {promoted.track}")
        _say_confirmed(len(done.confirmed), len(done.unconfirmed), done.took_ms)
        if promoted.shadow.share:
            click.echo(f"{promoted.previous} scores {promoted.shadow.share * 100:g} % of the requests beside it")
        click.echo(f"undo: {promoted.undo}")
    for beat in done.unconfirmed:
        click.echo(
            f"scorer {beat.worker} on {beat.host}: expected track {name} within {duration(timeout_ms)}, found {beat.track} "
            f"with version {beat.version}. The promotion stands; look at that scorer's log, or stop it. A scorer of an older "
            "release knows no tracks.",
            err=True,
        )
    if done.unconfirmed:
        sys.exit(EXIT_UNCONFIRMED)


@click.command()
@click.argument("name")
@click.option("--share", type=SHARE, required=True, help="Part of the requests, such as 5%; 0 ends it.")
@click.option("--reason", default="no reason given", help="Why; it stays in the registry.")
@_timeout
@format_option
def shadow(name: str, share: float, reason: str, timeout_ms: int, output: str) -> None:
    """Let track NAME score a share of the requests beside the track that serves, which answers them.

    Answers carry both scores, and impressions that carry them too let the trainer of NAME compare the two; see `headrace model
    compare`. Several tracks can have a share, each of other requests. Another share begins the comparison anew.

    With --share 0 the command waits until no scorer asks NAME any more: exit code 3 when one didn't confirm in time.

    \b
    Examples:
      headrace model shadow wide --share 5%
      headrace model shadow wide --share 0 --reason "not better"
    """
    settings = _settings()
    done = ask_kafka(settings, _operations(settings).share(name, share, reason, timeout_ms=timeout_ms), ABOUT)
    undo, track = done.shared.undo, done.shared.track
    if output == "json":
        echo_json(
            {
                "track": track.name,
                "share": track.share,
                "changed": undo is not None,
                "confirmed": done.confirmed,
                "unconfirmed": [beat.worker for beat in done.unconfirmed],
                "undo": undo,
            }
        )
    elif undo is None:
        click.echo(f"{name}: has a share of {track.share * 100:g} % already; nothing was written")
    elif share:
        click.echo(f"{name}: scores {share * 100:g} % of the requests beside, as soon as a scorer has read it")
        click.echo("watch it: headrace model compare")
        click.echo(f"undo: {undo}")
    else:
        click.echo(f"{name}: scores no requests beside any more")
        _say_confirmed(len(done.confirmed), len(done.unconfirmed), done.took_ms)
        click.echo(f"undo: {undo}")
    for beat in done.unconfirmed:
        click.echo(
            f"scorer {beat.worker} on {beat.host}: expected no scores by {name} within {duration(timeout_ms)}, found that it "
            "still makes some. The change stands; look at that scorer's log.",
            err=True,
        )
    if done.unconfirmed:
        sys.exit(EXIT_UNCONFIRMED)


def _say_confirmed(confirmed: int, unconfirmed: int, took_ms: float) -> None:
    everyone = confirmed + unconfirmed
    if everyone:
        click.echo(f"{confirmed} of {everyone} scorers confirmed, {duration(took_ms)} after the command")
    else:
        click.echo("no scorer is live: nobody had to confirm")


def _settings() -> Settings:
    from deploy.settings import load_settings

    return load_settings()


def _operations(settings: Settings, *, unchecked: bool = False) -> TrackOperations:
    from deploy.cli.common import who
    from stream.registry.track_operations import TrackOperations
    from stream.topics.names import TopicNames

    return TrackOperations(
        settings.kafka, TopicNames.of(settings.topics), who(), snapshots=None if unchecked else settings.snapshots
    )
