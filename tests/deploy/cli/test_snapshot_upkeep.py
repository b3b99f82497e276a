"""Aliases, tags, history, diff, gc, reindex and export as a user sees them: output, exit codes, messages."""

from __future__ import annotations

import asyncio
import json
import shlex
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest

from deploy.cli.common import who
from deploy.settings import Settings
from model.learner import Learner
from model.predictor import Predictor
from state.manifest import Manifest
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.registry.heartbeat import HeartbeatSender
from stream.registry.writer import RegistryWriter
from stream.topics.names import TopicNames
from tests.deploy.conftest import Run
from tests.judged import JUDGED
from tests.model.test_learner import SCHEMA, SETTINGS, learn, records
from tests.model.test_onnx_export import inputs_of

pytestmark = pytest.mark.kafka

GATE = SnapshotSettings(first_examples=0, good_after_ms=0)
FEW = {"KEEP_VERSIONS": "1", "KEEP_GOOD": "1", "KEEP_MS": "0", "KEEP_FOR_MS": "0", "ANCHOR_AGE_MS": "0", "ANCHOR_CLICKS": "0"}


@pytest.fixture
def learned(topics: Settings) -> Settings:
    """Four versions of one model, each learned further than the one before, announced and promoted; 4 is champion."""

    async def announce() -> None:
        store, learner = SnapshotStore(topics.snapshots), Learner(SCHEMA, SETTINGS, device="cpu")
        writer = RegistryWriter(topics.kafka, TopicNames.of(topics.topics), who="trainer@test")
        epoch = await writer.take_trainer_epoch()
        for version in (1, 2, 3, 4):
            batch, clicks = records(100, seed=version)
            learn(learner, batch, clicks)
            manifest = Manifest(
                version=version,
                epoch=epoch,
                created_at_ms=1_700_000_000_000 + version,
                examples_seen=100 * version,
                metrics={"window_examples": 100.0, "window_log_loss": 1 / version},
                verdict=JUDGED,
                features=SCHEMA.model_dump(mode="json"),
                model=SETTINGS.model_dump(mode="json"),
                schema_hash=SCHEMA.fingerprint(),
            )
            written = store.write(manifest, learner.serving_state(), learner.trainer_state())
            await writer.announce(written, gate=GATE)
        await writer.close()

    asyncio.run(announce())
    return topics


def test_an_alias_from_its_making_to_its_end(run: Run, learned: Settings) -> None:
    ran = run('snapshot alias set candidate 2 --reason "better on Monday"')
    assert ran.code == 0 and ran.out.splitlines() == [
        "candidate: none → 2",
        "undo: headrace snapshot alias rm candidate --reason 'undo of 2'",
    ]
    moved = run("snapshot alias set candidate 3 --reason x --format json").json
    assert moved == {
        "alias": "candidate",
        "from": 2,
        "to": 3,
        "changed": True,
        "undo": "headrace snapshot alias set candidate 2 --reason 'undo of 3'",
    }
    assert run("snapshot alias set candidate 3 --reason x").out.splitlines()[-1] == "It was so already; nothing was written."
    aliases = run("snapshot alias list --format json").json["aliases"]
    assert [(each["alias"], each["version"], each["who"]) for each in aliases] == [
        ("champion", 4, "trainer@test"),
        ("candidate", 3, who()),
    ]
    lines = run("snapshot alias list").out.splitlines()
    assert lines[0].split()[:2] == ["alias", "version"] and lines[2].split()[:2] == ["candidate", "3"]
    listed = run("snapshot list --format json").json
    assert listed["aliases"] == {"candidate": 3} and listed["versions"][2]["aliases"] == ["candidate"]
    assert "@candidate" in run("snapshot list").out.splitlines()[2]

    assert run(shlex.join(shlex.split(moved["undo"])[1:])).code == 0  # the undo command is one that runs
    assert run("snapshot alias rm candidate --reason done").code == 0
    assert run("snapshot alias list --format json").json["aliases"][1:] == []
    rows = run("snapshot history candidate --format json").json["moves"]
    assert [(row["how"], row["from"], row["to"], row["reason"]) for row in rows] == [
        ("set", None, 2, "better on Monday"),
        ("set", 2, 3, "x"),
        ("set", 3, 2, "undo of 3"),
        ("removed", 2, None, "done"),
    ]
    assert all(row["who"] == who() and row["at_ms"] > 0 for row in rows)


