"""Two revisions in turns: a process of each lives beside the other, and only one of them works at a time.

On a virtual machine whose speed changes from second to second, ratios of whole runs went from 0.4 to 4. In turns of a few
seconds they go from 0.9 to 1.1. A program below runs on its revision's own code, and uses what `bench/train.py` and
`bench/score.py` have had under the same names since 0.1.0.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

__all__ = ["PROGRAMS", "Program", "in_turns"]


@dataclass(frozen=True, slots=True)
class Program:
    """A program that prints `ready`, and answers each line that it reads by a turn of work and the figures of that turn.

    source  Python
    turns   number of turns for each line
    lines   line that it is sent → names of the numbers of its answer → whether more is better
    """

    source: str
    turns: int
    lines: dict[str, dict[str, bool]]

    @property
    def figures(self) -> dict[str, bool]:
        """All figures → whether more is better."""
        return {name: more for figures in self.lines.values() for name, more in figures.items()}


# Examples a second of the learner alone, with batches as large as the line says. A turn is a third of a second.
_TRAIN = """
import sys, time
import torch
from bench import train
torch.set_num_threads(1)
pool = train.Pool(1_000_000, train.POOL_ROWS, train.CLICK_RATE)
step = train.headrace(pool)
turns = {rows: train.stretch(step, rows, 0.3) for rows in (512, 4096)}
print("ready", flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    examples = turns[int(line)]()
    print(examples / (time.perf_counter() - began), flush=True)
"""

# A scorer and a broker alone, with a version that a trainer has made before. A turn is 5 s of 100 requests a second, and then
# 1,500 requests within half a second.
_SCORE = """
import asyncio, sys, tempfile
from pathlib import Path
import psutil
from bench import score

async def main(work):
    data_set = score.default_data_set()
    with score.LocalKafka(score.LocalKafkaSettings(dir=work / "kafka", heap_mb=512)) as kafka:
        settings = score.demo_settings(score.Settings(), data_set, work, kafka.bootstrap_servers, evaluation_from_ms=0)
        topics = score.TopicSettings(prefix="bench-", partitions=2, request_partitions=2)
        settings = settings.model_copy(update={"topics": topics})
        score.create_topics(settings.kafka, settings.topics)
        env = score.worker_environment(settings)
        replay = [sys.executable, "-m", "headrace", "replay", data_set.name, "--rate", "1000", "--loop"]
        with score.workers(settings, work, "join", "trainer") as behind:
            for worker in behind.values():
                worker.wait_ready()
            with score.process(replay, env, work / "replay.log"):
                score.wait_for_version(settings, lambda: None)
                await asyncio.sleep(10)
        names = score.TopicNames.of(settings.topics)
        with score.workers(settings, work, "scorer") as scoring:
            scoring["scorer"].wait_ready()
            process = psutil.Process(scoring["scorer"].pid)
            bodies = score.request_bodies(data_set, score.CANDIDATES)
            async with score.Load(kafka.bootstrap_servers, names.score_requests, names.scores, 2, bodies) as load:
                await turns(load, lambda: sum(process.cpu_times()[:2]))

async def turns(load, cpu_s):
    await load.warm_up()
    await load.offer(200, 8)
    await load.offer(3_000, 0.5)
    print("ready", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        began_s = cpu_s()
        paced = await load.offer(100, 5.0)
        cpu_ms = (cpu_s() - began_s) * 1e3 / paced.answered
        at_once = await load.offer(3_000, 0.5)
        took_ms = max(appended for appended, _ in load._answers.values()) - min(load._appended.values())
        for offered in (paced, at_once):
            assert offered.answered == offered.sent and not offered.errors
        print(paced.quantile(0.5), paced.quantile(0.99), cpu_ms, at_once.answered / took_ms * 1e3, flush=True)

with tempfile.TemporaryDirectory(prefix="headrace-versions-") as work:
    asyncio.run(main(Path(work)))
"""

PROGRAMS = {
    "train": Program(_TRAIN, 16, {"512": {"batch_512": True}, "4096": {"batch_4096": True}}),
    "score": Program(
        _SCORE,
        6,
        {"go": {"p50_ms": False, "p99_ms": False, "cpu_ms_per_request": False, "requests_per_s": True}},
    ),
}


class _Running:
    """A program that runs on the code of a checkout."""

    def __init__(self, program: Program, checkout: Path) -> None:
        self.checkout = checkout
        self._process = subprocess.Popen(
            [sys.executable, "-c", program.source],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def ask(self, line: str) -> list[float]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return [float(number) for number in self._answer().split()]

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise click.ClickException(
                f"{self.checkout}: expected figures, found an end with {self._process.wait()}; see the error above"
            )
        return answer


def in_turns(program: Program, checkouts: Sequence[Path]) -> dict[Path, dict[str, float]]:
    """The median of each figure in each checkout, over turns that alternate.

    Raises:
        click.ClickException: the program failed on a checkout's code.
    """
    running = [_Running(program, checkout) for checkout in checkouts]
    found: dict[Path, dict[str, float]] = {checkout: {} for checkout in checkouts}
    try:
        for line, figures in program.lines.items():
            turns: dict[Path, list[list[float]]] = {checkout: [] for checkout in checkouts}
            for number in range(program.turns):
                for each in running if number % 2 == 0 else running[::-1]:
                    turns[each.checkout].append(each.ask(line))
            for checkout, answers in turns.items():
                found[checkout] |= dict(zip(figures, map(statistics.median, zip(*answers, strict=True)), strict=True))
    finally:
        for each in running:
            each.end()
    return found
