"""From a run of score requests to their answers: one decode, one forward pass, one record each. Pure of Kafka's clients."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np

from model.features import DecodedRequests
from stream.batches import Outgoing
from stream.dead_letters import DeadLetter
from stream.scorer.serving import Served

__all__ = ["EVENT_TYPE", "Answer", "Answers", "Problem", "Score", "answer_requests"]

EVENT_TYPE = "headrace.scores.v1"
_DIGITS = 6  # of a score: beyond what a float32 forward pass means


class Score(msgspec.Struct, frozen=True):
    id: str
    score: float


class Problem(msgspec.Struct, frozen=True):
    """Why a request was not scored: a code, where in the request, and what was expected and found."""

    reason: str
    path: str
    message: str


class Answer(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The value of a record on `scores`. `snapshot_age_ms`: since the version was made, when the answer was."""

    request_id: str
    scores: list[Score] | msgspec.UnsetType = msgspec.UNSET
    model_version: int | msgspec.UnsetType | None = msgspec.UNSET
    snapshot_age_ms: int | msgspec.UnsetType | None = msgspec.UNSET
    stale: bool = False
    error: Problem | None = None


@dataclass(slots=True)
class Answers:
    """What one batch of requests came to."""

    records: list[Outgoing] = field(default_factory=list)
    dead: list[DeadLetter] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    candidates: int = 0


_encode = msgspec.json.Encoder().encode


def answer_requests(
    records: Sequence[Any], served: Served | None, *, worker: str, max_candidates: int, stale: bool = False
) -> Answers:
    """Answer a batch of requests (ConsumerRecords) with one version.

    Every request is answered: with scores in the order of its candidates, or with an error that says why not. Only one with
    neither a key nor a readable id becomes a dead letter, there being nobody to answer.
    """
    answers = Answers()
    now_ms = int(time.time() * 1000)
    headers = _Headers(worker, now_ms)
    if served is None:
        problem = Problem("no_model", "$", "expected a champion to score with, found none yet: is the trainer running?")
        for record in records:
            _refuse(answers, record, problem, headers, Answer(request_id="", stale=stale))
        return answers
    base = Answer(
        request_id="", model_version=served.version, snapshot_age_ms=max(now_ms - served.created_at_ms, 0), stale=stale
    )
    decoded = served.decoder.requests([record.value or b"" for record in records])
    for bad in decoded.bad:
        _refuse(answers, records[bad.index], Problem(bad.reason, bad.path, bad.message), headers, base)
    wanted: list[int] = []
    for index, row in enumerate(decoded.rows.tolist()):
        problem_found = _problem(records[row], decoded, index, now_ms, max_candidates)
        if problem_found is None:
            wanted.append(index)
        else:
            _refuse(answers, records[row], problem_found, headers, base)
    if wanted:
        _score(answers, decoded, wanted, served, headers, base)
    return answers


def _problem(record: Any, decoded: DecodedRequests, index: int, now_ms: int, max_candidates: int) -> Problem | None:
    request_id, deadline_ms = decoded.request_ids[index], int(decoded.deadlines_ms[index])
    count = int(decoded.offsets[index + 1] - decoded.offsets[index])
    if request_id.encode() != record.key:
        return Problem("id_mismatch", "$.request_id", f"expected the record's key {record.key!r}, found {request_id!r}")
    if 0 <= deadline_ms < now_ms:
        return Problem("deadline_exceeded", "$.deadline_ms", f"expected to be scored by {deadline_ms}, it is {now_ms}")
    if count > max_candidates:
        return Problem("too_many_candidates", "$.candidates", f"expected at most {max_candidates} candidates, found {count}")
    return None


def _score(
    answers: Answers, decoded: DecodedRequests, wanted: list[int], served: Served, headers: _Headers, base: Answer
) -> None:
    offsets = decoded.offsets
    batch = decoded.batch
    if len(wanted) < len(decoded.request_ids):
        batch = batch.take(np.concatenate([np.arange(offsets[index], offsets[index + 1]) for index in wanted]))
    scores = np.round(served.predictor.predict(batch).astype(np.float64), _DIGITS).tolist() if len(batch) else []
    position = 0
    for index in wanted:
        ids = decoded.candidate_ids[index]
        part = scores[position : position + len(ids)]
        position += len(ids)
        request_id = decoded.request_ids[index]
        listed = [Score(name, score) for name, score in zip(ids, part, strict=True)]
        answer = msgspec.structs.replace(base, request_id=request_id, scores=listed)
        answers.records.append((request_id.encode(), _encode(answer), headers.of(request_id)))
    answers.candidates += position
    answers.outcomes["scored"] += len(wanted)


def _refuse(answers: Answers, record: Any, problem: Problem, headers: _Headers, base: Answer) -> None:
    """Answer with an error, under the record's key: whoever asked listens for that."""
    try:
        name = record.key.decode() if record.key else ""
    except UnicodeDecodeError:
        name = ""
    if not name:
        answers.dead.append(DeadLetter.of(record, problem.reason, problem.path, problem.message))
        answers.outcomes["dead_letter"] += 1
        return
    answer = msgspec.structs.replace(base, request_id=name, scores=[], error=problem)
    answers.records.append((record.key, _encode(answer), headers.of(name)))
    answers.outcomes[problem.reason] += 1


class _Headers:
    """CloudEvents attributes in Kafka's binary mode (CloudEvents 1.0, Kafka protocol binding, 3.2)."""

    def __init__(self, worker: str, now_ms: int) -> None:
        when = datetime.fromtimestamp(now_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self._shared = (
            ("ce_specversion", b"1.0"),
            ("ce_type", EVENT_TYPE.encode()),
            ("ce_source", f"/headrace/scorer/{worker}".encode()),
            ("ce_time", when.encode()),
            ("content-type", b"application/json"),
        )

    def of(self, request_id: str) -> list[tuple[str, bytes]]:
        return [("ce_id", request_id.encode()), *self._shared]
