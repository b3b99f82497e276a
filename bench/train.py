"""Examples a second that the trainer learns, from int64 feature hashes in memory to updated weights.

    python bench/train.py               # about two minutes
    python bench/train.py --rounds 3    # a quick look

DeepFM has 39 fields, 1 M ids (Zipf 1.1 in each field), dimension 16 and an MLP of 400-400-400; batches have 512 and 4,096 rows.
All ids are in the tables before the timing starts. These run in turns with Headrace's learner:

- plain torch, `sparse`: one nn.Embedding with sparse gradients, torch.optim.Adagrad for the rows, and Adam for the MLP;
- plain torch, `dense`: the same with dense gradients and Adam for everything, as in tutorials;
- fbgemm's TBE with exact Adagrad, if fbgemm is installed;
- the floor: only the nine matrix products of the MLP's forward and backward passes.

The peers get row numbers; Headrace looks them up within its time. The last line is one JSON object: rates are medians over the
rounds, `of_floor` is Headrace's share of the floor's rate within a round, and `peer` is the fastest peer at batches of 512.

With `--gate`, it measures instead how much time the gate adds to a step: rows saved for the anchor, its scores, and what is
scored before a delta each 250 ms. With `--models`, it measures every model in turns, alone and with cross layers, at batches of
128 and 512 rows; `--ids 100000` lets all their tables fit into memory. With `--history`, it measures how much time row history
adds to a step of DeepFM, alone and with cross layers, at batches of 64, 128, 512 and 4,096.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from typing import Any, get_args

import click
import numpy as np
import torch

from bench.common import interleaved, report
from model.batch import FeatureBatch
from model.learner import Learner
from model.schema import FeatureSchema, FieldSpec
from model.settings import ModelName, ModelSettings
from state.gate import GateState
from state.settings import SnapshotSettings
from stream.trainer.columns import ExampleColumns
from stream.trainer.judge import Anchor, Judge
from stream.trainer.score_shift import ScoreShift

FIELDS = 39
DIM = 16
HIDDEN = (400, 400, 400)
ZIPF = 1.1
CLICK_RATE = 0.25
DELTA_S = 0.25
POOL_ROWS = 200_000
"""Examples that are drawn before the timing; the steps cycle through them."""

Step = Callable[[int, int], None]


class Pool:
    """Examples in memory: row ids (N, F), their hashes as a batch, and labels (N,)."""

    def __init__(self, ids: int, rows: int, click_rate: float) -> None:
        rng = np.random.default_rng(0)
        self.per_field = ids // FIELDS
        odds = np.arange(1, self.per_field + 1) ** -ZIPF
        ranks = np.searchsorted(np.cumsum(odds / odds.sum()), rng.random((rows, FIELDS)))
        shuffled = np.stack([rng.permutation(self.per_field) for _ in range(FIELDS)])  # so that popular ids have any number
        ranks = np.minimum(ranks, self.per_field - 1)
        self.ids = shuffled[np.arange(FIELDS), ranks] + np.arange(FIELDS) * self.per_field
        self.labels = (rng.random(rows) < click_rate).astype(np.float32)
        self.batch = as_batch(self.ids)
        self.id_hashes = rng.integers(-(2**63), 2**63 - 1, rows)
        self.every_id = np.arange(self.per_field * FIELDS).reshape(FIELDS, -1).T  # (per field, F)


def as_batch(ids: np.ndarray) -> FeatureBatch:
    """A batch of ids as well-mixed 64-bit keys, like those of the feature hash."""
    x = ids.astype(np.uint64) + np.uint64(1)
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        x = (x ^ (x >> np.uint64(29))) * np.uint64(factor)
    return FeatureBatch(x.view(np.int64), np.empty(0, np.int64), np.zeros(1, np.int64), lists=0)


PLAIN = {"row_history": False, "cross_layers": 0, "cross_rank": 0}
"""The model alone, as the peers have it."""


def headrace(pool: Pool, *, gate: bool = False, model: dict[str, Any] | None = None) -> Step:
    schema = FeatureSchema(fields=tuple(FieldSpec(name=f"f{i}") for i in range(FIELDS)), embedding_dim=DIM)
    settings = ModelSettings.model_validate({"hidden": HIDDEN, **PLAIN, **(model or {})})
    learner = Learner(schema, settings, device="cpu")
    learner.learn(as_batch(pool.every_id), np.zeros(len(pool.every_id), np.float32))
    judge, shift = Judge(SnapshotSettings(), GateState()), ScoreShift(learner)
    delta_due_s = 0.0
    if gate:
        judge.compare_with(Anchor(1, learner.keep()))

    def step(start: int, stop: int) -> None:
        nonlocal delta_due_s
        batch, labels = pool.batch.slice(start, stop), pool.labels[start:stop]
        scores = learner.learn(batch, labels)
        if gate:
            rows = np.arange(start, stop)
            none = np.full(len(rows), np.nan, np.float32)
            seen = ExampleColumns(
                batch=batch,
                labels=labels,
                weights=None,
                impression_ms=rows,
                reached_ms=rows,
                served=none,
                versions=rows,
                deltas=rows,
                id_hashes=pool.id_hashes[rows],
                records=(),
            )
            judge.observe(seen, scores)
            shift.observe(seen, scores)
            if time.monotonic() >= delta_due_s:
                delta_due_s = time.monotonic() + DELTA_S
                shift.measure()
                shift.served()

    return step


class PlainDeepFM(torch.nn.Module):
    """DeepFM in plain torch.nn."""

    def __init__(self, ids: int, *, sparse: bool, embeddings: bool = True) -> None:
        super().__init__()
        if embeddings:
            self.embedding = torch.nn.Embedding(ids, DIM, sparse=sparse)
            self.first_order = torch.nn.Embedding(ids, 1, sparse=sparse)
            torch.nn.init.normal_(self.embedding.weight, std=0.01)
            torch.nn.init.zeros_(self.first_order.weight)
        widths = [FIELDS * DIM, *HIDDEN]
        layers: list[torch.nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
        self.mlp = torch.nn.Sequential(*layers, torch.nn.Linear(widths[-1], 1))
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def dense_parameters(self) -> list[torch.nn.Parameter]:
        return [*self.mlp.parameters(), self.bias]

    def loss(self, embedded: torch.Tensor, first_order: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean log loss from embeddings (B, F, D), first-order terms (B, F) and labels (B,)."""
        pairs = 0.5 * (embedded.sum(1).square() - embedded.square().sum(1)).sum(1)
        logits = self.mlp(embedded.flatten(1)).squeeze(1) + pairs + first_order.sum(1) + self.bias
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)


