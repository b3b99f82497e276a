"""How well Headrace and its peers learn a data set in one pass: AUC and NE of scores that were given before each label.

    bench/peers_learning.py --dataset kuairand --install     # makes an environment for the peers, then compares
    bench/peers_learning.py --peers /path/to/python          # one that has vowpalwabbit and river already
    bench/peers_learning.py --only vw --set model.batch_rows=512

All learn the same rows, in the order of event time, from the same features, each label right after its row. The peers update
after each row, and Headrace after each batch, whose rows are all scored before it. Figures are of the last 80 % of the rows.
The peers' settings are several, and the best of them by its AUC on these very rows is compared, which favours the peer.

Vowpal Wabbit learns all rows. River is written in Python and needs up to 5 ms a row, so it learns the first `--river-rows`, and
Headrace is judged once more on those. Peers that aren't installed are left out, and the result says so.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import venv
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch

from bench.common import report
from bench.peer_learners import FIELDS, RIVER, VOWPAL_WABBIT
from deploy.datasets import NAMED, open_data_set
from deploy.datasets.folders import cache_folder
from deploy.evaluate import plans
from deploy.evaluate.figures import Figures, Judged, blocks_of, difference, estimate
from deploy.evaluate.labels import at_once
from deploy.evaluate.play import Scores, play
from deploy.evaluate.runs import Plan
from deploy.evaluate.source import Source
from deploy.evaluate.stream import Int64s, Stream
from model.learner import Learner

WHEELS = {"vowpalwabbit": "vowpalwabbit==9.11.9", "river": "river==0.26.1"}
CHILD = Path(__file__).with_name("peer_learners.py")
FIRST = 0.2
"""The share of rows that are learned and not judged."""


class Group(NamedTuple):
    """Settings of one peer. Slow ones learn fewer rows."""

    package: str
    settings: Sequence[str]
    slow: bool = False


GROUPS = {
    "vw": Group("vowpalwabbit", list(VOWPAL_WABBIT)),
    "river": Group("river", RIVER, slow=True),
}


class Learned(NamedTuple):
    """What one learner gave: scores (N,) from before each row was learned, and rows a second."""

    name: str
    scores: Scores
    rows_per_s: float


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--dataset", type=click.Choice(list(NAMED)), default="kuairand", show_default=True)
@click.option("--limit", type=click.IntRange(min=1_000), help="Rows to learn; all when not given.")
@click.option("--river-rows", type=click.IntRange(min=1_000), default=20_000, show_default=True, help="Rows that River learns.")
@click.option("--peers", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A Python that has the peers.")
@click.option("--install", is_flag=True, help=f"Make an environment with {' and '.join(WHEELS.values())}, if there is none.")
@click.option("--only", type=click.Choice(list(GROUPS)), multiple=True, help="Compare with these alone. May be repeated.")
@click.option(
    "--keep", type=click.Path(file_okay=False, path_type=Path), help="Folder of scores, so that a second call goes on."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting of Headrace. May be repeated.")
def main(
    dataset: str,
    limit: int | None,
    river_rows: int,
    peers: Path | None,
    install: bool,
    only: Sequence[str],
    keep: Path | None,
    overrides: Sequence[str],
) -> None:
    torch.set_num_threads(1)  # the peers learn with one thread
    python = peers or environment(install)
    source = Source(open_data_set(dataset), limit=limit)
    plan = plans.plan("headrace", plans.merged(*map(plans.assignment, overrides)), source.schema)
    whole = source.read(plan.settings)
    ours: dict[int, Learned] = {}
    figures: dict[str, Any] = {}
    for name in only or GROUPS:
        group = GROUPS[name]
        if not has(python, group.package):
            click.echo(f"{name} is left out: {python} has no {group.package}. Pass --install, or --peers PYTHON.", err=True)
            figures[name] = "not installed"
            continue
        rows = min(river_rows, len(whole)) if group.slow else len(whole)
        stream = whole if rows == len(whole) else whole.take(np.arange(rows))
        found = peer_runs(python, stream, group.settings, keep)
        if rows not in ours:
            ours[rows] = headrace(stream, plan)
        figures[name] = against(stream, ours[rows], found)
    compared = [each for each in figures.values() if isinstance(each, dict) and each["rows"] == len(whole)]
    best = max(compared, key=lambda each: each["peer_auc"], default=None)
    report(
        benchmark="peers_learning",
        value=None if best is None else best["auc"],
        peer=None if best is None else best["peer_auc"],
        difference=None if best is None else best["difference"],
        unit="AUC",
        dataset=dataset,
        rows=len(whole),
        settings=list(overrides),
        **figures,
    )


def environment(install: bool) -> Path:
    """The Python that runs the peers: that of their environment in the cache, if there is one, else this one.

    Raises:
        SystemExit: pip could not install them.
    """
    folder = cache_folder().parent / "peers" / "-".join(each.replace("==", "-") for each in WHEELS.values())
    python = folder / "bin" / "python"
    if install and not (folder / "installed").exists():
        venv.create(folder, clear=True, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *WHEELS.values()]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(
                f"--install: expected pip to install {', '.join(WHEELS.values())} in {folder}; it failed, see above."
            )
        (folder / "installed").touch()
    return python if (folder / "installed").exists() else Path(sys.executable)


def has(python: Path, package: str) -> bool:
    """Whether this Python can import the package."""
    return subprocess.run([str(python), "-c", f"import {package}"], capture_output=True, check=False).returncode == 0


def peer_runs(python: Path, stream: Stream, names: Sequence[str], keep: Path | None) -> list[Learned]:
    """Every setting of a peer, in processes of their own, one after the other.

    Raises:
        SystemExit: a peer failed, or the data set has more fields than Vowpal Wabbit has namespaces.
    """
    found = []
    with tempfile.TemporaryDirectory(prefix="headrace-peers-") as folder:
        rows, read = Path(folder, "rows.npz"), tokens(stream)
        np.savez(rows, **read)
        digest = zlib.crc32(b"".join(read[name].tobytes() for name in sorted(read)))  # scores that are kept are of these rows
        kept = keep or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        for name in names:
            scores, part = kept / f"{name}-{digest:08x}.npz", Path(folder, "part.npz")
            if not scores.exists():
                command = [str(python), str(CHILD), str(rows), str(part), name]
                answer = subprocess.run(command, capture_output=True, text=True, check=False)
                if answer.returncode:
                    raise SystemExit(f"{name}: expected scores, found an error:\n{answer.stderr[-2000:]}")
                shutil.move(part, scores)
            with np.load(scores) as given:
                found.append(Learned(name, given["scores"], len(stream) / float(given["seconds"])))
            click.echo(f"{name:32s} {found[-1].rows_per_s:10,.0f} rows/s", err=True)
    return found


def tokens(stream: Stream) -> dict[str, Any]:
    """The rows of a stream as `bench/peer_learners.py` reads them: the keys of all fields, numbered from 0."""
    batch, singles = stream.batch, len(stream.schema.singles)
    count, lists = len(batch), batch.lists
    if singles + lists > len(FIELDS):
        raise SystemExit(f"{stream.name}: expected at most {len(FIELDS)} fields, found {singles + lists}. Leave some out.")
    lengths = np.diff(batch.list_offsets)
    owners = np.concatenate(
        [np.repeat(np.arange(count), singles), np.repeat(np.arange(count * lists) // max(lists, 1), lengths)]
    )
    fields = np.concatenate(
        [np.tile(np.arange(singles), count), singles + np.repeat(np.arange(count * lists) % max(lists, 1), lengths)]
    )
    scales = np.ones(len(owners)) if batch.scales is None else np.concatenate([batch.scales.ravel(), np.ones(lengths.sum())])
    values = np.unique(np.concatenate([batch.keys.ravel(), batch.list_keys]), return_inverse=True)[1].ravel()
    order = np.argsort(owners, kind="stable")
    return {
        "starts": np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=count))]),
        "fields": fields[order],
        "values": values[order],
        "scales": scales[order],
        "labels": labels_of(stream),
    }


def labels_of(stream: Stream) -> Int64s:
    """Whether each row was clicked at any time, (N,)."""
    return (stream.clicked_ms >= 0).astype(np.int64)


def headrace(stream: Stream, plan: Plan) -> Learned:
    """The trainer's own code over the stream, each label known with its row."""
    settings = plan.settings
    learner = Learner(settings.features, settings.model, table=settings.table, device="cpu")
    longest_ms = int((stream.clicked_ms - stream.shown_ms).max())
    played = play(stream, at_once(stream, max(longest_ms, 1)), learner, batch_age_ms=None)
    return Learned("headrace", played.progressive, played.learned / played.learn_s)


