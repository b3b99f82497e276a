"""FNN (Zhang et al., "Deep Learning over Multi-field Categorical Data", ECIR 2016), trained jointly."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.dense.dense_model import DenseModel
from model.dense.mlp import Mlp
from model.dense.term import Shape, Term
from model.settings import ModelSettings

__all__ = ["Fnn"]


class Fnn(DenseModel):
    """logit = bias + MLP over the embeddings, as it is compared in Guo et al. 2017 (section 2.2, table 2).

    The paper takes the embeddings from an FM that was trained before. A model that learns from a stream has no "before", so
    here embeddings and MLP learn together from the start. The hidden layers are ReLU, as everywhere, and not tanh.

    With cross layers it is DCN-V2 in its parallel structure (Wang et al. 2021).
    """

    reads_first_order = False

    @staticmethod
    def terms(shape: Shape, settings: ModelSettings, device: torch.device) -> Sequence[Term]:
        return (Mlp(shape, settings.hidden),)
