"""A dead letter read back is the record that it was made from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from stream.letters.log import Wanted
from stream.records.dead_letter import MAX_RENAMED, ORIGINAL, OUR_HEADERS, DeadLetter, Letter, Origin, read_letter
from stream.records.replay import read_receipt, receipt

NAMES = st.one_of(st.sampled_from([*OUR_HEADERS, ORIGINAL, ORIGINAL + "reason", "kind", "replayed"]), st.text(max_size=12))


def consumed(key: bytes | None, value: bytes | None, headers: Any) -> Any:
    return SimpleNamespace(partition=1, offset=9, timestamp=77, key=key, value=value, headers=tuple(headers))


@given(st.lists(st.tuples(NAMES, st.one_of(st.none(), st.binary(max_size=9))), max_size=8), st.text(max_size=30))
def test_a_letter_gives_back_what_was_received(headers: Any, error: str) -> None:
    letter = DeadLetter("wrong_type", error, "$.x", "clicks", 3, 5, b"k", b"\xff", tuple(headers))
    found = read_letter(consumed(letter.key, letter.value, letter.out_headers()))
    assert found == Letter(
        1,
        9,
        77,
        "wrong_type",
        error.encode(errors="replace").decode(),
        "$.x",
        Origin("clicks", 3, 5),
        b"k",
        b"\xff",
        tuple(headers),
    )
    assert read_receipt(consumed(letter.key, letter.value, letter.out_headers())) == []


@given(st.lists(st.tuples(NAMES, st.binary(max_size=9)), max_size=8))
def test_whoever_reads_headers_into_a_dictionary_gets_ours(headers: Any) -> None:
    letter = DeadLetter("wrong_type", "e", "$.x", "clicks", 3, 5, b"k", b"v", tuple(headers))
    read = dict(letter.out_headers())
    assert [read[name] for name in OUR_HEADERS] == [b"wrong_type", b"e", b"$.x", b"clicks", b"3", b"5"]


def test_a_record_of_a_hundred_thousand_reasons_still_fits() -> None:
    theirs = (("reason", b""),) * 100_000
    grown = len(DeadLetter("wrong_type", "", "", "clicks", 0, 0, None, None, theirs).out_headers()) - len(OUR_HEADERS)
    assert grown == MAX_RENAMED and MAX_RENAMED * len(ORIGINAL) < 32_768


def test_a_receipt_names_origins_and_is_no_letter() -> None:
    origins = [Origin("shop-clicks", 2, 17), Origin("shop-examples", 0, 1 << 60)]
    key, value, headers = receipt(origins, "someone@host")
    record = consumed(key, value, headers)
    assert read_receipt(record) == origins and read_letter(record) is None


def test_what_is_neither_is_passed_over() -> None:
    for headers in ((), (("reason", b"x"),), tuple((name, b"x") for name in OUR_HEADERS), (("replayed", b"1"),)):
        record = consumed(None, b"{", headers)
        assert read_letter(record) is None and read_receipt(record) == []


def test_wanted_takes_what_every_part_takes() -> None:
    letter = Letter(1, 9, 77, "nested", "", "$", Origin("examples", 0, 5), None, None, ())
    for takes in (Wanted(), Wanted({"nested"}, {"examples"}, {"1/9"}, 77, 78)):
        assert takes.takes(letter)
    for refuses in (
        Wanted(reasons={"bad_utf8"}),
        Wanted(sources={"clicks"}),
        Wanted(names={"1/8"}),
        Wanted(since_ms=78),
        Wanted(until_ms=77),
    ):
        assert not refuses.takes(letter)
