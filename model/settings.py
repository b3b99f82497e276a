"""Settings of the model and its optimizers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ModelSettings"]


class ModelSettings(BaseModel):
    """What is learned and how fast.

    ```toml
    [model]
    name = "deepfm"          # which model
    hidden = [400, 400, 400] # widths of the MLP's hidden layers
    row_learning_rate = 0.01 # Adagrad, for embedding rows and first-order weights
    ```
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["deepfm"] = "deepfm"
    hidden: tuple[int, ...] = Field(default=(400, 400, 400), description="Widths of the MLP's hidden layers.")
    row_learning_rate: float = Field(default=0.01, gt=0, description="Adagrad step for rows (loss summed over a batch).")
    row_accumulator_start: float = Field(
        default=0.01, gt=0, description="Adagrad's first accumulator; near 0 the first steps are far too long."
    )
    dense_learning_rate: float = Field(default=2e-4, gt=0, description="Adam step for the MLP (loss averaged).")
    init_std: float = Field(default=0.01, gt=0, description="Standard deviation of a new embedding row.")
    batch_rows: int = Field(
        default=128, ge=1, le=65536, description="Examples in one update; more is faster, fewer learns sooner."
    )
    defer_negatives: bool = Field(
        default=True,
        description="Charge a row for a negative in part with the first label, in part when late clicks correct such labels: "
        "new items and hours start nearer to the truth. Off: all with the first label.",
    )
    seed: int = Field(default=0, ge=0, description="Seeds the dense weights and each new row.")
    initial_rows: int = Field(default=1 << 16, ge=16, description="Rows allocated at the start; the table grows by doubling.")
