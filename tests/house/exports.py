"""Names exported on purpose: what a module lists in `__all__` is what others import from it, and nothing else.

Tests may import private names of the module that they test. A name counts as used when a room or a benchmark imports it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.house.code import ROOMS, Module, modules

__all__ = ["problems"]


def problems(root: Path, allowed: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with exports, a line each.

    Args:
        allowed: `module.name` → why nothing in the project uses that exported name.
    """
    known = {module.name: module for module in modules(root, *ROOMS)}
    used = {name: set[str]() for name in known}
    for module in [*known.values(), *modules(root, "bench")]:
        yield from _imports(module, known, used)
    for name, module in known.items():
        listed = _listed(module)
        if listed is None:
            if _defined(module):
                yield f"{module.path}: expected `__all__`, found none. List the names that other modules may import."
            continue
        for each in sorted(listed - _defined(module)):
            yield f"{module.path}: expected every name of `__all__` in the module, found no {each}. Remove it from `__all__`."
        if module.room != "headrace":  # the client's users import it
            for each in sorted(listed - used[name] - {"main"}):
                if f"{name}.{each}" not in allowed and not _used_within(module, each):
                    yield (
                        f"{module.path}: expected names of `__all__` to be used outside tests, found {each} unused. "
                        "Remove it, or say in tests/house/allowed.py why it stays."
                    )
    for entry in allowed:
        name, _, each = entry.rpartition(".")
        if name not in known or each not in (_listed(known[name]) or set()) or each in used[name]:
            yield f"tests/house/allowed.py: expected {entry} to be exported and unused, found that it is not. Remove the entry."


def _imports(module: Module, known: Mapping[str, Module], used: dict[str, set[str]]) -> Iterator[str]:
    """Note which exported names the module uses, and report those that it takes without leave."""
    aliases: dict[str, str] = {}  # what the module calls a module of ours
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            aliases |= {each.asname or each.name: each.name for each in node.names if each.name in known}
        if not isinstance(node, ast.ImportFrom) or node.module is None or node.module.split(".")[0] not in ROOMS:
            continue
        for each in node.names:
            if f"{node.module}.{each.name}" in known:
                aliases[each.asname or each.name] = f"{node.module}.{each.name}"
            elif node.module in known:
                used[node.module].add(each.name)
                if module.room in ROOMS and each.name not in (_listed(known[node.module]) or set()):
                    yield (
                        f"{module.path}:{node.lineno}: expected to import names of `__all__`, found {each.name} of "
                        f"{node.module}. Export it there, or do without."
                    )
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and (target := aliases.get(ast.unparse(node.value))) is not None:
            used[target].add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.count(":") == 1:
            target, _, attribute = node.value.partition(":")  # as entry points name an object: `deploy.cli.data:data`
            if target in known:
                used[target].add(attribute)


def _listed(module: Module) -> set[str] | None:
    for node in module.tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(each, ast.Name) and each.id == "__all__" for each in node.targets):
            return set(ast.literal_eval(node.value))
    return None


def _defined(module: Module) -> set[str]:
    """Names at the top of a module."""
    found: set[str] = set()
    nodes = list(module.tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {
                (each.asname or each.name).split(".")[0] for each in node.names if getattr(node, "module", "") != "__future__"
            }
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
        elif isinstance(node, ast.If | ast.Try | ast.With):
            nodes += [
                *node.body,
                *getattr(node, "orelse", []),
                *(each for one in getattr(node, "handlers", []) for each in one.body),
            ]
    return found - {"__all__"}


def _used_within(module: Module, name: str) -> bool:
    """Whether the module itself uses a name: a type that its functions take or return is exported for annotations."""
    return any(
        isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load) for node in ast.walk(module.tree)
    )