def test_what_an_alias_refuses(run: Run, learned: Settings) -> None:
    ran = run("snapshot alias set champion 2 --reason x")
    assert (
        ran.code == 1 and "alias champion: expected a name that is free, found one that is taken: `headrace snapshot" in ran.err
    )
    ran = run("snapshot alias rm other --reason x")
    assert ran.code == 1 and "alias other: expected an alias, found none of that name (there are: none)" in ran.err
    ran = run("snapshot alias set b 9 --reason x")
    assert (
        ran.code == 1 and "version 9: expected a whole version in" in ran.err and "Nothing was changed; --unchecked" in ran.err
    )
    ran = run("snapshot alias set b 9 --reason x --unchecked")
    assert (
        ran.code == 1 and "version 9: expected an announced version, found none of that number (announced: 1 to 4)" in ran.err
    )
    next((Path(learned.snapshots.url) / "v0000000002").glob("serving*")).unlink()
    ran = run("snapshot alias set b 2 --reason x")
    assert ran.code == 1 and "found no file" in ran.err and "Nothing was changed" in ran.err
    assert run("snapshot history other").code == 1
    assert run("snapshot alias set b 2").code == 2, "why is not left out"


def test_tags(run: Run, learned: Settings) -> None:
    done = run('snapshot tag 2 ticket=CTR-17 note="before the sale" --reason audit --format json').json
    assert done["changed"] == ["ticket", "note"]
    assert {name: each["value"] for name, each in done["tagged"].items()} == {"note": "before the sale", "ticket": "CTR-17"}
    assert done["tagged"]["note"]["who"] == who() and done["tagged"]["note"]["reason"] == "audit"
    assert "ticket=CTR-17" in run("snapshot list").out and "ticket=CTR-17" in run("snapshot show 2").out
    lines = run("snapshot tag 2").out.splitlines()
    assert lines[0].split()[:2] == ["tag", "value"] and lines[2].startswith("ticket")
    assert run("snapshot tag 2 --remove ticket --remove note").out == "version 2 has no tags\n"
    assert run("snapshot tag 2 --remove ticket").out.splitlines()[-1] == "It was so already; nothing was written."
    assert run("snapshot tag 2 ticket").code == 2
    assert run("snapshot tag 2 ticket=1 --remove ticket").code == 2
    ran = run("snapshot tag 2 good=yes")
    assert ran.code == 1 and "tag good: expected a name that is free" in ran.err


def test_the_champions_history(run: Run, learned: Settings) -> None:
    assert run("snapshot rollback --to 2 --reason worse --yes").code == 0
    rows = run("snapshot history --format json").json["moves"]
    assert [(row["from"], row["to"], row["how"]) for row in rows] == [
        (None, 1, "auto"),
        (1, 2, "auto"),
        (2, 3, "auto"),
        (3, 4, "auto"),
        (4, 2, "rollback"),
    ]
    assert (rows[-1]["who"], rows[-1]["reason"]) == (who(), "worse")
    lines = run("snapshot history --last 2").out.splitlines()
    assert len(lines) == 3 and lines[1].split()[1:4] == ["4", "2", "rollback"], "latest first"


def test_what_changed_between_two_versions(run: Run, learned: Settings) -> None:
    store = SnapshotStore(learned.snapshots)
    tables = [dict(zip(store.serving(v)["keys"].tolist(), store.serving(v)["embedding"], strict=True)) for v in (2, 4)]
    run("snapshot alias set candidate 2 --reason x")
    document = run("snapshot diff candidate champion --format json").json
    rows = document["rows"]
    assert (document["before"], document["after"]) == (2, 4)
    assert (rows["before"], rows["after"]) == (len(tables[0]), len(tables[1]))
    assert (rows["added"], rows["gone"]) == (len(tables[1].keys() - tables[0].keys()), 0)
    changed = [key for key in tables[0] if not np.array_equal(tables[0][key], tables[1][key])]
    assert rows["changed"] >= len(changed) > 0 and rows["same"] + rows["changed"] + rows["added"] == rows["after"]
    assert [each["field"] for each in document["fields"]] == ["user", "item", "price", "tags", "words"]
    assert document["metrics"]["window_log_loss"] == {"before": 0.5, "after": 0.25}
    assert document["settings"]["examples_seen"] == {"before": "200", "after": "400"}
    assert document["settings"].keys() <= {"examples_seen", "digest"}
    text = run("snapshot diff 2 4").out
    assert f"rows           {rows['before']:,} → {rows['after']:,}" in text and "window_log_loss     0.5   0.25   -0.25" in text
    ran = run("snapshot diff 2 nobody")
    assert ran.code == 1 and "version 'nobody': expected a number or an alias (candidate, champion), found neither" in ran.err
    ran = run("snapshot diff 2 9")
    assert ran.code == 1 and "version 9: expected a whole version" in ran.err


