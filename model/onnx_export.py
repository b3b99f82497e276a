"""Serving weights as an ONNX model: feature keys in, click probabilities out, for servers that aren't Headrace's scorers.

Inputs of B rows, for a schema with S single-valued fields and L lists, each in the order of the schema:

| input | shape | there | what |
| --- | --- | --- | --- |
| `keys` | int64 (B, S) | if S > 0 | the key of each single-valued field (`model.hashing`); -1 for a missing value |
| `scales` | float32 (B, S) | if a field has `buckets = "scaled"` | sign(x) × log(1 + |x|) of such a field, 1 for all others |
| `list_keys` | int64 (B, L, M) | if L > 0 | the keys of each list's elements, filled up with -1; all -1 for a missing list |

The output `scores`, float32 (B,), has the click probabilities that a scorer answers, up to rounding. The model's metadata names
the fields with their kinds, hash spaces and buckets.

A key is looked up by binary search in the sorted keys, in plain ONNX operators (operator set 17): log2(rows) steps on all keys
of a batch at once. Runtimes' own hash tables aren't portable, and hold a table of their own beside the weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from model.batch import Float32Array, Int64Array
from model.errors import ModelError
from model.hashing import EMPTY_KEY, missing_key
from model.network import dense_model
from model.rows import Rows
from model.schema import FeatureSchema
from model.settings import ModelSettings
from model.typical import Typical

if TYPE_CHECKING:
    import onnx

__all__ = ["Exported", "export_onnx"]

OPSET, IR = 17, 8  # of 2022: ONNX Runtime 1.12 and later read them
# Bytes. Larger tables lie in a file of their own beside the model: a file of ONNX can't exceed 2 GiB, and memory holds it about
# three times while it is written.
LARGEST_INSIDE = 256_000_000
SPLIT = 8  # bytes: tables in their own file begin at multiples of it


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: the files, the model's inputs with their shapes, and the number of rows."""

    files: tuple[Path, ...]
    inputs: dict[str, str]
    rows: int


def export_onnx(
    path: Path,
    schema: FeatureSchema,
    settings: ModelSettings,
    dense: Mapping[str, torch.Tensor],
    rows: Callable[[], Iterable[Rows]],
    *,
    negative_rate: float,
    about: Mapping[str, str],
) -> Exported:
    """Write a version's weights as an ONNX model.

    Args:
        path: the model's file. Large tables go to a file beside it, with `.data` at the end of its name.
        dense: serving tensors that are no rows.
        rows: the rows, piece by piece; called twice, so that memory holds the keys and one piece.
        negative_rate: share of negatives that the weights were learned from.
        about: what the model's metadata says besides, such as the version's number.

    Raises:
        ModelError: the package `onnx` isn't there.
        SnapshotMismatch: the weights are of another model or schema.
    """
    try:
        import onnx
    except ImportError as error:
        raise ModelError(
            "export: expected the Python package onnx, found none. Install it beside Headrace: `uv pip install onnx` (in a "
            "checkout, `make setup` does)."
        ) from error
    network = dense_model(schema, settings, torch.device("cpu"))
    network.restore(dict(dense))
    average = Typical(schema, torch.device("cpu"))
    average.restore(dict(dense))
    tables = _Tables(rows, average, path.with_name(path.name + ".data"))
    graph = _Graph(tables)
    embedded, linear = graph.embed(schema)
    logits = graph.deepfm(embedded, linear, network.named, len(schema.fields), schema.embedding_dim)
    if negative_rate != 1:
        logits = graph.node("Add", logits, graph.constant(np.float32(math.log(negative_rate))))
    graph.node("Sigmoid", logits, output="scores")
    helper = onnx.helper
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "headrace",
            [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in graph.inputs],
            [helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["batch"])],
            [*graph.constants, *tables.tensors],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR,
        producer_name="headrace",
    )
    singles, lists = _fields(schema)
    metadata = {
        **about,
        "negative_rate": f"{negative_rate:g}",
        "fields": json.dumps([field.model_dump(mode="json") for field in (*singles, *lists)]),
        "inputs": json.dumps(graph.described),
        "keys": "hashes of values in their hash spaces, as Headrace's model/hashing.py defines them; -1 for a missing value",
    }
    helper.set_model_props(model, metadata)
    path.write_bytes(model.SerializeToString())
    return Exported((path, *tables.files), graph.described, tables.count)


def _fields(schema: FeatureSchema) -> tuple[list[Any], list[Any]]:
    """The single-valued fields and the lists: the order of keys, of embeddings and of average rows."""
    return list(schema.singles), list(schema.lists)


