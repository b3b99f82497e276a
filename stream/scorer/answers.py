"""From a batch of score requests to their answers: one decode, one forward pass, one record each. Pure of Kafka's clients."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import msgspec
import numpy as np
import numpy.typing as npt

from model.batch import FeatureBatch
from model.features import DecodedRequests
from model.predictor import Predictor
from stream.records.dead_letter import REASONS, DeadLetter
from stream.records.record import Outgoing
from stream.scorer.serving import Served

__all__ = ["ANSWER_REASONS", "EVENT_TYPE", "Answer", "Answers", "Problem", "Score", "answer_requests"]

EVENT_TYPE = "headrace.scores.v1"

# Why a request wasn't scored, besides what can be wrong with its JSON. docs/scoring.md lists them.
ANSWER_REASONS = {
    "no_model": "no scorer has a version",
    "id_mismatch": "`request_id` is not the record's key",
    "deadline_exceeded": "`deadline_ms` had passed before the request's turn came",
    "too_many_candidates": "more candidates than `scorer.max_candidates`",
    "score_not_finite": "the version served computes no number for a candidate",
    "answer_too_large": "the answer would be larger than the topic `scores` takes",
}

# Of a score. A float32 tells probabilities near 1 apart by 6e-8; rare clicks (1e-5) still have three digits here.
DIGITS = 8
# Rows in one call of the model: some 40 MB of activations at 40 fields of 16 floats and layers of 400; larger is no faster.
PASS_ROWS = 4_096
# Characters of an error's path and message, which quote what the sender wrote.
TOLD = 300
# Kafka's own bytes around a record alone in its batch, and the headers' names.
RECORD_OVERHEAD = 512


class Score(msgspec.Struct, frozen=True, gc=False):
    id: str
    score: float


class Problem(msgspec.Struct, frozen=True):
    """Why a request was not scored: a code, where in the request, and what was expected and found."""

    reason: str
    path: str
    message: str


class Answer(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The value of a record on `scores`.

    `model_version` and `snapshot_age_ms` (since that version was made) are null while there is no model. `stale` and
    `error` are left out when there is nothing to say.
    """

    request_id: str
    scores: list[Score]
    model_version: int | None
    snapshot_age_ms: int | None
    stale: bool = False
    error: Problem | None = None


@dataclass(slots=True)
class Answers:
    """What one batch of requests came to: records for `scores` and for `dead-letters`."""

    records: list[Outgoing] = field(default_factory=list)
    dead: list[DeadLetter] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    candidates: int = 0


class _Envelope(msgspec.Struct):
    request_id: str


_encode = msgspec.json.Encoder().encode
_envelope = msgspec.json.Decoder(_Envelope).decode


