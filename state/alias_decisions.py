"""Changes of aliases and tags. As in `state.decisions`, each function looks at the state and returns the records to write."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from state.alias_records import KEPT_CHANGES, NAME, Alias, AliasMove, TagChange, VersionTags, alias_key, tags_key
from state.changes import Cause, Change
from state.decisions import announced
from state.errors import Refused
from state.registry import KeyedRecord, RegistryState

__all__ = ["AliasMoved", "Tagged", "remove_alias", "set_alias", "tag"]

# Every reader holds all aliases and tags, and a change writes the whole record. Nobody who uses these as names comes near the
# limits; a program that makes a name for each version or request does, and is stopped.
MAX_ALIASES = 100
MAX_TAGS = 50  # of one version
MAX_TAG_VALUE = 500  # characters
# Records of removed aliases, kept for `headrace snapshot history NAME`.
KEPT_REMOVED = 100

# Names that mean something else, and what to use instead.
_TAKEN = {
    "champion": "`headrace snapshot promote` and `headrace snapshot rollback` move the champion",
    "trainer": "the registry uses this name for itself",
    "gc": "the registry uses this name for itself",
    "good": "the trainer tags versions as good by itself",
}


@dataclass(frozen=True, slots=True)
class AliasMoved:
    """Where an alias points now, and where it pointed before; None: nowhere.

    changed  False when it was so already, and nothing was written
    undo     the command that restores what was before; None when nothing was changed
    """

    name: str
    version: int | None
    previous: int | None
    changed: bool
    undo: str | None


@dataclass(frozen=True, slots=True)
class Tagged:
    """The tags of a version as they are now, and the names of those that were changed."""

    version: int
    tags: Mapping[str, TagChange]
    changed: tuple[str, ...]


def set_alias(state: RegistryState, name: str, version: int, cause: Cause) -> Change[AliasMoved]:
    """Point an alias at a version; a name that isn't there yet is made.

    Raises:
        Refused: the name can't be an alias, the version was never announced or is deleted, or there are too many aliases.
    """
    _check_name("alias", name, ("champion", "trainer", "gc"))
    announced(state, version)
    before = state.aliases.get(name, Alias())
    if before.version == version:
        return _unchanged(name, before, cause)
    live = sum(alias.version is not None for alias in state.aliases.values())
    if before.version is None and live >= MAX_ALIASES:
        raise Refused(
            f"alias {name}: expected fewer than {MAX_ALIASES} aliases, found {live}. Remove one: `headrace snapshot alias rm`. "
            "To note something about a version, tag it: `headrace snapshot tag`."
        )
    return _moved(state, name, before, version, cause)


def remove_alias(state: RegistryState, name: str, cause: Cause) -> Change[AliasMoved]:
    """Remove an alias. Its history stays.

    Raises:
        Refused: there never was an alias of this name, or it is one that can't be removed.
    """
    _check_name("alias", name, ("champion", "trainer", "gc"))
    before = state.aliases.get(name)
    if before is None:
        there = ", ".join(sorted(each for each, alias in state.aliases.items() if alias.version is not None)) or "none"
        raise Refused(f"alias {name}: expected an alias, found none of that name (there are: {there}). Nothing was changed.")
    if before.version is None:
        return _unchanged(name, before, cause)
    return _moved(state, name, before, None, cause)


def tag(
    state: RegistryState, version: int, values: Mapping[str, str], cause: Cause, *, remove: Collection[str] = ()
) -> Change[Tagged]:
    """Put tags on a version, or change or remove them.

    Args:
        values: value by name; an empty value is allowed.
        remove: names of tags to remove. A name that the version doesn't have is left out.

    Raises:
        Refused: the version was never announced or is deleted, a name can't be a tag, or a value is too long.
    """
    announced(state, version)
    before = state.tags.get(version, VersionTags(version=version))
    for name, value in values.items():
        _check_name("tag", name, ("good", "champion"))
        if len(value) > MAX_TAG_VALUE:
            raise Refused(
                f"tag {name}: expected a value of at most {MAX_TAG_VALUE} characters, found {len(value)}. Write the text "
                "elsewhere, and put its address here."
            )
    wanted: dict[str, str | None] = {**values, **dict.fromkeys(remove)}
    changes = [
        TagChange(name=name, value=value, who=cause.who, at_ms=cause.now_ms, reason=cause.reason, operation=cause.operation)
        for name, value in wanted.items()
        if value != (before.tags[name].value if name in before.tags else None)
    ]
    if not changes:
        ours = tuple(change.name for change in before.changes if cause.operation and change.operation == cause.operation)
        return Change((), Tagged(version, before.tags, ours))
    tags = {**before.tags, **{change.name: change for change in changes}}
    tags = {name: tags[name] for name in sorted(tags) if tags[name].value is not None}
    if len(tags) > MAX_TAGS:
        raise Refused(
            f"version {version}: expected at most {MAX_TAGS} tags, found {len(tags)} with the new ones. Remove some: "
            f"`headrace snapshot tag {version} --remove NAME`."
        )
    after = VersionTags(version=version, tags=tags, changes=(*before.changes, *changes)[-KEPT_CHANGES:])
    names = tuple(change.name for change in changes)
    return Change((KeyedRecord(tags_key(version), after),), Tagged(version, tags, names))


def _check_name(kind: str, name: str, taken: Collection[str]) -> None:
    if name in taken:
        raise Refused(f"{kind} {name}: expected a name that is free, found one that is taken: {_TAKEN[name]}.")
    if not NAME.fullmatch(name):
        raise Refused(
            f"{kind} {name!r}: expected a lower-case letter and up to 62 more letters, digits, dots, hyphens and underscores, "
            "found another name. Choose such a name."
        )


def _unchanged(name: str, alias: Alias, cause: Cause) -> Change[AliasMoved]:
    """There is nothing to write. An attempt that seemed to fail may have written it: then the last move is this operation's."""
    last = alias.moves[-1] if alias.moves else None
    if last is not None and cause.operation and last.operation == cause.operation:
        return Change((), AliasMoved(name, alias.version, last.previous, True, _undo(name, last.previous, alias.version)))
    return Change((), AliasMoved(name, alias.version, alias.version, False, None))


def _moved(state: RegistryState, name: str, before: Alias, version: int | None, cause: Cause) -> Change[AliasMoved]:
    at_ms = max(cause.now_ms, before.at_ms + 1)  # the clocks of machines differ, and a history never goes back in time
    move = AliasMove(
        version=version,
        previous=before.version,
        who=cause.who,
        at_ms=at_ms,
        reason=cause.reason,
        operation=cause.operation,
    )
    after = replace(
        before,
        version=version,
        who=cause.who,
        at_ms=at_ms,
        reason=cause.reason,
        moves=(*before.moves, move)[-KEPT_CHANGES:],
    )
    records = [KeyedRecord(alias_key(name), after)]
    removed = sorted((alias.at_ms, each) for each, alias in state.aliases.items() if alias.version is None and each != name)
    records += [KeyedRecord(alias_key(each), None) for _, each in removed[:-KEPT_REMOVED]]
    return Change(tuple(records), AliasMoved(name, version, before.version, True, _undo(name, before.version, version)))


def _undo(name: str, previous: int | None, version: int | None) -> str:
    words = ["headrace", "snapshot", "alias"]
    words += ["rm", name] if previous is None else ["set", name, str(previous)]
    return shlex.join([*words, "--reason", f"undo of {'removing it' if version is None else version}"])
