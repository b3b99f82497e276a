"""Settings of what must survive: where snapshots live and how many are kept, and the join's local state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["SnapshotSettings"]

_REMOVED = {
    "gate_calibration": "the gate compares log loss on the same examples. For the band of the alarm on served scores set "
    "snapshots.served_calibration_band",
    "gate_margin": "the loss is compared with an older good version's on the same examples. Set snapshots.gate_loss_margin",
    "gate_min_examples": "a comparison needs snapshots.gate_block_clicks, a first champion snapshots.first_examples and "
    "snapshots.first_clicks",
}


class SnapshotSettings(BaseModel):
    """Where versions are written, how often, and what may become champion by itself.

    ```toml
    [snapshots]
    url = "file:///var/lib/headrace/snapshots"  # or s3://bucket/prefix, gs://…, az://…
    interval_ms = 5000                          # time between versions
    anchor_age_ms = 600000                      # versions are compared with a good one at least this old
    ```
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(
        default=".headrace/snapshots",
        description="A folder (a relative one lies beside the settings file), or a URL that obstore understands.",
    )
    interval_ms: int = Field(default=5_000, ge=100, description="Time between two versions.")
    min_examples: int = Field(default=1, ge=0, description="New examples that a version needs over the one before.")
    keep_ready: int = Field(default=3, ge=1, description="Champions a scorer keeps in memory: going back costs no download.")
    good_after_ms: int = Field(
        default=10_000,
        ge=0,
        description="This long after a version became champion it is tagged good, if versions still flow and nobody rolled "
        "back over it; it need not be champion still. A rollback goes to a good version.",
    )
    first_examples: int = Field(
        default=200, ge=0, description="Examples that a version must have seen to become champion when there is none."
    )
    first_clicks: int = Field(
        default=10, ge=1, description="Clicks among them, and as many non-clicks: nothing that has seen one class is served."
    )
    gate_sample: int = Field(
        default=32, ge=1, description="One impression in so many, by a hash of its id, is scored by the anchor too."
    )
    gate_block_clicks: int = Field(default=200, ge=1, description="Clicks after which the gate compares and decides.")
    gate_loss_margin: float = Field(
        default=0.01,
        ge=0,
        description="Log loss may be worse than the anchor's by this fraction; beyond, new versions are withheld.",
    )
    anchor_age_ms: int = Field(
        default=600_000, ge=0, description="The anchor, which versions are compared with, is a good version at least this old."
    )
    anchor_clicks: int = Field(
        default=2_000,
        ge=0,
        description="Clicks learned since the anchor at least; also those over which a new model must hold its own.",
    )
    served_calibration_band: tuple[float, float] = Field(
        default=(0.8, 1.25),
        description="Served predictions over actual clicks; outside it a metric and `headrace doctor` say so.",
    )
    auto_promote: bool = Field(default=True, description="Promote each version that passes the gate.")

    @model_validator(mode="before")
    @classmethod
    def _names_what_replaced_a_removed_key(cls, values: Any) -> Any:
        removed = sorted(_REMOVED.keys() & values.keys()) if isinstance(values, Mapping) else []
        if removed:
            raise ValueError("; ".join(f"{name} was removed: {_REMOVED[name]}" for name in removed))
        return values
