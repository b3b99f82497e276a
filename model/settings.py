"""Settings of the model and its optimizers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ModelSettings"]


class ModelSettings(BaseModel):
    """What is learned, and how fast.

    ```toml
    [model]
    hidden = [200, 100]       # a smaller MLP: two hidden layers of 200 and 100 units
    batch_rows = 512          # fewer, larger updates: more examples a second, each learned a little later
    row_learning_rate = 0.02  # embedding rows and first-order weights move twice as fast
    ```
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["deepfm"] = Field(default="deepfm", description="Which model is learned.")
    hidden: tuple[int, ...] = Field(default=(400, 400, 400), description="Number of units in each hidden layer of the MLP.")
    row_learning_rate: float = Field(
        default=0.01,
        gt=0,
        description="Adagrad's step size for embedding rows and first-order weights. Their loss is summed over a batch.",
    )
    row_accumulator_start: float = Field(
        default=0.01,
        gt=0,
        description="Where Adagrad's sum of squared slopes begins for a new row. Near 0 the first steps are far too long.",
    )
    dense_learning_rate: float = Field(
        default=2e-4, gt=0, description="Adam's step size for the MLP. Its loss is averaged over a batch."
    )
    init_std: float = Field(
        default=0.01, gt=0, description="Standard deviation of the noise that a new embedding row begins with."
    )
    batch_rows: int = Field(
        default=128,
        ge=1,
        le=65536,
        description="Number of examples in one update. With more, training is faster; with fewer, each is learned sooner.",
    )
    defer_negatives: bool = Field(
        default=True,
        description="Whether a row is charged for a negative in two parts: with the first label, and when late clicks correct "
        "such labels. New items and hours then start nearer to the truth. When false, the first label charges all of it.",
    )
    row_history: bool = Field(
        default=False,
        description="Whether each row counts its examples and clicks, and the model reads them: the row's click rate beside "
        "the base rate, and on how many examples it rests. A version is only trained on with the value that it was made with.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the dense weights and of each new row.")
    initial_rows: int = Field(
        default=1 << 16, ge=16, description="Number of rows that the table has room for at the start; it grows by doubling."
    )
