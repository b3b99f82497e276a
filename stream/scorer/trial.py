"""The share of requests that a candidate scores, and its scores. A candidate that fails costs the champion's answers nothing.

A request is in the share if the hash of its id, in the space `canary` (`model.hashing`), is below share × 2**64. So every
scorer chooses the same requests, also when a request is answered twice.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from model.clock import LATEST_MS
from model.features import DecodedRequests
from model.hashing import hash_strings, space_seed
from model.requests import RequestDecoder
from state.canary import HASH_SPACE, Mode
from state.tracks import Interval
from stream.records.record import Record
from stream.scorer.scored_rows import score_rows
from stream.scorer.serving import Served

__all__ = ["Shadow", "Trial", "candidate_scores", "decode_requests", "in_share", "positions"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate that is ready, and its share of the requests."""

    mode: Mode
    share: float
    served: Served


@dataclass(frozen=True, slots=True)
class Shadow:
    """A track that scores the requests of its interval beside the one that answers (`state.tracks`)."""

    track: str
    interval: Interval
    served: Served


def decode_requests(decoder: RequestDecoder, records: Sequence[Record]) -> DecodedRequests:
    """The features of requests. One that doesn't carry its time is as old as its record."""
    arrived_ms = np.array([record.timestamp for record in records], np.int64)
    return decoder.requests([record.value or b"" for record in records], np.clip(arrived_ms, 0, LATEST_MS))


def in_share(request_ids: Sequence[str], share: float) -> npt.NDArray[np.bool_]:
    """Which requests are in the share, bool (R,)."""
    return positions(request_ids, HASH_SPACE) < share


def positions(request_ids: Sequence[str], space: str) -> npt.NDArray[np.float64]:
    """Where the hashes of the ids lie in their range, from 0 up to but not including 1, (R,)."""
    if not request_ids:
        return np.zeros(0)
    seeds = np.full(len(request_ids), space_seed(space), np.uint64)
    hashes = hash_strings(pa.array(request_ids, pa.string()), seeds).view(np.uint64)
    # 53 bits, which a float holds exactly: a share of 1 is every request.
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def candidate_scores(
    trial: Trial | Shadow, champion: Served, records: Sequence[Record], decoded: DecodedRequests, wanted: Sequence[int]
) -> dict[int, list[float]]:
    """The candidate's scores of the wanted requests that it can score, by position. Never raises because of the candidate.

    A candidate with other features decodes the requests by its own schema.
    """
    if not wanted:
        return {}
    try:
        if trial.served.decoder.schema == champion.decoder.schema:
            scored = score_rows(trial.served.predictor, decoded, wanted)
            found = {index: scored.of(index) for index in wanted}
        else:
            own = decode_requests(trial.served.decoder, [records[int(decoded.rows[index])] for index in wanted])
            positions = own.rows.tolist()
            scored = score_rows(trial.served.predictor, own, range(len(positions)))
            found = {wanted[position]: scored.of(index) for index, position in enumerate(positions)}
    except Exception:  # whatever is wrong with the candidate, the champion answers
        log.exception("version %d, a candidate, can't score %d requests", trial.served.version, len(wanted))
        return {}
    return {index: scores for index, scores in found.items() if scores is not None}