def answer_requests(
    records: Sequence[Any],
    served: Served | None,
    *,
    worker: str,
    max_candidates: int,
    max_bytes: int,
    stale: bool = False,
    now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
) -> Answers:
    """Answer a batch of requests (ConsumerRecords) with one version.

    Every request is answered: with scores in the order of its candidates, or with an error that says why not. Only one with
    neither a key nor a readable id becomes a dead letter, there being nobody to answer.

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


def _problem(record: Any, decoded: DecodedRequests, index: int, now_ms: int, max_candidates: int) -> Problem | None:
    request_id, deadline_ms = decoded.request_ids[index], int(decoded.deadlines_ms[index])
    count = int(decoded.offsets[index + 1] - decoded.offsets[index])
    if not request_id:
        return Problem("missing_field", "$.request_id", "expected an id, found an empty string")
    if request_id.encode() != record.key:
        key = "no key" if record.key is None else repr(record.key)
        return Problem("id_mismatch", "$.request_id", f"expected the record's key to be {request_id!r}, found {key}")
    if 0 <= deadline_ms < now_ms:
        return Problem("deadline_exceeded", "$.deadline_ms", f"expected to be scored by {deadline_ms}, it is {now_ms}")
    if count > max_candidates:
        return Problem("too_many_candidates", "$.candidates", f"expected at most {max_candidates} candidates, found {count}")
    return None


def _score(writer: _Writer, records: Sequence[Any], decoded: DecodedRequests, wanted: list[int], predictor: Predictor) -> None:
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
            place = int(np.argmin(finite[start:end]))
            message = "expected a number from the version that is served, found none. Go back: `headrace snapshot rollback`"
            writer.refuse(record, Problem("score_not_finite", f"$.candidates[{place}]", message))


def _predict(predictor: Predictor, batch: FeatureBatch) -> npt.NDArray[np.float64]:
    """Scores of all rows, (B,), a stretch at a time."""
    parts = [predictor.predict(batch.slice(start, start + PASS_ROWS)) for start in range(0, len(batch), PASS_ROWS)]
    return np.concatenate(parts or [np.empty(0, np.float32)]).astype(np.float64)


class _Writer:
    """Puts answers into records. CloudEvents 1.0 attributes in Kafka's binary mode (Kafka protocol binding, 3.2)."""

    def __init__(self, served: Served | None, worker: str, max_bytes: int, now_ms: int, *, stale: bool) -> None:
        self.answers = Answers()
        self._max_bytes, self._stale = max_bytes, stale
        self._version = None if served is None else served.version
        self._age_ms = None if served is None else max(now_ms - served.created_at_ms, 0)
        when = datetime.fromtimestamp(now_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self._shared = (
            ("ce_specversion", b"1.0"),
            ("ce_type", EVENT_TYPE.encode()),
            ("ce_source", f"/headrace/scorer/{quote(worker)}".encode()),
            ("ce_time", when.encode()),
            ("content-type", b"application/json"),
        )

    def answer(self, record: Any, request_id: str, scores: list[Score]) -> None:
        """Answer with scores."""
        if self._write(request_id, scores, None):
            self.answers.candidates += len(scores)
            self.answers.outcomes["scored"] += 1
        else:
            told = f"expected an answer of at most {self._max_bytes} bytes, found a larger one. Send fewer candidates"
            self.refuse(record, Problem("answer_too_large", "$.candidates", told))

    def refuse(self, record: Any, problem: Problem) -> None:
        """Answer with an error, under the record's key: whoever asked listens for that."""
        problem = Problem(problem.reason, problem.path[:TOLD], problem.message[:TOLD])
        request_id = _request_id(record)
        if request_id is not None and self._write(request_id, [], problem):
            self.answers.outcomes[problem.reason] += 1
            return
        if problem.reason not in REASONS:
            what = "neither a key nor a readable id" if request_id is None else f"one of {len(request_id)} characters"
            told = f"expected a request id to answer under, found {what} ({problem.reason})"
            problem = Problem("missing_field" if request_id is None else "out_of_range", "$.request_id", told)
        self.answers.dead.append(DeadLetter.of(record, problem.reason, problem.path, problem.message))
        self.answers.outcomes["dead_letter"] += 1

    def _write(self, request_id: str, scores: list[Score], problem: Problem | None) -> bool:
        """Add a record; False when the topic would not take it."""
        value = _encode(
            Answer(
                request_id=request_id,
                scores=scores,
                model_version=self._version,
                snapshot_age_ms=self._age_ms,
                stale=self._stale,
                error=problem,
            )
        )
        key = request_id.encode()
        # The id is in the key, in a header, and in the value.
        if 2 * len(key) + len(value) + sum(len(content) for _, content in self._shared) + RECORD_OVERHEAD > self._max_bytes:
            return False
        self.answers.records.append((key, value, [("ce_id", key), *self._shared]))
        return True


def _request_id(record: Any) -> str | None:
    """Whom to answer: the record's key, else the id in the value; None when neither can be read."""
    if record.key:
        with contextlib.suppress(UnicodeDecodeError):
            return str(record.key.decode())
    try:
        return _envelope(record.value or b"").request_id or None
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
        return None
