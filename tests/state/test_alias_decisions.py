"""Aliases and tags: what each change writes, what it refuses, and what undoes it."""

from __future__ import annotations

import pytest

from state import alias_decisions, decisions
from state.alias_records import KEPT_CHANGES
from state.changes import Cause
from state.errors import Refused
from state.registry import RegistryState
from tests.state.registry_log import Log, a_log


def set_alias(log: Log, name: str, version: int, reason: str = "why") -> alias_decisions.AliasMoved:
    return log.write(alias_decisions.set_alias(log.state, name, version, log.cause(reason)))  # type: ignore[return-value]


def remove(log: Log, name: str) -> alias_decisions.AliasMoved:
    return log.write(alias_decisions.remove_alias(log.state, name, log.cause()))  # type: ignore[return-value]


def tag(log: Log, version: int, remove: tuple[str, ...] = (), **values: str) -> alias_decisions.Tagged:
    return log.write(alias_decisions.tag(log.state, version, values, log.cause(), remove=remove))  # type: ignore[return-value]


def test_an_alias_moves_and_every_move_says_who_when_and_why() -> None:
    log = a_log(3)
    first = set_alias(log, "candidate", 2, "looks better")
    assert (first.version, first.previous, first.changed) == (2, None, True)
    log.now_ms -= 60_000  # the clock of another machine
    second = set_alias(log, "candidate", 3)
    assert (second.version, second.previous) == (3, 2)
    moves = log.state.aliases["candidate"].moves
    assert [(move.version, move.previous, move.who, move.reason) for move in moves] == [
        (2, None, "me", "looks better"),
        (3, 2, "me", "why"),
    ]
    assert moves[0].at_ms < moves[1].at_ms == log.state.aliases["candidate"].at_ms
    assert log.state.champion.version == 3, "an alias moves no champion"


def test_each_change_of_an_alias_is_undone_by_its_command() -> None:
    log = a_log(3)
    made = set_alias(log, "b", 2)
    log.run(made.undo or "")
    assert log.state.aliases["b"].version is None
    set_alias(log, "b", 2)
    moved = set_alias(log, "b", 1)
    log.run(moved.undo or "")
    assert log.state.aliases["b"].version == 2
    removed = remove(log, "b")
    log.run(removed.undo or "")
    assert log.state.aliases["b"].version == 2


def test_what_is_so_already_writes_nothing() -> None:
    log = a_log(2)
    set_alias(log, "b", 2)
    change = alias_decisions.set_alias(log.state, "b", 2, log.cause())
    assert (change.records, change.outcome.changed, change.outcome.undo) == ((), False, None)
    remove(log, "b")
    assert alias_decisions.remove_alias(log.state, "b", log.cause()).records == ()
    tag(log, 2, ticket="A-1")
    change = alias_decisions.tag(log.state, 2, {"ticket": "A-1"}, log.cause(), remove=["other"])
    assert (change.records, change.outcome.changed) == ((), ())


def test_an_attempt_that_seemed_to_fail_finds_its_own_change() -> None:
    """The commit took effect and its answer was lost: the operation is in the log, and says that it changed something."""
    log = a_log(3)
    set_alias(log, "b", 1)
    cause = Cause("me", log.now_ms, "why", "an operation")
    assert not log.state.has_done("an operation")
    log.write(alias_decisions.set_alias(log.state, "b", 2, cause))
    assert log.state.has_done("an operation")
    again = alias_decisions.set_alias(log.state, "b", 2, cause)
    assert again.records == () and again.outcome.changed and again.outcome.previous == 1
    tagging = Cause("me", log.now_ms, "why", "a tagging")
    log.write(alias_decisions.tag(log.state, 2, {"x": "1"}, tagging))
    assert log.state.has_done("a tagging")
    assert alias_decisions.tag(log.state, 2, {"x": "1"}, tagging).outcome.changed == ("x",)


def test_tags_are_set_changed_and_removed() -> None:
    log = a_log(2)
    assert tag(log, 1, ticket="A-1", note="").changed == ("ticket", "note")
    done = tag(log, 1, remove=("note",), ticket="A-2", owner="ann")
    assert done.changed == ("ticket", "owner", "note")
    assert {name: each.value for name, each in log.state.tags_of(1).items()} == {"owner": "ann", "ticket": "A-2"}
    assert [(each.name, each.value) for each in log.state.tags[1].changes][-1] == ("note", None)
    assert log.state.tags_of(2) == {}
    for turn in range(KEPT_CHANGES):
        tag(log, 1, turn=str(turn))
    assert len(log.state.tags[1].changes) == KEPT_CHANGES
    assert log.state.tags_of(1)["ticket"].who == "me", "a tag says who set it for as long as it is there"


