"""An answer to a score request: a record on `scores`, as a CloudEvent 1.0 in Kafka's binary mode (Kafka protocol binding, 3.2).

| part | value |
| --- | --- |
| key | the request's id |
| value | JSON, `Answer` |
| `ce_specversion`, `ce_type` | `1.0`, `EVENT_TYPE` |
| `ce_id` | the request's id |
| `ce_source` | `/headrace/scorer/WORKER` |
| `ce_time` | when the answer was made, RFC 3339 in UTC |
| `content-type` | `application/json` |

The client reads answers by itself (`headrace/scores.py`), since it imports nothing of ours.
"""

from __future__ import annotations

from datetime import UTC, datetime
from urllib.parse import quote

import msgspec

from stream.records.record import Header, Outgoing

__all__ = ["ANSWER_REASONS", "EVENT_TYPE", "Answer", "AnswerEncoder", "Problem", "Score"]

EVENT_TYPE = "headrace.scores.v1"

# Why a request was not scored, besides what can be wrong with its JSON. docs/scoring.md lists them.
ANSWER_REASONS = {
    "no_model": "no scorer has a version",
    "id_mismatch": "`request_id` is not the record's key",
    "deadline_exceeded": "`deadline_ms` had passed before the request's turn came",
    "too_many_candidates": "more candidates than `scorer.max_candidates`",
    "score_not_finite": "the version served computes no number for a candidate",
    "answer_too_large": "the answer would be larger than the topic `scores` takes",
}

# Kafka's own bytes around a record alone in its batch, and the names of the headers.
_OVERHEAD_BYTES = 512


class Score(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The score of one candidate; in the share of a shadow also the score by the version that is tried."""

    id: str
    score: float
    shadow: float | None = None


class Problem(msgspec.Struct, frozen=True):
    """Why a request was not scored: a code, where in the request, and what was expected and found."""

    reason: str
    path: str
    message: str


class Answer(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The value of the record.

    `model_version` is the newest announced version at or below the point of the weights that scored, `delta` the number of
    deltas since. `snapshot_age_ms` is the time since the trainer captured these weights. Version and age are null while there
    is no model. `delta`, `stale`, `error` and `shadow_version` are absent when they are 0, false and null. `shadow_version` is
    the version that gave the scores called `shadow`.
    """

    request_id: str
    scores: list[Score]
    model_version: int | None
    snapshot_age_ms: int | None
    delta: int = 0
    stale: bool = False
    error: Problem | None = None
    shadow_version: int | None = None


_encode = msgspec.json.Encoder().encode


class AnswerEncoder:
    """Encodes the answers that one worker makes at one time.

    Args:
        now_ms: for `ce_time`.
        max_bytes: largest batch that the topic `scores` takes.
    """

    def __init__(self, worker: str, now_ms: int, max_bytes: int) -> None:
        when = datetime.fromtimestamp(now_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        shared = (
            ("ce_specversion", b"1.0"),
            ("ce_type", EVENT_TYPE.encode()),
            ("ce_source", f"/headrace/scorer/{quote(worker)}".encode()),
            ("ce_time", when.encode()),
            ("content-type", b"application/json"),
        )
        self._shared: tuple[Header, ...] = shared
        self._room = max_bytes - _OVERHEAD_BYTES - sum(len(content) for _, content in shared)

    def encode(self, answer: Answer) -> Outgoing | None:
        """The record of an answer; None when the topic would not take it."""
        key, value = answer.request_id.encode(), _encode(answer)
        # The id is in the key, in a header, and in the value.
        if 2 * len(key) + len(value) > self._room:
            return None
        return key, value, [("ce_id", key), *self._shared]
