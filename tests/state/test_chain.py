"""What a replica does with what the log brings: every case, by its row in a table."""

from __future__ import annotations

import pytest

from state.chain import ChainPoint, Offered, Problem, Progress, Refusal, after, on_delta, on_digest, on_problem, order
from state.chain_name import ChainName

OLD, OURS, NEXT, LATER = (ChainName("deepfm", epoch, ordinal) for epoch, ordinal in ((2, 0), (3, 0), (3, 1), (4, 0)))
OTHER_MODEL = ChainName("lr", 9, 0)
DIGEST = 0xABC
AT = Progress(ChainPoint(OURS, 100), DIGEST)
GAP = Refusal("gap", "", ChainPoint(OURS, 103))


def delta(
    sequence: int,
    chain: ChainName = OURS,
    parent: tuple[ChainName, int] | None = None,
    *,
    digest: int = 0xDEF,
    rebase: bool = False,
) -> Offered:
    on = ChainPoint(*parent) if parent else ChainPoint(chain, sequence - 1)
    return Offered(ChainPoint(chain, sequence), on, digest, rebase)


@pytest.mark.parametrize(
    "offered, act, reason",
    [
        pytest.param(delta(101), "apply", "applied", id="the next one"),
        pytest.param(delta(101, parent=(OURS, 99)), "reread", "wrong_parent", id="the next number on another point"),
        pytest.param(delta(101, parent=(OLD, 100)), "reread", "wrong_parent", id="the next number on another chain"),
        pytest.param(delta(102), "reread", "gap", id="one is missing"),
        pytest.param(delta(102, parent=(OURS, 100)), "reread", "gap", id="a number is left out"),
        pytest.param(delta(100, digest=DIGEST), "skip", "duplicate", id="the last one again"),
        pytest.param(delta(100, digest=1), "reread", "forked", id="another one of the last number"),
        pytest.param(delta(40), "skip", "duplicate", id="an earlier one again, or in another order"),
        pytest.param(delta(500, OLD), "skip", "old_chain", id="of an older epoch, written after the fork"),
        pytest.param(delta(1, OLD, (OURS, 100), rebase=True), "skip", "old_chain", id="an older epoch on our point"),
        pytest.param(delta(1, LATER, (OURS, 100), rebase=True), "apply", "applied", id="a trainer restarted on our point"),
        pytest.param(delta(1, NEXT, (OURS, 100), rebase=True), "apply", "applied", id="a new chain of one trainer"),
        pytest.param(delta(1, LATER, (OURS, 102), rebase=True), "reread", "gap", id="a restart after deltas we miss"),
        pytest.param(delta(1, LATER, (OURS, 90), rebase=True), "reread", "wrong_parent", id="a restart before our point"),
        pytest.param(delta(1, LATER, (NEXT, 7), rebase=True), "skip", "other_chain", id="a restart of a chain we never saw"),
        pytest.param(delta(1, LATER, (LATER, 0)), "skip", "other_chain", id="a new line begins"),
        pytest.param(delta(6, LATER), "skip", "other_chain", id="a chain whose beginning we missed"),
        pytest.param(delta(1, LATER, (OURS, 100)), "skip", "other_chain", id="our point, but it says it is no restart"),
        pytest.param(delta(101, parent=(OURS, 100), rebase=True), "apply", "applied", id="a rebase within the chain"),
        pytest.param(delta(101, OTHER_MODEL), "skip", "other_chain", id="another model's"),
    ],
)
def test_a_delta(offered: Offered, act: str, reason: str) -> None:
    step = on_delta(AT, offered)
    assert (step.act, step.reason) == (act, reason)
    assert step.progress.point == AT.point and step.progress.broken is None, "a refusal alone moves nothing"