def plain_torch(pool: Pool, *, sparse: bool) -> Step:
    model = PlainDeepFM(len(pool.every_id) * FIELDS, sparse=sparse)
    tables = [model.embedding.weight, model.first_order.weight]
    dense = torch.optim.Adam(model.dense_parameters() + ([] if sparse else tables), lr=5e-4, fused=True)
    optimizers: list[torch.optim.Optimizer] = [dense]
    if sparse:
        optimizers.append(torch.optim.Adagrad(tables, lr=0.01, initial_accumulator_value=0.01))
    ids, labels = torch.from_numpy(pool.ids), torch.from_numpy(pool.labels)

    torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]  # the default; setting it avoids a warning

    def step(start: int, stop: int) -> None:
        rows = ids[start:stop]
        loss = model.loss(model.embedding(rows), model.first_order(rows).squeeze(2), labels[start:stop])
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()

    return step


def fbgemm(pool: Pool) -> Step | None:
    """fbgemm's table-batched embeddings, with one table for all fields; None if fbgemm isn't installed."""
    try:
        configs = import_module("fbgemm_gpu.split_embedding_configs")
        common = import_module("fbgemm_gpu.split_table_batched_embeddings_ops_common")
        training = import_module("fbgemm_gpu.split_table_batched_embeddings_ops_training")
    except (ImportError, OSError):  # OSError: built for another torch
        return None
    rows = len(pool.every_id) * FIELDS

    def table(dim: int) -> Any:
        return training.SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, dim, common.EmbeddingLocation.HOST, training.ComputeDevice.CPU)],
            optimizer=configs.EmbOptimType.EXACT_ADAGRAD,
            learning_rate=0.01,
            pooling_mode=common.PoolingMode.SUM,
        )

    embedding, first_order = table(DIM), table(4)  # 4 is its narrowest row; one of the four is used
    model = PlainDeepFM(rows, sparse=True, embeddings=False)
    optimizer = torch.optim.Adam(model.dense_parameters(), lr=5e-4, fused=True)
    ids, labels = torch.from_numpy(pool.ids), torch.from_numpy(pool.labels)

    def step(start: int, stop: int) -> None:
        indices = ids[start:stop].flatten()
        offsets = torch.arange(len(indices) + 1)  # bags of one
        embedded = embedding(indices, offsets).view(stop - start, FIELDS, DIM)
        linear = first_order(indices, offsets)[:, 0].view(stop - start, FIELDS)
        loss = model.loss(embedded, linear, labels[start:stop])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def floor(rows: int) -> Step:
    """The nine matrix products of the MLP for a batch of `rows` rows, with random numbers."""
    widths = [FIELDS * DIM, *HIDDEN]
    layers = [
        (torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs))
        for inputs, outputs in pairwise(widths)
    ]

    def products(start: int, stop: int) -> None:
        for inputs, weight, outputs in layers:
            torch.mm(inputs, weight.t())  # forward
            torch.mm(outputs, weight)  # gradient of the inputs
            torch.mm(outputs.t(), inputs)  # gradient of the weights

    return products


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--rounds", default=9, show_default=True, help="Interleaved rounds.")
@click.option("--ids", default=1_000_000, show_default=True, help="Ids in all fields together.")
@click.option("--seconds", default=0.7, show_default=True, help="Approximate time of each stretch.")
@click.option("--gate", is_flag=True, help="Only the cost of the gate's comparison with an anchor.")
@click.option("--models", is_flag=True, help="Only the rates of all models.")
@click.option("--history", is_flag=True, help="Only the cost of row history.")
@click.option("--click-rate", default=CLICK_RATE, show_default=True, help="Click rate of the examples.")
def main(rounds: int, ids: int, seconds: float, gate: bool, models: bool, history: bool, click_rate: float) -> None:
    pool = Pool(ids, POOL_ROWS, click_rate)
    if history:
        measure_history(pool, rounds, seconds)
        return
    if models:
        measure_models(pool, rounds, seconds)
        return
    if gate:
        measure_gate(pool, rounds, seconds, click_rate)
        return
    trainers: dict[str, Step | None] = {
        "headrace": headrace(pool),
        "torch_sparse": plain_torch(pool, sparse=True),
        "torch_dense": plain_torch(pool, sparse=False),
        "fbgemm": fbgemm(pool),
    }
    rates: dict[str, float] = {}
    shares: dict[str, float] = {}
    for rows in (512, 4096):
        work = {f"{name}_{rows}": stretch(step, rows, seconds) for name, step in trainers.items() if step is not None}
        work[f"floor_{rows}"] = stretch(floor(rows), rows, seconds)
        measured = interleaved(work, rounds)
        rates |= {name: statistics.median(values) for name, values in measured.items()}
        pairs = zip(measured[f"headrace_{rows}"], measured[f"floor_{rows}"], strict=True)
        shares[f"batch_{rows}"] = round(statistics.median(ours / least for ours, least in pairs), 3)
    peers = {name: rates[f"{name}_512"] for name in ("torch_sparse", "torch_dense", "fbgemm") if f"{name}_512" in rates}
    fastest = max(peers, key=lambda name: peers[name])
    report(
        benchmark="train",
        value=round(rates["headrace_512"]),
        peer=round(peers[fastest]),
        ratio=round(rates["headrace_512"] / peers[fastest], 2),
        unit="examples/s",
        peer_name=fastest,
        batch_512=round(rates["headrace_512"]),
        batch_4096=round(rates["headrace_4096"]),
        floor_512=round(rates["floor_512"]),
        floor_4096=round(rates["floor_4096"]),
        of_floor=shares,
        **{f"{name}_{rows}": round(rates[f"{name}_{rows}"]) for name in peers for rows in (512, 4096)},
        **({} if "fbgemm" in peers else {"fbgemm": "not installed"}),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        ids=len(pool.every_id) * FIELDS,
        rounds=rounds,
    )


