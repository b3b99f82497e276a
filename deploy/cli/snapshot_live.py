"""`headrace snapshot verify --live`: whether all live scorers serve the same weights."""

from __future__ import annotations

import sys

import click

from deploy.cli.common import ask_kafka, echo_json
from deploy.cli.snapshot_common import ABOUT, command_settings, topic_names

__all__ = ["verify_live"]

# Some scorer serves other weights than the rest: it must not be taken for a problem of the command.
EXIT_DIFFERENT = 1


def verify_live(wait_ms: int, output: str) -> None:
    """Compare the digests of all live scorers, print what was found, and exit with 1 if any differ."""
    from deploy.cli.snapshot_view import beat_json, weights_text
    from stream.deltas.live_digests import compare_live

    settings = command_settings()
    found = ask_kafka(settings, compare_live(settings.kafka, topic_names(settings), wait_ms=wait_ms), ABOUT)
    if output == "json":
        echo_json(
            {
                "equal": not found.differences if found.compared else None,
                "points": found.compared,
                "differences": [each._asdict() for each in found.differences],
                "alone": found.alone,
                "scorers": [beat_json(beat) for beat in found.beats.values()],
            }
        )
    else:
        for worker, beat in found.beats.items():
            lone = "; at no point that another scorer, the trainer or a version was at" if worker in found.alone else ""
            click.echo(f"scorer {worker} on {beat.host}: {weights_text(beat)}{lone}")
        outcome = f"{len(found.differences)} of them different" if found.differences else "all digests equal"
        compared = f"{found.compared} points compared, {outcome}" if found.compared else "nothing to compare them with"
        click.echo(f"{len(found.beats)} live scorers, {compared}")
    for each in found.differences:
        who = "; ".join(f"{digest}: {', '.join(names)}" for digest, names in each.digests.items())
        click.echo(
            f"{each.chain} at sequence {each.sequence}: expected one digest, found {len(each.digests)} ({who}). Restart a "
            "scorer that differs from the others, or go back: `headrace snapshot rollback`.",
            err=True,
        )
    if found.differences:
        sys.exit(EXIT_DIFFERENT)