def against(stream: Stream, ours: Learned, peers: Sequence[Learned]) -> dict[str, Any]:
    """Headrace on this stream beside the best of a peer's settings, and all of them."""
    labels, start = labels_of(stream), round(FIRST * len(stream))
    judged = {each.name: judge(each.scores[start:], labels[start:]) for each in peers}
    own = judge(ours.scores[start:], labels[start:])
    best = max(peers, key=lambda each: judged[each.name].estimate("auc").value)
    paired = difference([own], [judged[best.name]])
    return {
        "rows": len(stream),
        **described(own, ours.rows_per_s),
        "peer": best.name,
        **{f"peer_{name}": value for name, value in described(judged[best.name], best.rows_per_s).items()},
        "difference": interval(paired["auc"]),
        "ne_difference": interval(paired["ne"]),
        "lowest_peer_ne": round(min(each.estimate("ne").value for each in judged.values()), 4),
        "all": {each.name: described(judged[each.name], each.rows_per_s) for each in peers},
    }


def judge(scores: Scores, labels: Int64s) -> Figures:
    """AUC, NE and calibration of these scores."""
    blocks = blocks_of(len(labels))
    truth = labels.astype(np.float64)
    return estimate(Judged(scores.astype(np.float64), truth, np.ones(len(labels)), None, blocks), int(blocks.max()) + 1)


def described(figures: Figures, rows_per_s: float) -> dict[str, Any]:
    """Figures as the result shows them."""
    each = {name: round(figures.estimate(name).value, 4) for name in ("auc", "ne", "calibration")}
    return {**each, "rows_per_s": round(rows_per_s)}


def interval(estimated: Any) -> list[float]:
    """A difference, and the ends of its 95 % interval."""
    return [round(float(value), 4) for value in estimated]


if __name__ == "__main__":
    main()
