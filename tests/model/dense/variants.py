"""Every model, alone and with cross layers, as parameters of tests."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from model.settings import ModelName, ModelSettings

__all__ = ["MODELS", "VARIANTS", "every_model", "every_variant", "settings"]

MODELS: tuple[str, ...] = get_args(ModelName)
_CROSSES: dict[str, dict[str, Any]] = {
    "": {"cross_layers": 0},
    "+cross": {"cross_layers": 2, "cross_rank": 0},
    "+low_rank": {"cross_layers": 3, "cross_rank": 2},
}
VARIANTS = {name + added: {"name": name, **more} for name in MODELS for added, more in _CROSSES.items()}

every_model = pytest.mark.parametrize("name", MODELS)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def settings(variant: str, **more: Any) -> ModelSettings:
    return ModelSettings.model_validate(
        {"hidden": (16, 8), "initial_rows": 16, "row_history": False, **VARIANTS[variant], **more}
    )
