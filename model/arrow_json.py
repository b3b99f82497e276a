"""Reads a run of JSON records into Arrow columns, if Arrow's reader is sure to agree with the reference decoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json as pj

__all__ = ["Doubt", "read_json"]

_SURE_DEPTH = 100
"""The fast path takes records nested up to here. Python's JSON reader fails near 1,000; Arrow has no such limit."""


class Doubt(Exception):
    """The fast path isn't sure that it agrees with the reference on this run."""


def read_json(payloads: Sequence[bytes], layout: pa.Schema) -> pa.Table:
    """One row for each payload. Raises Doubt.

    Arrow's reader accepts more than JSON, and ignores which payload a record comes from. So it only gets texts that it and the
    reference read alike:

    - each payload starts with { and ends with };
    - there are no control characters, so that only the newlines in between separate records, and no string spans two payloads;
    - the text is UTF-8, without NaN and infinity, and without deep nesting.
    """
    joined = b"\n".join(payloads)
    text = np.frombuffer(joined, np.uint8)
    lengths: npt.NDArray[np.int64] = np.fromiter(map(len, payloads), np.int64, len(payloads))
    ends = np.cumsum(lengths + 1) - 1
    if (lengths < 2).any() or (text[ends - lengths] != ord("{")).any() or (text[ends - 1] != ord("}")).any():
        raise Doubt
    if np.count_nonzero(text < 32) != len(payloads) - 1 or b"NaN" in joined or b"Inf" in joined:
        raise Doubt
    # { and [ differ in one bit. A payload's brackets are those before its end, less those before its start.
    brackets = np.searchsorted(np.flatnonzero((text | 0x20) == ord("{")), ends)
    deep = np.flatnonzero(np.diff(brackets, prepend=0) > _SURE_DEPTH)
    if any(_depth(payloads[index]) > _SURE_DEPTH for index in deep.tolist()):
        raise Doubt
    try:
        joined.decode("utf-8")
        table = pj.read_json(
            pa.BufferReader(joined),
            read_options=pj.ReadOptions(use_threads=False, block_size=len(joined) + 1),  # one block: one chunk a column
            parse_options=pj.ParseOptions(explicit_schema=layout, unexpected_field_behavior="ignore"),
        )
    except (UnicodeDecodeError, pa.ArrowException, ValueError) as error:
        raise Doubt from error
    if table.num_rows != len(payloads):
        raise Doubt
    return table


def _depth(payload: bytes) -> int:
    """How deep the brackets of a JSON text nest; brackets in strings don't count."""
    text = np.frombuffer(payload.replace(rb"\\", b"  ").replace(rb"\"", b"  "), np.uint8)
    outside = (np.cumsum(text == ord('"')) & 1) == 0
    opens = ((text == ord("{")) | (text == ord("["))) & outside
    closes = ((text == ord("}")) | (text == ord("]"))) & outside
    return int(np.cumsum(opens.astype(np.int64) - closes).max(initial=0))
