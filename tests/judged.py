"""What a gate says of a healthy version, for tests that announce versions without training them."""

from __future__ import annotations

from typing import Any

from state.gate_report import GateReport

__all__ = ["JUDGED", "judged"]


def judged(**changed: Any) -> GateReport:
    """A report of a version that has seen both classes, while versions flow."""
    fields: dict[str, Any] = {"line": 1, "clicks": 100, "negatives": 900, "reason": "nothing was compared yet", **changed}
    return GateReport(**fields)


JUDGED = judged()
