"""`headrace doctor`: what is wrong with a running system, and how to fix it."""

from __future__ import annotations

from typing import Any

import click

from deploy.cli.common import ask_kafka, echo_json, format_option

__all__ = ["doctor"]


@click.command()
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    default=20_000,
    show_default=True,
    help="How many of the newest records to read from each of impressions, clicks and dead-letters, over all partitions.",
)
@format_option
def doctor(sample: int, output: str) -> None:
    """Find what is wrong with topics, producers and workers, and say how to fix it. Never writes.

    What producers send is judged by a sample: the newest records. The exit code is 0 if everything could be read and nothing
    was found, else 1.

    \b
    Examples:
      headrace doctor
      headrace doctor --sample 200000
      headrace doctor --format json | jq -r '.findings[].cure'
    """
    from deploy.doctor.examination import CHECKS, examine
    from deploy.doctor.kafka_readings import read_everything
    from deploy.settings import load_settings

    settings = load_settings()
    readings = ask_kafka(settings, read_everything(settings, sample=sample), "topics and groups")
    findings = examine(readings)
    sampled: dict[str, int] = {"impressions": 0, "clicks": 0, "dead-letters": len(readings.letters)}
    for (topic, _), tail in readings.tails.items():
        sampled[topic] += len(tail.offsets)
    if output == "json":
        document: dict[str, Any] = {"findings": findings, "checks": list(CHECKS), "sampled": sampled, "unread": readings.unread}
        echo_json(document)
    else:
        for finding in findings:
            click.echo(f"{finding.check}: {finding.what}")
            for name in ("expected", "found", "cure"):
                click.echo(f"  {name:8} {getattr(finding, name)}")
        if not findings:
            found = "Nothing found, but not everything could be read" if readings.unread else "Nothing found"
            click.echo(f"{found}: {len(CHECKS)} checks.")
        counts = ", ".join(f"{count:,} {topic}" for topic, count in sampled.items())
        click.echo(f"Sampled the newest of each topic: {counts}.", err=True)
        for reason in readings.unread:
            click.echo(f"Could not read {reason}", err=True)
    if findings or readings.unread:
        click.get_current_context().exit(1)
