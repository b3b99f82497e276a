"""Tensors as bytes of the safetensors format, without a copy of their data.

`safetensors.torch.save` copies all data twice and holds the interpreter's lock meanwhile: 14 ms for 20 MB, in which nothing is
learned or scored. Here the data stays where it is, and only the header is made. Reading is the library's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

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


def decode_tensors(data: bytes, *, where: str) -> dict[str, torch.Tensor]:
    """The tensors of a file, copied out of `data`. `where` names the file, for the error.

    Raises:
        SnapshotCorrupt: the data isn't a file of the format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except SafetensorError as error:
        raise SnapshotCorrupt(
            f"{where}: expected a safetensors file, found {len(data)} bytes that don't read as one ({error}). "
            "The version can't be used; go back to another one: `headrace snapshot rollback`."
        ) from error