def test_deleting(run: Run, learned: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FEW.items():
        monkeypatch.setenv(f"HEADRACE_SNAPSHOTS__{name}", value)
    run("snapshot alias set old 1 --reason compare")
    plan = run("snapshot gc --dry-run --format json").json
    assert (plan["delete"], plan["pending"], plan["rests"], plan["dry_run"]) == ([2], [], [], True)
    assert plan["kept"] == {
        "1": "alias old",
        "3": "the champion before this one, to which an undo goes",
        "4": "champion",
    }
    text = run("snapshot gc --dry-run").out.splitlines()
    assert text[0].startswith("would delete 1 versions (2), 0.0 MB (dry run: nothing was written)")
    assert text[2].split(maxsplit=1) == ["1", "alias old"]
    assert SnapshotStore(learned.snapshots).versions() == [1, 2, 3, 4]
    done = run("snapshot gc --yes --format json").json
    assert (done["deleted"], done["foreign"]) == ([2], []) and done["bytes"] == plan["bytes"] > 0
    assert SnapshotStore(learned.snapshots).versions() == [1, 3, 4]
    assert [each["version"] for each in run("snapshot list --format json").json["versions"]] == [1, 3, 4]
    assert run("snapshot gc").out == "deleted 0 versions, 0.0 MB\n"
    ran = run("snapshot rollback --to 2 --yes")
    assert ran.code == 1 and "version 2: expected an announced version, found none of that number" in ran.err


def test_a_store_that_is_away(run: Run, learned: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_SNAPSHOTS__URL", f"{learned.snapshots.url}-elsewhere")
    ran = run("snapshot gc --yes")
    assert ran.code == 1 and "expected one of the newest versions that the registry knows (4, 3, 2, 1), found none" in ran.err
    ran = run("snapshot reindex")
    assert ran.code == 1 and "expected versions to enter, found none. Is snapshots.url right?" in ran.err
    assert len(run("snapshot list --format json").json["versions"]) == 4


def test_a_registry_that_is_lost(run: Run, settings: Settings, learned: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its topic is another, empty one here: that of another prefix."""
    monkeypatch.setenv("HEADRACE_TOPICS__PREFIX", f"{settings.topics.prefix}new-")
    assert run("topics create").code == 0
    ran = run("snapshot reindex")
    assert ran.code == 1 and "found no live scorer with a version. Name the champion: `--champion N` (the newest" in ran.err
    text = run("snapshot reindex --champion 3 --dry-run").out.splitlines()
    assert text == [
        "would enter 4 versions (1, 2, 3, … 4)",
        "champion: would be 3, auto-promotion held until `headrace snapshot resume`",
        "dry run: nothing was written",
    ]
    assert run("snapshot list --format json").json["versions"] == []

    async def scorer() -> HeartbeatSender:
        names = TopicNames.of(settings.topics.model_copy(update={"prefix": f"{settings.topics.prefix}new-"}))
        sender = HeartbeatSender(settings.kafka, names, worker="s1")
        await sender.start()
        await sender.send(3, 0, 0)
        await sender._producer.stop()
        return sender

    asyncio.run(scorer())
    (Path(learned.snapshots.url) / "v0000000002" / "manifest.json").write_bytes(b"{")
    ran = run('snapshot reindex --reason "topic deleted" --format json')
    done = ran.json
    assert ran.code == 1 and (done["lost"], done["added"], done["champion"], list(done["broken"])) == (
        True,
        [1, 3, 4],
        3,
        ["2"],
    )
    assert "manifest.json: expected a manifest, found 1 bytes" in ran.err
    listed = run("snapshot list --format json").json
    assert (listed["champion"], listed["held"], listed["hold_reason"]) == (3, True, "topic deleted")


def test_an_export_scores_as_the_version_does(run: Run, learned: Settings, tmp_path: Path) -> None:
    document = run("snapshot export champion --onnx model.onnx --format json").json
    assert document["version"] == 4 and list(document["files"]) == ["model.onnx"] and document["rows"] > 0
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    batch, _ = records(80, seed=9)
    serving = SnapshotStore(learned.snapshots).serving(4)
    expected = Predictor.of(SCHEMA, SETTINGS, serving, device="cpu").predict(batch)
    np.testing.assert_allclose(session.run(None, inputs_of(batch, session))[0], expected, rtol=2e-5)
    metadata: dict[str, Any] = session.get_modelmeta().custom_metadata_map
    assert metadata["version"] == "4" and metadata["schema_hash"] == SCHEMA.fingerprint()
    assert json.loads(metadata["inputs"]) == document["inputs"]

    ran = run("snapshot export 4 --onnx model.onnx")
    assert ran.code == 1 and "model.onnx: expected no file, found one" in ran.err
    text = run("snapshot export 3 --onnx other.onnx").out.splitlines()
    assert text[1].startswith("version 3, ") and text[-1] == "output scores: float32 (batch)"
    manifest = Path(learned.snapshots.url) / "v0000000002" / "manifest.json"
    broken = msgspec.json.decode(manifest.read_bytes()) | {"model": {"hidden": [7]}}
    manifest.write_bytes(msgspec.json.encode(broken))
    ran = run("snapshot export 2 --onnx broken.onnx")
    assert ran.code == 1 and "version 2: snapshot: tensor 'mlp.0.weight': expected 7×" in ran.err
    assert not (tmp_path / "broken.onnx").exists()
