"""Files that a reader can hold in mind, each in the folder of its idea."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tests.house.code import ROOMS, modules

__all__ = ["problems"]

LONGEST = 400  # lines; about 250 is good
FIRST_LINES = 15
REASON = re.compile(r"\bfile is long because \S")
LOOSE_IN_STREAM = {"__init__.py", "errors.py", "settings.py"}


def problems(root: Path) -> Iterator[str]:
    """Files that are too long or in the wrong folder, a line each."""
    for module in modules(root, *ROOMS, "bench", "tests"):
        lines = module.text.splitlines()
        if len(lines) > LONGEST and not REASON.search("\n".join(lines[:FIRST_LINES])):
            yield (
                f"{module.path}: expected at most {LONGEST} lines, found {len(lines)}. Split it by ideas, or say why "
                f"not in its first {FIRST_LINES} lines: `This file is long because …`."
            )
    for file in sorted((root / "stream").glob("*.py")):
        if file.name not in LOOSE_IN_STREAM:
            yield (
                f"stream/{file.name}: expected no files in stream/ but {', '.join(sorted(LOOSE_IN_STREAM))}, found it. Move "
                "it into the folder of its idea (docs/architecture.md)."
            )
