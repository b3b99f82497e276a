"""The name of a chain: one line of weights by one trainer."""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["ChainName"]

_TEXT = re.compile(r"(?P<model>[A-Za-z0-9._-]+)/(?P<epoch>0|[1-9][0-9]{0,17})/(?P<ordinal>0|[1-9][0-9]{0,8})")


class ChainName(NamedTuple):
    """A chain by its parts. Versions, deltas and heartbeats have the text form, such as `deepfm/12/0`.

    model    name of the model
    epoch    of the trainer that writes the chain, below 10**18
    ordinal  number of the chain among those of this trainer, from 0, below 10**9
    """

    model: str
    epoch: int
    ordinal: int

    @classmethod
    def of(cls, text: str) -> ChainName:
        """Raises ValueError for a text that names no chain."""
        found = _TEXT.fullmatch(text)
        if found is None:
            raise ValueError(f"expected the name of a chain such as deepfm/12/0, found {text[:80]!r}")
        return cls(found["model"], int(found["epoch"]), int(found["ordinal"]))

    def __str__(self) -> str:
        return f"{self.model}/{self.epoch}/{self.ordinal}"
