"""`headrace demo`: everything once, on real impressions."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.cli.common import echo_json, format_option, model_option, with_model
from deploy.cli.tables import print_pairs

if TYPE_CHECKING:
    from deploy.demo.play import DemoResult

__all__ = ["demo"]


@click.command()
@click.option(
    "--dataset",
    default="auto",
    show_default=True,
    help="Data set to send. auto uses kuairand if it is found, else movielens-100k.",
)
@model_option
@click.option("--limit", type=click.IntRange(min=1), help="Impressions to send; all when unset.")
@click.option("--fast", is_flag=True, help="Send as fast as possible, instead of at a pace to watch.")
@click.option(
    "--window-ms",
    type=click.IntRange(min=60_000),
    default=60_000,
    show_default=True,
    help="Attribution window in ms of event time.",
)
@click.option(
    "--keep",
    type=click.Path(path_type=Path, file_okay=False),
    help="Run in this folder and keep it, with its logs and snapshots.",
)
@format_option
def demo(
    dataset: str, model: str | None, limit: int | None, fast: bool, window_ms: int, keep: Path | None, output: str
) -> None:
    """Run everything once on real impressions: Kafka, join, trainer, scorer, a rollback. About 2 minutes.

    The exit code is 0 only if every impression got exactly one label. However the demo ends, it leaves nothing behind.

    \b
    Examples:
      headrace demo
      HEADRACE_DATA_DIR=~/data headrace demo --dataset kuairand
      headrace demo --model wide_deep
      headrace demo --limit 20000 --fast --format json
    """
    # SIGTERM ends the demo as Ctrl-C does: workers and Kafka are stopped in order.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    from deploy.datasets import default_data_set, open_data_set
    from deploy.demo.play import play
    from deploy.demo.view import View
    from deploy.settings import load_settings

    base = with_model(load_settings(), model)
    data_set = default_data_set() if dataset == "auto" else open_data_set(dataset)
    work = keep.absolute() if keep else Path(tempfile.mkdtemp(prefix="headrace-demo-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        view = View(f"headrace demo · {data_set.name}")
        if data_set.find() is None:
            view.say(f"fetching {data_set.name} …")
            data_set.fetch(view.say)
        view.say(f"data set: {data_set.title}")
        with view:
            result = asyncio.run(play(data_set, base, work, view, limit=limit, fast=fast, window_ms=window_ms))
    except KeyboardInterrupt:
        click.echo("stopped; no process is left", err=True)
        sys.exit(130)
    finally:
        if not keep:
            shutil.rmtree(work, ignore_errors=True)
    if output == "json":
        echo_json(result)
    else:
        _summary(result)
    for problem in result.problems:
        click.echo(f"Error: {problem}", err=True)
    sys.exit(0 if result.exactly_once else 1)


def _summary(result: DemoResult) -> None:
    waits = f"{result.click_to_served_ms_p50} / {result.click_to_served_ms_p99} ms"
    rows: list[tuple[str, Any]] = [
        ("impressions, each labelled exactly once", f"{result.impressions:,}" if result.exactly_once else "NO, see below"),
        ("clicks / positives", f"{result.clicks:,} / {result.positives:,}"),
        ("dead letters", f"{result.dead_letters:,}"),
        ("events/s through the pipeline", f"{result.events_per_s:,.0f}"),
        ("AUC, last 80 % of event time", result.auc),
        ("normalised entropy", result.ne),
        ("calibration", result.calibration),
        ("AUC of the scores as served", result.served_auc),
        ("versions published / scores answered", f"{result.versions} / {result.scores:,}"),
        ("click to an answer that knows it, p50 / p99", waits),
        ("rollback, until every scorer had it", f"{result.rollback_ms:.0f} ms"),
        ("peak memory", ", ".join(f"{kind} {mb:.0f} MB" for kind, mb in result.peak_rss_mb.items())),
        ("took", f"{result.seconds:.0f} s"),
    ]
    pairs = [(name, "-" if value is None else value) for name, value in rows]
    print_pairs(pairs, title=f"headrace demo: {result.dataset}")
