"""Settings of the model and its optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ModelName", "ModelSettings"]

ModelName = Literal["deepfm", "lr", "fm", "fnn", "ipnn", "opnn", "pnn", "wide_deep"]
"""Names of models, as `model.name` and `--model` take them."""


_BEFORE: Mapping[str, Any] = {"cross_layers": 0, "cross_rank": 0, "first_order": "adagrad", "row_history": False}
"""What a version has whose manifest lacks these: it was made before there was a choice. Not the defaults, which may change."""


class ModelSettings(BaseModel):
    """What is learned, and how fast.

    ```toml
    [model]
    name = "wide_deep"        # another model than DeepFM; a trainer needs --new-model once
    cross_layers = 2          # two cross layers beside it
    hidden = [200, 100]       # a smaller MLP: two hidden layers of 200 and 100 units
    batch_rows = 512          # fewer, larger updates: more examples a second, each learned a little later
    row_learning_rate = 0.02  # embedding rows and first-order weights move twice as fast
    ```
    """

    # JSON has no infinity, so a version couldn't say that it was made with one.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: ModelName = Field(
        default="deepfm",
        description="Which model is learned. `lr`: logistic regression. `fm`: factorization machine. `fnn`: an MLP over the "
        "embeddings. `ipnn`, `opnn`, `pnn`: an MLP over the embeddings and their inner products, outer products, or both. "
        "`wide_deep`: first-order weights and an MLP. `deepfm`: these and a factorization machine. docs/training.md compares "
        "them.",
    )
    hidden: tuple[int, ...] = Field(
        default=(400, 400, 400),
        description="Number of units in each hidden layer of the MLP. `lr` and `fm` have none.",
    )
    cross_layers: int = Field(
        default_factory=lambda before: 2 if before.get("name", "deepfm") == "deepfm" else 0,
        ge=0,
        le=8,
        description="Number of cross layers (DCN-V2) that the model has beside its own parts; 0 for none. By default `deepfm` "
        "has 2, and the other models have none.",
    )
    cross_rank: int = Field(
        default=64,
        ge=0,
        le=4096,
        description="Rank of the cross layers' matrices. 0: full matrices, which cost the square of fields × embedding_dim.",
    )
    row_learning_rate: float = Field(
        default=0.01,
        gt=0,
        description="Adagrad's step size for embedding rows and first-order weights. Their loss is summed over a batch.",
    )
    first_order: Literal["adagrad", "ftrl"] = Field(
        default="adagrad",
        description="Optimizer of the first-order weights. `ftrl`: FTRL-Proximal with a learning rate for each weight.",
    )
    ftrl_alpha: float = Field(
        default=0.05, gt=0, description="FTRL: step size. After slopes g, a weight's rate is alpha / (beta + sqrt(sum of g^2))."
    )
    ftrl_beta: float = Field(
        default=1.0, gt=0, description="FTRL: how many squared slopes it takes until a weight's rate falls."
    )
    ftrl_l1: float = Field(
        default=0.0, ge=0, description="FTRL: L1 penalty. Weights whose slopes add up to less than this are exactly 0."
    )
    ftrl_l2: float = Field(default=0.0, ge=0, description="FTRL: L2 penalty, which pulls weights towards 0.")
    row_accumulator_start: float = Field(
        default=0.01,
        gt=0,
        description="Where Adagrad's sum of squared slopes begins for a new row. Near 0 the first steps are far too long.",
    )
    dense_learning_rate: float = Field(
        default=2e-4,
        gt=0,
        description="Adam's step size for the MLP. Its loss is averaged over a batch.",
    )
    cross_learning_rate: float = Field(
        default=1e-3,
        gt=0,
        description="Adam's step size for the cross layers, which begin at 0. Their loss is averaged over a batch.",
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
        default=True,
        description="Whether each row counts its examples and clicks, and the model reads them: the row's click rate beside "
        "the base rate, and on how many examples it rests. A version is only trained on with the value that it was made with.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the dense weights and of each new row.")
    initial_rows: int = Field(
        default=1 << 16, ge=16, description="Number of rows that the table has room for at the start; it grows by doubling."
    )

    @classmethod
    def of_version(cls, saved: Mapping[str, Any]) -> ModelSettings:
        """The settings that a version was made with, from its manifest.

        Raises:
            ValueError: they aren't settings of this release.
        """
        return cls.model_validate({**_BEFORE, **saved})

    def shape(self) -> dict[str, Any]:
        """The settings by name that a model keeps while it goes on: those of its parts, and those that FTRL's state depends on.

        The others (rates, batch size) may change between two starts.
        """
        names = ["name", "hidden", "cross_layers", "cross_rank", "first_order", "row_history"]
        if self.first_order == "ftrl":
            names += ["ftrl_alpha", "ftrl_beta", "ftrl_l1", "ftrl_l2"]
        settings = self.model_dump(mode="json")
        if not self.cross_layers:
            settings["cross_rank"] = 0  # of no layers
        return {name: settings[name] for name in names}