@pytest.mark.parametrize(
    "problem, act, reason",
    [
        pytest.param(Problem("missing_piece", "m", 3, 0, 101), "reread", "missing_piece", id="the next one lacks a piece"),
        pytest.param(Problem("checksum", "m"), "reread", "checksum", id="nothing is known of it"),
        pytest.param(Problem("checksum", "m", 3, 0, 100), "skip", "duplicate", id="of one that was applied"),
        pytest.param(Problem("checksum", "m", 2, 7, 900), "skip", "old_chain", id="of an older epoch"),
        pytest.param(Problem("body_checksum", "m", 4, 0, 1), "reread", "body_checksum", id="of a newer chain"),
        pytest.param(Problem("unknown_format", "m", 3, 0, 101), "wait", "unknown_format", id="of a newer release"),
        pytest.param(Problem("log_gone", "m"), "reread", "log_gone", id="retention has passed"),
        pytest.param(Problem("not_a_delta", "m"), "skip", "not_a_delta", id="somebody else wrote it"),
    ],
)
def test_a_problem(problem: Problem, act: str, reason: str) -> None:
    step = on_problem(AT, problem)
    assert (step.act, step.reason) == (act, reason)
    assert step.progress.point == AT.point


def test_what_is_refused_again_breaks_the_chain_and_what_follows_is_passed_over() -> None:
    once = on_delta(AT, delta(102))
    again = on_delta(once.progress, delta(102))
    assert (once.act, again.act) == ("reread", "refuse")
    broken = again.progress
    assert broken.broken is not None and broken.broken.needs == ChainPoint(OURS, 101)
    assert broken.point == AT.point, "the last whole state stays"
    for offered in (delta(103), delta(104), delta(1, LATER, (OURS, 104), rebase=True)):
        assert on_delta(broken, offered)[:2] == ("skip", "broken")
    assert on_problem(broken, Problem("checksum", "m"))[:2] == ("skip", "broken")
    assert on_problem(broken, Problem("unknown_format", "m", 3, 0, 105))[:2] == ("skip", "broken")


def test_what_fits_mends_a_broken_chain() -> None:
    broken = AT._replace(refused=GAP, broken=GAP)
    step = on_delta(broken, delta(101))
    assert step.act == "apply"
    assert after(step.progress, delta(101)) == Progress(ChainPoint(OURS, 101), 0xDEF, refused=GAP)
    restart = delta(1, LATER, (OURS, 100), rebase=True, digest=5)
    assert on_delta(broken, restart).act == "apply"
    assert after(broken, restart) == Progress(ChainPoint(LATER, 1), 5, refused=GAP)


def test_a_wrong_digest_is_read_once_more_and_once_only_also_after_healing() -> None:
    once = on_digest(AT, delta(101), "message")
    assert (once.act, once.reason) == ("reread", "wrong_digest")
    again = on_digest(once.progress, delta(101), "message")
    assert again.act == "refuse"
    assert again.progress.broken == Refusal("wrong_digest", "message", ChainPoint(OURS, 101))
    healed = Progress(ChainPoint(OURS, 90), 0x1, refused=again.progress.refused)
    for sequence in range(91, 101):
        healed = after(on_delta(healed, delta(sequence)).progress, delta(sequence))
    assert on_digest(healed, delta(101), "message").act == "refuse", "not read a third time"


def test_another_refusal_is_read_again() -> None:
    once = on_delta(AT, delta(102))
    other = on_problem(once.progress, Problem("checksum", "m", 3, 0, 101))
    assert other.act == "reread"


def test_a_format_that_is_not_known_is_waited_at() -> None:
    step = on_problem(AT, Problem("unknown_format", "newer", 3, 0, 101))
    assert step.progress.broken == Refusal("unknown_format", "newer", ChainPoint(OURS, 101))
    assert on_delta(step.progress, delta(102))[:2] == ("skip", "broken")


def test_points_of_one_line_are_ordered() -> None:
    points = [ChainPoint(OLD, 900), ChainPoint(OURS, 0), ChainPoint(OURS, 7), ChainPoint(NEXT, 1), ChainPoint(LATER, 0)]
    assert sorted((points[index] for index in (3, 0, 4, 2, 1)), key=order) == points
