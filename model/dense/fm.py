"""FM (Rendle, "Factorization Machines", ICDM 2010)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.dense.dense_model import DenseModel
from model.dense.pairs import Pairs
from model.dense.term import Shape, Term
from model.settings import ModelSettings

__all__ = ["Fm"]


class Fm(DenseModel):
    """logit = bias + sum of w_i + sum of <e_i, e_j> over all pairs of fields i < j (equation 1)."""

    @staticmethod
    def terms(shape: Shape, settings: ModelSettings, device: torch.device) -> Sequence[Term]:
        return (Pairs(shape),)
