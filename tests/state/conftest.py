"""The join's local state, in an empty folder."""

from __future__ import annotations

import pytest

from state.join_state import JoinState
from tests.state.made_state import OPTIONS


@pytest.fixture
def state(tmp_path):
    opened = JoinState(tmp_path / "state", OPTIONS)
    yield opened
    opened.close()
