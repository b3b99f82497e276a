"""The predictor: a replica of the serving weights, which scores and is kept current by deltas."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch

from model.batch import FeatureBatch, Float32Array
from model.dense.dense_model import DenseModel
from model.digest import dense_hash, digest_sum, row_hashes
from model.embedding import take
from model.errors import DigestMismatch, ModelError
from model.history import BASE, history_inputs, take_base
from model.network import choose_device, dense_model, embed, to_elements
from model.rows import ModelDelta, Rows
from model.sampling import probabilities
from model.schema import FeatureSchema
from model.serving_rows import Averages, ServingRows
from model.settings import ModelSettings
from model.table import ABSENT_ROW
from model.typical import Typical

__all__ = ["Predictor", "Prepared"]

_MODULUS = 1 << 64

# Rows that a scrub checks at a time, some 2 ms: a delta that is to be applied waits for at most that long.
_SCRUBBED_AT_ONCE = 16_384


class _Dense(NamedTuple):
    """All serving tensors that are no rows: parameters, average rows, counts of all examples. And their hash."""

    model: DenseModel
    averages: Averages
    base: torch.Tensor | None
    hash: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a delta does to a predictor in a certain state. Only `Predictor.apply` uses it.

    state       which state of the predictor it is for
    known       rows of the delta that the predictor has, with their numbers and the hashes of their weights before and after
    new         rows of the delta that it doesn't have, with their hashes
    gone        keys of rows that go, with their numbers and hashes
    dense       dense parameters and average rows; None if they stay
    rows_sum    sum of the hashes of all rows once it is applied
    """

    state: int
    known: Rows
    known_numbers: torch.Tensor
    known_change: torch.Tensor
    new: Rows
    new_hashes: torch.Tensor
    gone: torch.Tensor
    gone_numbers: torch.Tensor
    gone_hashes: torch.Tensor
    dense: _Dense | None
    rows_sum: int


class _Scrub:
    """A scrub under way: the hashes of the rows up to `last` have the sum `sum`, modulo 2**64."""

    def __init__(self) -> None:
        self.last = 0
        self.sum = 0

    def changed(self, numbers: torch.Tensor, change: torch.Tensor) -> None:
        """Takes note that hashes of rows (N,) have changed by `change` (N,)."""
        self.sum += digest_sum(change * (numbers <= self.last))


