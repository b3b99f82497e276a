"""From a batch of score requests to their answers: one decode, one forward pass, one record each. Uses no Kafka client."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from model.batch import FeatureBatch
from model.features import DecodedRequests
from model.predictor import Predictor
from stream.records.answer import Answer, AnswerEncoder, Problem, Score
from stream.records.dead_letter import REASONS, DeadLetter
from stream.records.record import Outgoing, Record
from stream.records.request import request_id
from stream.scorer.serving import Served

__all__ = ["Answers", "answer_requests"]

# Digits of a score after the point. Neighbouring float32 values near 1 differ by 6e-8, and the score of a rare click (1e-5)
# still has three digits.
DIGITS = 8
# Rows in one call of the model: some 40 MB of activations at 40 fields of 16 floats and layers of 400. More rows are no faster.
PASS_ROWS = 4_096
# Characters of an error's path and of its message, which quote what the sender wrote.
MAX_TEXT = 300


@dataclass(slots=True)
class Answers:
    """The result of one batch of requests: records for `scores` and for `dead-letters`."""

    records: list[Outgoing] = field(default_factory=list)
    dead: list[DeadLetter] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    candidates: int = 0


def answer_requests(
    records: Sequence[Record],
    served: Served | None,
    *,
    worker: str,
    max_candidates: int,
    max_bytes: int,
    stale: bool = False,
    now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
) -> Answers:
    """Answer a batch of requests with one version.

    Every request is answered: with scores in the order of its candidates, or with an error that says why not. Only a request
    with neither a key nor a readable id becomes a dead letter, since nobody could find its answer.

    Args:
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
    decoded = served.decoder.requests([record.value or b"" for record in records])
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
        _score(writer, records, decoded, wanted, served.predictor)
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


def _score(
    writer: _Writer, records: Sequence[Record], decoded: DecodedRequests, wanted: list[int], predictor: Predictor
) -> None:
    """Score the candidates of the wanted requests, all with one predictor."""
    offsets, batch = decoded.offsets, decoded.batch
    if len(wanted) < len(decoded.request_ids):
        batch = batch.take(np.concatenate([np.arange(offsets[index], offsets[index + 1]) for index in wanted]))
    rounded = np.round(_predict(predictor, batch), DIGITS)
    finite = np.isfinite(rounded)
    scores = rounded.tolist()
    end = 0
    for index in wanted:
        ids = decoded.candidate_ids[index]
        start, end = end, end + len(ids)
        record = records[int(decoded.rows[index])]
        if finite[start:end].all():
            listed = [Score(name, score) for name, score in zip(ids, scores[start:end], strict=True)]
            writer.answer(record, decoded.request_ids[index], listed)
        else:
            candidate = int(np.argmin(finite[start:end]))
            message = "expected a number from the version that is served, found none. Go back: `headrace snapshot rollback`"
            writer.refuse(record, Problem("score_not_finite", f"$.candidates[{candidate}]", message))


def _predict(predictor: Predictor, batch: FeatureBatch) -> npt.NDArray[np.float64]:
    """Scores of all rows, (B,), `PASS_ROWS` at a time."""
    parts = [predictor.predict(batch.slice(start, start + PASS_ROWS)) for start in range(0, len(batch), PASS_ROWS)]
    return np.concatenate(parts or [np.empty(0, np.float32)]).astype(np.float64)


class _Writer:
    """Turns scores and problems into records."""

    def __init__(self, served: Served | None, worker: str, max_bytes: int, now_ms: int, *, stale: bool) -> None:
        self.answers = Answers()
        self._encoder, self._max_bytes, self._stale = AnswerEncoder(worker, now_ms, max_bytes), max_bytes, stale
        state = None if served is None else served.state
        self._version = None if state is None else state.version
        self._delta = 0 if state is None else state.delta
        self._age_ms = None if state is None else max(now_ms - state.captured_at_ms, 0)

    def answer(self, record: Record, name: str, scores: list[Score]) -> None:
        """Answer a request with scores."""
        if self._write(name, scores, None):
            self.answers.candidates += len(scores)
            self.answers.outcomes["scored"] += 1
        else:
            message = f"expected an answer of at most {self._max_bytes} bytes, found a larger one. Send fewer candidates"
            self.refuse(record, Problem("answer_too_large", "$.candidates", message))

    def refuse(self, record: Record, problem: Problem) -> None:
        """Answer a request with an error, under the record's key: the sender waits for an answer with that key."""
        problem = Problem(problem.reason, problem.path[:MAX_TEXT], problem.message[:MAX_TEXT])
        name = request_id(record)
        if name is not None and self._write(name, [], problem):
            self.answers.outcomes[problem.reason] += 1
            return
        if problem.reason not in REASONS:
            found = "neither a key nor a readable id" if name is None else f"one of {len(name)} characters"
            message = f"expected a request id to answer under, found {found} ({problem.reason})"
            problem = Problem("missing_field" if name is None else "out_of_range", "$.request_id", message)
        self.answers.dead.append(DeadLetter.of(record, problem.reason, problem.path, problem.message))
        self.answers.outcomes["dead_letter"] += 1

    def _write(self, name: str, scores: list[Score], problem: Problem | None) -> bool:
        """Add a record; False when the topic would not take it."""
        written = self._encoder.encode(
            Answer(
                request_id=name,
                scores=scores,
                model_version=self._version,
                snapshot_age_ms=self._age_ms,
                delta=self._delta,
                stale=self._stale,
                error=problem,
            )
        )
        if written is None:
            return False
        self.answers.records.append(written)
        return True
