"""`headrace snapshot …` as a user sees it: output, exit codes, messages."""

from __future__ import annotations

import asyncio
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from deploy.cli.common import who
from deploy.cli.times import DURATION, TIME, clock, duration
from deploy.settings import Settings
from state.manifest import Manifest
from state.settings import SnapshotSettings
from state.store import SnapshotStore
from stream.registry.follower import RegistryFollower
from stream.registry.heartbeat import HeartbeatSender
from stream.registry.writer import RegistryWriter
from stream.topics.names import TopicNames
from tests.deploy.conftest import Run
from tests.judged import JUDGED, judged

GATE = SnapshotSettings(first_examples=0, good_after_ms=0)


@pytest.fixture
def three(topics: Settings) -> Settings:
    """Three versions in the store and announced, each promoted; 1 and 2 are good."""

    async def announce() -> None:
        store = SnapshotStore(topics.snapshots)
        writer = RegistryWriter(topics.kafka, TopicNames.of(topics.topics), who="trainer@test")
        epoch = await writer.take_trainer_epoch()
        for version in (1, 2, 3):
            metrics = {"window_examples": 1_000.0, "window_log_loss": 0.5, "window_calibration": 1.0, "window_auc": 0.7}
            manifest = Manifest(
                version=version,
                epoch=epoch,
                created_at_ms=1_700_000_000_000,
                examples_seen=1_234,
                metrics=metrics,
                verdict=JUDGED,
            )
            written = store.write(manifest, {"rows": torch.ones(3)}, {"adam": torch.ones(3)})
            assert (await writer.announce(written, gate=GATE)).promoted
        await writer.tag_good(1, 2)
        await writer.close()

    asyncio.run(announce())
    return topics


@contextmanager
def scorer(settings: Settings, worker: str, *, deaf: bool = False) -> Iterator[None]:
    """A scorer of its own loop in a thread, which swaps at once, or never once it has begun."""
    ready, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        names = TopicNames.of(settings.topics)
        reader = RegistryFollower(settings.kafka, names)
        sender = HeartbeatSender(settings.kafka, names, worker=worker, host="h1")
        await sender.start()
        await reader.start()
        sent, sent_s = None, 0.0
        while not stop.is_set():
            now = (reader.state.champion.version, reader.position)
            if (now != sent or time.monotonic() - sent_s > 0.5) and not (deaf and sent):
                sent_s = time.monotonic()
                await sender.send(now[0] or -1, 0, now[1])
                sent = now
                ready.set()
            await asyncio.sleep(0.01)
        await reader.close()
        await sender.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(20)
    try:
        yield
    finally:
        stop.set()
        thread.join(20)


def test_list_shows_what_there_is(run: Run, three: Settings) -> None:
    document = run("snapshot list --format json").json
    assert (document["champion"], document["held"], document["trainer_epoch"]) == (3, False, 1)
    assert [version["version"] for version in document["versions"]] == [1, 2, 3]
    assert [version["tags"] for version in document["versions"]] == [["good"], ["good"], ["champion"]]
    assert all(version["in_store"] and version["bytes"] > 0 for version in document["versions"])
    assert [version["version"] for version in run("snapshot list --last 1 --format json").json["versions"]] == [3]

    shutil.rmtree(Path(three.snapshots.url) / "v0000000002")
    text = run("snapshot list").out.splitlines()
    assert text[0].split()[:4] == ["version", "tags", "kind", "examples"]
    assert text[1].split()[:4] == ["3", "champion", "full", "1,234"] and "2023-11-14T22:13:20Z" in text[1]
    assert "promoted: flowing: nothing was compared yet" in text[1]
    assert text[2].split()[:5] == ["2", "good,", "not", "in", "store"]
    assert text[-2].startswith("champion 3 since ") and text[-2].endswith(", auto-promotion on")
    assert text[-1] == "gate flowing: nothing was compared yet"


