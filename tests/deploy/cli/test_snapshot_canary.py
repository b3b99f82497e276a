"""`headrace snapshot shadow`, `canary` and `watch`: one scene with Kafka, a trainer and a scorer as processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from deploy.settings import Settings
from stream.scorer.trial import in_share
from tests.deploy.cli.serving_scene import Scene, shown
from tests.deploy.conftest import Run

# Wide enough that a small model on made-up labels is promoted.
WIDE = "--loss-margin 20% --calibration-margin 60% --ctr-margin 90%"


@pytest.fixture
def scene(topics: Settings, tmp_path: Path) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(topics, tmp_path, stack)


@pytest.mark.kafka
def test_a_canary_is_promoted_a_shadow_taken_back_and_another_stopped(scene: Scene, run: Run) -> None:
    scene.learn([{}] * 3_000)
    first = scene.until(lambda: scene.registry().champion.version)
    run('snapshot hold --reason "no version but by canary"')
    champion = scene.registry().champion.version
    scene.learn([{}] * 2_000)
    candidate = scene.until(lambda: max(v for v in scene.registry().versions) > champion and scene.registry().newest)
    scene.until(lambda: (beat := scene.beat()) is not None and beat.version == champion)

    # A canary: planned, begun, answered by the candidate in its share, promoted by what is clicked.
    command = f"snapshot canary {candidate} --share 40% --clicks 100 {WIDE} --reason wider"
    planned = run(f"{command} --dry-run --format json").json
    assert (planned["champion"], planned["dry_run"], len(planned["live"])) == (champion, True, 1)
    assert not scene.registry().canary.version, "a dry run writes nothing"
    begun = run(f"{command} --format json").json
    assert begun["outcome"] == "running" and begun["undo"] == "headrace snapshot canary stop --reason undo --yes"
    scene.until(lambda: (beat := scene.beat()) is not None and beat.candidate == candidate)
    scene.until(lambda: scene.workers[0].metrics()["headrace_trainer_canary_version", ()] == candidate)
    assert run("snapshot watch --timeout 1ms").code == 5
    assert f"canary of version {candidate}, 40 % of the requests since" in run("snapshot list").out

    answers = scene.ask(2_000)
    chosen = in_share([answer.request_id for answer in answers], 0.4).tolist()
    assert [answer.model_version for answer in answers] == [candidate if each else champion for each in chosen]
    assert {answer.delta for answer in answers} == {0} and all(answer.shadow_version is None for answer in answers)
    scene.learn([shown(answer) for answer in answers])
    watched = run("snapshot watch --timeout 60s --format json")
    last = json.loads(watched.out.splitlines()[-1])
    assert (watched.code, last["outcome"], last["champion"]) == (0, "promoted", candidate), watched.out
    assert last["ended_who"].startswith("trainer@") and "clicks" in last["ended_reason"]
    assert last["progress"]["candidate"]["clicks"] >= 100 and last["progress"]["champion"]["clicks"] >= 100
    state = scene.registry()
    assert state.champion.hold and state.champion.moves[-1].reason == last["ended_reason"]
    scene.until(lambda: (beat := scene.beat()) is not None and (beat.version, beat.candidate) == (candidate, None))

    # A shadow: both scores in every answer; what it would have said is far off.
    assert run(f"snapshot shadow {first} --share 100% --clicks 100 {WIDE}").code == 0
    scene.until(lambda: (beat := scene.beat()) is not None and beat.candidate == first)
    scene.until(lambda: scene.workers[0].metrics()["headrace_trainer_canary_version", ()] == first)
    answers = scene.ask(700)
    assert {(answer.model_version, answer.shadow_version) for answer in answers} == {(candidate, first)}
    assert all(answer.scores[0].shadow is not None for answer in answers)
    scene.learn([shown(answer, shadow_score=0.97) for answer in answers])
    watched = run("snapshot watch --timeout 60s")
    assert watched.code == 4 and "taken back" in watched.out, watched.out
    assert scene.registry().champion.version == candidate
    trainer, scorer = (worker.metrics() for worker in scene.workers)
    assert trainer["headrace_trainer_canary_version", ()] in (-1, first)
    assert scorer["headrace_scorer_candidate_requests_total", ("shadow",)] == 700
    assert scorer["headrace_scorer_candidate_requests_total", ("canary",)] == sum(chosen)

    # Stopped by hand, and the scorer says that nothing is asked of the candidate any more.
    assert run(f"snapshot canary {first} --share 5% --format json").json["outcome"] == "running"
    refused = run(f"snapshot shadow {first} --share 5%")
    assert refused.code == 1 and "found a canary of version" in refused.err
    scene.until(lambda: (beat := scene.beat()) is not None and beat.candidate == first)
    stopped = run("snapshot canary stop --reason enough --yes --format json").json
    assert (stopped["outcome"], len(stopped["confirmed"]), stopped["unconfirmed"]) == ("stopped", 1, [])
    assert stopped["undo"] == f"headrace snapshot canary {first} --share 5% --reason 'no reason given'"
    assert "nothing was written" in run("snapshot canary stop").out
    assert run("snapshot watch").code == 4


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("snapshot canary 4", "expected --share"),
        ("snapshot canary 4 --share 5 --yes", "expected a share such as 5% or 0.05, found '5'"),
        ("snapshot canary stop --share 5%", "stop: expected no --share"),
    ],
)
def test_usage(command: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from deploy.cli import cli

    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(cli, command.split())
    assert ended.exit_code == 2 and found in ended.output
