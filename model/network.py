"""From a batch of keys to embeddings and from gradients back to rows: what learner and predictor share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from model.batch import FeatureBatch
from model.dense.deepfm import DeepFM
from model.dense.dense_model import DenseModel
from model.dense.fm import Fm
from model.dense.fnn import Fnn
from model.dense.lr import Lr
from model.dense.pnn import Ipnn, Opnn, Pnn
from model.dense.term import Shape
from model.dense.wide_deep import WideDeep
from model.distinct import Groups, bags
from model.errors import ModelError
from model.schema import FeatureSchema
from model.settings import ModelName, ModelSettings

__all__ = [
    "HISTORY_NUMBERS",
    "Elements",
    "RowGradients",
    "choose_device",
    "dense_model",
    "embed",
    "scatter_back",
    "to_elements",
]

_MODELS: Mapping[ModelName, type[DenseModel]] = {
    "deepfm": DeepFM,
    "lr": Lr,
    "fm": Fm,
    "fnn": Fnn,
    "ipnn": Ipnn,
    "opnn": Opnn,
    "pnn": Pnn,
    "wide_deep": WideDeep,
}

HISTORY_NUMBERS = 2
"""Numbers of each field's row history that the dense part reads (`model.history`)."""


def dense_model(schema: FeatureSchema, settings: ModelSettings, device: torch.device, *, extra: int = 0) -> DenseModel:
    """The dense part of the model that `model.name` names, with all parameters 0. It reads `extra` inputs besides the rows.

    Raises:
        ModelError: the schema has no fields.
    """
    if not schema.fields:
        raise ModelError("features.fields is empty: name at least one feature for the model to read")
    if settings.row_history:
        extra += HISTORY_NUMBERS * len(schema.fields)
    shape = Shape(len(schema.fields), schema.embedding_dim, extra)
    return _MODELS[settings.name](shape, settings, device)


def choose_device(name: str) -> torch.device:
    """The device `name`; `auto` is a CUDA device if this machine has one, else the CPU.

    Raises ModelError for an unknown name, and for CUDA on a machine without it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device: expected auto, cpu or cuda, found {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device: expected auto, cpu or cuda, found {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device: expected a CUDA device for {name!r}, found none on this machine; use cpu or auto")
    return device


@dataclass(frozen=True, slots=True)
class Elements:
    """All elements of a batch of B rows: the values of its S single-valued fields (B*S), then the N elements of its L lists.

    keys        int64 (B*S + N,)
    scales      float32 (B, S, 1), or None: factors of single-valued embeddings
    list_of     int64 (N,), or None: which of the B*L lists an element belongs to
    list_share  float32 (N,), or None: 1 / length of that list
    offsets     int64 (B*L,), or None: start of each list among the N elements
    """

    rows: int
    singles: int
    lists: int
    keys: torch.Tensor
    scales: torch.Tensor | None
    list_of: torch.Tensor | None
    list_share: torch.Tensor | None
    offsets: torch.Tensor | None

    def owners(self) -> torch.Tensor:
        """Index of the example that each element belongs to, (B*S + N,)."""
        return self.of_examples(torch.arange(self.rows, device=self.keys.device))

    def fields(self) -> torch.Tensor:
        """Index of the field that each element belongs to, (B*S + N,); single-valued fields are counted before lists."""
        own = torch.arange(self.singles, device=self.keys.device).repeat(self.rows)
        return own if self.list_of is None else torch.cat((own, self.singles + self.list_of % self.lists))

    def of_examples(self, values: torch.Tensor) -> torch.Tensor:
        """The value (B*S + N,) of the example that each element belongs to, from those of the examples (B,)."""
        own = values.unsqueeze(1).expand(-1, self.singles).reshape(-1)
        return own if self.list_of is None else torch.cat((own, values.index_select(0, self.list_of // self.lists)))

    def shares(self) -> torch.Tensor | None:
        """The factor (B*S + N,) of each element within its field: its scale, or its share of a list; None if all are 1."""
        if self.list_share is None:
            return None if self.scales is None else self.scales.flatten()
        own = self.list_share.new_ones(self.rows * self.singles) if self.scales is None else self.scales.flatten()
        return torch.cat((own, self.list_share))

    def places(self) -> torch.Tensor | None:
        """Which of the B*(S + L) fields of all examples each element belongs to, (B*S + N,); None: one after the other."""
        if self.list_of is None:
            return None
        numbers = torch.arange(self.rows * (self.singles + self.lists), device=self.keys.device).view(self.rows, -1)
        lists = numbers[:, self.singles :].flatten().index_select(0, self.list_of)
        return torch.cat((numbers[:, : self.singles].flatten(), lists))


def to_elements(batch: FeatureBatch, schema: FeatureSchema, device: torch.device) -> Elements:
    """A batch as tensors on `device`. Raises ModelError if its fields aren't those of the schema."""
    singles, lists = len(schema.singles), len(schema.lists)
    if batch.keys.shape[1:] != (singles,) or batch.lists != lists:
        raise ModelError(
            f"batch: expected {singles} single-valued fields and {lists} lists, as features.fields has, "
            f"found {batch.keys.shape[1]} and {batch.lists}"
        )
    keys = _tensor(batch.keys, np.int64, device).flatten()
    scales = None if batch.scales is None else _tensor(batch.scales, np.float32, device).unsqueeze(2)
    if not lists:
        return Elements(len(batch), singles, 0, keys, scales, None, None, None)
    lengths = np.diff(batch.list_offsets)
    return Elements(
        rows=len(batch),
        singles=singles,
        lists=lists,
        keys=torch.cat((keys, _tensor(batch.list_keys, np.int64, device))),
        scales=scales,
        list_of=_tensor(np.repeat(np.arange(len(lengths)), lengths), np.int64, device),
        list_share=_tensor(np.repeat(1 / lengths, lengths), np.float32, device),
        offsets=_tensor(batch.list_offsets[:-1], np.int64, device),
    )