def test_list_shows_what_scorers_say(run: Run, three: Settings) -> None:
    async def say() -> None:
        sender = HeartbeatSender(three.kafka, TopicNames.of(three.topics), worker="s1", host="h1")
        await sender.start()
        await sender.send(2, 0, 1, fallback_of=3, fallback_reason="a broken file")
        await sender._producer.stop()  # no goodbye

    asyncio.run(say())
    (told,) = run("snapshot list --format json").json["scorers"]
    assert (told["worker"], told["version"], told["fallback_of"], told["fallback_reason"]) == ("s1", 2, 3, "a broken file")
    assert run("snapshot list").out.splitlines()[-1] == "scorer s1 on h1: version 2; it can't read version 3: a broken file"


def test_list_of_an_empty_registry(run: Run, topics: Settings) -> None:
    ran = run("snapshot list")
    assert ran.code == 0 and "champion none, auto-promotion on" in ran.out
    assert run("snapshot list --format json").json["versions"] == []
    assert not Path(topics.snapshots.url).exists()  # looking makes nothing


def test_show(run: Run, three: Settings) -> None:
    shown = run("snapshot show 2 --format json").json
    assert shown["announced"]["tags"] == ["good"] and shown["manifest"]["examples_seen"] == 1_234
    text = run("snapshot show 2").out
    assert "dense.safetensors" in text and "SHA-256" in text and "by trainer@test" in text
    assert "flowing: nothing was compared yet" in text and "100 clicks and 900 non-clicks seen" in text
    assert shown["announced"]["verdict"]["flow"] == "flowing"
    ran = run("snapshot show 9")
    assert ran.code == 1 and "version 9: expected a whole version in" in ran.err and ran.out == ""
    shutil.rmtree(Path(three.snapshots.url) / "v0000000002")
    assert "no: it can't be promoted" in run("snapshot show 2").out


def test_verify(run: Run, three: Settings) -> None:
    ran = run("snapshot verify 2")
    assert ran.code == 0 and ran.out.startswith("version 2 is whole: 2 files, ") and ran.err == ""
    file = Path(three.snapshots.url) / "v0000000002" / "dense.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    ran = run("snapshot verify 2 --format json")
    assert ran.code == 1 and ran.json["whole"] is False
    assert "dense.safetensors: expected SHA-256 " in ran.err and ran.json["problems"] == [ran.err.strip()]


def test_promote_prints_what_undoes_it(run: Run, three: Settings) -> None:
    dry = run("snapshot promote 1 --reason test --dry-run")
    assert dry.out.splitlines()[0] == "champion: 3 → 1 (dry run: nothing was written)"
    assert run("snapshot list --format json").json["champion"] == 3
    ran = run("snapshot promote 1 --reason 'for a test' --hold 'pin it'")
    undo = "headrace snapshot promote 3 --reason 'undo of 1' --resume"
    assert ran.out.splitlines() == ["champion: 3 → 1", "auto-promotion: held", f"undo: {undo}"]
    document = run("snapshot list --format json").json
    assert (document["champion"], document["hold_reason"], document["reason"]) == (1, "pin it", "for a test")
    assert "@" in document["who"]
    undone = run(undo.removeprefix("headrace ") + " --format json").json
    assert undone["to"] == 3 and undone["held"] is False
    assert undone["undo"] == "headrace snapshot promote 1 --reason 'undo of 3' --hold 'pin it'"
    ran = run("snapshot promote 3 --reason again")
    assert ran.code == 1 and "Error: version 3: it is champion already, since" in ran.err


def test_nobody_is_sent_to_a_version_that_is_not_whole(run: Run, three: Settings) -> None:
    (Path(three.snapshots.url) / "v0000000002" / "dense.safetensors").unlink()
    for command in ("promote 2 --reason x", "rollback --yes", "rollback --dry-run"):
        ran = run(f"snapshot {command}")
        assert ran.code == 1 and "dense.safetensors: expected " in ran.err and "found no file" in ran.err
        assert ran.err.strip().endswith("Nothing was changed; --unchecked goes there all the same.")
    assert run("snapshot list --format json").json["champion"] == 3
    assert run("snapshot rollback --unchecked --format json").json["to"] == 2


