"""Settings that a version's manifest, which is JSON, could not hold."""

from __future__ import annotations

import math

import pytest
from pydantic import BaseModel, ValidationError

from model.settings import ModelSettings
from model.table_settings import TableSettings


@pytest.mark.parametrize("settings", [ModelSettings, TableSettings])
def test_no_number_may_be_infinite(settings: type[BaseModel]) -> None:
    floats = [name for name, field in settings.model_fields.items() if field.annotation is float]
    assert floats
    for name in floats:
        with pytest.raises(ValidationError, match="finite number"):
            settings.model_validate({name: math.inf})
