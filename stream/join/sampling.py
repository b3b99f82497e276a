"""Which negatives are sent. A hash of the impression id decides, so that a replay takes the same ones.

A kept negative stands for 1 / rate negatives. A model that learns from them must correct for it: the odds of a score that was
learned at `rate` are the odds of the true probability, divided by `rate` (He et al., "Practical Lessons from Predicting Clicks
on Ads at Facebook", ADKDD 2014, section 6.3).
"""

from __future__ import annotations

from hashlib import blake2b

__all__ = ["Sampling"]

_BYTES = 8  # of the hash: two rates must differ by 2 ** -64


class Sampling:
    """Keeps a share `rate` of negatives, 0 < rate <= 1: those with BLAKE2b(id, 8 bytes), read big endian, < rate * 2 ** 64."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._bound = min(int(rate * (1 << 8 * _BYTES)), (1 << 8 * _BYTES) - 1).to_bytes(_BYTES, "big")

    def keeps(self, key: bytes) -> bool:
        """Whether the negative of this impression id is sent."""
        # Big-endian bytes compare like their numbers.
        return self.rate >= 1 or blake2b(key, digest_size=_BYTES).digest() < self._bound
