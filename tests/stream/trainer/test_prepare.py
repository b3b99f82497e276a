"""What is made sure of before an epoch ends the trainer that runs."""

from __future__ import annotations

from state.gate import GateState
from state.manifest import Manifest
from stream.trainer.prepare import gate_state
from stream.trainer.start import Start
from tests.judged import judged


def test_a_line_begins_with_a_new_model_and_goes_on_with_its_versions():
    assert gate_state(Start(None, 7), epoch=4) == GateState(line=4)
    old = Start(Manifest(version=3), 7)
    assert gate_state(old, epoch=4).line == 0
    known = Start(Manifest(version=3, verdict=judged(line=2, clicks=5, negatives=9, passed=(1,))), 7)
    assert gate_state(known, epoch=4) == GateState(line=2, clicks=5, negatives=9, passed=(1,))
