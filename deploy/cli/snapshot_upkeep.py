"""`headrace snapshot gc` and `reindex`: delete versions that nothing needs, make the registry again from the store."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from deploy.cli.common import ask_kafka, echo_json, format_option
from deploy.cli.snapshot_common import ABOUT, command_settings, operations_of

if TYPE_CHECKING:
    from stream.registry.collect import CollectionPlan
    from stream.registry.reindex import Reindexing

__all__ = ["gc", "reindex"]


@click.command()
@click.option("--reason", default="by hand", show_default=True, help="Why; it stays in the registry.")
@click.option("--dry-run", is_flag=True, help="Say what would be deleted; write nothing.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@format_option
def gc(reason: str, dry_run: bool, yes: bool, output: str) -> None:
    """Delete versions that nothing needs: files and records, for good.

    The settings `snapshots.keep_…` say what is kept. Besides, versions with an alias or a tag and those that live scorers
    report are kept. The trainer deletes versions by itself, too.

    A run that is killed, or that loses the store, leaves versions without a record. The next run deletes their files.

    \b
    Examples:
      headrace snapshot gc --dry-run
      headrace snapshot gc --yes --format json
    """
    settings = command_settings()
    operations = operations_of(settings)
    if dry_run or (not yes and sys.stdin.isatty()):
        plan = ask_kafka(settings, operations.plan_gc(settings.snapshots), ABOUT)
        if dry_run:
            _show_plan(plan, output)
            return
        count = len(plan.versions) + len(plan.pending) + len(plan.rests)
        if not count:
            click.echo("nothing to delete")
            return
        click.confirm(f"Delete {count} versions ({plan.size / 1e6:,.1f} MB) for good?", abort=True, err=True)
    done = ask_kafka(settings, operations.gc(settings.snapshots, reason), ABOUT)
    if output == "json":
        echo_json({"deleted": done.versions, "bytes": done.size, "foreign": done.foreign, "dry_run": False})
    else:
        click.echo(f"deleted {len(done.versions)} versions{_shown(done.versions)}, {done.size / 1e6:,.1f} MB")
    for version in done.foreign:
        click.echo(
            f"version {version}: expected the one that was announced, found another of that number in the store. It was left "
            "alone: look whose it is, and delete it by hand.",
            err=True,
        )
    if done.foreign:
        sys.exit(1)


@click.command()
@click.option(
    "--champion",
    type=click.IntRange(min=0),
    metavar="VERSION",
    help="Champion of a registry that is lost; 0: none. By default the version that live scorers answer with.",
)
@click.option("--reason", default="the registry was lost", show_default=True, help="Why; it stays in the registry.")
@click.option("--dry-run", is_flag=True, help="Say what would be entered; write nothing.")
@format_option
def reindex(champion: int | None, reason: str, dry_run: bool, output: str) -> None:
    """Make the registry again from the store, after the topic `snapshots` was lost.

    Enters every version that is whole in the store and that the registry doesn't know. If it knows none at all, the version
    that live scorers answer with becomes champion, and auto-promotion is held, since nobody knows whether it was. Aliases,
    tags, `good` and the history are lost with the topic.

    A run that is killed is run again. Exit code 1 when a version in the store couldn't be read.

    \b
    Examples:
      headrace topics create && headrace snapshot reindex --dry-run
      headrace snapshot reindex --champion 41 --reason "the topic was deleted"
    """
    settings = command_settings()
    done = ask_kafka(settings, operations_of(settings).reindex(reason, champion=champion, dry_run=dry_run), ABOUT)
    if output == "json":
        echo_json(
            {
                "lost": done.lost,
                "added": done.added,
                "repaired": done.repaired,
                "broken": {str(version): problem for version, problem in done.broken.items()},
                "champion": done.champion,
                "dry_run": dry_run,
            }
        )
    else:
        _show_reindexing(done, dry_run)
    for problem in done.broken.values():
        click.echo(problem, err=True)
    if done.broken:
        sys.exit(1)


def _show_plan(plan: CollectionPlan, output: str) -> None:
    if output == "json":
        echo_json(
            {
                "delete": plan.versions,
                "bytes": plan.size,
                "kept": {str(version): why for version, why in plan.kept.items()},
                "pending": plan.pending,
                "rests": plan.rests,
                "dry_run": True,
            }
        )
        return
    click.echo(
        f"would delete {len(plan.versions)} versions{_shown(plan.versions)}, {plan.size / 1e6:,.1f} MB (dry run: nothing was "
        "written)"
    )
    if plan.pending:
        click.echo(f"would end an earlier deletion of {len(plan.pending)} versions{_shown(plan.pending)}")
    if plan.rests:
        click.echo(f"would delete what was never announced: {len(plan.rests)} versions{_shown(plan.rests)}")
    from deploy.cli.tables import print_table

    print_table(("kept", "why"), [[str(version), why] for version, why in plan.kept.items()], right=("kept",))


def _show_reindexing(done: Reindexing, dry_run: bool) -> None:
    would = "would enter" if dry_run else "entered"
    click.echo(f"{would} {len(done.added)} versions{_shown(done.added)}")
    if done.repaired:
        click.echo(f"{'would complete' if dry_run else 'completed'} the records of {len(done.repaired)} versions")
    if done.champion is not None:
        click.echo(
            f"champion: {'would be ' if dry_run else ''}{done.champion}, auto-promotion held until `headrace snapshot resume`"
        )
    elif done.lost:
        click.echo("champion: none")
    if dry_run:
        click.echo("dry run: nothing was written")


def _shown(versions: list[int] | tuple[int, ...]) -> str:
    """A few numbers in brackets, for the eye."""
    if not versions:
        return ""
    few = ", ".join(map(str, versions[:3]))
    return f" ({few})" if len(versions) <= 3 else f" ({few}, … {versions[-1]})"
