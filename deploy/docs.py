"""Writes the generated pages: `docs/cli.md` from every command's `--help`, `docs/settings.md` from the settings tree, and the
tables of metrics in `docs/operations.md` from the workers' registries.

`python -m deploy.docs --check` writes nothing and exits with 1 when a page isn't what the code says.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import click
from prometheus_client import CollectorRegistry

from deploy.cli import cli
from deploy.cli.failures import EXIT_CODES
from deploy.settings_page import settings_page
from stream.join.metrics import JoinMetrics
from stream.scorer.candidate_metrics import CandidateMetrics
from stream.scorer.challenger_metrics import ChallengerMetrics
from stream.scorer.following_metrics import FollowingMetrics
from stream.scorer.metrics import ScorerMetrics
from stream.trainer.canary_metrics import CanaryMetrics
from stream.trainer.challenge_metrics import ChallengeMetrics
from stream.trainer.metrics import StandbyMetrics, TrainerMetrics
from stream.trainer.table_metrics import TableMetrics
from stream.worker.metrics import new_prometheus, start_time

__all__ = ["Described", "main", "metrics", "pages"]

ROOT = Path(__file__).resolve().parents[1]
OPERATIONS = "docs/operations.md"
METRICS_BEGIN = "<!-- These tables are written by `make docs` from the code; edit that instead. -->"
METRICS_END = "<!-- The end of what `make docs` writes. -->"
NOTE = "<!-- Written by `make docs` from the code; edit that instead. -->\n"


def pages() -> dict[str, str]:
    """Every generated page: path below the checkout → content."""
    return {"docs/cli.md": _cli_page(), "docs/settings.md": settings_page(NOTE), OPERATIONS: _operations_page()}


def _cli_page() -> str:
    parts = [
        "# Command line\n",
        NOTE,
        "Data goes to stdout, messages and progress to stderr. JSON and TOML are UTF-8 in any locale; a character that a "
        "terminal's encoding lacks is escaped.\n",
        "An error is one line on stderr: `Error: object: expected …, found …. What to do.` `HEADRACE_TRACEBACK=1` prints where "
        "it was raised, too.\n",
        "| exit code | what |\n| --- | --- |",
        *(f"| {code} | {what} |" for code, what in EXIT_CODES.items()),
        "",
    ]
    parts.extend(_command_parts(cli, click.Context(cli, info_name="headrace", max_content_width=100, terminal_width=100)))
    return "\n".join(parts)


def _command_parts(command: click.Command, context: click.Context) -> list[str]:
    depth = min(context.command_path.count(" ") + 2, 4)
    parts = [f"{'#' * depth} `{context.command_path}`\n", f"```text\n{command.get_help(context).rstrip()}\n```\n"]
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            if not child.hidden:
                shape = {**child.context_settings, "max_content_width": 100, "terminal_width": 100}
                inner = click.Context(child, info_name=name, parent=context, **shape)
                parts.extend(_command_parts(child, inner))
    return parts


class Described(NamedTuple):
    """A metric as a scrape names it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str


def metrics() -> dict[str, list[Described]]:
    """Every metric of each worker; under "every worker" those that all of them have."""
    shared = new_prometheus()
    start_time(shared)
    registries = {"every worker": shared}
    kinds = (
        ("join", JoinMetrics),
        ("trainer", TrainerMetrics),
        ("trainer", StandbyMetrics),
        ("trainer", CanaryMetrics),
        ("trainer", ChallengeMetrics),
        ("trainer", TableMetrics),
        ("scorer", ScorerMetrics),
        ("scorer", FollowingMetrics),
        ("scorer", CandidateMetrics),
        ("scorer", ChallengerMetrics),
    )
    for name, kind in kinds:
        kind(registries.setdefault(name, CollectorRegistry()))
    return {name: _described(registry) for name, registry in registries.items()}


def _described(registry: CollectorRegistry) -> list[Described]:
    found = []
    for collector in registry._collector_to_names:
        labels = tuple(getattr(collector, "_labelnames", ()))
        for family in collector.describe() if hasattr(collector, "describe") else collector.collect():
            suffix = "_total" if family.type == "counter" else ""
            found.append(Described(f"{family.name}{suffix}", family.type, labels, family.documentation))
    return found


def _operations_page() -> str:
    before, rest = (ROOT / OPERATIONS).read_text().split(METRICS_BEGIN)
    after = rest.split(METRICS_END)[1]
    parts = [METRICS_BEGIN]
    for worker, described in metrics().items():
        title = "Every worker" if worker == "every worker" else f"The {worker}"
        parts += [f"\n### {title}\n", "| metric | type | labels | meaning |"]
        parts.append("| --- | --- | --- | --- |")
        for each in described:
            labels = ", ".join(f"`{label}`" for label in each.labels)
            parts.append(f"| `{each.name}` | {each.kind} | {labels} | {each.meaning.replace('|', '/')} |")
    return before + "\n".join(parts) + "\n\n" + METRICS_END + after


def main() -> int:
    """Write the pages, or with `--check` compare them."""
    check, stale = "--check" in sys.argv[1:], []
    for name, text in pages().items():
        path = ROOT / name
        if check:
            if not path.is_file() or path.read_text() != text:
                stale.append(name)
        else:
            path.write_text(text)
    for name in stale:
        click.echo(f"{name} is not what the code says; run `make docs`", err=True)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
