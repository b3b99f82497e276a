"""Tensors as bytes of the safetensors format, without a copy of their data.

The library `safetensors` copies all data, and holds the interpreter's lock meanwhile: 14 ms to write 20 MB and 3 to 13 ms to
read them, in which nothing is learned or scored. Here the data stays where it is, and only the header is made and read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import msgspec

from state.errors import SnapshotCorrupt

if TYPE_CHECKING:
    import torch

__all__ = ["decode_tensors", "encode_tensors"]

# Names of the types in the format. Others don't occur in versions.
_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_NAMES = {kind: name for name, kind in _TYPES.items()}


class _Entry(msgspec.Struct, frozen=True):
    """What a file's header says of one tensor. Offsets count from the end of the header."""

    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    data_offsets: tuple[Annotated[int, msgspec.Meta(ge=0)], Annotated[int, msgspec.Meta(ge=0)]]


def encode_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """CPU tensors as the consecutive parts of one file. The parts share the tensors' memory: write them before it changes.

    Args:
        metadata: of the file; readers of the format ignore it.
    """
    import torch

    # Wide types first: then each tensor begins at a multiple of its width, which readers that map files need.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    parts: list[bytes | memoryview] = []
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        kind = _TYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        if end > begin:
            parts.append(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *parts]


def decode_tensors(data: bytearray, *, where: str) -> dict[str, torch.Tensor]:
    """The tensors of a file. They share the memory of `data`. `where` names the file, for the error.

    Raises:
        SnapshotCorrupt: the data isn't a file of the format.
    """
    import torch

    try:
        length = int.from_bytes(data[:8], "little")
        if length > len(data) - 8:
            raise ValueError(f"its header has {length} bytes")
        header = msgspec.json.decode(data[8 : 8 + length], type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        found = {}
        for name, raw in header.items():
            entry = msgspec.json.decode(raw, type=_Entry)
            if entry.dtype not in _NAMES:
                raise ValueError(f"tensor {name!r} is of type {entry.dtype!r}")
            dtype = getattr(torch, _NAMES[entry.dtype])
            begin, end = (8 + length + offset for offset in entry.data_offsets)
            count = math.prod(entry.shape)
            if end - begin != count * dtype.itemsize or end > len(data):
                raise ValueError(f"tensor {name!r} of {entry.shape} has bytes {begin} to {end}")
            if not count:
                found[name] = torch.empty(entry.shape, dtype=dtype)
            elif begin % dtype.itemsize:
                found[name] = torch.frombuffer(data[begin:end], dtype=dtype).view(entry.shape)
            else:
                found[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=begin).view(entry.shape)
        return found
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise SnapshotCorrupt(
            f"{where}: expected a safetensors file, found {len(data)} bytes that don't read as one ({error}). "
            "The version can't be used; go back to another one: `headrace snapshot rollback`."
        ) from error
