"""From a batch of score requests to their answers: one decode, one forward pass, one record each. Uses no Kafka client."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from model.features import DecodedRequests
from state.tracks import HASH_SPACE as TRACK_SPACE
from stream.records.answer import Answer, AnswerEncoder, Problem, Score
from stream.records.dead_letter import REASONS, DeadLetter
from stream.records.record import Outgoing, Record
from stream.records.request import request_id
from stream.scorer.scored_rows import score_rows
from stream.scorer.serving import Served
from stream.scorer.trial import Shadow, Trial, candidate_scores, decode_requests, in_share, positions

__all__ = ["Answers", "answer_requests"]

# Characters of an error's path and of its message, which quote what the sender wrote.
MAX_TEXT = 300


class ShadowCount(NamedTuple):
    """Requests of a track's share that the track has scored beside the answer, and those that it has not."""

    scored: int
    missed: int


@dataclass(slots=True)
class Answers:
    """The result of one batch of requests: records for `scores` and for `dead-letters`."""

    records: list[Outgoing] = field(default_factory=list)
    dead: list[DeadLetter] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    candidates: int = 0
    by_champion: int = 0
    """Those of them that the weights which answer have scored, and not the candidate of a canary."""
    by_candidate: int = 0
    """Requests that the candidate of a shadow or canary has scored."""
    not_by_candidate: int = 0
    """Requests of its share that it could not score."""
    by_shadow: dict[str, ShadowCount] = field(default_factory=dict)
    """Requests of the shares of tracks beside, by track."""


def answer_requests(
    records: Sequence[Record],
    served: Served | None,
    *,
    trial: Trial | None = None,
    shadows: Sequence[Shadow] = (),
    worker: str,
    max_candidates: int,
    max_bytes: int,
    stale: bool = False,
    now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
) -> Answers:
    """Answer a batch of requests with one version, but for the share that a candidate answers.

    Every request is answered: with scores in the order of its candidates, or with an error that says why not. Only a request
    with neither a key nor a readable id becomes a dead letter, since nobody could find its answer.

    Args:
        trial: the candidate of a shadow or canary that gets a share of the requests.
        shadows: tracks that score a share of the requests beside.
        worker: this worker's id, the source of the event.
        max_bytes: largest batch that the topic `scores` takes.
    """
    writer = _Writer(served, worker, max_bytes, now_ms(), stale=stale)
    if served is None:
        problem = Problem(
            "no_model",
            "$",
            "expected a version to score with, found none. Does a trainer run, can scorers read the store? `headrace doctor`",
        )
        for record in records:
            writer.refuse(record, problem)
        return writer.answers
    decoded = decode_requests(served.decoder, records)
    for bad in decoded.bad:
        record = records[bad.index]
        writer.refuse(record, Problem(bad.reason if record.value else "empty_value", bad.path, bad.message))
    wanted: list[int] = []
    turn_ms = now_ms()
    for index, row in enumerate(decoded.rows.tolist()):
        found = _problem(records[row], decoded, index, turn_ms, max_candidates)
        if found is None:
            wanted.append(index)
        else:
            writer.refuse(records[row], found)
    if wanted:
        _score(writer, records, decoded, wanted, served, trial, shadows)
    return writer.answers


def _problem(record: Record, decoded: DecodedRequests, index: int, now_ms: int, max_candidates: int) -> Problem | None:
    name, deadline_ms = decoded.request_ids[index], int(decoded.deadlines_ms[index])
    count = int(decoded.offsets[index + 1] - decoded.offsets[index])
    if not name:
        return Problem("missing_field", "$.request_id", "expected an id, found an empty string")
    if name.encode() != record.key:
        key = "no key" if record.key is None else repr(record.key)
        return Problem("id_mismatch", "$.request_id", f"expected the record's key to be {name!r}, found {key}")
    if 0 <= deadline_ms < now_ms:
        return Problem("deadline_exceeded", "$.deadline_ms", f"expected to be scored by {deadline_ms}, it is {now_ms}")
    if count > max_candidates:
        return Problem("too_many_candidates", "$.candidates", f"expected at most {max_candidates} candidates, found {count}")
    return None


class _Beside(NamedTuple):
    """Scores that stand beside those of the answer, and the version that gave them."""

    version: int
    scores: list[float]


