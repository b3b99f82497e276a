"""`headrace snapshot verify --live`, and what `list` says of scorers that follow."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from deploy.settings import Settings
from stream.records.heartbeat import Mark
from stream.registry.heartbeat import HeartbeatSender, Weights
from stream.topics.names import TopicNames
from tests.deploy.conftest import Run

pytestmark = pytest.mark.kafka


@contextmanager
def scorer(settings: Settings, worker: str, marks: dict[int, str], *, problem: str = "") -> Iterator[None]:
    """A scorer that has reported these points of a chain, and says goodbye at the end."""
    sender = HeartbeatSender(settings.kafka, TopicNames.of(settings.topics), worker=worker, host="h1", heartbeat_ms=60_000)
    told = tuple(Mark(sequence, digest * 16) for sequence, digest in marks.items())
    weights = Weights(True, "deepfm/1/0", told[-1].digest, 41, 250, told, problem)

    async def say() -> None:
        await sender.start()
        await sender.send(3, 0, 9, weights=weights)

    with asyncio.Runner() as runner:
        runner.run(say())
        try:
            yield
        finally:
            runner.run(sender.close())


def test_equal_weights(run: Run, topics: Settings) -> None:
    with scorer(topics, "a", {7: "1", 8: "2"}), scorer(topics, "b", {8: "2", 9: "3"}):
        ran = run("snapshot verify --live")
        assert ran.code == 0 and ran.out.splitlines() == [
            f"scorer a on h1: version 3 and 41 deltas (deepfm/1/0 at 8, digest {'2' * 16})",
            f"scorer b on h1: version 3 and 41 deltas (deepfm/1/0 at 9, digest {'3' * 16})",
            "2 live scorers, 1 points compared, all digests equal",
        ]


def test_different_weights(run: Run, topics: Settings) -> None:
    with ExitStack() as stack:
        for worker, digest in (("a", "1"), ("b", "1"), ("c", "4")):
            stack.enter_context(scorer(topics, worker, {7: digest}))
        ran = run("snapshot verify --live")
        assert ran.code == 1 and ran.out.endswith("3 live scorers, 1 points compared, 1 of them different\n")
        assert f"deepfm/1/0 at sequence 7: expected one digest, found 2 ({'1' * 16}: a, b; {'4' * 16}: c)." in ran.err
        document = run("snapshot verify --live --format json").json
    assert document["equal"] is False and document["points"] == 1
    assert document["differences"] == [
        {"chain": "deepfm/1/0", "sequence": 7, "digests": {"1" * 16: ["a", "b"], "4" * 16: ["c"]}}
    ]
    assert [(beat["worker"], beat["sequence"], beat["following"]) for beat in document["scorers"]] == [
        ("a", 7, True),
        ("b", 7, True),
        ("c", 7, True),
    ]


def test_a_scorer_that_is_alone_at_its_points_is_named(run: Run, topics: Settings) -> None:
    with scorer(topics, "a", {7: "1"}), scorer(topics, "b", {9: "1"}):
        ran = run("snapshot verify --live --wait 500ms")
    assert ran.code == 0 and ran.out.count("; at no point that another scorer, the trainer or a version was at") == 2
    assert ran.out.endswith("2 live scorers, nothing to compare them with\n")


def test_a_version_or_live(run: Run, topics: Settings) -> None:
    for arguments, found in (("", "neither"), ("3 --live", "both")):
        ran = run(f"snapshot verify {arguments}")
        assert ran.code == 2 and f"expected VERSION or --live, found {found}." in ran.err


def test_list_says_how_far_scorers_are_and_why_not_further(run: Run, topics: Settings) -> None:
    with scorer(topics, "a", {7: "1"}, problem="gap: deltas are missing"):
        shown = run("snapshot list").out.splitlines()[-1]
    assert shown == "scorer a on h1: version 3 and 41 deltas, 250 ms old; it goes no further: gap: deltas are missing"
