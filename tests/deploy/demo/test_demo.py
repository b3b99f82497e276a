"""The demo as a whole: what it says, what it leaves behind, and its parts when their processes are killed in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deploy.demo.audit import Audit
from deploy.demo.play import demo_settings, worker_environment
from deploy.feeding.replay import Replayer
from deploy.processes.workers import stop_workers
from deploy.settings import Settings
from state.store import SnapshotStore
from stream.registry.log import read_registry
from stream.topics.admin import create_topics
from stream.topics.names import TopicNames
from tests.deploy.made_up import MadeUp, read_topic
from tests.forked import ForkedWorker

pytestmark = pytest.mark.kafka

PATIENCE_S = 90.0
FIRST_S = 881_250_949
KEYS = {
    *("dataset", "impressions", "clicks", "examples", "positives", "events_per_s", "auc", "ne", "calibration", "served_auc"),
    *("versions", "scores", "rollback_ms", "click_to_served_ms_p50", "click_to_served_ms_p99", "dead_letters", "peak_rss_mb"),
}


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, int, int]:
    """A folder for HEADRACE_DATA_DIR with made-up ratings in MovieLens' files; how many ratings and how many of them clicks."""
    draw, count, clicks = random.Random(1), 9_000, 0
    folder = tmp_path / "data" / "ml-100k"
    folder.mkdir(parents=True)
    ratings = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for row in range(count):
        # Each pair once, as in the real one; whom it is decides what is liked.
        user, item = row % 50 + 1, row // 50 + 1
        rating = 4 if draw.random() < (0.8 if (user + item) % 2 else 0.2) else 2
        clicks += rating >= 4
        ratings.append(f"{user}\t{item}\t{rating}\t{FIRST_S + 20 * row}")
    people = ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"]
    people += [f"{user}\t{20 + user}\t{'MF'[user % 2]}\twriter\t{user:05d}" for user in range(1, 51)]
    films = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    films += [f"{item}\tFilm {item}\t1995\t{('Comedy', 'Drama')[item % 2]}" for item in range(1, count // 50 + 1)]
    for name, lines in (("inter", ratings), ("user", people), ("item", films)):
        (folder / f"ml-100k.{name}").write_text("\n".join(lines) + "\n")
    return folder.parent, count, clicks


def of_demo(work: Path) -> list[psutil.Process]:
    """Processes that say this folder in their command line, environment or working directory: workers, Kafka, its leash."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and (
                any(str(work) in part for part in (*process.cmdline(), *process.environ().values(), process.cwd()))
            ):
                found.append(process)
    return found


@contextlib.contextmanager
def demo(data: Path, work: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "headrace", "demo", "--dataset", "movielens-100k", "--keep", str(work), *options]
    # A model that has seen some thousand examples is not calibrated yet; what is tested is the run.
    gate = {"SERVED_CALIBRATION_BAND": "[0.01, 100.0]", "GATE_LOSS_MARGIN": "100", "FIRST_EXAMPLES": "1", "FIRST_CLICKS": "1"}
    env = {
        **os.environ,
        "HEADRACE_DATA_DIR": str(data),
        **{f"HEADRACE_SNAPSHOTS__{name}": value for name, value in gate.items()},
    }
    running = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # as a shell runs it: Ctrl-C is for its process group
    )
    try:
        yield running
    finally:
        running.kill()
        running.communicate()
        for process in of_demo(work):
            with contextlib.suppress(psutil.Error):
                process.kill()


def until(true: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline, f"not in {patience_s:.0f} s: {what}"
        time.sleep(0.1)


def test_one_run_counts_exactly_and_says_so_in_json(data, tmp_path):
    folder, count, clicks = data
    work = tmp_path / "work"
    with demo(folder, work, "--fast", "--format", "json") as running:
        out, err = running.communicate(timeout=200)
        assert running.returncode == 0, err
        assert of_demo(work) == []
    result = json.loads(out)
    assert result.keys() >= KEYS
    assert result["dataset"] == "movielens-100k"
    assert result["impressions"] == result["examples"] == count
    assert result["clicks"] == result["positives"] == clicks
    assert result["dead_letters"] == 0
    assert result["exactly_once"] is True
    assert result["problems"] == []
    assert result["versions"] >= 2
    assert 0 < result["rollback_ms"] <= 5_000
    served = result["click_to_served_ms_p50"]  # None: every answer came before the first delta
    assert served is None or 0 < served <= result["click_to_served_ms_p99"]
    assert result["peak_rss_mb"].keys() == {"join", "trainer", "scorer"}
    assert all(mb > 10 for mb in result["peak_rss_mb"].values())
    assert 0.5 < result["auc"] <= 1.0
    assert "rolled back from version" in err
    assert "undone" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_however_it_ends_no_process_is_left(data, tmp_path, number, code):
    work = tmp_path / "work"
    with demo(data[0], work) as running:
        # Kafka, its leash and three workers run, and the stream has begun.
        until(lambda: (work / "state").exists() or running.poll() is not None, "the join's state")
        assert len(of_demo(work)) >= 5, running.stderr.read() if running.poll() is not None and running.stderr else ""
        os.killpg(running.pid, number)
        out, _ = running.communicate(timeout=60)
        assert running.returncode == code
        assert out == ""
        # Also of workers that were still starting: the trainer and the scorer import and connect for seconds.
        until(lambda: of_demo(work) == [], "the end of every process", patience_s=20.0)


def test_kill_9_of_each_worker_in_the_middle_and_the_counts_still_come_out_exact(settings, tmp_path):
    """Killed and started again one after another, under way: nothing is lost, nothing counts twice."""

    async def check() -> None:
        draw = random.Random(4)
        first_ms = 1_700_000_000_000
        rows = [(first_ms + 100 * row, draw.choice([-1, -1, draw.randrange(60_000)])) for row in range(6_000)]
        data_set = MadeUp(rows)
        chosen = demo_settings(settings, data_set, tmp_path, settings.kafka.bootstrap_servers, evaluation_from_ms=first_ms)
        create_topics(chosen.kafka, chosen.topics)
        env = worker_environment(chosen)
        workers = {
            kind: ForkedWorker(kind, env, tmp_path / f"{kind}.log", cwd=tmp_path) for kind in ("join", "trainer", "scorer")
        }
        try:
            for worker in workers.values():
                worker.start()
            for kind in ("join", "trainer"):
                await asyncio.to_thread(workers[kind].wait_ready)
            replayer = Replayer(data_set, chosen, rate=600, loop=True, scored_fraction=0.2, score_timeout_ms=200)
            sending = asyncio.ensure_future(replayer.run_async())
            await asyncio.to_thread(workers["scorer"].wait_ready)  # there is a model
            for kind in ("join", "trainer", "scorer"):
                await asyncio.sleep(draw.uniform(0.2, 1.0))
                assert not sending.done()
                workers[kind].kill()
                workers[kind].start()
            for worker in workers.values():
                await asyncio.to_thread(worker.wait_ready)
            replayer.stop()
            stats = await sending
            assert stats.requests > 0
            await counts_are_exact(chosen, stats.impressions, stats.clicks)
            for worker in workers.values():
                worker.check()
            await asyncio.to_thread(answered, chosen, stats.requests)
        finally:
            await asyncio.to_thread(stop_workers, list(workers.values()))
        assert {kind: worker.returncode for kind, worker in workers.items()} == {"join": 0, "trainer": 0, "scorer": 0}
        await counts_are_exact(chosen, stats.impressions, stats.clicks)

    asyncio.run(check())


async def counts_are_exact(settings: Settings, impressions: int, clicks: int) -> None:
    """Wait for it: one label for each impression, positives as many as clicks, and a version that learned each once."""
    async with Audit(settings) as audit:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            ledger = await audit.read()
            learned = await examples_seen(settings)
            whole = impressions + ledger.corrections.total()  # a correction is an example of its own
            if (ledger.labels.total(), learned) == (impressions, whole) or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.2)
    assert ledger.problems() == []
    assert len(ledger.impressions) == impressions
    assert ledger.labels.total() == impressions
    assert len(ledger.positives) == clicks
    assert ledger.dead_letters.total() == 0
    assert learned == whole


async def examples_seen(settings: Settings) -> int:
    """Of the newest version."""
    state = await read_registry(settings.kafka, TopicNames.of(settings.topics))
    return SnapshotStore(settings.snapshots).manifest(state.newest).examples_seen if state.versions else 0


def answered(settings: Settings, requests: int) -> None:
    """Wait until every score request has an answer, at least once; one that is late says so."""
    asked = {json.loads(record.value)["request_id"] for record in read_topic(settings, "score-requests")}
    assert len(asked) == requests
    answers: dict[str, dict[str, object]] = {}

    def all_there() -> bool:
        for record in read_topic(settings, "scores"):
            answer = json.loads(record.value)
            answers.setdefault(answer["request_id"], answer)
        return answers.keys() >= asked

    until(all_there, "an answer to each score request")
    assert answers.keys() == asked
    assert any(answer.get("scores") for answer in answers.values())