def _score(
    writer: _Writer,
    records: Sequence[Record],
    decoded: DecodedRequests,
    wanted: list[int],
    served: Served,
    trial: Trial | None,
    shadows: Sequence[Shadow],
) -> None:
    """Score the candidates of the wanted requests: by the candidate what is its share, the rest with one predictor."""
    theirs: dict[int, list[float]] = {}
    if trial is not None:
        chosen = in_share([decoded.request_ids[index] for index in wanted], trial.share)
        share = [wanted[position] for position in np.flatnonzero(chosen).tolist()]
        theirs = candidate_scores(trial, served, records, decoded, share)
        writer.answers.by_candidate = len(theirs)
        writer.answers.not_by_candidate = len(share) - len(theirs)
    canary = trial.served if trial is not None and trial.mode == "canary" else None
    ours = wanted if canary is None else [index for index in wanted if index not in theirs]
    scored = score_rows(served.predictor, decoded, ours) if ours else None
    beside: dict[int, _Beside] = {}
    if trial is not None and canary is None:
        beside = {index: _Beside(trial.served.version, scores) for index, scores in theirs.items()}
    # An answer has room for one score beside each: that of a version on trial goes first.
    _score_beside(writer, records, decoded, [index for index in wanted if index not in theirs], served, shadows, beside)
    for index in wanted:
        record, name, ids = records[int(decoded.rows[index])], decoded.request_ids[index], decoded.candidate_ids[index]
        if canary is not None and index in theirs:
            listed = [Score(each, score) for each, score in zip(ids, theirs[index], strict=True)]
            writer.answer(record, name, listed, by=canary)
            continue
        assert scored is not None
        scores, noted = scored.of(index), beside.get(index)
        if scores is None:
            message = "expected a number from the version that is served, found none. Go back: `headrace snapshot rollback`"
            path = f"$.candidates[{scored.first_not_finite(index)}]"
            writer.refuse(record, Problem("score_not_finite", path, message))
        elif noted is not None:
            listed = [Score(*each) for each in zip(ids, scores, noted.scores, strict=True)]
            writer.answer(record, name, listed, shadow_version=noted.version)
        else:
            writer.answer(record, name, [Score(each, score) for each, score in zip(ids, scores, strict=True)])


def _score_beside(
    writer: _Writer,
    records: Sequence[Record],
    decoded: DecodedRequests,
    free: list[int],
    served: Served,
    shadows: Sequence[Shadow],
    beside: dict[int, _Beside],
) -> None:
    """Add to `beside` the scores of tracks that have a share of these requests."""
    if not shadows or not free:
        return
    at = positions([decoded.request_ids[index] for index in free], TRACK_SPACE)
    for shadow in shadows:
        chosen = np.flatnonzero((at >= shadow.interval.start) & (at < shadow.interval.stop))
        share = [free[position] for position in chosen.tolist()]
        found = candidate_scores(shadow, served, records, decoded, share)
        beside.update({index: _Beside(shadow.served.version, scores) for index, scores in found.items()})
        writer.answers.by_shadow[shadow.track] = ShadowCount(len(found), len(share) - len(found))


class _By(NamedTuple):
    """What an answer says of the weights that scored."""

    version: int | None
    delta: int
    age_ms: int | None


class _Writer:
    """Turns scores and problems into records."""

    def __init__(self, served: Served | None, worker: str, max_bytes: int, now_ms: int, *, stale: bool) -> None:
        self.answers = Answers()
        self._encoder, self._max_bytes, self._stale = AnswerEncoder(worker, now_ms, max_bytes), max_bytes, stale
        self._now_ms = now_ms
        self._by = self._named(served)

    def _named(self, served: Served | None) -> _By:
        if served is None:
            return _By(None, 0, None)
        state = served.state
        return _By(state.version, state.delta, max(self._now_ms - state.captured_at_ms, 0))

    def answer(
        self,
        record: Record,
        name: str,
        scores: list[Score],
        *,
        by: Served | None = None,
        shadow_version: int | None = None,
    ) -> None:
        """Answer a request with scores.

        Args:
            by: the weights that scored, if not those that answer everything else.
            shadow_version: the candidate whose scores stand beside.
        """
        named = self._by if by is None else self._named(by)
        fits = self._write(name, scores, None, named, shadow_version)
        if not fits and shadow_version is not None:  # without what is only noted beside
            fits = self._write(name, [Score(score.id, score.score) for score in scores], None, named)
        if fits:
            self.answers.candidates += len(scores)
            self.answers.by_champion += len(scores) if by is None else 0
            self.answers.outcomes["scored"] += 1
        else:
            message = f"expected an answer of at most {self._max_bytes} bytes, found a larger one. Send fewer candidates"
            self.refuse(record, Problem("answer_too_large", "$.candidates", message))

    def refuse(self, record: Record, problem: Problem) -> None:
        """Answer a request with an error, under the record's key: the sender waits for an answer with that key."""
        problem = Problem(problem.reason, problem.path[:MAX_TEXT], problem.message[:MAX_TEXT])
        name = request_id(record)
        if name is not None and self._write(name, [], problem, self._by):
            self.answers.outcomes[problem.reason] += 1
            return
        if problem.reason not in REASONS:
            found = "neither a key nor a readable id" if name is None else f"one of {len(name)} characters"
            message = f"expected a request id to answer under, found {found} ({problem.reason})"
            problem = Problem("missing_field" if name is None else "out_of_range", "$.request_id", message)
        self.answers.dead.append(DeadLetter.of(record, problem.reason, problem.path, problem.message))
        self.answers.outcomes["dead_letter"] += 1

    def _write(
        self, name: str, scores: list[Score], problem: Problem | None, by: _By, shadow_version: int | None = None
    ) -> bool:
        """Add a record; False when the topic would not take it."""
        written = self._encoder.encode(
            Answer(
                request_id=name,
                scores=scores,
                model_version=by.version,
                snapshot_age_ms=by.age_ms,
                delta=by.delta,
                stale=self._stale,
                error=problem,
                shadow_version=shadow_version,
            )
        )
        if written is None:
            return False
        self.answers.records.append(written)
        return True
