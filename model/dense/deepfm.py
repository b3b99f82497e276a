"""DeepFM (Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction", IJCAI 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.dense.dense_model import DenseModel
from model.dense.mlp import Mlp
from model.dense.pairs import Pairs
from model.dense.term import Shape, Term
from model.settings import ModelSettings

__all__ = ["DeepFM"]


class DeepFM(DenseModel):
    """logit = bias + first order + FM + MLP, all over the same embeddings (section 2.1, equations 1 to 4)."""

    @staticmethod
    def terms(shape: Shape, settings: ModelSettings, device: torch.device) -> Sequence[Term]:
        return Mlp(shape, settings.hidden), Pairs(shape)
