"""`headrace snapshot gate` and `release`: whether the gate withholds what is learned, and an operator's release."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from deploy.cli.common import ask_kafka, echo_json, format_option
from deploy.cli.snapshot_common import ABOUT, command_settings, operations_of, reason_option, topic_names
from deploy.cli.times import clock

if TYPE_CHECKING:
    from state.registry import RegistryState

__all__ = ["gate", "release"]

# The gate withholds what is learned. 1 is for errors, 2 for wrong usage, 3 to 5 for what other commands of the group report.
EXIT_WITHHELD = 6


@click.command()
@format_option
def gate(output: str) -> None:
    """Show whether the gate lets through what is learned, and why, as of the newest version.

    Exit code 6 while it withholds, 0 while it doesn't or there is no version yet. A version is written each
    `snapshots.interval_ms`, so this may be as old as that; `headrace_trainer_gate_flowing` is newer.

    \b
    Examples:
      headrace snapshot gate
      headrace snapshot gate --format json
      headrace snapshot gate || page-somebody
    """
    from stream.registry.log import read_registry

    settings = command_settings()
    document = gate_json(ask_kafka(settings, read_registry(settings.kafka, topic_names(settings)), ABOUT))
    if output == "json":
        echo_json(document)
    else:
        _print(document)
    if document["flow"] == "withheld":
        sys.exit(EXIT_WITHHELD)


@click.command()
@reason_option
@format_option
def release(reason: str, output: str) -> None:
    """Release what the gate withholds: the trainer publishes it within seconds, as one delta.

    Whoever releases vouches for the weights: until there is another anchor, only what is still worse by
    `snapshots.gate_loss_margin` is withheld again. Weights that aren't finite are withheld all the same. A rollback isn't
    ended by this; that is `headrace snapshot resume`.

    \b
    Examples:
      headrace snapshot release --reason "the campaign that began at noon is real"
    """
    settings = command_settings()
    done = ask_kafka(settings, operations_of(settings).release(reason), ABOUT)
    if output == "json":
        echo_json({"line": done.line, "withheld": done.withheld, "since_ms": done.since_ms, "reason": reason})
        return
    if done.withheld is None:
        click.echo(
            f"line {done.line}: the newest version was let through. If the trainer withholds since then, it is released."
        )
    else:
        assert done.since_ms is not None
        click.echo(f"line {done.line}: released; withheld since {clock(done.since_ms)}: {done.withheld}")


def gate_json(state: RegistryState) -> dict[str, Any]:
    """What the registry says of the gate. `flow` is null while no version has a report."""
    version = max(state.versions, default=None)
    report = None if version is None else state.versions[version].verdict
    last = state.release
    return {
        "version": version,
        "flow": None if report is None else report.flow,
        "reason": None if report is None else report.reason,
        "since_ms": None if report is None else report.since_ms,
        "line": None if report is None else report.line,
        "anchor": None if report is None else report.anchor,
        "loss_change": None if report is None else report.loss_change,
        "loss_error": None if report is None else report.loss_error,
        "score_shift": None if report is None else report.score_shift,
        "problems": [] if report is None else list(report.problems),
        "released": None
        if last.line is None
        else {"line": last.line, "who": last.who, "at_ms": last.at_ms, "reason": last.reason},
    }


def _print(document: dict[str, Any]) -> None:
    if document["flow"] is None:
        click.echo("no version has a report of the gate yet")
        return
    since = f" since {clock(document['since_ms'])}" if document["since_ms"] else ""
    click.echo(f"{document['flow']}{since}: {document['reason']} (as of version {document['version']})")
    if document["loss_change"] is not None:
        anchor = "the served scores" if document["anchor"] is None else f"version {document['anchor']}"
        error = document["loss_error"] * 100
        click.echo(f"log loss {document['loss_change'] * 100:+.2f} % ± {error:.2f} % against {anchor}")
    if document["score_shift"] is not None:
        click.echo(f"scores of recent requests shifted by {document['score_shift']:.3f} logits")
    for problem in document["problems"]:
        click.echo(f"problem: {problem}")
    if (last := document["released"]) is not None:
        click.echo(f"last released by {last['who']} at {clock(last['at_ms'])}, line {last['line']}: {last['reason']}")
    if document["flow"] == "withheld":
        click.echo('Scorers stay at the last good state. `headrace snapshot release --reason "…"` lets the weights through.')
