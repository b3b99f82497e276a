"""Settings of the snapshots: where versions are written, how often, and what the gate promotes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from state.tracks import MAIN

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
    url = "s3://bucket/headrace"  # also gs://…, az://…, file:///var/lib/headrace/snapshots, or a folder
    interval_ms = 60_000          # a whole version every minute
    delta_interval_ms = 250       # what has changed, to the scorers, 4 times a second
    anchor_clicks = 500           # on a stream with few clicks, compare with a good version 500 clicks old
    keep_for_ms = 86_400_000      # a rollback can go back a day
    auto_promote = false          # versions stay candidates until `headrace snapshot promote`
    ```
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(
        default=".headrace/snapshots",
        description="Where versions are written: a folder, or a URL that obstore understands (`s3://`, `gs://`, `az://`, "
        "`file://`). A relative folder lies beside the settings file.",
    )
    track: str = Field(
        default="",
        pattern=r"^([a-z][a-z0-9-]{0,30})?$",
        description="Name of the track: the series of versions that a trainer publishes. When empty, a trainer works on the "
        "track `main`, and commands look at the track that serves. A challenger has a name of its own, and with it topics and "
        "a part of the store: `deltas-NAME`, `snapshots-NAME`, and `tracks/NAME` below `snapshots.url`. Joins and scorers "
        "don't read this setting.",
    )
    interval_ms: int = Field(
        default=60_000,
        ge=100,
        description="Time between two versions. The first ones of a new model come sooner. Scorers don't wait for versions: "
        "they follow the deltas. A version is what a rollback goes back to, and what a worker starts from.",
    )
    delta_interval_ms: int = Field(
        default=250,
        ge=10,
        description="Time between two deltas, in which scorers get what the model has changed. Longer than a delta takes to "
        "be written.",
    )
    row_precision: Literal["float32", "float16"] = Field(
        default="float32",
        description="Precision of the rows that scorers get. `float16` halves what a delta's rows take in Kafka. Training and "
        "versions keep all digits. Set it once every scorer and trainer is of this release. A trainer that starts with another "
        "value than before begins a new chain with a version, which all scorers load.",
    )
    dense_interval_ms: int = Field(
        default=1_000,
        ge=0,
        description="Time between two deltas that carry the dense weights: MLP, bias and average rows. Deltas in between "
        "carry rows only: a tenth of the bytes. A version comes with both, and those of a new model leave more often. "
        "0: every delta carries both.",
    )
    min_examples: int = Field(
        default=1,
        ge=0,
        description="Number of examples that must have been learned since the last version for a new one. A version comes all "
        "the same before Kafka deletes deltas after the last one (`topics.deltas_retention_ms`).",
    )
    keep_ready: int = Field(
        default=3,
        ge=1,
        description="Number of versions that a scorer keeps in memory: the one that answers and those that answered before it. "
        "The target of a rollback is kept in addition. Going back to one of them needs no download.",
    )
    keep_versions: int = Field(
        default=10,
        ge=1,
        description="Number of newest versions that are not deleted. The champion, aliased and tagged versions, "
        "and the gate's anchor are never deleted.",
    )
    keep_good: int = Field(
        default=3,
        ge=1,
        description="Number of newest good versions below the champion that are not deleted: the targets of rollbacks.",
    )
    keep_ms: int = Field(
        default=60_000, ge=0, description="Age below which no version is deleted: somebody may be loading or promoting it."
    )
    keep_every_ms: int = Field(
        default=600_000,
        ge=1,
        description="Time between two former champions that are not deleted, for rollbacks to a time.",
    )
    keep_for_ms: int = Field(
        default=7_200_000, ge=0, description="How long such former champions are not deleted; 0 keeps none of them."
    )
    good_after_ms: int = Field(
        default=10_000,
        ge=0,
        description="A version is tagged good this long after it became champion, if versions flow and nobody has rolled back "
        "over it. It need not be champion any more. Rollbacks go to good versions.",
    )
    first_examples: int = Field(
        default=200, ge=0, description="Number of examples that a version must have seen to become the first champion."
    )
    first_clicks: int = Field(
        default=10,
        ge=1,
        description="Number of clicks, and of non-clicks, that a version must have seen to become the first champion.",
    )
    gate_sample: int = Field(
        default=32,
        ge=1,
        description="The gate compares one impression in this many with the anchor, chosen by a hash of the impression id.",
    )
    gate_block_clicks: int = Field(default=200, ge=1, description="Number of clicks after which the gate compares and decides.")
    gate_loss_margin: float = Field(
        default=0.01,
        ge=0,
        description="Fraction by which the log loss may be worse than the anchor's. Beyond it new versions are withheld.",
    )
    score_shift_limit: float = Field(
        default=0.2,
        gt=0,
        description="Mean absolute change, in logits, of the scores of 64 recent requests within up to 2,000 examples. "
        "Beyond it and beyond 4 times what is usual, once there is an anchor, deltas are withheld until scores are back, until "
        "`anchor_age_ms` have passed and clicks don't show the weights to be worse, or until an operator releases them.",
    )
    drift_null_rate: float = Field(
        default=0.1,
        gt=0,
        description="Change of a feature's share of nulls from one block of 1,000 examples to the next that is beyond what is "
        "normal, once it is also 8 standard deviations of what is usual. Then deltas are withheld, as by `score_shift_limit`. "
        "1: never.",
    )
    drift_score_distribution: float = Field(
        default=0.25,
        gt=0,
        description="Change of the distribution of scores in a block of 1,000 examples, as a population stability index, that "
        "is beyond what is normal, once it is also 6 times what is usual. A shift of all scores that clicks explain doesn't "
        "count. Then deltas are withheld.",
    )
    drift_click_alarm: float = Field(
        default=1.5,
        gt=1,
        description="Factor by which the click rate may change abruptly. Beyond it the trainer logs an error and sets "
        "`headrace_trainer_click_rate_alarm`.",
    )
    drift_click_factor: float = Field(
        default=4.0,
        gt=1,
        description="Factor by which the click rate may change abruptly. Beyond it deltas are withheld.",
    )
    anchor_age_ms: int = Field(
        default=600_000,
        ge=0,
        description="Least age, event time, of the anchor: the good version that the live weights are compared with.",
    )
    anchor_clicks: int = Field(
        default=2_000,
        ge=0,
        description="Number of clicks that must have been learned since the anchor. A new model is compared over as many "
        "before it may become champion.",
    )
    served_calibration_band: tuple[float, float] = Field(
        default=(0.8, 1.25),
        description="Lowest and highest ratio of served predictions to clicks that is right. Outside of it "
        "`headrace_trainer_served_out_of_band` is 1, `headrace doctor` reports it, and a block of clicks is out of band "
        "(snapshots.auto_rollback).",
    )
    auto_rollback: Literal["off", "alarm", "act"] = Field(
        default="alarm",
        description="What the trainer does when served scores are out of their band, against the labels of their impressions: "
        "`off`: it doesn't look; `alarm`: it logs an error and sets `headrace_trainer_served_alarm`; `act`: it also rolls back "
        "to the newest good version, once, and holds auto-promotion until `headrace snapshot resume`.",
    )
    served_block_clicks: int = Field(
        default=200,
        ge=20,
        description="Number of clicks on impressions with a served score after which served scores are judged.",
    )
    served_blocks: int = Field(
        default=3, ge=1, description="Number of such blocks in a row that must be out of band for an alarm."
    )
    served_ne_margin: float = Field(
        default=0.05,
        ge=0,
        description="Fraction by which the normalised entropy of served scores may be above its own mean of the blocks before.",
    )
    auto_promote: bool = Field(
        default=True, description="Whether each version that passes the gate becomes champion by itself."
    )

    @property
    def store_url(self) -> str:
        """Where the versions of this track are."""
        return self.url if self.track in ("", MAIN) else f"{self.url.rstrip('/')}/tracks/{self.track}"

    def on_track(self, track: str) -> SnapshotSettings:
        """The same settings for another track."""
        return self.model_copy(update={"track": track})

    @model_validator(mode="before")
    @classmethod
    def _names_what_replaced_a_removed_key(cls, values: Any) -> Any:
        removed = sorted(_REMOVED.keys() & values.keys()) if isinstance(values, Mapping) else []
        if removed:
            raise ValueError("; ".join(f"{name} was removed: {_REMOVED[name]}" for name in removed))
        return values
