"""Each click is followed to the first delta that has learned it, and to the first answer that knows this delta."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.demo.freshness import Answers, Clicks, Deltas, follow_clicks, read_followed
from deploy.feeding.feed import Feed
from deploy.settings import Settings
from state.manifest import Manifest
from stream.records.delta import encode_delta
from stream.records.example import CORRECTION, FIRST, Example, example_records
from stream.records.packing import unpack_headers
from stream.registry.writer import RegistryWriter
from stream.topics.names import TopicNames
from tests.judged import JUDGED
from tests.stream.deltas.scene import scene
from tests.stream.records.made_deltas import header, model_delta


def clicks(*rows: tuple[int, int]) -> Clicks:
    """Clicks by (partition, offset). The one at an offset arrived at 1,000 + offset, and its label at 2,000 + offset."""
    partition, offset = np.array(rows, np.int64).reshape(-1, 2).T
    return Clicks(partition, offset, offset, 1_000 + offset, 2_000 + offset, np.zeros(len(rows), np.int64))


def deltas(*rows: tuple[int, int, int]) -> Deltas:
    """Deltas by sequence and the next offsets of two partitions. Each is taken at 3,000 + sequence, and there 10 later."""
    sequence, first, second = np.array(rows, np.int64).reshape(-1, 3).T
    return Deltas(sequence, 3_000 + sequence, 3_010 + sequence, {0: first, 1: second})


def answers(*rows: tuple[int, int]) -> Answers:
    sequence, written_ms = np.array(rows, np.int64).reshape(-1, 2).T
    return Answers(sequence, written_ms)


def test_the_first_delta_beyond_the_label_and_the_first_answer_at_or_beyond_it():
    found = follow_clicks(
        clicks((0, 4), (0, 5), (1, 0), (1, 7)),
        deltas((1, 5, 0), (2, 6, 1), (3, 6, 7), (4, 9, 8)),
        answers((0, 5_000), (1, 5_001), (3, 5_002), (4, 5_003)),
    )
    assert found.total == 4
    assert found.clicks.offset.tolist() == [4, 5, 0, 7]
    assert found.taken_ms.tolist() == [3_001, 3_002, 3_002, 3_004]
    assert found.logged_ms.tolist() == [3_011, 3_012, 3_012, 3_014]
    assert found.answered_ms.tolist() == [5_001, 5_002, 5_002, 5_003]  # no answer is by delta 2 exactly
    assert found.click_to_answer_ms.tolist() == [3_997, 3_997, 4_002, 3_996]


def test_what_no_delta_or_no_answer_reaches_is_left_out_and_counted():
    found = follow_clicks(clicks((0, 1), (0, 5), (1, 9)), deltas((1, 2, 9), (2, 6, 9)), answers((1, 5_000), (0, 5_001)))
    assert found.total == 3
    assert found.clicks.offset.tolist() == [1]
    assert found.answered_ms.tolist() == [5_000]


def test_nothing_at_all():
    assert follow_clicks(clicks(), deltas((1, 2, 2)), answers((1, 5_000))).total == 0
    assert len(follow_clicks(clicks((0, 1)), deltas(), answers((1, 5_000))).clicks) == 0
    assert len(follow_clicks(clicks((0, 1)), deltas((1, 2, 2)), answers()).clicks) == 0


OFFSETS = st.lists(st.integers(0, 30), min_size=1, max_size=12)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 30)), max_size=12), OFFSETS, OFFSETS, st.lists(st.integers(0, 13)))
def test_as_one_would_by_hand(where, first, second, answered):
    ends = list(zip(sorted(first), sorted(second), strict=False))
    made = deltas(*((number, *offsets) for number, offsets in enumerate(ends, 1)))
    found = follow_clicks(clicks(*where), made, answers(*((number, 5_000 + at) for at, number in enumerate(answered))))
    expected = []
    for partition, offset in where:
        learned = next((number for number, offsets in enumerate(ends, 1) if offsets[partition] > offset), None)
        at = next((at for at, number in enumerate(answered) if learned is not None and number >= learned), None)
        if learned is not None and at is not None:
            expected.append((offset, 3_000 + learned, 5_000 + at))
    rows = zip(found.clicks.offset.tolist(), found.taken_ms.tolist(), found.answered_ms.tolist(), strict=True)
    assert list(rows) == expected


async def send_examples(feed: Feed, topic: str, *examples: Example) -> None:
    records = [(key, value, unpack_headers(headers)) for key, value, headers in example_records(examples, 1.0)]  # type: ignore[arg-type]
    keys, values, headers = zip(*records, strict=True)
    await feed.send(topic, keys, values, headers)  # type: ignore[arg-type]
    await feed.flush()


@pytest.mark.kafka
def test_a_run_is_read_from_its_topics(topics: Settings) -> None:
    """Of three clicks, deltas 1 and 2 learn the first two. Answers name the weights by version 7, which is at sequence 1."""
    names = TopicNames.of(topics.topics)
    key = b"a"  # all of one key are in one partition

    async def run() -> None:
        async with scene(topics) as made, Feed(topics.kafka) as feed:
            writer = await made.writer()
            chain = f"deepfm/{writer._epoch}/0"
            await send_examples(
                feed,
                names.examples,
                Example(key, b"{}", 100, 0, -1, FIRST),
                Example(key, b"{}", 100, 1, 110, FIRST, 120),
                Example(key, b"{}", 200, 0, 230, CORRECTION, 240),
                Example(key, b"{}", 300, 2, 310, FIRST, 320),
            )
            where = {str(number): 0 for number in range(topics.topics.partitions)}
            for sequence, trained in ((1, 2), (2, 3)):
                offsets = dict.fromkeys(where, trained)
                delta = model_delta(rows=2_000, dim=16, seed=sequence)  # of several records
                stated = header(sequence, chain=chain, offsets=offsets, at_ms=1_000 * sequence)
                await writer.send(encode_delta(stated, delta, 65_536))
            registry = RegistryWriter(topics.kafka, names, who="trainer@here")
            try:
                epoch = await registry.take_trainer_epoch()
                point = {"chain": chain, "sequence": 1, "digest": "0" * 16, "deltas_offset": 3}
                manifest = Manifest(version=7, epoch=epoch, created_at_ms=5, features={}, model={}, verdict=JUDGED, **point)
                await registry.announce(manifest, gate=topics.snapshots)
            finally:
                await registry.close()
            for answer in (b'{"scores":[],"model_version":null}', b'{"model_version":7}', b'{"model_version":7,"delta":4}'):
                await feed.send(names.scores, [b"r"], [answer])
                await feed.flush()
                await asyncio.sleep(0.01)  # so that the broker's timestamps differ
        found = await read_followed(topics)
        assert found.total == 3
        assert found.clicks.offset.tolist() == [1, 2]
        assert found.clicks.corrects.tolist() == [0, 1]
        assert found.clicks.impression_ms.tolist() == [100, 200]
        assert found.clicks.arrived_ms.tolist() == [120, 240]
        assert found.taken_ms.tolist() == [1_000, 2_000]
        assert found.answered_ms[0] < found.answered_ms[1]
        assert (found.logged_ms <= found.answered_ms).all()
        assert (found.clicks.written_ms <= found.logged_ms).all()

    asyncio.run(run())