class _Tables:
    """The sorted keys (R,), and embeddings (R + F, D) and first-order weights (R + F,) in their order, F average rows last."""

    def __init__(self, rows: Callable[[], Iterable[Rows]], average: Typical, beside: Path) -> None:
        keys = [piece.keys.numpy().copy() for piece in rows()]
        joined = np.concatenate(keys) if keys else np.zeros(0, np.int64)
        order = np.argsort(joined, kind="stable")
        self.keys: Int64Array = joined[order]
        self.count = len(order)
        fields, dim = average.embedding.shape
        row_of = np.empty(self.count, np.int64)
        row_of[order] = np.arange(self.count)
        del order, joined, keys
        total = self.count + fields
        self.files: tuple[Path, ...] = ()
        self.tensors: list[onnx.TensorProto] = []
        starts = np.cumsum([0, _padded(8 * self.count), _padded(4 * total * dim), _padded(4 * total)])
        inside = int(starts[-1]) <= LARGEST_INSIDE
        if inside:
            room: npt.NDArray[np.uint8] = np.zeros(int(starts[-1]), np.uint8)
        else:
            room = np.memmap(beside, np.uint8, mode="w+", shape=(int(starts[-1]),))
            self.files = (beside,)
        stored = room[: 8 * self.count].view(np.int64)
        embedding: Float32Array = room[starts[1] : starts[1] + 4 * total * dim].view(np.float32).reshape(total, dim)
        first_order: Float32Array = room[starts[2] : starts[2] + 4 * total].view(np.float32)
        stored[:] = self.keys
        at = 0
        for piece in rows():
            to = row_of[at : at + len(piece)]
            embedding[to], first_order[to] = piece.embedding.numpy(), piece.first_order.numpy()
            at += len(piece)
        embedding[self.count :], first_order[self.count :] = average.embedding.numpy(), average.first_order.numpy()
        arrays: dict[str, npt.NDArray[Any]] = {"keys_sorted": stored, "embedding": embedding, "first_order": first_order}
        for (name, array), start in zip(arrays.items(), starts, strict=False):
            self.tensors.append(_inside(name, array) if inside else _outside(name, array, beside.name, int(start)))
        if isinstance(room, np.memmap):
            room.flush()

    def row(self, key: int, unknown: int) -> int:
        """The row of a key; `unknown` if there is none."""
        at = int(np.searchsorted(self.keys, key))
        return at if at < self.count and int(self.keys[at]) == key else unknown