@pytest.mark.parametrize(
    ("name", "version", "says"),
    [
        (
            "champion",
            1,
            "alias champion: expected a name that is free, found one that is taken: `headrace snapshot promote` and",
        ),
        ("trainer", 1, "the registry uses this name for itself"),
        ("gc", 1, "the registry uses this name for itself"),
        ("Prod", 1, "alias 'Prod': expected a lower-case letter and up to 62 more"),
        ("a/b", 1, "alias 'a/b': expected"),
        ("tags/1", 1, "alias 'tags/1': expected"),
        ("", 1, "alias '': expected"),
        ("x" * 64, 1, "expected a lower-case letter and up to 62 more"),
        ("b", 9, r"version 9: expected an announced version, found none of that number \(announced: 1 to 3\)"),
    ],
)
def test_what_an_alias_cannot_be(name: str, version: int, says: str) -> None:
    log = a_log(3)
    with pytest.raises(Refused, match=says):
        alias_decisions.set_alias(log.state, name, version, log.cause())


def test_what_cannot_be_removed_or_tagged() -> None:
    log = a_log(3)
    set_alias(log, "b", 1)
    with pytest.raises(Refused, match=r"alias c: expected an alias, found none of that name \(there are: b\)"):
        remove(log, "c")
    with pytest.raises(Refused, match="alias champion: expected a name that is free"):
        remove(log, "champion")
    with pytest.raises(Refused, match=r"tag good: .* the trainer tags versions as good by itself"):
        tag(log, 1, good="yes")
    with pytest.raises(Refused, match="version 9: expected an announced version"):
        tag(log, 9, x="1")
    with pytest.raises(Refused, match="tag note: expected a value of at most 500 characters, found 501"):
        tag(log, 1, note="x" * 501)


def test_aliases_and_tags_are_bounded() -> None:
    """Every reader holds them all: a program that makes a name for each request must not fill memory, removed or not."""
    log = a_log(2)
    for turn in range(300):
        set_alias(log, f"made.{turn}", 1)
        remove(log, f"made.{turn}")
    assert len(log.state.aliases) == 101 and "made.299" in log.state.aliases and "made.0" not in log.state.aliases
    for turn in range(100):
        set_alias(log, f"live.{turn}", 1)
    with pytest.raises(Refused, match=r"alias one\.more: expected fewer than 100 aliases, found 100"):
        set_alias(log, "one.more", 1)
    set_alias(log, "live.7", 2)  # an alias that is there still moves
    for turn in range(50):
        tag(log, 1, **{f"t{turn}": ""})
    with pytest.raises(Refused, match="version 1: expected at most 50 tags, found 51"):
        tag(log, 1, more="")


def test_moves_by_hand_outlast_automatic_ones() -> None:
    log = a_log(3, good=(1, 2))
    log.rollback()
    log.write(decisions.resume(log.state, log.cause()))
    for version in range(4, 54):
        log.announce(version)
    moves = log.state.champion.moves
    assert [move.version for move in moves if move.how == "rollback"] == [2]
    assert [move.version for move in moves if move.how == "auto"] == list(range(34, 54))
    for _ in range(40):
        log.write(decisions.promote(log.state, 1, log.cause()))
        log.write(decisions.promote(log.state, 2, log.cause()))
    assert len(log.state.champion.moves) == 40


def test_keys_are_such_as_older_releases_ignore() -> None:
    """A reader of 0.1.0 skips unknown aliases, and reports keys that begin with neither `version/` nor `alias/`."""
    log = a_log(2)
    set_alias(log, "candidate", 1)
    tag(log, 1, x="1")
    keys = [key for key in log.compacted if not key.startswith("version/")]
    assert sorted(keys) == ["alias/candidate", "alias/champion", "alias/tags/1", "alias/trainer"]
    reader = RegistryState()
    for offset, (key, value) in enumerate(log.compacted.items()):
        assert reader.apply(key.encode(), value, offset) is None
    assert (reader.aliases, reader.tags) == (log.state.aliases, log.state.tags)
