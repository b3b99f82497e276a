from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import slots
from model import table as table_module
from model.distinct import group
from model.embedding import EmbeddingTable, initial_rows
from model.errors import ModelError
from model.frozen import ModelRows
from model.hashing import EMPTY_KEY
from model.row_optimizers import Adagrad
from model.rows import Rows
from model.table import ABSENT_ROW, KeyTable

CPU = torch.device("cpu")
ADAGRAD = Adagrad(rate=0.1, start=0.5)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=(gpu, pytest.mark.gpu))])

# Few distinct keys, some that share a home slot (multiples of 2**40) and the largest ones.
keys = st.integers(0, 30) | st.integers(0, 20).map(lambda n: n << 40) | st.sampled_from([-(2**63), 2**63 - 1, -2])


def tensor(values: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


class Model:
    """What a table should do, by a dictionary."""

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.freed: list[int] = []  # the next one is at the end
        self.last_row = 0

    def insert(self, batch: list[int]) -> list[int]:
        for key in sorted(set(batch)):
            if key not in self.rows:
                self.rows[key] = self.freed.pop() if self.freed else self.last_row + 1
                self.last_row = max(self.last_row, self.rows[key])
        return [self.rows[key] for key in batch]

    def delete(self, batch: list[int]) -> list[int]:
        gone = sorted(self.rows.pop(key) for key in set(batch) & self.rows.keys())
        self.freed += reversed(gone)
        return gone


steps = st.lists(
    st.tuples(st.sampled_from(["insert", "insert", "delete", "load", "reserve"]), st.lists(keys, max_size=30)), max_size=12
)


@pytest.mark.parametrize("bits", [32, 64])
@settings(deadline=None)
@given(steps, st.lists(keys, max_size=30))
def test_against_a_dictionary(bits: int, steps: list[tuple[str, list[int]]], asked: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # As small as it goes, so that buckets fill up, growth goes on over several steps, and lookups take both ways.
        patch.setattr(slots, "_LEAST_SIZE", 16)
        patch.setattr(slots, "_SMALL_LOOKUP", 8)
        patch.setattr(table_module, "_MOVED_AT_LEAST", 1)
        patch.setattr(table_module, "_MOVED_FOR_A_KEY", 1)
        if bits == 64:
            patch.setattr(slots, "_LARGEST_OF_32_BITS", 0)
        table, model = KeyTable(CPU), Model()
        for step, batch in steps:
            if step == "insert":
                assert table.insert(tensor(batch)).rows.tolist() == model.insert(batch)
            elif step == "delete":
                assert table.delete(tensor(batch)).tolist() == model.delete(batch)
            elif step == "load":
                new = sorted(set(batch) - model.rows.keys())
                assert table.load(tensor(new)).tolist() == model.insert(new)
            else:
                table.reserve(len(batch))
            assert len(table) == len(model.rows)
            assert table.last_row == model.last_row
            known = list(model.rows)
            assert table.lookup(tensor(known)).tolist() == list(model.rows.values())
            assert table.lookup(tensor(asked)).tolist() == [model.rows.get(key, ABSENT_ROW) for key in asked]
            items = table.items()
            assert dict(zip(items.keys.tolist(), items.rows.tolist(), strict=True)) == model.rows
            assert items.rows.tolist() == sorted(model.rows.values())
            assert table.keys_of(tensor(list(model.rows.values()))).tolist() == known


@devices
def test_large_tables_with_deletions_and_growth(device: str) -> None:
    """By the numbers alone, since a dictionary would take minutes."""
    rng = np.random.default_rng(1)
    table = KeyTable(torch.device(device))
    everything = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, 150_000)).to(device)
    rows = torch.zeros(150_000, dtype=torch.int64, device=device)  # of each key, 0 for those that aren't in it
    for _ in range(40):
        some = torch.from_numpy(rng.choice(150_000, rng.integers(1, 20_000), replace=False)).to(device)
        if rng.random() < 0.6:
            known = rows[some] != 0
            found = table.insert(everything[some]).rows
            assert torch.equal(found[known], rows[some][known])
            rows[some] = found
        else:
            freed = table.delete(everything[some])
            assert torch.equal(freed, rows[some][rows[some] != 0].sort().values)
            rows[some] = 0
        assert torch.equal(table.lookup(everything), rows)
        used = rows[rows != 0]
        assert len(table) == len(used) == len(used.unique())
        assert int(used.max()) <= table.last_row <= 150_000
        items = table.items()
        assert torch.equal(items.rows, used.sort().values)
        assert torch.equal(table.lookup(items.keys), items.rows)


