"""How far a rebuild is: for the log, for `/readyz` and for the metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

__all__ = ["RebuildProgress", "told"]

log = logging.getLogger(__name__)

# A rebuild within this time says nothing but that it is done; a longer one is told of this often.
LOG_EVERY_S = 5.0


@dataclass(slots=True)
class RebuildProgress:
    """One partition number's rebuild, in offsets of its three logs.

    ```python
    progress = RebuildProgress(3)
    progress.begin(120_000)      # offsets to read
    progress.advance(2_000)      # logs a line every few seconds
    str(progress)                # "partition 3: 2,000 of 120,000 offsets read again (1 %), 41,000 a second"
    ```

    Args:
        changed: called after every change; the metrics listen here.
    """

    number: int
    changed: Callable[[RebuildProgress], None] = lambda progress: None
    total: int = 0
    done: int = 0
    foreign: int = 0
    """Records in `examples` that the join has not written; whoever is told of a change may take them away."""
    stage: str = "nothing begun"
    """What is being waited for, in words; before the records are read."""
    _stages: int = 0
    _began: float = field(default_factory=time.monotonic)
    _told: float = field(default_factory=time.monotonic)

    def at(self, stage: str) -> None:
        """Say what comes next."""
        self.stage = stage
        self._stages += 1

    @property
    def progress(self) -> tuple[int, int]:
        """Changes whenever the takeover gets further."""
        return self._stages, self.done

    def begin(self, total: int) -> None:
        """Say how many offsets there are to read; a rebuild begun anew begins its count anew."""
        self.total, self.done = total, 0
        self.at("records to be read again")
        self._began = self._told = time.monotonic()
        self.changed(self)

    def advance(self, offsets: int) -> None:
        self.done += offsets
        self.changed(self)
        now = time.monotonic()
        if now - self._told >= LOG_EVERY_S:
            self._told = now
            log.info("rebuilding %s", self)

    def pass_over(self, records: int) -> None:
        """Count records in `examples` that the join has not written."""
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


def told(rebuilds: Iterable[RebuildProgress], taken: int, of: int) -> str:
    """What `/readyz` says while partitions are being taken over: how many are done, and how far the others are."""
    lines = [str(progress) for progress in rebuilds]
    return "; ".join([f"partitions are being taken over: {taken} of {of} done", *lines])
