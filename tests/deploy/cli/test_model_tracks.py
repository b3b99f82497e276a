"""Challengers: `headrace run trainer --track`, `headrace model shadow`, `compare` and `promote`; one scene with Kafka."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from deploy.settings import Settings
from state.tracks import HASH_SPACE, NUMBERS
from stream.scorer.trial import positions
from tests.deploy.cli.serving_scene import Scene, shown
from tests.deploy.conftest import Run


@pytest.fixture
def scene(topics: Settings, tmp_path: Path) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(topics, tmp_path, stack)


@pytest.mark.kafka
def test_a_challenger_is_compared_killed_promoted_and_sent_back(scene: Scene, run: Run, tmp_path: Path) -> None:
    scene.learn([{}] * 3_000)
    scene.until(lambda: (beat := scene.beat()) is not None and beat.following)
    assert "There is no challenger." in run("model compare").out
    refused = run("model promote wide --reason none --yes")
    assert refused.code == 1 and "expected one of main, found none of that name" in refused.err

    # Another architecture learns the same examples, with topics, versions and a gate of its own.
    assert run("topics create --track wide --format json").json["created"] == [
        f"{scene.names.prefix}{name}-wide" for name in ("deltas", "snapshots")
    ]
    assert run("topics check --track wide").code == 0
    challenger = scene.add_trainer("wide", tmp_path, name="lr")
    scene.until(lambda: "wide" in scene.registry().tracks and scene.registry("wide").champion.version)
    own = scene.registry("wide")
    assert min(own.versions) > NUMBERS and own.champion_record is not None and own.champion_record.chain.startswith("wide/")
    assert all(version < NUMBERS for version in scene.registry().versions)
    assert "wide scores no requests." in run("model compare").out
    assert run("model shadow wide --share 50% --reason wider --format json").json["share"] == 0.5
    scene.until(lambda: (beat := scene.beat()) is not None and any(each.version > NUMBERS for each in beat.shadows))

    # Half of the requests have both scores, and the champion's are the answer.
    answers = scene.ask(1_000)
    chosen = (positions([answer.request_id for answer in answers], HASH_SPACE) < 0.5).tolist()
    assert [answer.shadow_version is not None for answer in answers] == chosen
    assert all(answer.model_version is not None and answer.model_version < NUMBERS for answer in answers)
    scene.learn([shown(answer) for answer in answers])
    # Its trainer is killed while it counts, and counts every impression once.
    challenger.kill()
    challenger.start()
    more = scene.ask(1_000)
    scene.learn([shown(answer) for answer in more])
    both = sum(answer.shadow_version is not None for answer in [*answers, *more])
    scene.until(lambda: scene.registry("wide").comparison.impressions == both)
    found = run("model compare wide --format json").json["challengers"][0]
    assert found["comparison"]["against"] == "main" and found["comparison"]["clicks"] >= 100
    assert found["low"] <= found["comparison"]["change"] <= found["high"] and found["verdict"] != "too_early"
    assert all(found["comparison"][side]["auc"] > 0.5 for side in ("track", "serving"))
    assert found["ready"] == [scene.beat().worker]  # type: ignore[union-attr]

    # Promoted: scorers follow its chain, the former one is compared with it, and the usual commands act on what serves.
    planned = run("model promote wide --reason better --dry-run --format json").json
    assert planned["dry_run"] and scene.registry().serving.track == "main"
    done = run("model promote wide --reason better --yes --timeout 60s --format json").json
    assert (done["from"], done["to"], len(done["confirmed"]), done["unconfirmed"]) == ("main", "wide", 1, [])
    beat = scene.beat()
    assert beat is not None and beat.track == "wide" and beat.following and beat.chain.startswith("wide/")
    scene.until(lambda: any(each.track == "main" and each.version > 0 for each in scene.beat().shadows))  # type: ignore[union-attr]
    turned = scene.ask(300)
    assert all(answer.model_version is not None and answer.model_version > NUMBERS for answer in turned)
    assert {answer.shadow_version is not None for answer in turned} == {True, False}
    assert all(answer.shadow_version is None or answer.shadow_version < NUMBERS for answer in turned)
    scene.learn([shown(answer) for answer in turned])
    assert min(each["version"] for each in run("snapshot list --format json").json["versions"]) > NUMBERS
    assert max(each["version"] for each in run("snapshot --track main list --format json").json["versions"]) < NUMBERS
    scene.until(lambda: scene.registry().comparison.against == "wide")
    # A rollback holds what serves: the challenger's own line.
    held = run("snapshot hold --reason look --format json")
    assert held.code == 0 and scene.registry("wide").champion.hold and not scene.registry().champion.hold
    run("snapshot resume")

    undone = run(" ".join(shlex.split(done["undo"])[1:]) + " --timeout 60s --format json").json
    assert (undone["to"], len(undone["confirmed"])) == ("main", 1)
    answers = scene.ask(20)
    assert all(answer.model_version is not None and answer.model_version < NUMBERS for answer in answers)
    assert [turn.track for turn in scene.registry().serving.turns] == ["wide", "main"]