@pytest.mark.parametrize("rows_at_once", [1, 1000])
def test_growth_beside_lookups(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "_MOVED_AT_LEAST", rows_at_once)
    rng = np.random.default_rng(2)
    table, lock, done = KeyTable(CPU), threading.Lock(), threading.Event()
    everything = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, 30_000))
    first = table.insert(everything[:500]).rows.clone()
    wrong = []

    def look() -> None:
        while not done.is_set():
            with lock:
                found = table.lookup(everything[:500])
            if not torch.equal(found, first):
                wrong.append(found)

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for part in everything[500:].split(100):
            table.reserve(len(part))  # without the lock
            with lock:
                table.load(part)
    finally:
        done.set()
        reader.join()
    assert not wrong
    assert torch.equal(table.lookup(everything).unique(), torch.arange(1, 30_001))


def test_growth_is_done_before_the_slots_are_full() -> None:
    table = KeyTable(CPU, expected=60_000)
    rng = np.random.default_rng(3)
    sizes = {table._slots.size}
    for _ in range(1000):
        new = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, 300))
        table.reserve(300)
        assert not table._too_full(300), "a growth step that is due at once stops the thread for as long as it takes"
        table.load(new)
        sizes.add(table._slots.size)
    assert len(sizes) >= 4


def test_memory_a_key() -> None:
    table = KeyTable(CPU, expected=200_000)
    before = table._slots.size
    table.load(torch.arange(200_000))
    assert table._slots.size == before
    assert (table._slots._words.nbytes + 8 * 200_000) / 200_000 < 14.7


@devices
def test_large_batches_and_growth(device: str) -> None:
    rng = np.random.default_rng(0)
    table = KeyTable(torch.device(device))
    everything = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, 200_000)).to(device)
    rows = torch.cat([table.insert(part).rows for part in everything.split(30_000)])
    assert len(table) == 200_000
    assert torch.equal(table.lookup(everything), rows)
    assert torch.equal(rows.sort().values, torch.arange(1, 200_001, device=device))
    for part in (everything[:7], everything[:2048]):  # small lookups run other code
        assert torch.equal(table.lookup(part), rows[: len(part)])
    assert not table.lookup(everything + 1).any()


def test_keys_that_share_a_home_slot() -> None:
    # Multiples of the multiplier's inverse have the home slots 0, 0, 0, …: the longest possible run of probes.
    inverse = pow(-7046029254386353131 % 2**64, -1, 2**64)
    crowd = tensor([(n * inverse + 2**63) % 2**64 - 2**63 for n in range(500)])
    table = KeyTable(CPU)
    rows = table.insert(crowd).rows
    assert torch.equal(table.lookup(crowd), rows)
    assert len(set(rows.tolist())) == 500


def test_a_loaded_table_keeps_the_order() -> None:
    table = KeyTable(CPU)
    table.load(tensor([9, -5, 3]))
    assert table.lookup(tensor([3, 9, 4, -5])).tolist() == [3, 1, ABSENT_ROW, 2]
    assert table.insert(tensor([4, 3])).rows.tolist() == [4, 3]
    assert table.load(tensor([8, 7])).tolist() == [5, 6]


def test_freed_rows_are_used_again_the_last_deletion_first() -> None:
    table = KeyTable(CPU)
    table.load(tensor([10, 20, 30, 40, 50]))
    assert table.delete(tensor([40, 99, 20, 40])).tolist() == [2, 4]
    assert table.delete(tensor([50])).tolist() == [5]
    assert table.keys_of(slice(1, 6)).tolist() == [10, EMPTY_KEY, 30, EMPTY_KEY, EMPTY_KEY]
    assert table.insert(tensor([3, 2, 1, 4])).rows.tolist() == [4, 2, 5, 6]
    assert table.lookup(tensor([20, 40, 50])).tolist() == [ABSENT_ROW] * 3


def test_a_table_whose_memory_changed_says_so() -> None:
    table = KeyTable(CPU)
    table.load(tensor([10, 20, 30]))
    row = table.lookup(tensor([20]))
    table._slots._words.zero_()
    with pytest.raises(ModelError, match="key table: expected each key where its hash leads"):
        table._slots.remove(tensor([20]), row)


def test_the_empty_key_has_no_row() -> None:
    table = KeyTable(CPU)
    table.insert(tensor([1, 2]))
    assert table.lookup(tensor([EMPTY_KEY])).tolist() == [ABSENT_ROW]


# First weights


@devices
def test_first_weights_never_change(device: str) -> None:
    rows = initial_rows(tensor([1, -7, 2**62], device), 3, std=0.01, seed=0)
    assert rows.dtype == torch.float32
    assert torch.equal(
        rows.cpu(),
        torch.tensor(
            [
                [-0.0023746455553919077, 0.0006657464546151459, 0.01711277663707733],
                [0.008866664953529835, 0.007445048540830612, 0.00420379638671875],
                [-0.0029489474836736917, -0.022704359143972397, -0.012614032253623009],
            ]
        ),
    )


