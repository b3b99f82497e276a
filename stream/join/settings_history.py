"""The settings that records were decided under, by offset. They are part of the committed progress.

A record is decided under the settings of the worker that reads it first, and keeps them:

- an impression keeps its window, hold, dedupe horizon and skew;
- a record of either source keeps the bound on times ahead of its arrival, and the formats that its value may have.

So a worker that starts with other settings changes nothing for what is pending, and a rebuild decides each record as it was
decided at first.

```python
history = History().with_settings(settings, form="", impressions=0, clicks=0, watermark_ms=NEVER_MS)
history.of(1_234).window_ms       # of the impression at offset 1,234
history.late_before(watermark)    # impressions before this time are late from now on
```
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from stream.errors import PositionError
from stream.settings import JoinSettings

__all__ = ["MAX_CHANGES", "NEVER_MS", "History", "Terms"]

# The time before the first event of a source. Event times are >= 0, and so is every watermark after the first event.
NEVER_MS = -(1 << 62)

# Terms kept at once. Each takes at most some 110 of the 4,096 bytes that a broker takes as an offset's metadata.
MAX_CHANGES = 24


class Terms(msgspec.Struct, frozen=True, array_like=True):
    """One set of settings, and the offsets from which it holds. Encoded without names, since it is part of every commit.

    - `late_floor_ms`: impressions before this time were late when these terms began, and stay late: their ids may be forgotten.
    - `legacy`: whether these stand for version 0.1.0, which recorded no terms. The stored row of a pending impression then says
      whether its first label is out.
    - `orphan_floor_ms`: of the clicks read before these terms began, those before this time no longer waited, and a longer skew
      doesn't let them wait again. Clicks read since have their own terms, so the floor isn't copied to the next terms.
    - `form`: the formats that events could have besides plain JSON (`stream.formats`).
    """

    impressions_from: int
    clicks_from: int
    window_ms: int
    hold_ms: int
    horizon_ms: int
    skew_ms: int
    max_future_ms: int
    late_floor_ms: int = NEVER_MS
    legacy: bool = False
    orphan_floor_ms: int = NEVER_MS
    form: str = ""

    @classmethod
    def of(
        cls,
        settings: JoinSettings,
        *,
        form: str,
        impressions: int,
        clicks: int,
        late_floor_ms: int = NEVER_MS,
        legacy: bool = False,
        orphan_floor_ms: int = NEVER_MS,
    ) -> Terms:
        return cls(
            impressions,
            clicks,
            settings.window_ms,
            settings.window_ms if legacy else settings.held_ms,
            settings.dedupe_horizon_ms,
            settings.negative_skew_ms,
            settings.max_future_ms,
            late_floor_ms,
            legacy,
            orphan_floor_ms,
            form,
        )

    def counts(self, click_ms: int, impression_ms: int) -> bool:
        """Whether a click at this time lies in the attribution window of an impression."""
        return -self.skew_ms <= click_ms - impression_ms <= self.window_ms

    def same_settings(self, other: Terms) -> bool:
        """Whether both terms have the same settings, wherever they begin."""
        return self._settings == other._settings

    @property
    def _settings(self) -> tuple[object, ...]:
        settings = self.window_ms, self.hold_ms, self.horizon_ms, self.skew_ms, self.max_future_ms
        return (*settings, self.legacy, self.form)


@dataclass(frozen=True, slots=True)
class History:
    """The terms of everything that is pending or remembered, the oldest first. The last terms are in force."""

    terms: tuple[Terms, ...] = ()

    @property
    def current(self) -> Terms:
        return self.terms[-1]

    @property
    def max_late_ms(self) -> int:
        """How far behind the watermark an impression is late: so far that no waiting click counts for an id forgotten by then.

        Version 0.1.0 did not consider the skew, and may have forgotten ids that its larger skews would keep.
        """
        horizon_ms = max(terms.window_ms + terms.horizon_ms for terms in self.terms)
        skew_ms = max((terms.skew_ms for terms in self.terms if not terms.legacy), default=0)
        return max(horizon_ms, self.max_window_ms + skew_ms)

    @property
    def max_window_ms(self) -> int:
        return max(terms.window_ms for terms in self.terms)

    @property
    def max_skew_ms(self) -> int:
        return max(terms.skew_ms for terms in self.terms)

    def of(self, offset: int) -> Terms:
        """The terms of the impression at this offset."""
        terms = self.terms[-1]
        if offset >= terms.impressions_from:  # nearly always
            return terms
        for terms in reversed(self.terms):
            if offset >= terms.impressions_from:
                return terms
        return self.terms[0]

    def of_click(self, offset: int) -> Terms:
        """The terms of the click at this offset."""
        for terms in reversed(self.terms):
            if offset >= terms.clicks_from:
                return terms
        return self.terms[0]

    def late_before(self, watermark_ms: int) -> int:
        """Impressions before this time are late. The time never falls, whatever the settings change to.

        While there are terms with a longer window or horizon, these count: what is pending under them is still remembered.
        """
        return max(self.current.late_floor_ms, watermark_ms - self.max_late_ms)

    def orphan_before(self, watermark_ms: int, clicks: int) -> int:
        """Clicks before this time that were read below the offset `clicks` have been settled."""
        none_since = self.current.clicks_from >= clicks
        return max(self.current.orphan_floor_ms if none_since else NEVER_MS, watermark_ms - self.max_skew_ms)

    def was_orphan(self, offset: int, click_ms: int) -> bool:
        """Whether a click had been settled already when any of these terms began."""
        return any(offset < terms.clicks_from and click_ms < terms.orphan_floor_ms for terms in self.terms)

    def with_settings(self, settings: JoinSettings, *, form: str, impressions: int, clicks: int, watermark_ms: int) -> History:
        """The history when these settings come into force for records read from these offsets on.

        Args:
            form: the formats that events may have from there on (`Formats.form`).

        Raises:
            PositionError: settings have changed more often than the committed progress has room for.
        """
        if not self.terms:
            return History((Terms.of(settings, form=form, impressions=impressions, clicks=clicks),))
        terms = Terms.of(
            settings,
            form=form,
            impressions=impressions,
            clicks=clicks,
            late_floor_ms=self.late_before(watermark_ms),
            orphan_floor_ms=self.orphan_before(watermark_ms, clicks),
        )
        if terms.same_settings(self.current):
            return self
        # Terms that no record was read under are dropped.
        kept = [each for each in self.terms if each.impressions_from < impressions or each.clicks_from < clicks]
        if len(kept) >= MAX_CHANGES:
            raise PositionError(
                f"join: expected at most {MAX_CHANGES} changes of window_ms, hold_ms, dedupe_horizon_ms, negative_skew_ms, "
                f"max_future_ms, envelope and of whether schema_registry.url is set, "
                f"while impressions read under them are still remembered, found {len(kept)}. Put the previous settings "
                "back until these are forgotten (window + 2 dedupe horizons of event time), then change them again."
            )
        return History((*kept, terms))

    def pruned(self, impressions_low: int, clicks_low: int) -> History:
        """The history without the terms of records below both low-water offsets, which nothing needs any more."""
        first = 0
        while (
            first + 1 < len(self.terms)
            and self.terms[first + 1].impressions_from <= impressions_low
            and self.terms[first + 1].clicks_from <= clicks_low
        ):
            first += 1
        return self if not first else History(self.terms[first:])
