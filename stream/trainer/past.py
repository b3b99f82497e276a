"""Examples of the stream that the weights know from history (`state.history`): they are skipped, so that none counts twice."""

from __future__ import annotations

import logging

from state.history import History
from stream.trainer.examples import DecodedRun

__all__ = ["Past"]

log = logging.getLogger(__name__)


class Past:
    """Leaves out the examples of impressions at or before the cut-off. For one thread; `skipped` may be read in any.

        past = Past.of(manifest.history)      # None: the weights know no history
        past.cut(run)                         # the examples of a run that are to be learned

    Corrections of such impressions are left out too: the label that history has is the final one.
    """

    def __init__(self, history: History) -> None:
        self._history = history
        self._said = False
        self.skipped = 0
        """Number of examples left out since the start of this process."""

    @classmethod
    def of(cls, history: History | None) -> Past | None:
        """What to leave out for this history; None when there is none."""
        return None if history is None else cls(history)

    def cut(self, run: DecodedRun) -> DecodedRun:
        """The run without the examples that history has. Its end stays, so their offsets count as trained."""
        newer = run.impression_ms > self._history.until_ms
        left_out = len(run) - int(newer.sum())
        if left_out:
            if not self.skipped:
                log.info(
                    "skipping examples up to %d ms, which were learned from %s", self._history.until_ms, self._history.source
                )
            self.skipped += left_out
        if left_out < len(run) and self.skipped and not self._said:
            self._said = True
            log.info("skipped %d examples that were learned from %s; newer ones follow", self.skipped, self._history.source)
        return run.take(newer) if left_out else run
