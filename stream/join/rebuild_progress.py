"""How far takeovers and their rebuilds are: for the process' log, for `/readyz` and for the metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

__all__ = ["RebuildProgress", "takeover_status"]

log = logging.getLogger(__name__)

# How often a long rebuild logs its progress. A rebuild that takes less time is logged only when it is done.
LOG_EVERY_S = 5.0


@dataclass(slots=True)
class RebuildProgress:
    """The rebuild of one partition number, in offsets of its three logs.

    ```python
    progress = RebuildProgress(3)
    progress.begin(120_000)      # offsets to read
    progress.advance(2_000)      # logs a line every few seconds
    str(progress)                # "partition 3: 2,000 of 120,000 offsets read again (1 %), 41,000 a second"
    ```

    Args:
        changed: called after every change, for the metrics.
    """

    number: int
    changed: Callable[[RebuildProgress], None] = lambda progress: None
    total: int = 0
    done: int = 0
    foreign: int = 0
    """Records in `examples` that the join has not written. `changed` may count them and reset this to 0."""
    stage: str = "nothing begun"
    """What the takeover waits for, in words."""
    _stages: int = 0
    _began: float = field(default_factory=time.monotonic)
    _logged: float = field(default_factory=time.monotonic)

    def at(self, stage: str) -> None:
        """Begin the next stage."""
        self.stage = stage
        self._stages += 1

    @property
    def progress(self) -> tuple[int, int]:
        """Changes whenever the takeover gets further."""
        return self._stages, self.done

    def begin(self, total: int) -> None:
        """Begin reading this many offsets. A rebuild that starts again counts from 0 again."""
        self.total, self.done = total, 0
        self.at("records to be read again")
        self._began = self._logged = time.monotonic()
        self.changed(self)

    def advance(self, offsets: int) -> None:
        """Count offsets that have been read."""
        self.done += offsets
        self.changed(self)
        now = time.monotonic()
        if now - self._logged >= LOG_EVERY_S:
            self._logged = now
            log.info("rebuilding %s", self)

    def pass_over(self, records: int) -> None:
        """Count records in `examples` that the rebuild skips, since the join has not written them."""
        self.foreign += records
        self.changed(self)

    @property
    def offsets_per_s(self) -> float:
        elapsed_s = time.monotonic() - self._began
        return self.done / elapsed_s if elapsed_s > 0 else 0.0

    def __str__(self) -> str:
        if not self.total:
            return f"partition {self.number}: {self.stage}"
        share = self.done / self.total
        return (
            f"partition {self.number}: {self.done:,} of {self.total:,} offsets read again ({share:.0%}), "
            f"{self.offsets_per_s:,.0f} a second"
        )


def takeover_status(rebuilds: Iterable[RebuildProgress], taken: int, of: int) -> str:
    """What `/readyz` says while partitions are being taken over: how many are done, and how far the others are."""
    lines = [str(progress) for progress in rebuilds]
    return "; ".join([f"partitions are being taken over: {taken} of {of} done", *lines])
