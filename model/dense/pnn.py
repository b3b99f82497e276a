"""PNN (Qu et al., "Product-based Neural Networks for User Response Prediction", ICDM 2016)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.dense.dense_model import DenseModel
from model.dense.products import ProductMlp
from model.dense.term import Shape, Term
from model.settings import ModelSettings

__all__ = ["Ipnn", "Opnn", "Pnn"]


class Ipnn(DenseModel):
    """logit = bias + MLP over the embeddings and their inner products (section III.B)."""

    reads_first_order = False

    @staticmethod
    def terms(shape: Shape, settings: ModelSettings, device: torch.device) -> Sequence[Term]:
        return (ProductMlp(shape, settings.hidden, inner=True, outer=False, device=device),)


class Opnn(DenseModel):
    """logit = bias + MLP over the embeddings and the outer product of their sum (section III.C)."""

    reads_first_order = False

    @staticmethod
    def terms(shape: Shape, settings: ModelSettings, device: torch.device) -> Sequence[Term]:
        return (ProductMlp(shape, settings.hidden, inner=False, outer=True, device=device),)


class Pnn(DenseModel):
    """logit = bias + MLP over the embeddings and both products: PNN* of Guo et al. 2017 (section 3.1)."""

    reads_first_order = False

    @staticmethod
    def terms(shape: Shape, settings: ModelSettings, device: torch.device) -> Sequence[Term]:
        return (ProductMlp(shape, settings.hidden, inner=True, outer=True, device=device),)
