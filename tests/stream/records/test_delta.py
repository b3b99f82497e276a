from __future__ import annotations

import json
import struct
from typing import Any

import msgspec
import pytest
import torch
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from model.rows import ModelDelta, Rows, rounded
from stream.records.delta import (
    FORMAT,
    RECORD_OVERHEAD_BYTES,
    DeltaDamaged,
    DeltaHeader,
    Point,
    UnknownFormat,
    encode_delta,
    read_piece,
)
from stream.records.delta_assembly import DeltaAssembly, assemble
from stream.records.packing import batch_bytes
from tests.stream.records.made_deltas import header, model_delta, pieces, same

PREFIX, CRC_AT = 44, 40


def sealed(value: bytes) -> bytes:
    """A record with the checksum that its bytes have."""
    return value[:CRC_AT] + struct.pack("<I", crc32c(value[:CRC_AT] + value[PREFIX:])) + value[PREFIX:]


def rewritten(first: bytes, **fields: Any) -> bytes:
    """The first piece with other fields in its header, and right checksums."""
    (size,) = struct.unpack_from("<I", first, 36)
    stated = json.loads(first[PREFIX : PREFIX + size]) | fields
    encoded = json.dumps(stated).encode()
    return sealed(first[:36] + struct.pack("<II", len(encoded), 0) + encoded + first[PREFIX + size :])


names = st.text(st.characters(codec="utf-8"), max_size=10)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(
    rows=st.integers(0, 2_000),
    dim=st.integers(0, 20),
    gone=st.integers(0, 500),
    dense=st.none() | st.dictionaries(names, shapes, max_size=4),
    limit=st.integers(4_000, 60_000),
    half=st.booleans(),
    history=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_delta_comes_back(
    rows: int, dim: int, gone: int, dense: dict[str, tuple[int, ...]] | None, limit: int, half: bool, history: bool, seed: int
) -> None:
    sent = model_delta(rows, dim, gone=gone, dense=dense, history=history, seed=seed)
    if half:
        sent = ModelDelta(rounded(sent.rows, "float16"), sent.gone, sent.dense, sent.digest)
    stated = header(
        4, offsets={"0": 2**40, "11": 0}, arrivals=(5, 6), rebase=True, version=8, dtype="float16" if half else "float32"
    )
    encoded = encode_delta(stated, sent, limit)
    sizes = [len(value) for value in encoded]
    assert max(batch_bytes(None, value, ()) for value in encoded) <= limit
    assert len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0]
    found = assemble(encoded)
    assert same(found.model, sent)
    derived = {"dim": dim, "rows": rows, "gone": gone, "dense": found.header.dense, "pieces": len(encoded)}
    derived |= {"digest": f"{sent.digest:016x}", "body_crc32c": found.header.body_crc32c}
    assert found.header == msgspec.structs.replace(stated, **derived)
    every = [each for each in (found.model.rows.keys, found.model.rows.embedding, found.model.gone) if each.numel()]
    assert all(each.data_ptr() % each.element_size() == 0 for each in every)


