"""Opening a partition's state folder: what it holds is given up only when it can't be right, and then it is moved aside."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from state.errors import JoinStateError
from state.join_state import LAYOUT, JoinMeta, JoinState, StateOptions
from stream.errors import PositionError
from stream.join import committed as committed_module
from stream.join import local_state, takeover
from stream.join.commit_metadata import Progress, encode_progress
from stream.join.committed import Committed, CommittedReader
from stream.join.local_state import LocalState
from stream.join.memory import Memory
from stream.join.rebuild import Rebuild
from stream.join.takeover import Takeover
from stream.settings import JoinSettings, KafkaSettings, TopicSettings
from stream.topics.names import TopicNames
from tests.stream.join.fake_log import FakeConsumer, FakeLog

NAMES = TopicNames.of(TopicSettings())
OPTIONS = StateOptions(8)
PENDING = 500
PROGRESS = Progress(
    watermark_ms=10, impressions_seen_ms=10, clicks_seen_ms=10, impressions_low=0, clicks_low=0, examples_low=0, partitions=1
)
COMMITTED = Committed(PENDING, 0, 0, 0, 0, 0, PROGRESS)


def fill(path: Path, identity: str = "i") -> None:
    state = JoinState(path, OPTIONS)
    batch = state.batch()
    batch.add_pending((index, index, b"%d" % index, b"value") for index in range(PENDING))
    seen = {"watermark_ms": 10, "impressions_seen_ms": 10, "clicks_seen_ms": 10}
    positions = {"impressions_position": PENDING, "clicks_position": 0, "examples_position": 0}
    batch.set_meta(JoinMeta(identity=identity, layout=LAYOUT, **positions, **seen))
    batch.write()
    state.close()


def takeover_in(folder: Path) -> Takeover:
    settings = JoinSettings()
    return Takeover(
        kafka=KafkaSettings(), settings=settings, names=NAMES, group="g", identity="i", state_dir=folder, options=OPTIONS
    )


def open_state(folder: Path) -> JoinState:
    return LocalState(folder, OPTIONS, "i").open(0, COMMITTED)


def pending(folder: Path) -> int:
    """How many are pending in what is opened; it is closed again."""
    state = open_state(folder)
    try:
        return len(list(state.payloads.keys()))
    finally:
        state.close()


def folders(folder: Path) -> list[str]:
    return sorted(each.name.split("-2")[0] for each in folder.iterdir())


def test_what_is_a_part_of_the_log_is_taken_as_it_is(tmp_path: Path) -> None:
    fill(tmp_path / "partition-0")
    assert pending(tmp_path) == PENDING
    assert folders(tmp_path) == ["partition-0"]


@pytest.mark.parametrize("name", ["CURRENT", "MANIFEST-*", "*.sst"])
def test_what_is_damaged_is_moved_aside(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path / "partition-0")
    file = next((tmp_path / "partition-0").glob(name))
    content = bytearray(file.read_bytes())
    content[0] ^= 0xFF
    content[-10] ^= 0xFF
    file.write_bytes(content)
    assert pending(tmp_path) == 0
    assert folders(tmp_path) == ["partition-0", "partition-0.damaged"]
    [aside] = tmp_path.glob("partition-0.damaged-*")
    assert (aside / file.name).read_bytes() == content
    assert f"Moved it aside to {aside}" in caplog.text


@pytest.mark.parametrize("words", ["Too many open files", "Permission denied", "No space left on device", "Something new"])
def test_any_other_error_leaves_it_and_ends_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    """Before, the folder was deleted: with too few file descriptors, nine of them in one start."""
    fill(tmp_path / "partition-0")

    class Fails:
        def __init__(self, *args: Any) -> None:
            raise JoinStateError(words)

    with monkeypatch.context() as patch:
        patch.setattr(local_state, "JoinState", Fails)
        with pytest.raises(JoinStateError, match=words):
            open_state(tmp_path)
    assert pending(tmp_path) == PENDING


def test_a_newer_version_has_written_it(tmp_path: Path) -> None:
    fill(tmp_path / "partition-0")
    state = JoinState(tmp_path / "partition-0", OPTIONS)
    meta = state.db[b"meta"]
    state.db[b"meta"] = meta.replace(b'"layout":%d' % LAYOUT, b'"layout":%d' % (LAYOUT + 1))
    state.close()
    with pytest.raises(JoinStateError, match="a newer version of Headrace"):
        open_state(tmp_path)
    state = JoinState(tmp_path / "partition-0", OPTIONS)
    state.db[b"meta"] = meta
    state.close()
    assert pending(tmp_path) == PENDING
    assert folders(tmp_path) == ["partition-0"]


def test_what_is_of_another_log_is_moved_aside(tmp_path: Path) -> None:
    fill(tmp_path / "partition-0", identity="another cluster")
    assert pending(tmp_path) == 0
    assert folders(tmp_path) == ["partition-0", "partition-0.other"]
    [aside] = tmp_path.glob("partition-0.other-*")
    JoinState.destroy(tmp_path / "partition-0")
    aside.rename(tmp_path / "partition-0")
    state = JoinState(tmp_path / "partition-0", OPTIONS)
    assert len(list(state.payloads.keys())) == PENDING
    state.close()


def test_what_an_unfinished_rebuild_has_left_goes(tmp_path: Path) -> None:
    fill(tmp_path / "partition-0")
    state = JoinState(tmp_path / "partition-0", OPTIONS)
    batch = state.batch()
    batch.drop_meta()
    batch.write()
    state.close()
    assert pending(tmp_path) == 0
    assert folders(tmp_path) == ["partition-0"]


def test_a_folder_that_is_in_use_is_left_to_its_owner(tmp_path: Path) -> None:
    fill(tmp_path / "partition-0")
    owner = JoinState(tmp_path / "partition-0", OPTIONS)
    try:
        assert pending(tmp_path) == 0
        assert folders(tmp_path) == ["partition-0", "partition-0.1"]
        assert len(list(owner.payloads.keys())) == PENDING
    finally:
        owner.close()


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("beyond", [True, False])
def test_labels_beyond_what_was_committed_stop_a_takeover(tmp_path: Path, local: bool, beyond: bool) -> None:
    """The committed offset that was read is then not the newest: going on from it would label again what was labelled."""
    if local:
        fill(tmp_path / "partition-0")
    log = FakeLog(NAMES)
    for index in range(PENDING):
        value = b'{"impression_id":"%d","timestamp":%d}' % (index, index)
        log.append(NAMES.impressions, b"%d" % index, value)
    offset = PENDING if beyond else PENDING - 1
    headers = {"kind": b"first", "label": b"0", "source_offset": b"%d" % offset, "impression_ms": b"5"}
    log.append(NAMES.examples, b"x", b"{}", tuple(headers.items()))
    committed = Committed(PENDING, 0, 0, 0, 0, len(log.topics[NAMES.examples]), PROGRESS)

    async def rebuild() -> Memory:
        state = open_state(tmp_path)
        try:
            work = Rebuild(
                *(JoinSettings(), NAMES, 0, "i"),
                consumer=FakeConsumer(log),
                state=state,
                committed=committed,
                still_ours=lambda: True,
            )
            return (await work.run()).memory
        finally:
            state.close()

    if not beyond:
        asyncio.run(rebuild())
        return
    with pytest.raises(
        PositionError, match=rf"impressions at or after offset {PENDING}, .*found something about offset {offset}"
    ):
        asyncio.run(rebuild())


@pytest.mark.parametrize(("reset", "said"), [(NAMES.impressions, True), (NAMES.clicks, True), ("both", False)])
def test_offsets_of_one_source_that_were_reset_alone_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reset: str, said: bool
) -> None:
    sources = [TopicPartition(topic, 0) for topic in (NAMES.impressions, NAMES.clicks)]
    metadata = encode_progress(PROGRESS)
    known = {tp: OffsetAndMetadata(0, "" if reset in (tp.topic, "both") else metadata) for tp in sources}
    reader = CommittedReader(KafkaSettings(), NAMES, "g", "i")

    async def committed_offsets(*args: Any) -> dict[TopicPartition, OffsetAndMetadata]:
        return known

    async def ends(*args: Any) -> dict[TopicPartition, int]:
        return dict.fromkeys((*sources, TopicPartition(NAMES.examples, 0)), 0)

    monkeypatch.setattr(committed_module, "committed_offsets", committed_offsets)
    monkeypatch.setattr(committed_module, "high_watermarks", ends)
    consumer = SimpleNamespace(beginning_offsets=ends, end_offsets=ends)
    if not said:
        assert asyncio.run(reader.read(consumer, 0)).progress is None
        return
    with pytest.raises(PositionError, match=f"found none with those of {reset}: they were reset alone"):
        asyncio.run(reader.read(consumer, 0))


class Consumer(FakeConsumer):
    async def start(self) -> None: ...

    async def stop(self) -> None: ...


def test_damage_that_is_found_on_reading_is_moved_aside_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is read, and its checksum looked at, when somebody wants it."""
    fill(tmp_path / "partition-0")
    file = max((tmp_path / "partition-0").glob("*.sst"), key=lambda each: each.stat().st_size)  # of what is pending
    content = bytearray(file.read_bytes())
    content[100] ^= 0xFF
    file.write_bytes(content)
    opened = open_state(tmp_path)
    opened.close()
    log = FakeLog(NAMES)
    producer = SimpleNamespace(start=Consumer(log).start, stop=Consumer(log).stop)
    monkeypatch.setattr(takeover, "AIOKafkaProducer", lambda **options: producer)
    monkeypatch.setattr(takeover, "AIOKafkaConsumer", lambda **options: Consumer(log))

    async def committed(self: CommittedReader, consumer: Any, number: int) -> Committed:
        return COMMITTED

    async def take() -> int:
        opening = takeover_in(tmp_path)
        for index in range(PENDING):
            log.append(NAMES.impressions, b"%d" % index, b'{"impression_id":"%d","timestamp":%d}' % (index, index))
        taken = await opening.take(0, lambda: True)
        taken.state.close()
        return taken.pending

    monkeypatch.setattr(CommittedReader, "read", committed)
    assert asyncio.run(take()) == PENDING
    assert folders(tmp_path) == ["partition-0", "partition-0.damaged"]
