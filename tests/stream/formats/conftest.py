"""A registry that answers from memory."""

from __future__ import annotations

from typing import Any

import pytest

from tests.stream.formats.stand_in import StandIn


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("stream.formats.reader.CONFIRM_S", 0.02)
    monkeypatch.setattr("stream.formats.reader.FIRST_WAIT_S", 0.02)
    with StandIn() as running:
        yield running
