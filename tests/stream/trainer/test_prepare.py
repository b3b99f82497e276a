"""What is made sure of before an epoch ends the trainer that runs."""

from __future__ import annotations

import socket

import pytest

from state.gate import GateState
from state.manifest import Manifest
from stream.errors import StreamError
from stream.settings import HttpSettings
from stream.trainer.prepare import gate_state, require_free
from stream.trainer.start import Start
from tests.judged import judged


def test_a_port_that_is_taken_is_said_before_anything_changes():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StreamError, match=rf"http.port {port}: expected a free port .* a trainer that runs goes on"):
            require_free(HttpSettings(port=port))
    require_free(HttpSettings(port=port))
    require_free(HttpSettings(port=0))


def test_a_line_begins_with_a_new_model_and_goes_on_with_its_versions():
    assert gate_state(Start(None, 7), epoch=4) == GateState(line=4)
    old = Start(Manifest(version=3), 7)
    assert gate_state(old, epoch=4).line == 0
    known = Start(Manifest(version=3, verdict=judged(line=2, clicks=5, negatives=9, passed=(1,))), 7)
    assert gate_state(known, epoch=4) == GateState(line=2, clicks=5, negatives=9, passed=(1,))