def measure_models(pool: Pool, rounds: int, seconds: float) -> None:
    """Rates of every model, alone and with cross layers, at the default batch size and at a larger one."""
    variants: dict[str, dict[str, Any]] = {}
    for name in get_args(ModelName):
        variants |= {name: {"name": name}, f"{name}_cross": {"name": name, "cross_layers": 2}}
    variants["deepfm_cross_rank_64"] = {"name": "deepfm", "cross_layers": 2, "cross_rank": 64}
    variants["default"] = {name: ModelSettings.model_fields[name].default for name in PLAIN}
    variants["deepfm_ftrl"] = {"name": "deepfm", "first_order": "ftrl"}
    rates: dict[str, dict[str, int]] = {name: {} for name in variants}
    steps = {name: headrace(pool, model=model) for name, model in variants.items()}
    for rows in (128, 512):
        work = {name: stretch(step, rows, seconds) for name, step in steps.items()}
        for name, values in interleaved(work, rounds).items():
            rates[name][f"batch_{rows}"] = round(statistics.median(values))
    report(benchmark="train_models", value=rates["deepfm"]["batch_512"], unit="examples/s", rounds=rounds, **rates)


def measure_history(pool: Pool, rounds: int, seconds: float) -> None:
    """How much longer a step takes with row history, and the rates."""
    shares: dict[str, float] = {}
    rates: dict[str, int] = {}
    for name, cross in {"deepfm": 0, "deepfm_cross": 2}.items():
        steps = {
            label: headrace(pool, model={"name": "deepfm", "cross_layers": cross, "row_history": counts})
            for label, counts in {name: False, f"{name}_history": True}.items()
        }
        for rows in (64, 128, 512, 4096):
            measured = interleaved({label: stretch(step, rows, seconds) for label, step in steps.items()}, rounds)
            rates |= {f"{label}_{rows}": round(statistics.median(values)) for label, values in measured.items()}
            shares[f"{name}_{rows}"] = added(measured[name], measured[f"{name}_history"])
    report(benchmark="train_history", value=shares["deepfm_512"], unit="share of a step", rounds=rounds, shares=shares, **rates)