def test_first_weights_are_near_normal() -> None:
    rows = initial_rows(torch.arange(100_000), 8, std=0.01, seed=3)
    assert rows.mean().item() == pytest.approx(0, abs=5e-5)
    assert rows.std().item() == pytest.approx(0.01, rel=0.01)
    assert rows.abs().max() < 0.04
    correlation = torch.corrcoef(torch.cat((rows[:-1], rows[1:]), dim=1).t()) - torch.eye(16)
    assert correlation.abs().max() < 0.02
    assert not torch.equal(rows, initial_rows(torch.arange(100_000), 8, std=0.01, seed=4))


def make_table(room: int = 2, rows: ModelRows | None = None) -> EmbeddingTable:
    held = rows or ModelRows(EmbeddingTable.columns(4, ADAGRAD), room, CPU)
    return EmbeddingTable(4, held, init_std=0.01, embedding=ADAGRAD, first_order=ADAGRAD, seed=0, expected=room)


def serving(table: EmbeddingTable) -> Rows:
    return table.serving(torch.arange(1, len(table) + 1))


def insert(table: EmbeddingTable, keys: list[int]) -> torch.Tensor:
    """Insert keys of one kind, whose initial row is zero but for the random numbers."""
    groups, kinds = group(tensor(keys)), torch.zeros(len(keys), dtype=torch.int64)
    return table.insert(groups, lambda: kinds, torch.zeros(1, 4), torch.zeros(1)).rows[groups.inverse]


def test_order_of_arrival_and_growth_dont_matter() -> None:
    one, other = make_table(), make_table(64)
    for key in range(40):
        insert(one, [key])
    insert(other, list(range(39, -1, -1)))
    first, second = serving(one), serving(other)
    order = first.keys.argsort(), second.keys.argsort()
    assert torch.equal(first.embedding[order[0]], second.embedding[order[1]])
    assert len(one) == len(other) == 40


def test_a_step_is_adagrads_and_touches_its_rows_only() -> None:
    held = ModelRows(EmbeddingTable.columns(4, ADAGRAD), 64, CPU)
    table = make_table(64, held)
    rows = insert(table, [5, 6, 7])
    before = serving(table)
    gathered = table.gather(group(rows[[2, 0, 2]]))
    order = gathered.inverse[:2]  # indices of the rows of keys 7 and 5 among the distinct rows
    gradient, first = torch.zeros(2, 4), torch.zeros(2)
    gradient[order], first[order] = torch.tensor([[1.0, -2, 0, 3], [0.5, 0, 0, 0]]), torch.tensor([2.0, -1])
    table.step(gathered, gradient, first)
    after = serving(table)
    gradient, first = gradient[order], first[order]
    expected = before.embedding[[2, 0]] - 0.1 * gradient / (0.5 + gradient**2).sqrt()
    torch.testing.assert_close(after.embedding[[2, 0]], expected)
    torch.testing.assert_close(after.first_order[[2, 0]], -0.1 * first / (0.5 + first**2).sqrt())
    assert torch.equal(after.embedding[1], before.embedding[1])
    assert held.part("adagrad.first_order")[1:4].tolist() == [1.5, 0.5, 4.5]


def test_the_absent_row_reads_zero() -> None:
    table = make_table()
    insert(table, [5])
    gathered = table.gather(group(table.keys.lookup(tensor([8, 5, 9]))))
    assert not gathered.embedding[gathered.inverse[[0, 2]]].any()
    assert gathered.embedding[gathered.inverse[1]].any()


def test_rows_begin_at_the_row_of_their_kind_and_a_key_of_two_kinds_at_that_of_the_lower() -> None:
    table, plain = make_table(), make_table()
    insert(plain, [5, 6, 7])
    embedding, first_order = torch.tensor([[1.0] * 4, [2.0] * 4]), torch.tensor([0.1, 0.2])
    table.insert(group(tensor([5, 6, 7, 6])), lambda: tensor([0, 1, 1, 0]), embedding, first_order)
    found = serving(table)
    assert found.keys.tolist() == [5, 6, 7]
    torch.testing.assert_close(found.embedding - serving(plain).embedding, embedding[[0, 0, 1]])
    assert found.first_order.tolist() == pytest.approx([0.1, 0.1, 0.2])
    table.insert(group(tensor([5])), lambda: tensor([1]), embedding, first_order)  # a known key keeps its row
    assert torch.equal(serving(table).embedding, found.embedding)