class _Graph:
    """Nodes of the model, each named after its output."""

    def __init__(self, tables: _Tables) -> None:
        self.tables = tables
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[tuple[str, int, list[str | int]]] = []
        self.described: dict[str, str] = {}

    def node(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        output = output or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def constant(self, value: Any) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(_inside(name, np.asarray(value)))
        return name

    def input(self, name: str, kind: str, shape: list[str | int]) -> str:
        import onnx

        self.inputs.append((name, onnx.TensorProto.INT64 if kind == "int64" else onnx.TensorProto.FLOAT, shape))
        self.described[name] = f"{kind} ({', '.join(map(str, shape))})"
        return name

    def embed(self, schema: FeatureSchema) -> tuple[str, str]:
        """Embeddings (B, F, D) of the fields, and the sum of the first-order terms (B, 1)."""
        singles, lists = _fields(schema)
        last = self.constant(np.array([-1], np.int64))
        embedded, linear = [], []
        if singles:
            keys = self.input("keys", "int64", ["batch", len(singles)])
            missing = np.array([[missing_key(field.hash_space) for field in singles]], np.int64)
            gone = self.node("Equal", keys, self.constant(np.int64(EMPTY_KEY)))
            keys = self.node("Where", gone, self.constant(missing), keys)
            rows = self._rows_of(keys, np.arange(len(singles))[None])  # (B, S)
            vectors, terms = self.node("Gather", "embedding", rows), self.node("Gather", "first_order", rows)
            if any(field.is_scaled for field in singles):
                scales = self.input("scales", "float32", ["batch", len(singles)])
                vectors = self.node("Mul", vectors, self.node("Unsqueeze", scales, last))
                terms = self.node("Mul", terms, scales)
            embedded.append(vectors)
            linear.append(self.node("ReduceSum", terms, last, keepdims=1))  # (B, 1)
        if lists:
            vectors, terms = self._pooled(lists, len(singles))
            embedded.append(vectors)
            linear.append(self.node("ReduceSum", terms, last, keepdims=1))
        if len(embedded) == 1:
            return embedded[0], linear[0]
        return self.node("Concat", *embedded, axis=1), self.node("Add", *linear)

    def deepfm(self, embedded: str, linear: str, named: Mapping[str, torch.Tensor], fields: int, dim: int) -> str:
        """Logits (B,): bias, first order, FM and MLP over embeddings (B, F, D), as `model.deepfm` computes them."""
        flat = self.node("Reshape", embedded, self.constant(np.array([-1, fields * dim], np.int64)))
        hidden = flat
        layers = sum(name.endswith(".weight") for name in named)
        for layer in range(layers):
            weight = self.constant(named[f"mlp.{layer}.weight"].numpy())
            bias = self.constant(named[f"mlp.{layer}.bias"].numpy())
            hidden = self.node("Gemm", hidden, weight, bias, transB=1)
            if layer < layers - 1:
                hidden = self.node("Relu", hidden)
        one = self.constant(np.array([1], np.int64))
        total = self.node("ReduceSum", embedded, one, keepdims=0)  # (B, D)
        squares = [self.node("ReduceSum", self.node("Mul", each, each), one, keepdims=1) for each in (total, flat)]
        pairs = self.node("Mul", self.node("Sub", *squares), self.constant(np.float32(0.5)))
        logits = self.node("Add", self.node("Add", hidden, pairs), linear)
        return self.node("Squeeze", self.node("Add", logits, self.constant(named["bias"].numpy())), one)

    def _pooled(self, lists: list[Any], before: int) -> tuple[str, str]:
        """Mean embeddings (B, L, D) and first-order weights (B, L) of the lists. An empty list reads its missing row."""
        keys = self.input("list_keys", "int64", ["batch", len(lists), "elements"])
        unknown = before + np.arange(len(lists))
        last = self.constant(np.array([-1], np.int64))
        two = self.constant(np.array([2], np.int64))
        padding = self.node("Equal", keys, self.constant(np.int64(EMPTY_KEY)))
        there = self.node("Cast", self.node("Not", padding), to=1)  # float32 (B, L, M)
        count = self.node("ReduceSum", there, two, keepdims=1)  # (B, L, 1)
        empty = self.node("Equal", count, self.constant(np.float32(0)))
        divisor = self.node("Max", count, self.constant(np.float32(1)))
        rows = self._rows_of(keys, unknown[None, :, None])
        vectors = self.node("Mul", self.node("Gather", "embedding", rows), self.node("Unsqueeze", there, last))
        vectors = self.node("Div", self.node("ReduceSum", vectors, two, keepdims=0), divisor)
        terms = self.node("Mul", self.node("Gather", "first_order", rows), there)
        terms = self.node("Div", self.node("ReduceSum", terms, two, keepdims=1), divisor)  # (B, L, 1)
        missing = [
            self.tables.row(missing_key(field.hash_space), self.tables.count + int(at))
            for field, at in zip(lists, unknown, strict=True)
        ]
        missing_rows = self.constant(np.array(missing, np.int64))
        vectors = self.node("Where", empty, self.node("Gather", "embedding", missing_rows), vectors)
        missing_terms = self.node("Unsqueeze", self.node("Gather", "first_order", missing_rows), last)  # (L, 1)
        terms = self.node("Where", empty, missing_terms, terms)
        return vectors, self.node("Squeeze", terms, two)

    def _rows_of(self, keys: str, fields: npt.NDArray[np.int64]) -> str:
        """The rows of keys. Keys that the table lacks read the average row of their field; `fields` broadcasts to the keys."""
        count = self.tables.count
        unknown = self.constant(count + fields)
        if not count:
            return self.node("Add", self.node("Mul", keys, self.constant(np.int64(0))), unknown)
        # The last position whose key isn't larger: each step keeps it if the key so many positions further isn't, either.
        position = self.node("Mul", keys, self.constant(np.int64(0)))
        end, edge = self.constant(np.int64(count)), self.constant(np.int64(count - 1))
        for step in (1 << power for power in reversed(range((count - 1).bit_length()))):
            further = self.node("Add", position, self.constant(np.int64(step)))
            key = self.node("Gather", "keys_sorted", self.node("Min", further, edge))
            ahead = self.node("And", self.node("Less", further, end), self.node("LessOrEqual", key, keys))
            position = self.node("Where", ahead, further, position)
        known = self.node("Equal", self.node("Gather", "keys_sorted", position), keys)
        return self.node("Where", known, position, unknown)


def _inside(name: str, array: npt.NDArray[Any]) -> onnx.TensorProto:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.ascontiguousarray(array), name)


def _outside(name: str, array: npt.NDArray[Any], file: str, start: int) -> onnx.TensorProto:
    """A tensor whose data lies in a file beside the model."""
    from onnx import StringStringEntryProto, TensorProto, helper

    tensor = TensorProto(
        name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape, data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", file), ("offset", str(start)), ("length", str(array.nbytes))):
        tensor.external_data.append(StringStringEntryProto(key=key, value=value))
    return tensor


def _padded(size: int) -> int:
    return -(-size // SPLIT) * SPLIT