def test_versions_are_named_by_number_or_by_alias(run: Run, three: Settings) -> None:
    assert run("snapshot alias set candidate 1 --reason 'better on the hold-out'").code == 0
    assert run("snapshot alias set before-sale champion --reason 'to compare with' --format json").json["to"] == 3
    assert run("snapshot show candidate --format json").json["version"] == 1
    assert run("snapshot verify before-sale --format json").json == {"version": 3, "whole": True, "problems": []}
    assert run("snapshot tag candidate ticket=CTR-17 --format json").json["version"] == 1
    dry = run("snapshot promote candidate --reason x --hold y --dry-run").out.splitlines()
    assert dry[:2] == ["champion: 3 → 1 (dry run: nothing was written)", "auto-promotion: would be held"]
    assert run("snapshot rollback --to candidate --dry-run --format json").json["to"] == 1
    for command in ("show", "verify", "tag", "promote --reason x", "rollback --dry-run --to"):
        ran = run(f"snapshot {command} cadidate")
        assert ran.code == 1, command
        assert "version 'cadidate': expected a number or an alias (before-sale, candidate, champion), found neither" in ran.err


def test_rollback_confirmed_and_undone(run: Run, three: Settings) -> None:
    with scorer(three, "s1"), scorer(three, "s2"):
        plan = run("snapshot rollback --dry-run --format json").json
        rewind = {"rewind": False, "skipped": [], "offsets": {}}
        expected = {"from": 3, "to": 2, "held_already": False, "live": ["s1", "s2"], "checked": "hashes", "dry_run": True}
        assert plan == {**expected, **rewind}
        ran = run("snapshot rollback --reason 'CTR fell' --format json")
        assert ran.code == 0, ran.err
        done = ran.json
        assert (done["from"], done["to"], done["held"], done["unconfirmed"]) == (3, 2, True, [])
        assert sorted(each["worker"] for each in done["confirmed"]) == ["s1", "s2"]
        assert 0 < done["rollback_ms"] < 5_000
        assert done["undo"] == "headrace snapshot promote 3 --reason 'undo of 2' --resume"
        assert run(done["undo"].removeprefix("headrace ")).code == 0
        document = run("snapshot list --format json").json
        assert (document["champion"], document["held"], document["hold_reason"]) == (3, False, "")
        text = run("snapshot rollback --to 1 --yes").out.splitlines()
        assert text[0] == "champion: 3 → 1, auto-promotion held until `headrace snapshot resume`"
        assert text[1].startswith("2 of 2 scorers confirmed (") and text[1].endswith(" after the command")
        assert text[2] == "undo: headrace snapshot promote 3 --reason 'undo of 1' --resume"


def test_rollback_that_someone_does_not_confirm(run: Run, three: Settings) -> None:
    with scorer(three, "s1"), scorer(three, "deaf", deaf=True):
        ran = run("snapshot rollback --timeout 700ms --format json")
    assert ran.code == 3
    assert [each["worker"] for each in ran.json["confirmed"]] == ["s1"]
    assert [each["worker"] for each in ran.json["unconfirmed"]] == ["deaf"]
    assert "scorer deaf on h1: expected version 2 within 700 ms, found version 3 at registry offset " in ran.err
    assert "The rollback stands; look at that scorer's log, or stop it." in ran.err


