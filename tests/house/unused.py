"""Dead code, found by vulture: names that nothing outside tests uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import vulture

from tests.house.code import ROOMS

__all__ = ["problems"]

# Functions that a library calls: click's commands, pydantic's validators, Faust's agents.
CALLED_BY_LIBRARIES = ["@*.command", "@*.group", "@click.*", "@field_validator", "@model_validator", "@app.agent"]


def problems(root: Path, allowed: Mapping[str, str]) -> Iterator[str]:
    """Unused names, a line each.

    Args:
        allowed: name → why it stays, though no code of ours uses it.
    """
    found = vulture.Vulture(ignore_decorators=CALLED_BY_LIBRARIES)
    found.scavenge([root / room for room in (*ROOMS, "bench")])
    unused = found.get_unused_code()
    for each in unused:
        if each.name not in allowed:
            where = f"{Path(each.filename).relative_to(root)}:{each.first_lineno}"
            yield (
                f"{where}: expected every {each.typ} to be used outside tests, found {each.name} unused. Remove it, "
                "or say in tests/house/allowed.py why it stays."
            )
    for name in sorted(allowed.keys() - {each.name for each in unused}):
        yield f"tests/house/allowed.py: expected {name} to be unused, found that it is used or gone. Remove the entry."
