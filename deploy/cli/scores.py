"""`headrace scores`: show what the scorers answer on the live score topic."""

from __future__ import annotations

import signal
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
import msgspec

from deploy.cli.common import await_kafka, echo_document, format_option, on_terminal
from deploy.cli.tables import printable, styled

if TYPE_CHECKING:
    from headrace.scores import Answer

__all__ = ["scores"]

_SHOWN = 3  # best candidates on a line


@click.group()
def scores() -> None:
    """Show the answers of the scorers.

    \b
    Examples:
      headrace scores tail
      headrace scores tail --format json --limit 100
    """


@scores.command()
@click.option("--limit", type=click.IntRange(min=1), help="End after this many answers; never when not given.")
@click.option("--from-beginning", is_flag=True, help="Begin with the oldest answer that is kept, instead of now.")
@format_option
def tail(limit: int | None, from_beginning: bool, output: str) -> None:
    """Follow the live score topic until Ctrl-C: one line for each answer, as text or as a JSON object.

    \b
    Examples:
      headrace scores tail
      headrace scores tail --from-beginning --limit 20
      headrace scores tail --format json | jq .model_version
    """
    from deploy.settings import load_settings
    from headrace.errors import InvalidAnswer
    from headrace.scores import ScoreStream
    from stream.kafka.clients import kafka_python_options
    from stream.topics.names import TopicNames

    settings = load_settings()
    await_kafka(settings)
    topic = TopicNames.of(settings.topics).scores
    with ScoreStream(topic, kafka_python_options(settings.kafka), from_beginning=from_beginning) as stream:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the command as Ctrl-C does
        left = limit
        try:
            click.echo(f"following {topic} at {settings.kafka.bootstrap_servers}; Ctrl-C ends it", err=True)
            if output == "text":
                click.echo(styled(f"{'time':12} {'version':>7} {'age':>8}  {'request':36} best candidates", bold=on_terminal()))
            while left is None or left > 0:
                try:
                    answers = stream.poll()
                except InvalidAnswer as error:
                    click.echo(f"{error} This record is skipped.", err=True)
                    continue
                for answer in answers[:left]:
                    if output == "json":
                        echo_document(msgspec.json.encode(answer))
                    else:
                        click.echo(_line(answer))
                    left = None if left is None else left - 1
        except KeyboardInterrupt:
            click.echo(err=True)


def _line(answer: Answer) -> str:
    version = "-" if answer.model_version is None else f"{answer.model_version}{f'+{answer.delta}' if answer.delta else ''}"
    age = "-" if answer.snapshot_age_ms is None else f"{answer.snapshot_age_ms / 1_000:.1f} s"
    if answer.error is not None:
        rest = styled(printable(str(answer.error)), fg="red")
    else:
        best = sorted(answer.scores, key=lambda score: -score.score)
        rest = "  ".join(f"{printable(score.id)} {score.score:.4f}" for score in best[:_SHOWN])
        rest += f"  and {len(best) - _SHOWN} more" if len(best) > _SHOWN else ""
        if answer.shadow_version is not None and best:
            rest += f"  shadow {answer.shadow_version}: {best[0].shadow or 0:.4f}"
        rest += styled("  stale", fg="yellow") if answer.stale else ""
    return f"{_clock(answer.event):12} {version:>7} {age:>8}  {printable(answer.request_id):36} {rest}"


def _clock(event: dict[str, Any]) -> str:
    """The answer's CloudEvents `time` as a local time of day; a dash without one."""
    try:
        when = datetime.fromisoformat(event["time"])
    except (KeyError, ValueError):
        return "-"
    return when.replace(tzinfo=when.tzinfo or UTC).astimezone().strftime("%H:%M:%S.%f")[:12]
