"""`headrace model stats` as a user sees it. Versions are real ones of a learner, in a store on the disk; no Kafka is asked."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from deploy.cli import main
from model.learner import Learner
from state.manifest import Manifest
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.trainer.table_metrics import table_figures
from tests.deploy.conftest import Ran, Run
from tests.model.test_upkeep import HOUR_MS, PLAIN, START_MS, learner_of, show


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(SnapshotSettings(url=str(tmp_path / "store")))


@pytest.fixture
def run(store: SnapshotStore, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADRACE_SNAPSHOTS__URL", str(tmp_path / "store"))

    def run(command: str) -> Ran:
        with pytest.raises(SystemExit) as exit_:
            main(shlex.split(command))
        out, err = capfd.readouterr()
        return Ran(int(exit_.value.code or 0), out, err)

    return run


def write(store: SnapshotStore, version: int, learner: Learner, *, counted: bool = True) -> None:
    metrics = table_figures(learner.table) if counted else {}
    manifest = Manifest(version=version, epoch=1, created_at_ms=START_MS, schema_hash=PLAIN.fingerprint(), metrics=metrics)
    trainer = learner.trainer_state()
    if not counted:
        trainer = {name: value for name, value in trainer.items() if not name.startswith("upkeep.")}
    store.write(manifest, learner.serving_state(), trainer)


def test_stats_of_the_newest_and_of_a_named_version(run: Run, store: SnapshotStore) -> None:
    plain = learner_of()
    show(plain, [1, 2, 3], [101, 101, 102])
    write(store, 1, plain)
    keeping = learner_of(admit_after=2, evict_after_ms=3 * HOUR_MS)
    for hours, user in enumerate([1, 1, 2, 1, 3, 2, 2, 2]):
        show(keeping, [user], [101], hours)
    write(store, 2, keeping)

    document = run("model stats --format json").json
    assert (document["version"], document["rows"], document["unknown"]) == (2, 2, 0)
    assert document["size"] == keeping.table.size > 0
    hours_ms = START_MS // 60_000 * 60_000
    assert document["fields"] == [
        {"field": "user", "rows": 1, "admitted": 2, "refused": 3, "evicted": 1, "oldest_ms": hours_ms + 7 * HOUR_MS},
        {"field": "item", "rows": 1, "admitted": 1, "refused": 1, "evicted": 0, "oldest_ms": hours_ms + 7 * HOUR_MS},
    ]
    assert document["total"]["admitted"] == 3 and document["total"]["rows"] == 2

    lines = run("model stats 1").out.splitlines()
    assert lines[0].split()[:6] == ["field", "rows", "share", "admitted", "refused", "evicted"]
    assert lines[1].split() == ["user", "3", "60.0%", "3", "0", "0", "-"]
    assert lines[3].split()[:4] == ["all", "5", "100.0%", "5"]
    assert lines[4].startswith("version 1 of 2023-11-14T22:13:20Z: 5 rows, 0.0 MB in the trainer")


def test_stats_of_a_version_in_which_nobody_counted(run: Run, store: SnapshotStore) -> None:
    plain = learner_of()
    show(plain, [1, 2, 3], [101, 101, 102])
    write(store, 1, plain, counted=False)
    lines = run("model stats").out.splitlines()
    assert lines[1].split() == ["all", "5", "100.0%", "-", "-", "-", "-"]
    assert lines[2].endswith("5 rows, memory not known")
    assert lines[3] == "of 5 rows nobody knows the field: they are from before fields were counted"


def test_stats_without_a_version(run: Run, store: SnapshotStore) -> None:
    ended = run("model stats")
    assert ended.code == 1
    assert "expected a version, found none. A trainer writes one: `headrace run trainer`." in ended.err
    assert run("model stats 7").code == 1