@given(count=st.integers(1, 4), data=st.data())
def test_a_bit_that_flips_is_found(count: int, data: st.DataObject) -> None:
    encoded = pieces(count=count, limit=8_000)
    piece = data.draw(st.integers(0, count - 1))
    at, bit = data.draw(st.integers(0, len(encoded[piece]) - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(encoded[piece])
    flipped[at] ^= 1 << bit
    with pytest.raises(DeltaDamaged) as damaged:
        assemble([*encoded[:piece], bytes(flipped), *encoded[piece + 1 :]])
    assert damaged.value.reason == ("not_a_delta" if at < 4 else "checksum")


@given(count=st.integers(2, 4), data=st.data())
def test_pieces_in_another_order_are_refused(count: int, data: st.DataObject) -> None:
    encoded = pieces(count=count, limit=8_000)
    order = data.draw(st.lists(st.integers(0, count - 1), max_size=count + 2).filter(lambda order: order != list(range(count))))
    with pytest.raises(DeltaDamaged) as damaged:
        assemble([encoded[each] for each in order])
    assert damaged.value.reason in ("missing_piece", "repeated_piece")


@given(st.binary(max_size=200))
def test_any_other_bytes_are_no_delta(value: bytes) -> None:
    with pytest.raises(DeltaDamaged) as damaged:
        read_piece(value)
    assert damaged.value.reason == "not_a_delta"
    with pytest.raises(DeltaDamaged) as damaged:
        read_piece(b"HRDL" + value)
    assert damaged.value.reason in ("not_a_delta", "checksum")


def test_no_value_and_no_pieces() -> None:
    with pytest.raises(DeltaDamaged, match=r"begins with b'HRDL', found none\."):
        read_piece(None)
    with pytest.raises(DeltaDamaged, match="expected its pieces, found none") as damaged:
        assemble([])
    assert damaged.value.reason == "missing_piece"


def test_a_later_format_says_which_delta_it_is() -> None:
    first = pieces(7)[0]
    later = sealed(first[:4] + struct.pack("<H", FORMAT + 1) + first[6:PREFIX] + b"whatever that is")
    piece = read_piece(later)
    assert (piece.epoch, piece.ordinal, piece.sequence, piece.pieces) == (1, 0, 7, 1)
    with pytest.raises(UnknownFormat, match=r"expected format 2 or less, found 3\. Upgrade this worker") as damaged:
        DeltaAssembly(piece)
    assert damaged.value.reason == "unknown_format"


@pytest.mark.parametrize(
    ("fields", "reason", "says"),
    [
        ({"sequence": 2}, "bad_header", "found delta 2 of deepfm/1/0 in 1 pieces"),
        ({"chain": "deepfm/2/0"}, "bad_header", "found delta 1 of deepfm/2/0"),
        ({"chain": "deepfm/1/3"}, "bad_header", "found delta 1 of deepfm/1/3"),
        ({"chain": "deepfm"}, "bad_header", "the name of a chain such as"),
        ({"pieces": 2}, "bad_header", "in 2 pieces"),
        ({"rows": -1}, "bad_header", "expected a header, found Expected `int` >= 0"),
        ({"rows": "10"}, "bad_header", "Expected `int`, got `str`"),
        ({"digest": "00"}, "bad_header", "digest"),
        ({"dtype": "bfloat16"}, "bad_header", "dtype"),
        ({"offsets": None}, "bad_header", "offsets"),
        ({"rows": 10**15}, "wrong_size", "expected a body of 76,000,000,000,000,000 bytes, found at most 1 times "),
        ({"dense": [{"name": "w", "shape": [10**12, 10**12, 10**12]}]}, "wrong_size", "found at most 1 times "),
        ({"rows": 9}, "wrong_size", "expected 688 bytes, found at least 760"),
        ({"gone": 2}, "wrong_size", "expected 776 bytes, found 760"),
        ({"body_crc32c": 5}, "body_checksum", "expected the CRC-32C 00000005"),
    ],
)
def test_a_header_that_does_not_fit_its_delta(fields: dict[str, Any], reason: str, says: str) -> None:
    delta = model_delta(rows=10, dim=16, gone=0)
    (first,) = encode_delta(header(), delta, 65_536)
    assert same(assemble([rewritten(first)]).model, delta)
    with pytest.raises(DeltaDamaged) as damaged:
        assemble([rewritten(first, **fields)])
    assert damaged.value.reason == reason and says in str(damaged.value)


def test_a_header_that_is_no_json() -> None:
    first = pieces()[0]
    for header_bytes in (b"", b"{", b"\xff", b"[" * 10_000):
        broken = first[:36] + struct.pack("<II", len(header_bytes), 0) + header_bytes + first[-800:]
        with pytest.raises(DeltaDamaged) as damaged:
            assemble([sealed(broken)])
        assert damaged.value.reason == "bad_header"


def test_fields_of_a_later_version_are_ignored() -> None:
    first = pieces(3)[0]
    assert assemble([rewritten(first, later={"a": 1})]).header.sequence == 3


def test_pieces_of_two_deltas_with_one_name() -> None:
    """Two trainers of one epoch, which must not be: same chain and sequence, other weights."""
    one, other = (encode_delta(header(), model_delta(1_000, 16, seed=seed), 65_536) for seed in (1, 2))
    assert len(one) == 2
    with pytest.raises(DeltaDamaged) as damaged:
        assemble([one[0], other[1]])
    assert damaged.value.reason == "body_checksum"


def test_what_can_not_be_sent() -> None:
    made = model_delta(10, 16, dense={"w": (3,)})
    rows = made.rows
    with pytest.raises(ValueError, match=r"embedding of a delta: expected float16 numbers as the header says, found others"):
        encode_delta(header(dtype="float16"), made, 65_536)
    for wrong, says in (
        (
            Rows(rows.keys.int(), rows.embedding, rows.first_order),
            r"keys of a delta: expected torch.int64 \(10,\), found torch.int32",
        ),
        (Rows(rows.keys, rows.embedding.double(), rows.first_order), "embedding of a delta: expected torch.float32"),
        (
            Rows(rows.keys[:9], rows.embedding, rows.first_order),
            r"keys of a delta: expected torch.int64 \(10,\), found .* \(9,\)",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            encode_delta(header(), ModelDelta(wrong, made.gone, None, 0), 65_536)
    with pytest.raises(ValueError, match=r"w of a delta: expected torch\.float32"):
        encode_delta(header(), ModelDelta(rows, made.gone, {"w": torch.zeros(3, dtype=torch.int64)}, 0), 65_536)
    with pytest.raises(ValueError, match="expected the name of a chain"):
        encode_delta(header(chain="deepfm"), made, 65_536)
    many = {str(partition): 10**12 for partition in range(10_000)}
    with pytest.raises(
        ValueError, match=r"expected a header of at most 65,.* bytes, found .*Raise topics.deltas_max_message_bytes"
    ):
        encode_delta(header(offsets=many), made, 65_536)
    assert same(assemble(encode_delta(header(offsets=many), made, 1_048_588)).model, made)


def test_rows_that_are_not_contiguous() -> None:
    wide = torch.randn(16, 40)
    rows = Rows(torch.arange(80)[::2], wide.T, torch.randn(80)[::2])
    sent = ModelDelta(rows, torch.arange(6)[::3], {"w": torch.randn(4, 6).T}, 1)
    assert same(assemble(encode_delta(header(), sent, 65_536)).model, sent)


def test_the_bytes_of_format_1() -> None:
    """What scorers without row history read. No such delta may ever change."""
    rows = Rows(torch.tensor([-1, 2]), torch.tensor([[0.5], [1.0]]), torch.tensor([0.0, -2.0]))
    sent = ModelDelta(rows, torch.tensor([3]), {"b": torch.tensor([4.0])}, 0xFEDCBA9876543210)
    stated = DeltaHeader(
        chain="m/2/1",
        sequence=3,
        parent=Point("m/2/1", 2),
        offsets={},
        watermark_ms=1,
        examples_seen=2,
        negative_rate=0.5,
        at_ms=4,
    )
    (value,) = encode_delta(stated, sent, 65_536)
    assert value[:36].hex() == "4852444c 0100 0000 0200000000000000 01000000 0300000000000000 00000000 01000000".replace(
        " ", ""
    )
    (header_bytes,) = struct.unpack_from("<I", value, 36)
    body = value[PREFIX + header_bytes :]
    assert body.hex() == (
        "ffffffffffffffff 02000000000000000000003f 0000803f00000000 000000c0030000000000000000008040 00000000"
    ).replace(" ", "")
    assert json.loads(value[PREFIX : PREFIX + header_bytes]) == {
        "chain": "m/2/1",
        "sequence": 3,
        "parent": {"chain": "m/2/1", "sequence": 2},
        "offsets": {},
        "watermark_ms": 1,
        "examples_seen": 2,
        "negative_rate": 0.5,
        "at_ms": 4,
        "arrivals": [],
        "rebase": False,
        "version": None,
        "dtype": "float32",
        "dim": 1,
        "rows": 2,
        "gone": 1,
        "dense": [{"name": "b", "shape": [1]}],
        "digest": "fedcba9876543210",
        "pieces": 1,
        "body_crc32c": crc32c(body),
    }


def test_the_overhead_is_small() -> None:
    """A delta of 2,500 rows, what a quarter of a second touches at 2,000 examples/s: at most 1.2 times its payload."""
    encoded = encode_delta(header(arrivals=tuple(range(64))), model_delta(2_500, 16, gone=0), 1_048_588)
    assert sum(map(len, encoded)) + RECORD_OVERHEAD_BYTES * len(encoded) < 1.02 * 2_500 * 76


def test_format_2_has_the_counts_after_the_first_order_weights() -> None:
    rows = Rows(
        torch.tensor([-1, 2]), torch.tensor([[0.5], [1.0]]), torch.tensor([0.0, -2.0]), torch.tensor([[9.0, 3], [1, 0]])
    )
    (value,) = encode_delta(header(), ModelDelta(rows, torch.tensor([3]), None, 1), 65_536)
    assert struct.unpack_from("<H", value, 4) == (2,)
    (header_bytes,) = struct.unpack_from("<I", value, 36)
    body = value[PREFIX + header_bytes :]
    assert body.hex() == (
        "ffffffffffffffff 0200000000000000 0000003f0000803f 00000000000000c0 00001041000040400000803f00000000 0300000000000000"
    ).replace(" ", "")