def _tensor(array: np.ndarray, dtype: type, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.require(array, dtype, ("C", "W"))).to(device)


def embed(
    elements: Elements, rows: torch.Tensor, embedding: torch.Tensor, first_order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (B, F, D) of the fields, and the sum of the first-order terms (B,).

    rows  (B*S + N,): row of `embedding` (R, D) and `first_order` (R,) of each element

    In both, scaled fields are multiplied by their scale and lists are mean pooled.
    """
    batch, singles, lists = elements.rows, elements.singles, elements.lists
    count = batch * singles
    embedded = embedding.index_select(0, rows[:count]).view(batch, singles, embedding.shape[1])
    linear = first_order.index_select(0, rows[:count]).view(batch, singles)
    if elements.scales is not None:
        embedded = embedded * elements.scales
        linear = linear * elements.scales.squeeze(2)
    total = linear.sum(1)
    if elements.offsets is not None and elements.list_of is not None and elements.list_share is not None:
        pooled = bags(embedding, rows[count:], elements.offsets, mean=True)
        embedded = torch.cat((embedded, pooled.view(batch, lists, embedding.shape[1])), dim=1)
        shares = first_order.index_select(0, rows[count:]) * elements.list_share
        total = total.index_add(0, elements.list_of // lists, shares)
    return embedded, total


class RowGradients(NamedTuple):
    """Gradients of U distinct rows: embeddings (U, D) and first-order weights (U,). None where the model doesn't read them."""

    embedding: torch.Tensor | None
    first_order: torch.Tensor | None


def scatter_back(
    elements: Elements,
    groups: Groups,
    own: torch.Tensor | None,
    gradient: torch.Tensor | None,
    slope: torch.Tensor | None,
    factors: torch.Tensor | None = None,
) -> RowGradients:
    """Gradients of the U distinct rows that K elements of a batch read.

    groups    of these elements
    own       int64 (K,): which elements they are, if others have no rows; None: all N, in their order
    gradient  (B, F*D): by the fields' embeddings; None if the model doesn't read them
    slope     (B,): by the sum of the first-order weights; None if the model doesn't read it
    factors   (K,): factor of each element's gradient; 1 when None
    """
    shares = elements.shares()
    if shares is not None and own is not None:
        shares = shares.index_select(0, own)
    if factors is not None:
        shares = factors if shares is None else shares * factors
    embedding = first_order = None
    if gradient is not None:
        places = elements.places()
        if own is not None:
            places = own if places is None else places.index_select(0, own)
        index = groups.order if places is None else places.index_select(0, groups.order)
        weights = None if shares is None else shares.index_select(0, groups.order)
        dim = gradient.shape[1] // (elements.singles + elements.lists)
        embedding = bags(gradient.view(-1, dim), index, groups.starts, weights)
    if slope is not None:
        slopes = elements.of_examples(slope)
        if own is not None:
            slopes = slopes.index_select(0, own)
        if shares is not None:
            slopes = slopes * shares
        first_order = slope.new_zeros(len(groups.distinct)).index_add_(0, groups.inverse, slopes)
    return RowGradients(embedding, first_order)
