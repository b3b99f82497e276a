"""Open files: the limit is raised, shared out among partitions, and refused where it is too low."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from state.errors import JoinStateError
from stream.join.file_limit import BASE, BESIDES, LEAST, MOST, check_file_limit, open_files_each


@pytest.mark.parametrize("partitions", [1, 4, 9, 40, 300])
@pytest.mark.parametrize("limit", [1_024, 4_096, 1 << 20])
def test_what_is_opened_fits_or_is_refused(limit: int, partitions: int) -> None:
    each = open_files_each(limit, partitions)
    assert LEAST <= each <= MOST
    fits = BASE + partitions * (each + BESIDES) <= limit
    if fits:
        check_file_limit(limit, partitions)
    else:
        with pytest.raises(JoinStateError, match=rf"limit of at least \d+ for {partitions} partitions, found {limit} .*ulimit"):
            check_file_limit(limit, partitions)


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    program = """
import resource
from stream.join.file_limit import raise_file_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 700))
print(raise_file_limit(), resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout == "700 (700, 700)\n"
    assert resource.getrlimit(resource.RLIMIT_NOFILE) != (700, 700)
