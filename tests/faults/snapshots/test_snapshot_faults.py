"""Some runs of the harness of snapshot faults, and proof that its checks can fail: the product is broken on purpose."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from deploy.local_kafka.cluster import LocalKafka
from model.errors import DigestMismatch
from model.predictor import Predictor, Prepared
from model.rows import ModelDelta
from state import chain
from stream.scorer import chain_follower, scrub
from stream.trainer.skips import Skips
from tests.faults.code import ROOT
from tests.faults.snapshots.kinds import KINDS, kind_named
from tests.faults.snapshots.play import Result, play, where_of
from tests.faults.snapshots.report import BEGIN, END, table, write_table
from tests.faults.snapshots.run import Run

pytestmark = pytest.mark.kafka

Played = Callable[[str], Result]


@pytest.fixture
def played(kafka: LocalKafka, tmp_path: Path) -> Played:
    """Plays a run of a kind."""
    return lambda name: play(kind_named(name), where_of(kafka.bootstrap_servers, kafka.dir, 7, tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        "a piece of a delta is missing",
        "a second trainer takes over, and the first goes on",
        "the disk is full after 1 files of a version",
        "a dead trainer is sent back, skipping by time",
    ],
)
def test_a_fault_leaves_every_scorer_with_the_replayed_weights(played: Played, name: str) -> None:
    result = played(name)
    assert (result.problems, result.skipped) == ([], "")
    assert result.happened and result.points > 4 and result.answers > 10


def believe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scorer that puts into its weights whatever a delta holds."""
    prepare = Predictor.prepare

    def believing(self: Predictor, delta: ModelDelta) -> Prepared:
        try:
            return prepare(self, delta)
        except DigestMismatch as error:
            found = int(str(error).split(" to result, found ")[1][:16], 16)
            return prepare(self, ModelDelta(delta.rows, delta.gone, delta.dense, found))

    monkeypatch.setattr(Predictor, "prepare", believing)


def test_a_scorer_that_does_not_compare_digests_is_found(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    believe(monkeypatch)
    monkeypatch.setattr(Run, "refused", happens)
    problems = played("a weight flips between capture and checksum").problems
    signs = ("differ from those of", "names no point", "expected to stay at")  # a later delta may write over the weight
    assert any(sign in problem for problem in problems for sign in signs)


def test_a_scorer_that_passes_over_a_gap_is_found(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    believe(monkeypatch)

    def careless(progress: chain.Progress, offered: chain.Offered) -> chain.Step:
        step = chain.on_delta(progress, offered)
        return chain.Step("apply", "applied", progress) if step.reason == "gap" else step

    monkeypatch.setattr(chain_follower, "on_delta", careless)
    monkeypatch.setattr(Run, "refused", happens)
    assert played("a delta is missing").problems


def test_memory_that_nobody_scrubs_is_found(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    async def right(predictor: Predictor, *, duty: float = 1.0) -> bool:
        return True

    monkeypatch.setattr(scrub, "memory_is_right", right)
    monkeypatch.setattr(chain_follower, "memory_is_right", right)
    [problem] = played("a bit flips in a scorer's memory: an embedding").problems
    assert "a scrub finds it" in problem


def test_a_trainer_that_learns_what_it_should_leave_out_is_found(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Skips, "cut", lambda skips, run: run)
    problems = played("the running trainer is sent back, skipping by offsets").problems
    assert any("a run that never saw what is left out" in problem for problem in problems)


async def happens(run: Run, *reasons: str, scorers: object = None) -> None:
    """In the place of a wait for a refusal, which a broken scorer doesn't make."""
    await asyncio.sleep(0.3)
    run.happened.append("not refused")


def test_the_table_on_the_page(tmp_path: Path) -> None:
    made = Result("a cut", 1, [], ["cut"], 1.25, 7, 40, 3.0)
    results = [
        made,
        msgspec.structs.replace(made, seed=2, problems=["x"], heal_s=2.75),
        Result("no disk", 3, [], [], None, 0, 0, 0.1, "no root"),
    ]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nearlier table\n{END}\nafter\n")
    write_table(results, page, "abc1234")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "earlier table" not in text
    assert "| a cut | 2 | 1 | 14 | 80 | 2.0 | 2.8 |" in text and "2 runs of 1 kinds" in text and "Skipped: no root." in text
    shown = (ROOT / "docs" / "reliability.md").read_text().split(BEGIN)[1].split(END)[0].strip().splitlines()
    assert shown[0] == table(results, "abc1234").splitlines()[0]


def test_every_kind_has_a_name_of_its_own() -> None:
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)
