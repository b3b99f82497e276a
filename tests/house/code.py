"""The project's Python files, parsed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

__all__ = ["ROOMS", "Module", "modules"]

ROOMS = ("headrace", "stream", "model", "state", "deploy")


@dataclass(frozen=True)
class Module:
    """A file of Python."""

    root: Path
    path: str
    """Below the root, with slashes."""

    @cached_property
    def text(self) -> str:
        return (self.root / self.path).read_text()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def name(self) -> str:
        """As an import names it."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def room(self) -> str:
        return self.path.split("/")[0]


def modules(root: Path, *folders: str) -> Iterator[Module]:
    """Every file of Python in these folders of a checkout, in order."""
    for folder in folders:
        for file in sorted((root / folder).rglob("*.py")):
            yield Module(root, file.relative_to(root).as_posix())
