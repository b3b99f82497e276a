"""Examples that are not learned: stretches of the log that were left out when the trainer was sent back (`state.rewinds`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from state.rewinds import SkippedRange, begun
from stream.trainer.columns import Int64Array
from stream.trainer.examples import DecodedRun

__all__ = ["Skips"]


class Skips:
    """Which offsets are left out, by partition.

        skips = Skips(registry.rewinds.skipped, topic_id="…")
        skips.cut(run)                # the examples of a run that are to be learned
        skips.begun({0: 1200})        # what a manifest says of weights that have come to these offsets

    Args:
        topic_id: Kafka's id of `examples` as it is now. A range of another id is of a topic that was created again since, so
            its offsets mean nothing.
    """

    def __init__(self, ranges: Iterable[SkippedRange], topic_id: str = "") -> None:
        self._ranges = tuple(each for each in ranges if not each.topic_id or not topic_id or each.topic_id == topic_id)
        self._bounds = {partition: _bounds(self._ranges, partition) for partition in {each.partition for each in self._ranges}}

    def cut(self, run: DecodedRun) -> DecodedRun:
        """The run without its skipped examples. Its end stays, so their offsets count as trained."""
        bounds = self._bounds.get(run.partition)
        if bounds is None or not len(run):
            return run
        # Bounds ascend and alternate between the first offset of a stretch and the one after its last: inside, an odd number of
        # them is at or below the offset.
        inside = np.searchsorted(bounds, run.offsets, side="right") % 2 == 1
        return run.take(~inside) if inside.any() else run

    def begun(self, offsets: Mapping[int, int]) -> tuple[SkippedRange, ...]:
        """The ranges that training has reached, by the next offset to train of each partition."""
        return begun(self._ranges, offsets)


def _bounds(ranges: Iterable[SkippedRange], partition: int) -> Int64Array:
    """First offsets and ends of the union of a partition's ranges, ascending; int64 (2N,)."""
    merged: list[list[int]] = []
    for first, to in sorted((each.first, each.to) for each in ranges if each.partition == partition and each.first < each.to):
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], to)
        else:
            merged.append([first, to])
    flat: npt.NDArray[np.int64] = np.array(merged, np.int64).reshape(-1)
    return flat