def added(alone: list[float], together: list[float]) -> float:
    """How much longer the second takes than the first, by their rates in each round; 0.1 is a tenth.

    Shares are taken within rounds: the machine's speed differs more between rounds than what is measured.
    """
    return round(statistics.median(one / both - 1 for one, both in zip(alone, together, strict=True)), 4)


def measure_gate(pool: Pool, rounds: int, seconds: float, click_rate: float) -> None:
    """How much longer a step takes with the gate, at the default batch size and at a larger one."""
    shares: dict[str, float] = {}
    for rows in (128, 512):
        steps = {name: headrace(pool, gate=name == "gate") for name in ("alone", "gate")}
        rates = interleaved({name: stretch(step, rows, seconds) for name, step in steps.items()}, rounds)
        shares[f"batch_{rows}"] = added(rates["alone"], rates["gate"])
    report(
        benchmark="train_gate",
        value=max(shares.values()),
        unit="share of a step",
        click_rate=click_rate,
        rounds=rounds,
        **shares,
    )


def stretch(step: Step, rows: int, seconds: float) -> Callable[[], int]:
    """A function that runs steps for about `seconds` on the next examples of the pool, and returns the number of examples."""
    start = 0

    def run(steps: int) -> int:
        nonlocal start
        for _ in range(steps):
            if start + rows > POOL_ROWS:
                start = 0
            step(start, start + rows)
            start += rows
        return steps * rows

    run(2)
    began = time.perf_counter()
    run(3)
    steps = max(1, round(3 * seconds / (time.perf_counter() - began)))
    return lambda: run(steps)


if __name__ == "__main__":
    main()
