"""Wide & Deep (Cheng et al., "Wide & Deep Learning for Recommender Systems", DLRS 2016)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.dense.dense_model import DenseModel
from model.dense.mlp import Mlp
from model.dense.term import Shape, Term
from model.settings import ModelSettings

__all__ = ["WideDeep"]


class WideDeep(DenseModel):
    """logit = bias + sum of w_i + MLP over the embeddings (section 3.3, equation 3).

    The wide part has a weight for each value of each field of the schema. The paper learns these by FTRL with an L1 penalty:
    `model.first_order = "ftrl"`.
    """

    @staticmethod
    def terms(shape: Shape, settings: ModelSettings, device: torch.device) -> Sequence[Term]:
        return (Mlp(shape, settings.hidden),)
