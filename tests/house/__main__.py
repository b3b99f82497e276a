"""`python -m tests.house`: prints what breaks a rule, and exits with 1 when something does."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.house import exports, sizes, unused
from tests.house.allowed import EXPORTED, UNUSED

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    found = [*sizes.problems(ROOT), *exports.problems(ROOT, EXPORTED), *unused.problems(ROOT, UNUSED)]
    for problem in found:
        sys.stderr.write(f"{problem}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
