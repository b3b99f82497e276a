"""Settings of the table of rows: which values get a row, which rows go, and how many there are at most."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["TableSettings"]


class TableSettings(BaseModel):
    """How many rows there are. By default every value gets a row at once, and keeps it for ever.

    ```toml
    [table]
    admit_after = 2                # a value gets a row with its second impression
    admit_crosses_after = 3        # and a value of a cross with its third
    evict_after_ms = 2_592_000_000 # a row that no impression has used for 30 days of event time goes
    max_rows = 20_000_000          # never more rows; the least used ones make room for new values
    ```

    A value without a row is scored by the average row of its field. Ages are in event time, and no clock takes part, so a
    trainer that restarts does again what it did.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    admit_after: int = Field(
        default=1,
        ge=1,
        le=255,
        description="With which impression a value gets a row. Counts of values without a row are kept in a sketch.",
    )
    admit_crosses_after: int = Field(
        default=0,
        ge=0,
        le=255,
        description="The same for values of crosses, of which most are rare. 0: as `admit_after`.",
    )
    admit_memory_mb: int = Field(
        default=8,
        ge=1,
        le=32,
        description="Memory of that sketch, rounded down to a power of 2. After every 130,000 values without a row a MiB, "
        "all counts are halved, so older ones are forgotten. Every version holds the sketch.",
    )
    evict_after_ms: int = Field(
        default=0,
        ge=0,
        description="Event time without an impression after which a row is evicted, in steps of a minute. 0: at no age.",
    )
    evict_below: float = Field(
        default=0.0,
        ge=0,
        description="A row whose uses have decayed below this number is evicted. A use is one impression. 0: no row is.",
    )
    half_life_ms: int = Field(
        default=604_800_000,
        ge=60_000,
        description="Event time in which the uses of a row decay to a half, for `evict_below` and `max_rows`.",
    )
    max_rows: int = Field(
        default=0,
        ge=0,
        description="Largest number of rows. Shortly below it, rows with the fewest decayed uses are evicted. A new value that "
        "finds no room gets no row. A row of 16 floats takes some 200 bytes. 0: no limit.",
    )

    @property
    def admits_late(self) -> bool:
        """Whether some values get their rows later than with the first impression."""
        return max(self.admit_after, self.admit_crosses_after) > 1

    def admitted_after(self, *, cross: bool) -> int:
        """With which impression a value of a field gets a row."""
        return self.admit_crosses_after if cross and self.admit_crosses_after else self.admit_after

    @property
    def evicts(self) -> bool:
        """Whether rows are ever evicted."""
        return bool(self.evict_after_ms or self.evict_below or self.max_rows)
