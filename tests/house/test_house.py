"""The rules of the house, on made-up checkouts: each rule finds what breaks it, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.house import exports, sizes, unused
from tests.house.allowed import EXPORTED, UNUSED
from tests.house.code import ROOMS


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for room in (*ROOMS, "bench", "tests"):
        (tmp_path / room).mkdir()
    return tmp_path


def write(checkout: Path, **files: str) -> None:
    """Files by their paths, with `__` for each slash."""
    for name, text in files.items():
        (checkout / f"{name.replace('__', '/')}.py").write_text(text)


def test_a_long_file_needs_a_reason(checkout: Path) -> None:
    lines = "x = 1\n" * 400
    write(checkout, model__short=lines, model__long=lines + "x = 2\n")
    write(checkout, tests__table=f'"""Cases.\n\nThis file is long because it is one table of cases.\n"""\n{lines}')
    assert list(sizes.problems(checkout)) == [
        "model/long.py: expected at most 400 lines, found 401. Split it by ideas, or say why not in its first 15 lines: "
        "`This file is long because …`."
    ]


def test_stream_has_no_loose_files(checkout: Path) -> None:
    write(checkout, stream__settings="", stream__errors="", stream__loose="")
    [problem] = sizes.problems(checkout)
    assert problem.startswith(
        "stream/loose.py: expected no files in stream/ but __init__.py, errors.py, settings.py, found it."
    )


def test_exports(checkout: Path) -> None:
    write(
        checkout,
        model__a='__all__ = ["Type", "gone", "lonely", "make", "used"]\nclass Type: ...\ndef used(): ...\ndef lonely(): ...\n'
        "def make() -> Type: ...\nhidden = 1\n",
        model__b="def nothing_listed(): ...\n",
        state__c='from model.a import hidden, used\nimport model.a as other\n__all__ = []\nprint(other.make)\n',
        tests__test_a="from model.a import lonely\n",
    )  # fmt: skip
    found = list(exports.problems(checkout, {}))
    assert [problem.split(". ")[0] for problem in found] == [
        "state/c.py:1: expected to import names of `__all__`, found hidden of model.a",
        "model/a.py: expected every name of `__all__` in the module, found no gone",
        "model/a.py: expected names of `__all__` to be used outside tests, found gone unused",
        "model/a.py: expected names of `__all__` to be used outside tests, found lonely unused",
        "model/b.py: expected `__all__`, found none",
    ]
    why = {"model.a.lonely": "why", "model.a.used": "why"}
    assert [problem for problem in exports.problems(checkout, why) if "lonely" in problem or "a.used" in problem] == [
        "tests/house/allowed.py: expected model.a.used to be exported and unused, found that it is not. Remove the entry."
    ]


def test_dead_code(checkout: Path) -> None:
    write(checkout, model__a="def used(): ...\ndef dead(): ...\ndef library(): ...\nused()\n", tests__test_a="dead()\n")
    assert list(unused.problems(checkout, {"library": "why", "used": "why"})) == [
        "model/a.py:2: expected every function to be used outside tests, found dead unused. Remove it, or say in "
        "tests/house/allowed.py why it stays.",
        "tests/house/allowed.py: expected used to be unused, found that it is used or gone. Remove the entry.",
    ]


def test_every_exception_says_why() -> None:
    assert all(len(why) > 10 for why in (*EXPORTED.values(), *UNUSED.values()))
