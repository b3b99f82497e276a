"""Replaces workers of one release by those of another, one by one; see the package's docstring."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import click

from deploy.local_kafka.cluster import LocalKafka
from deploy.settings import LocalKafkaSettings
from tests.faults.versions.system import Traffic, Worker, environment, examples_of, files_of, headrace, wait_for

# The last revision that has full versions only.
OLD = "563747e"
KINDS = ("join", "trainer", "scorer")
ORDERS = {
    # (release that all begin with, what is replaced in turn)
    "upgrade": ("old", ("scorer", "trainer", "join")),
    "downgrade": ("new", ("join", "trainer", "scorer")),
    "upgrade, trainer before scorers": ("old", ("trainer", "scorer", "join")),
    "upgrade, join first": ("old", ("join", "trainer", "scorer")),
}
NEXT_VERSION_S = 45.0


@click.command()
@click.option("--old", default=OLD, show_default=True, help="Revision of the older release; this checkout is the newer one.")
@click.option("--order", "orders", multiple=True, type=click.Choice(list(ORDERS)), help="Only this order; may be repeated.")
@click.option("--and-back/--one-way", default=True, show_default=True, help="After an upgrade, also downgrade the same system.")
def main(old: str, orders: tuple[str, ...], and_back: bool) -> None:
    """Run workers of two releases together, and replace them one by one while events and requests come in.

    The exit code is 1 if an example was lost, doubled or wrong, or a request got no answer, in the orders that
    docs/operations.md prescribes. Other orders only report.
    """
    failed = False
    with tempfile.TemporaryDirectory(prefix="headrace-versions-") as name:
        folder = Path(name)
        releases = {"old": files_of(old, folder), "new": files_of("", folder)}
        for order in orders or ("upgrade", "upgrade, trainer before scorers", "upgrade, join first"):
            found = _play(order, releases, folder / order.replace(" ", "-"), and_back=and_back and order == "upgrade")
            failed |= found and order in ("upgrade", "downgrade")
    sys.exit(failed)


def _play(order: str, releases: dict[str, Path], folder: Path, *, and_back: bool) -> bool:
    """One order on a Kafka of its own. Returns whether something is wrong."""
    folder.mkdir()
    first, turns = ORDERS[order]
    click.echo(f"== {order}: all workers {first}, then {', '.join(turns)}")
    with LocalKafka(LocalKafkaSettings(dir=folder / "kafka", heap_mb=384, start_timeout_ms=180_000)) as kafka:
        env = environment(kafka.bootstrap_servers, folder)
        workers: dict[str, Worker] = {}
        wrong: list[str] = []
        traffic = Traffic(kafka.bootstrap_servers)
        try:
            headrace(releases[first], env, "topics", "create")
            for kind in KINDS:
                workers[kind] = Worker(kind, releases[first], env, folder / f"{kind}.log")
            traffic.start()
            for worker in workers.values():
                wrong += _ready(worker, first)
            wait_for(lambda: bool(traffic.versions(0)), 120)
            _report(f"all {first}", traffic, workers, wrong)
            mixed = dict.fromkeys(KINDS, first)
            steps = [("new" if first == "old" else "old", kind) for kind in turns]
            if and_back:
                steps += [("old", kind) for kind in reversed(turns)]
            for release, kind in steps:
                if release == "new" and set(mixed.values()) == {"old"}:
                    headrace(releases["new"], env, "topics", "create")  # the first step: topics that the old release lacks
                began = time.monotonic()
                code = workers[kind].stop()
                if code:
                    wrong.append(f"the {mixed[kind]} {kind} ended with {code}: {workers[kind].last_words()}")
                if (release, kind) == ("old", "join"):
                    # An older join doesn't read a newer one's state: it is rebuilt from the log, in another folder.
                    env = env | {"HEADRACE_STATE_DIR": str(folder / "state-of-old")}
                workers[kind] = Worker(kind, releases[release], env, folder / f"{kind}.log")
                mixed[kind] = release
                wrong += _ready(workers[kind], release)
                click.echo(f"   {kind} is {release} after {time.monotonic() - began:.0f} s")
                _report(", ".join(f"{release} {kind}" for kind, release in mixed.items()), traffic, workers, wrong)
        finally:
            traffic.stop()
            wait_for(lambda: not examples_of(kafka.bootstrap_servers).problems(traffic.sent)["lost"], 20)
            for worker in workers.values():
                worker.stop()
        labels = examples_of(kafka.bootstrap_servers).problems(traffic.sent)
        answers = traffic.answered(0)
        click.echo(f"   {len(traffic.sent)} impressions: {labels}; requests: {dict(answers)}")
        for each in wrong:
            click.echo(f"   WRONG {each}")
        return bool(wrong) or any(labels.values()) or set(answers) - {"scored", "no_model"} != set()


def _ready(worker: Worker, release: str) -> list[str]:
    found = worker.until_ready()
    return [f"the {release} {worker.kind}: {found}"] if found else []


def _report(name: str, traffic: Traffic, workers: dict[str, Worker], wrong: list[str]) -> None:
    """Wait until answers come by newer weights than before, and say what was found."""
    began = time.monotonic()
    seen = set(traffic.versions(0))
    ended = [worker for worker in workers.values() if worker.process.poll() is not None]
    newer = wait_for(lambda: bool(set(traffic.versions(began + 1)) - seen), 1.0 if ended else NEXT_VERSION_S)
    for kind, worker in workers.items():
        if worker.process.poll() is not None:
            wrong.append(f"{name}: the {kind} ended with {worker.process.returncode}: {worker.last_words()}")
    shown = traffic.versions(began)[-2:]
    click.echo(
        f"   {name}: answers {dict(traffic.answered(began))}, by {shown}, {'newer weights' if newer else 'NO newer weights'}"
    )


if __name__ == "__main__":
    main()
