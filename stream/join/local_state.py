"""Opens a partition's local state folder. What the folder holds is used only if it is a prefix of this committed log."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from state.errors import JoinStateError, StateDamaged, StateInUse
from state.join_state import JoinMeta, JoinState, StateOptions
from stream.join.commit_metadata import Progress
from stream.join.committed import Committed
from stream.join.settings_history import NEVER_MS

__all__ = ["LocalState"]

log = logging.getLogger(__name__)

# Local folders tried for one partition: a worker that hangs may still hold the lock of the first.
MAX_FOLDERS = 16


@dataclass(frozen=True, slots=True)
class LocalState:
    """The folders `partition-N` below a worker's `state_dir`."""

    state_dir: Path
    options: StateOptions
    identity: str
    """The ids of cluster and topics; state of another log is moved aside."""

    def open(self, number: int, committed: Committed) -> JoinState:
        """The state to rebuild from; an empty one where the folder is damaged, or holds no prefix of this log.

        The content of such a folder is moved aside, unless it is of no use (it is new, or an unfinished rebuild left it).

        Raises:
            JoinStateError: the folder can't be opened, and what it holds may be good.
        """
        for attempt in range(MAX_FOLDERS):
            path = self.state_dir / (f"partition-{number}" if not attempt else f"partition-{number}.{attempt}")
            try:
                state, meta = self._opened(path)
            except StateInUse:
                log.warning("%s is open in another process; trying the next folder", path)
                continue
            except StateDamaged as error:
                self.set_aside_damaged(path, error)
                return JoinState(path, self.options)
            if (
                meta is not None
                and committed.progress is not None
                and self._is_prefix(state, meta, committed, committed.progress)
            ):
                return state
            state.close()
            # The state is new, or an unfinished rebuild left it, or no event came after the start that made it.
            if meta is None or max(meta.watermark_ms, meta.impressions_seen_ms, meta.clicks_seen_ms) == NEVER_MS:
                JoinState.destroy(path)
            elif committed.progress is not None or meta.watermark_ms > NEVER_MS:
                aside = JoinState.set_aside(path, "other")
                log.warning(
                    "local state of partition %d is of another log, not a part of this one, from before offsets were reset, or "
                    "from before settings that are not known any more: moved it aside to %s",
                    *(number, aside),
                )
            else:
                JoinState.destroy(path)
            return JoinState(path, self.options)
        raise JoinStateError(
            f"{self.state_dir}: expected a free folder for partition {number}, found {MAX_FOLDERS} held by other processes. "
            "End the join workers that hang, or set another `state_dir`."
        )

    def set_aside_damaged(self, path: Path, error: StateDamaged) -> None:
        """Move a damaged folder aside, so that the state is rebuilt from the log."""
        aside = JoinState.set_aside(path, "damaged")
        # As text: a log handler that kept the error would keep the database's lock with it, through the error's traceback.
        log.warning("%s Moved it aside to %s; the state is rebuilt from the log.", str(error), aside)

    def _opened(self, path: Path) -> tuple[JoinState, JoinMeta | None]:
        state = JoinState(path, self.options)
        try:
            return state, state.meta()
        except BaseException:
            state.close()
            raise

    def _is_prefix(self, state: JoinState, meta: JoinMeta, committed: Committed, progress: Progress) -> bool:
        """Whether the state belongs to an earlier position of this log, and the log still has all that came after."""
        return (
            meta.life == progress.life
            and meta.identity.removesuffix("/layout 3") == self.identity  # version 0.1.0 had its layout in there
            and committed.impressions_start <= meta.impressions_position <= committed.impressions
            and committed.clicks_start <= meta.clicks_position <= committed.clicks
            # Compared besides the positions, since the watermark also moves without records.
            and (meta.watermark_ms, meta.cut) <= (progress.watermark_ms, progress.cut)
            and (
                # An older state needs the labels given since; one that is up to date does not.
                committed.examples_start <= meta.examples_position
                or (meta.impressions_position, meta.clicks_position) == (committed.impressions, committed.clicks)
            )
            and _terms_known(state, meta, progress)
        )


def _terms_known(state: JoinState, meta: JoinMeta, progress: Progress) -> bool:
    """Whether the progress still has the settings of all records: those in the state, and those beyond its positions.

    The progress no longer has the settings of records that are forgotten by now. An old state may remember such records, or lie
    before them, so that they would be read again. They would then be decided under the settings of today.
    """
    if not progress.terms:
        return True
    oldest = progress.terms[0]
    if meta.impressions_position < oldest.impressions_from or meta.clicks_position < oldest.clicks_from:
        return False
    first = next(state.all_chunks(), None) if oldest.impressions_from else None
    return first is None or first.first_offset >= oldest.impressions_from
