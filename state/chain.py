"""What a replica of the serving weights does with what it reads from the log of deltas. Pure: no Kafka, no torch, no clock.

A replica is at one point of one chain. What the log brings is applied, passed over, or refused with a reason:

```python
step = on_delta(progress, offered)
if step.act == "apply":
    progress = after(progress, offered)       # once the weights have the digest that the delta names
elif step.act == "refuse":
    progress = step.progress                  # the last whole state goes on answering
```

A delta that is refused for the first time is read once more, since what broke may have been the reading. If it is refused
again, the chain is broken for this replica: the replica stays before that delta, passes over what follows, and is replaced by a
version that contains what it could not apply (`state.chain_versions`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from state.chain_name import ChainName

__all__ = [
    "REFUSALS",
    "ChainPoint",
    "Offered",
    "Problem",
    "Progress",
    "Refusal",
    "Step",
    "after",
    "on_delta",
    "on_digest",
    "on_problem",
    "order",
]

REFUSALS = {
    "gap": "deltas between the replica's point and this one are missing",
    "wrong_parent": "the delta belongs on another point than the replica's",
    "forked": "the log holds another delta of the replica's sequence number, with another digest",
    "wrong_digest": "the weights would not have the digest that the delta names",
    "unfit": "the delta does not fit the model",
    "memory": "the weights in memory have changed by themselves",
    "behind": "the log does not lead to the champion",
}
"""Why a delta or a replica is refused, besides what a reader of deltas finds wrong with one (docs/events.md)."""


class ChainPoint(NamedTuple):
    """The weights after delta `sequence` of a chain; 0 is what the chain begins with."""

    chain: ChainName
    sequence: int


class Offered(NamedTuple):
    """A delta that was read whole, as its header describes it. `digest` is that of the weights after it."""

    point: ChainPoint
    parent: ChainPoint
    digest: int
    rebase: bool = False


class Problem(NamedTuple):
    """Something in the log that is no delta which can be used. What isn't known of it is None; `reason` is a code."""

    reason: str
    message: str
    epoch: int | None = None
    ordinal: int | None = None
    sequence: int | None = None


class Refusal(NamedTuple):
    """What a replica could not apply.

    needs  the point from which on a version contains it; None: any point after the replica's
    """

    reason: str
    message: str
    needs: ChainPoint | None


class Progress(NamedTuple):
    """How far a replica has come.

    point    of its weights
    digest   of its weights
    refused  what it refused last, also after it was healed: the same refused again is not read another time
    broken   what it stays before; None while it follows
    """

    point: ChainPoint
    digest: int
    refused: Refusal | None = None
    broken: Refusal | None = None


class Step(NamedTuple):
    """What to do.

    apply   the delta belongs on the replica's point
    skip    nothing; `reason` says why: duplicate, old_chain, other_chain, not_a_delta, broken
    reread  refused for the first time: read on again from behind the last applied delta
    refuse  refused again: stay before it
    wait    stay before it, since this worker is too old for it

    reason    the code of a metric
    progress  the replica's after this step; `apply` changes it only by `after`
    """

    act: Literal["apply", "skip", "reread", "refuse", "wait"]
    reason: str
    progress: Progress


def order(point: ChainPoint) -> tuple[int, int, int]:
    """Points of one line of weights compare by this: a newer chain begins where an older one ends."""
    return point.chain.epoch, point.chain.ordinal, point.sequence


def on_delta(progress: Progress, offered: Offered) -> Step:
    """What to do with a delta that was read whole."""
    at, point, parent = progress.point, offered.point, offered.parent
    if point.chain.model != at.chain.model:
        return Step("skip", "other_chain", progress)
    if order(point)[:2] < order(at)[:2]:  # a trainer of an older epoch wrote it after the fork
        return Step("skip", "old_chain", progress)
    if point.chain == at.chain and point.sequence <= at.sequence:
        if point.sequence == at.sequence and offered.digest != progress.digest:
            found = (
                f"{_name(point)}: expected the digest {progress.digest:016x} of the weights served, found {offered.digest:016x}"
            )
            return _refused(progress, Refusal("forked", found, ChainPoint(point.chain, point.sequence + 1)))
        return Step("skip", "duplicate", progress)
    if parent == at and (offered.rebase or point == ChainPoint(at.chain, at.sequence + 1)):
        return Step("apply", "applied", progress)
    if point.chain != at.chain and not (offered.rebase and parent.chain == at.chain):
        # Another line, or a chain whose beginning was missed: the champion's version leads to it.
        return Step("skip", "other_chain", progress)
    if order(parent) > order(at) or (point.chain == at.chain and point.sequence > at.sequence + 1):
        missing = f"{_name(point)}: expected the delta after sequence {at.sequence}, found one on {_name(parent)}"
        return _refused(progress, Refusal("gap", missing, max(parent, ChainPoint(at.chain, at.sequence + 1), key=order)))
    found = f"{_name(point)}: expected it to belong on {_name(at)}, found one on {_name(parent)}"
    return _refused(progress, Refusal("wrong_parent", found, point))


def on_digest(progress: Progress, offered: Offered, message: str, reason: str = "wrong_digest") -> Step:
    """What to do with a delta that belongs on the replica's point, but whose result isn't what it names."""
    return _refused(progress, Refusal(reason, message, offered.point))


def on_problem(progress: Progress, problem: Problem) -> Step:
    """What to do with something that can't be used.

    A record that isn't a delta at all is passed over: somebody else has written it. If it was a delta that is damaged beyond
    recognition, the next one shows the gap.
    """
    at, needs = progress.point, None
    if problem.reason == "not_a_delta":
        return Step("skip", problem.reason, progress)
    if problem.epoch is not None and problem.ordinal is not None:
        chain = (problem.epoch, problem.ordinal)
        if chain < order(at)[:2]:
            return Step("skip", "old_chain", progress)
        if problem.sequence is not None:
            if chain == order(at)[:2] and problem.sequence <= at.sequence:
                return Step("skip", "duplicate", progress)
            needs = ChainPoint(ChainName(at.chain.model, *chain), problem.sequence)
    refusal = Refusal(problem.reason, problem.message, needs)
    if problem.reason == "unknown_format" and progress.broken is None:
        return Step("wait", problem.reason, progress._replace(refused=refusal, broken=refusal))
    return _refused(progress, refusal)


def after(progress: Progress, offered: Offered) -> Progress:
    """The progress once a delta is applied."""
    return Progress(offered.point, offered.digest, refused=progress.refused)


def _refused(progress: Progress, refusal: Refusal) -> Step:
    if progress.broken is not None:  # everything after the delta that broke it is refused too
        return Step("skip", "broken", progress)
    before = progress.refused
    if before is not None and (before.reason, before.needs) == (refusal.reason, refusal.needs):
        return Step("refuse", refusal.reason, progress._replace(refused=refusal, broken=refusal))
    return Step("reread", refusal.reason, progress._replace(refused=refusal))


def _name(point: ChainPoint) -> str:
    return f"delta {point.sequence} of {point.chain}"
