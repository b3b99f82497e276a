"""History that a model learned before the stream: examples of the stream up to its cut-off aren't learned again."""

from __future__ import annotations

import msgspec

__all__ = ["History"]


class History(msgspec.Struct, frozen=True, kw_only=True):
    """What `headrace bootstrap` taught a model. The manifests of its version and of all versions after it have it.

    source       name of the data set, with the file's name if it is a file
    examples     number of impressions learned from it
    until_ms     the cut-off: event time of its newest impression (ms since epoch). Examples of impressions at or before it are
                 not learned from the stream
    fingerprint  of the data, the settings and the options that it was learned with, in hex
    """

    source: str = ""
    examples: int = 0
    until_ms: int = 0
    fingerprint: str = ""
