"""Stable 64-bit hashes of feature values: the keys of the embedding table.

The algorithm, for bytes `b` of a hash space `s`, all arithmetic modulo 2**64:

1. `seed(s)` is the hash of the UTF-8 bytes of the space's name with seed 0.
2. `state = seed + kind + len(b) * P`, with a constant `kind` each for strings, numbers, crosses and the missing value, and P =
   2**64 / golden ratio. The bytes of a cross are the keys of what it combines, 8 little-endian bytes each.
3. For each 8-byte little-endian word of `b`, the last one padded with zero bytes: `state = mix(state ^ word)`.
4. The key is `mix(state)` read as a signed 64-bit integer; `EMPTY_KEY`, which marks free slots, becomes
   `EMPTY_KEY - 1`.

`mix(x)` is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection with full avalanche, so two
values of the same length that differ in one word never collide before step 4. Every snapshot holds keys, so the
algorithm can't change without a new snapshot format: tests pin its values.

`hash_bytes`, `number_key` and `cross_key` are the reference in plain Python; `hash_strings`, `hash_integers` and `hash_crosses`
compute the same keys for columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = [
    "EMPTY_KEY",
    "cross_key",
    "hash_bytes",
    "hash_crosses",
    "hash_integers",
    "hash_strings",
    "missing_key",
    "number_key",
    "space_seed",
]

EMPTY_KEY = -1
"""Marks a free slot of the key table; no feature has this key."""

Int64Array = npt.NDArray[np.int64]

_MASK = (1 << 64) - 1
_LENGTH_FACTOR = 0x9E3779B97F4A7C15  # P: 2**64 / golden ratio, made odd; lengths change all bits of the state
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_STRING_KIND = 0
_NUMBER_KIND = 0x4E554D4245520000  # "NUMBER"
_MISSING_KIND = 0x4D495353494E4700  # "MISSING"
_CROSS_KIND = 0x43524F5353000000  # "CROSS"

_LONG_BYTES = 256
"""Longer strings are hashed one by one: the vectorised loop makes a pass over the whole column for each 8-byte word."""


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    x = x - (1 << 64) if x >> 63 else x
    return EMPTY_KEY - 1 if x == EMPTY_KEY else x


def _hash(data: bytes, seed: int, kind: int) -> int:
    state = (seed + kind + len(data) * _LENGTH_FACTOR) & _MASK
    for start in range(0, len(data), 8):
        state = _mix(state ^ int.from_bytes(data[start : start + 8], "little"))
    return _mix(state)


@lru_cache(maxsize=4096)
def space_seed(space: str) -> int:
    """Seed of a hash space, unsigned 64-bit."""
    return _hash(space.encode(), 0, _STRING_KIND)


def hash_bytes(value: bytes, space: str) -> int:
    """Key of a string, given as UTF-8 bytes, in `space`: signed 64-bit, never `EMPTY_KEY`."""
    return _signed(_hash(value, space_seed(space), _STRING_KIND))


def number_key(number: int, space: str) -> int:
    """Key of an integer, such as a bucket of a numeric field, in `space`. Number and key are signed 64-bit.

    It differs from the key of the string with the same bytes.
    """
    return _signed(_hash(number.to_bytes(8, "little", signed=True), space_seed(space), _NUMBER_KIND))


def missing_key(space: str) -> int:
    """Key of the missing value in `space`."""
    return _signed(_hash(b"", space_seed(space), _MISSING_KIND))


def cross_key(keys: Sequence[int], space: str) -> int:
    """Key in `space` of a combination of values, given by their own keys. Another order is another combination."""
    return _signed(_hash(b"".join(key.to_bytes(8, "little", signed=True) for key in keys), space_seed(space), _CROSS_KIND))


def _mix_array(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX_2)
    return x ^ (x >> np.uint64(31))


def _signed_array(state: npt.NDArray[np.uint64]) -> Int64Array:
    keys = _mix_array(state).view(np.int64)
    keys[keys == EMPTY_KEY] = EMPTY_KEY - 1
    return keys


def hash_integers(numbers: Int64Array, space: str) -> Int64Array:
    """`number_key` of each of `numbers` (N,), as int64 (N,)."""
    start = np.uint64((space_seed(space) + _NUMBER_KIND + 8 * _LENGTH_FACTOR) & _MASK)
    return _signed_array(_mix_array(np.ascontiguousarray(numbers, dtype=np.int64).view(np.uint64) ^ start))


def hash_crosses(columns: Sequence[Int64Array], space: str) -> Int64Array:
    """`cross_key` of each row of two or more columns of keys, each int64 (N,); returns int64 (N,)."""
    start = np.uint64((space_seed(space) + _CROSS_KIND + 8 * len(columns) * _LENGTH_FACTOR) & _MASK)
    state = columns[0].view(np.uint64) ^ start
    for column in columns[1:]:
        state = _mix_array(state)
        state ^= column.view(np.uint64)
    return _signed_array(_mix_array(state))


def hash_strings(strings: pa.StringArray, seeds: npt.NDArray[np.uint64]) -> Int64Array:
    """`hash_bytes` of each value of an Arrow string array (N,) without nulls, as int64 (N,).

    seeds  uint64 (N,): `space_seed` of the space of each value, so that one call can hash several fields

    Repeated values are hashed again: encode a column as a dictionary and hash the dictionary instead.
    """
    count = len(strings)
    _, offsets_buffer, data_buffer = strings.buffers()
    offsets = np.frombuffer(offsets_buffer, dtype=np.int32, count=count + 1, offset=4 * strings.offset)
    starts, lengths = offsets[:-1].astype(np.int64), np.diff(offsets).astype(np.int64)
    data = np.frombuffer(data_buffer, dtype=np.uint8) if data_buffer is not None else np.empty(0, np.uint8)
    short = np.minimum(lengths, _LONG_BYTES)
    padded = np.zeros(int(offsets[-1]) + 8 if count else 8, dtype=np.uint8)  # so that a word can be read at any byte
    padded[: len(padded) - 8] = data[: len(padded) - 8]
    words = np.ndarray((len(padded) - 7,), dtype="<u8", buffer=padded, strides=(1,))

    state = seeds + np.uint64(_STRING_KIND) + lengths.astype(np.uint64) * np.uint64(_LENGTH_FACTOR)
    active = np.flatnonzero(lengths)
    position = 0
    while len(active):
        word = words[starts[active] + position]
        left = np.minimum(short[active] - position, 8)
        word &= np.uint64(_MASK) >> ((8 - left) * 8).astype(np.uint64)
        state[active] = _mix_array(state[active] ^ word)
        position += 8
        active = active[short[active] > position]
    keys = _signed_array(state)
    for index in np.flatnonzero(lengths > _LONG_BYTES).tolist():
        value = data[starts[index] : starts[index] + lengths[index]].tobytes()
        keys[index] = _signed(_hash(value, int(seeds[index]), _STRING_KIND))
    return keys
