"""`headrace topics`: create the nine topics, and compare them with the contract."""

from __future__ import annotations

import click
import msgspec

from deploy.cli.common import await_kafka, echo_json, format_option, track_option, with_track
from state.tracks import MAIN

__all__ = ["topics"]


@click.group()
def topics() -> None:
    """Create the nine topics, and compare them with the contract.

    \b
    Examples:
      headrace topics create
      headrace topics check
    """


@topics.command()
@click.option("--mend", is_flag=True, help="Also set the configuration of topics that exist and differ.")
@track_option
@format_option
def create(mend: bool, output: str) -> None:
    """Create the topics that are missing. Safe to repeat: existing topics are left alone, unless --mend is given.

    \b
    Examples:
      headrace topics create
      HEADRACE_TOPICS__PREFIX=shop- HEADRACE_TOPICS__PARTITIONS=8 headrace topics create
      headrace topics create --mend        and set retention, compaction and limits as the settings say
      headrace topics create --track wide  also the two of a challenger: deltas-wide and snapshots-wide
    """
    from deploy.settings import load_settings
    from stream.topics.admin import create_topics

    settings = with_track(load_settings())
    await_kafka(settings)
    track = settings.snapshots.track or MAIN
    made = create_topics(settings.kafka, settings.topics, settings.join, mend=mend, track=track)
    if output == "json":
        echo_json(msgspec.to_builtins(made))
        return
    for word, names in (("created", made.created), ("mended", made.mended), ("kept", made.kept)):
        for name in names:
            click.echo(f"{word:8} {name}")
    if made.kept and not mend:
        click.echo("Existing topics were left as they are; `headrace topics check` compares them.", err=True)


@topics.command()
@track_option
@format_option
def check(output: str) -> None:
    """Report where topics differ from the contract or from what the join needs, and how to fix that.

    Never writes. Exit code 1 when something differs.

    \b
    Examples:
      headrace topics check
      headrace topics check --format json
    """
    from deploy.settings import load_settings
    from stream.topics.admin import check_topics

    settings = with_track(load_settings())
    await_kafka(settings)
    track = settings.snapshots.track or MAIN
    found = check_topics(settings.kafka, settings.topics, settings.join, track=track)
    if output == "json":
        echo_json(msgspec.to_builtins(found))
    else:
        for problem in found:
            click.echo(f"{problem.topic}: {problem.what}: expected {problem.expected}, found {problem.found}")
            click.echo(f"  fix: {problem.cure}")
        if not found:
            which = "All nine topics" if track == MAIN else f"All nine topics, and the two of track {track},"
            click.echo(f"{which} are as the contract says.")
    if found:
        click.get_current_context().exit(1)