class Predictor:
    """Scores batches with serving weights, and takes deltas of them while it scores.

        predictor = Predictor(schema, settings, dense, expected_rows=1_000_000)
        for rows in pieces:
            predictor.add(rows)
        predictor.ready()
        scores = predictor.predict(batch)

        prepared = predictor.prepare(delta)  # beside `predict`; DigestMismatch if the delta doesn't lead to the digest it names
        predictor.apply(prepared)

        predictor = Predictor.of(schema, settings, learner.serving_state())  # from one dictionary

    Any number of threads may use `predict`. `add`, `prepare` and `apply` are for one thread at a time, beside them. A batch is
    scored before a delta or after it, never by half of it: `apply` and the lookups of `predict` exclude each other. That takes
    some milliseconds for 100,000 rows.

    `dense` are all serving tensors that are no rows. `negative_rate` is the share of negatives that the weights were learned
    from; scores are corrected by it (`model.sampling`). SnapshotMismatch is raised for weights of another model or schema.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        settings: ModelSettings,
        dense: Mapping[str, torch.Tensor],
        *,
        expected_rows: int,
        device: str = "auto",
        negative_rate: float = 1.0,
    ) -> None:
        self.schema = schema
        self.negative_rate = negative_rate
        self.device = choose_device(device)
        self._settings = settings
        self._dense = self._read_dense(dense)
        self._rows = ServingRows(
            len(schema.fields), schema.embedding_dim, expected_rows, self.device, history=settings.row_history
        )
        self._rows.set_averages(self._dense.averages)
        self._rows_sum = 0
        self._state = 0
        self._added = 0
        # Until `ready`: puts keys into their table, which takes as long as all else with a row, in a thread of its own.
        self._loader: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "keys")
        self._loading: Future[torch.Tensor] | None = None
        self._reading = threading.Lock()  # held while weights are read for a batch, and while they change
        self._changing = threading.Lock()  # held while they change, and by a scrub while it reads
        self._scrubs: list[_Scrub] = []

    @classmethod
    def of(
        cls,
        schema: FeatureSchema,
        settings: ModelSettings,
        serving: Mapping[str, torch.Tensor],
        *,
        device: str = "auto",
        negative_rate: float = 1.0,
    ) -> Predictor:
        """A predictor of all serving tensors in one dictionary: the dense ones, and the parts of `Rows`."""
        keys = take(serving, "keys", (-1,), torch.int64)
        take(serving, "embedding", (len(keys), schema.embedding_dim))
        take(serving, "first_order", (len(keys),))
        predictor = cls(schema, settings, serving, expected_rows=len(keys), device=device, negative_rate=negative_rate)
        predictor.add(Rows.of(serving))
        predictor.ready()
        return predictor

    @property
    def digest(self) -> int:
        """The digest of the weights: computed as they were added, and kept current by deltas (`model.digest`)."""
        return (self._rows_sum + self._dense.hash) % _MODULUS

    def add(self, rows: Rows) -> None:
        """Adds rows, before `ready`. Each key comes only once."""
        if self._loader is None:
            raise ModelError("predictor: expected rows before ready(), found some after it; apply a delta")
        rows = self._rows.checked(rows)
        self._wait_for_keys()
        self._loading = self._loader.submit(self._rows.keys.load, rows.keys)
        self._rows.write_from(self._added + 1, rows)
        self._added += len(rows)
        self._rows_sum = (self._rows_sum + digest_sum(row_hashes(rows))) % _MODULUS

    def ready(self) -> None:
        """Ends the loading: call this once all rows are added."""
        self._wait_for_keys()
        if self._loader is not None:
            self._loader.shutdown()
            self._loader = None

    def _wait_for_keys(self) -> None:
        if self._loading is not None:
            self._loading.result()
            self._loading = None

    @torch.inference_mode()
    def predict(self, batch: FeatureBatch) -> Float32Array:
        """Click probabilities float32 (B,)."""
        elements = to_elements(batch, self.schema, self.device)
        fields = elements.fields()
        with self._reading:
            if self._loader is not None:
                raise ModelError("predictor: expected a call of ready() before predictions, found none")
            dense, rate, history = self._dense, self.negative_rate, self._rows.history
            where = self._rows.lookup(elements.keys, fields)
            embedded, first_order = embed(elements, where, self._rows.embedding, self._rows.first_order)
            counts = None if history is None else history.index_select(0, where)
        extra = None if counts is None or dense.base is None else history_inputs(elements, counts, dense.base)
        return probabilities(dense.model.forward(embedded, first_order, extra).logits, rate).cpu().numpy()

    def prepare(self, delta: ModelDelta) -> Prepared:
        """Finds out what a delta does to the weights as they are now, and changes nothing.

        Raises:
            DigestMismatch: the weights wouldn't have the digest that the delta names: a delta before it is missing, or these
                weights aren't the trainer's.
            SnapshotMismatch: the delta's tensors are of another model or schema.
        """
        rows = self._rows.checked(delta.rows)
        gone = take({"gone": delta.gone}, "gone", (-1,), torch.int64).to(self.device)
        dense = None if delta.dense is None else self._read_dense(delta.dense)
        numbers, gone_numbers = self._rows.keys.lookup(rows.keys), self._rows.keys.lookup(gone)
        gone_numbers = gone_numbers[gone_numbers != ABSENT_ROW]
        is_new = numbers == ABSENT_ROW
        known, new = is_new.logical_not().nonzero().squeeze(1), is_new.nonzero().squeeze(1)
        numbers = numbers.index_select(0, known)
        hashes = row_hashes(rows)
        before, gone_hashes = self._rows.hashes(numbers), self._rows.hashes(gone_numbers)
        change = digest_sum(hashes) - digest_sum(before) - digest_sum(gone_hashes)
        rows_sum = (self._rows_sum + change) % _MODULUS
        digest = (rows_sum + (dense or self._dense).hash) % _MODULUS
        if digest != delta.digest:
            raise DigestMismatch(
                f"delta of {len(rows)} rows and {len(gone)} that go: expected the digest {delta.digest:016x} to result, found "
                f"{digest:016x}; nothing was changed. Load the newest version, and apply the deltas after it"
            )
        self._rows.reserve(len(new))
        return Prepared(
            state=self._state,
            known=_select(rows, known),
            known_numbers=numbers,
            known_change=hashes.index_select(0, known).sub_(before),
            new=_select(rows, new),
            new_hashes=hashes.index_select(0, new),
            gone=gone,
            gone_numbers=gone_numbers,
            gone_hashes=gone_hashes,
            dense=dense,
            rows_sum=rows_sum,
        )

    def apply(self, prepared: Prepared, *, negative_rate: float | None = None) -> None:
        """Writes what was prepared, and the new `negative_rate` if it has changed.

        Raises ModelError if it was prepared for an earlier state of this predictor.
        """
        if prepared.state != self._state:
            raise ModelError(
                f"predictor: expected a delta that was prepared for its present state ({self._state}), found one for state "
                f"{prepared.state}; prepare it again"
            )
        with self._changing, self._reading:
            self._state += 1
            self._rows.write(prepared.known_numbers, prepared.known)
            self._rows.keys.delete(prepared.gone)
            new_numbers = self._rows.load(prepared.new)
            if prepared.dense is not None:
                self._rows.set_averages(prepared.dense.averages)
                self._dense = prepared.dense
            self._rows_sum = prepared.rows_sum
            if negative_rate is not None:
                self.negative_rate = negative_rate
            for scrub in self._scrubs:
                scrub.changed(prepared.known_numbers, prepared.known_change)
                scrub.changed(prepared.gone_numbers, -prepared.gone_hashes)
                scrub.changed(new_numbers, prepared.new_hashes)

    def scrub(self) -> Iterator[bool | None]:
        """Checks whether memory still has the weights that were put there, a step with each item, beside all else.

            for intact in predictor.scrub():
                ...  # a pause
            if not intact:
                ...  # load the weights again

        All items are None but the last one, which says it. A step takes some 2 ms. Weights that deltas change meanwhile are
        right.
        """
        scrub = _Scrub()
        with self._changing:
            self._scrubs.append(scrub)
        intact = None
        try:
            while intact is None:
                with self._changing:
                    intact = self._scrub_step(scrub)
                if intact is None:
                    yield None
        finally:
            self._scrubs.remove(scrub)
        yield intact

    def _scrub_step(self, scrub: _Scrub) -> bool | None:
        last = self._rows.keys.last_row
        if scrub.last < last:
            until = min(scrub.last + _SCRUBBED_AT_ONCE, last)
            hashes = self._rows.check(scrub.last + 1, until)
            if hashes is None:
                return False
            scrub.last, scrub.sum = until, scrub.sum + digest_sum(hashes)
            return None
        others = _by_name(self._rows.averages(), self._dense.base)
        dense = dense_hash({**self._dense.model.serving_state(), **others})
        return (scrub.sum + dense) % _MODULUS == self.digest

    def _read_dense(self, dense: Mapping[str, torch.Tensor]) -> _Dense:
        model = dense_model(self.schema, self._settings, self.device)
        model.restore(dense)
        typical = Typical(self.schema, torch.device("cpu"))
        typical.restore(dense)
        averages = Averages(typical.embedding, typical.first_order)
        base = take_base(dense) if self._settings.row_history else None
        hashed = dense_hash({**{name: dense[name].cpu() for name in model.named}, **_by_name(averages, base)})
        on_device = Averages(*(each.to(self.device) for each in averages))
        return _Dense(model, on_device, None if base is None else base.to(self.device, copy=True), hashed)


def _by_name(averages: Averages, base: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Serving tensors besides parameters and rows, on the CPU, by the names that versions use."""
    named = {"typical.embedding": averages.embedding.cpu(), "typical.first_order": averages.first_order.cpu()}
    return named if base is None else {**named, BASE: base.cpu()}


def _select(rows: Rows, index: torch.Tensor) -> Rows:
    """The rows at these distinct, ascending indices."""
    if len(index) == len(rows):
        return rows
    return rows.map(lambda part: part.index_select(0, index))