def test_a_scorer_that_stands_still_is_named(run: Run, three: Settings) -> None:
    async def beat_once() -> None:
        sender = HeartbeatSender(three.kafka, TopicNames.of(three.topics), worker="still", host="h1", heartbeat_ms=1)
        await sender.start()
        await sender.send(3, 0, 1)
        await sender._producer.stop()

    asyncio.run(beat_once())
    while not (listed := run("snapshot list --format json").json)["silent"]:  # it counts as alive for two seconds
        assert [each["worker"] for each in listed["scorers"]] == ["still"]
    assert "scorer still on h1: version 3, silent for " in run("snapshot list").out
    ran = run("snapshot rollback --format json")
    assert (ran.code, ran.json["to"], ran.json["unconfirmed"]) == (3, 2, [])
    assert [(each["worker"], each["version"]) for each in ran.json["silent"]] == [("still", 3)]
    assert "scorer still on h1: expected a heartbeat every 1 ms, found the last one " in ran.err
    ran = run("snapshot rollback --to 2")
    assert ran.code == 3 and "That was so already, by an earlier rollback: nothing was written." in ran.out


def test_a_trainer_that_is_sent_back_and_is_not_there(run: Run, three: Settings) -> None:
    ran = run("snapshot rollback --rewind-trainer --to 1 --timeout 100ms --reason poisoned")
    assert ran.code == 3 and "trainer: goes back to version 1, and learns again from its offsets" in ran.out
    assert "trainer: expected it to go back to version 1 within 100 ms, found that it hasn't. The request stands" in ran.err
    ran = run("snapshot resume")
    assert ran.code == 1 and f"expected a trainer that has gone back to version 1, as {who()} asked at " in ran.err
    text = run("snapshot list").out
    assert f"trainer: is to go back to version 1, as {who()} asked at " in text and "left by the trainer" in text
    assert run("snapshot list --format json").json["rewinds"][0]["up_to"] is None
    ran = run("snapshot rollback --rewind-trainer --to 1 --skip 0:5-9 --dry-run")
    assert ran.code == 1 and "skip 0:5-9: expected a range of the log, which ends at offset 0, found one up to 9" in ran.err


def test_rollback_without_scorers_or_without_a_target(run: Run, three: Settings) -> None:
    ran = run("snapshot rollback --back 0s")
    assert ran.code == 1 and "expected one older than the champion, 3. --to can name: 2 (champion at " in ran.err
    ran = run("snapshot rollback --before 2001-01-01")
    assert ran.code == 1 and "expected a champion at 2001-01-01T00:00:00Z, found none remembered" in ran.err
    ran = run("snapshot rollback")
    assert ran.code == 0 and "no scorer is live: nobody had to confirm (" in ran.out


def test_hold_and_resume(run: Run, three: Settings) -> None:
    by = rf"\(by {re.escape(who())} at \d{{4}}-\S+Z\)"
    held = run("snapshot hold --reason sale").out.splitlines()
    assert re.fullmatch(f"auto-promotion: held: sale {by}", held[0])
    assert held[1:] == ["undo: headrace snapshot resume"]
    again = run("snapshot hold --reason other --format json").json
    assert (again["held"], again["reason"], again["changed"], again["undo"]) == (True, "sale", False, None)
    assert again["who"] == who() and again["since_ms"] > 0
    text = run("snapshot hold --reason other").out.splitlines()
    assert re.fullmatch(f"auto-promotion: held: sale {by}", text[0])
    assert text[1:] == ["It was so already; nothing was written."]
    (line,) = (line for line in run("snapshot list").out.splitlines() if line.startswith("champion "))
    assert re.search(rf"auto-promotion held by {re.escape(who())} at \S+Z: sale$", line)
    resumed = run("snapshot resume").out.splitlines()
    assert resumed[0].startswith("auto-promotion: on (by ")
    assert resumed[1:] == ["undo: headrace snapshot hold --reason sale"]
    assert run("snapshot resume").out.splitlines()[-1] == "It was so already; nothing was written."


