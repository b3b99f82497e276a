"""Settings of what must survive: where snapshots live and how many are kept, and the join's local state."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["SnapshotSettings"]


class SnapshotSettings(BaseModel):
    """Where versions are written, how often, and what may become champion by itself.

    ```toml
    [snapshots]
    url = "file:///var/lib/headrace/snapshots"  # or s3://bucket/prefix, gs://…, az://…
    interval_ms = 5000                          # time between versions
    gate_calibration = [0.8, 1.25]              # predicted clicks over clicks, of the window before the snapshot
    ```
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(default=".headrace/snapshots", description="A folder, or a URL that obstore understands.")
    interval_ms: int = Field(default=5_000, ge=100, description="Time between two versions.")
    min_examples: int = Field(default=1, ge=0, description="New examples that a version needs over the one before.")
    keep_ready: int = Field(default=3, ge=1, description="Champions a scorer keeps in memory: going back costs no download.")
    good_after_ms: int = Field(default=10_000, ge=0, description="A champion this long, with metrics in band, is tagged good.")
    gate_calibration: tuple[float, float] = Field(
        default=(0.8, 1.25),
        description="Band for predicted over actual clicks; outside it a version stays a candidate.",
    )
    gate_margin: float = Field(
        default=0.02, ge=0, description="Log loss may be worse than the champion's by this fraction at most."
    )
    gate_min_examples: int = Field(
        default=1_000,
        ge=0,
        description="Examples in the metrics window below which calibration and loss are not judged.",
    )
    auto_promote: bool = Field(default=True, description="Promote each version that passes the gate.")
