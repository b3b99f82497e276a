"""Which negatives are sent is decided by the id alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.join.sampling import Sampling


@given(st.binary(min_size=1, max_size=40), st.floats(1e-6, 1), st.floats(1e-6, 1))
def test_what_a_lower_rate_keeps_a_higher_one_keeps_too(key, one, other):
    low, high = sorted((one, other))
    assert Sampling(high).keeps(key) or not Sampling(low).keeps(key)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.999, 1.0])
def test_the_share_kept_is_the_rate(rate):
    """Ids that count up are the hardest for a hash."""
    sampling = Sampling(rate)
    kept = sum(sampling.keeps(b"impression-%d" % index) for index in range(50_000))
    assert kept == pytest.approx(50_000 * rate, abs=4 * (50_000 * rate * (1 - rate)) ** 0.5 + 1e-9)


def test_the_hash_never_changes():
    """Else a replay, or another worker, would keep others. BLAKE2b of b"a" and b"b" are 0.2538 and 0.5174 of 2 ** 64."""
    assert [Sampling(rate).keeps(b"a") for rate in (0.2537, 0.2539)] == [False, True]
    assert [Sampling(rate).keeps(b"b") for rate in (0.5173, 0.5175)] == [False, True]