def test_usage(run: Run) -> None:
    assert run("snapshot rollback --back tomorrow").code == 2
    ran = run("snapshot promote 1 --reason x --hold y --resume")
    assert ran.code == 2 and "--hold and --resume: expected one of them, found both." in ran.err
    ran = run("snapshot rollback --to 1 --back 1m")
    assert ran.code == 2 and "expected one of --to, --back and --before, found several." in ran.err
    for command in ("show 0", "verify 0", "promote 0 --reason x", "rollback --to 0", "tag 0"):
        ran = run(f"snapshot {command}")
        assert ran.code == 2 and "versions are numbered from 1, found '0'" in ran.err
    ran = run("snapshot rollback --skip 0:1-2")
    assert ran.code == 2 and "expected --rewind-trainer beside them, found none" in ran.err
    ran = run("snapshot rollback --rewind-trainer --skip-to-latest --unchecked")
    assert ran.code == 2 and "what the version has learned is read from the store" in ran.err
    for skip in ("0:9-5", "1-5", "x"):
        assert "expected a partition, its first offset" in run(f"snapshot rollback --rewind-trainer --skip {skip}").err
    assert "the earlier time first" in run("snapshot rollback --rewind-trainer --skip-time 1m..2m").err
    assert "two times with .. between them" in run("snapshot rollback --rewind-trainer --skip-time 1m").err
    ran = run("snapshot rollback --help")
    text = " ".join(ran.out.split())
    assert (
        ran.code == 0
        and "Exit code 3 when a scorer, or the trainer that was sent back, didn't confirm" in text
        and "headrace snapshot rollback --to 39" in text
    )


@pytest.mark.parametrize(
    ("text", "found"), [("500ms", 500), ("10s", 10_000), ("1.5m", 90_000), ("2h", 7_200_000), ("1d", 86_400_000)]
)
def test_durations(text: str, found: int) -> None:
    assert DURATION.convert(text, None, None) == found


def test_times_are_utc_unless_they_say_otherwise() -> None:
    assert TIME.convert("2024-05-01T12:00:00Z", None, None) == TIME.convert("2024-05-01T12:00", None, None)
    assert TIME.convert("2024-05-01T14:00+02:00", None, None) == TIME.convert("2024-05-01 12:00:00", None, None)
    assert clock(TIME.convert("2024-05-01T12:00:00Z", None, None)) == "2024-05-01T12:00:00Z"
    assert clock(None) == "-"
    assert [duration(span) for span in (12, 1_234, 90_000, 7_200_000)] == ["12 ms", "1.23 s", "1.5 m", "2 h"]


def test_the_gate_says_why_it_withholds_and_an_operator_releases_it(run: Run, three: Settings) -> None:
    assert run("snapshot gate --format json").json["flow"] == "flowing"
    reason = "scores of recent requests have shifted by 0.58 logits"

    async def withheld() -> None:
        store = SnapshotStore(three.snapshots)
        writer = RegistryWriter(three.kafka, TopicNames.of(three.topics), who="trainer@test")
        verdict = judged(flow="withheld", reason=reason, since_ms=1_700_000_000_000, score_shift=0.58)
        manifest = Manifest(version=4, epoch=1, created_at_ms=1_700_000_000_000, examples_seen=2_000, verdict=verdict)
        written = store.write(manifest, {"rows": torch.ones(3)}, {"adam": torch.ones(3)})
        assert not (await writer.announce(written, gate=GATE)).promoted
        await writer.close()

    asyncio.run(withheld())
    seen = run("snapshot gate")
    assert seen.code == 6
    shown = seen.out
    assert shown.startswith(f"withheld since 2023-11-14T22:13:20Z: {reason} (as of version 4)\n")
    assert "shifted by 0.580 logits" in shown
    assert run("snapshot gate --format json").json["score_shift"] == 0.58
    assert "withheld" in run("snapshot list").out
    assert run("snapshot release").code == 2  # without a reason
    assert run('snapshot release --reason "it is real"').out == (
        f"line 1: released; withheld since 2023-11-14T22:13:20Z: {reason}\n"
    )
    last = run("snapshot gate --format json").json["released"]  # the trainer's next version says that it is released
    assert (last["line"], last["who"], last["reason"]) == (1, who(), "it is real")
