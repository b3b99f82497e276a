"""Logistic regression over the features' values (McMahan et al., "Ad Click Prediction: a View from the Trenches", KDD 2013)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.dense.dense_model import DenseModel
from model.dense.term import Shape, Term
from model.settings import ModelSettings

__all__ = ["Lr"]


class Lr(DenseModel):
    """logit = bias + sum of w_i (section 3). It doesn't read the embeddings, so `features.embedding_dim = 1` is enough for it.

    With `model.first_order = "ftrl"` its weights are learned as in the paper.
    """

    @staticmethod
    def terms(shape: Shape, settings: ModelSettings, device: torch.device) -> Sequence[Term]:
        return ()
