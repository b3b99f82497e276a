"""Reading text files: plain or compressed, whatever their names say, with or without a byte order mark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from deploy.datasets.refusal import refuse

__all__ = ["blocks", "one_line", "open_text"]

# The first bytes of compressed files: gzip (RFC 1952), zstd (RFC 8878), bzip2, the LZ4 frame format.
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\x04\x22\x4d\x18": "lz4"}
_BLOCK_BYTES = 8 << 20
_UTF8_MARK = b"\xef\xbb\xbf"


def open_text(path: Path) -> pa.NativeFile:
    """Open the file, decompressing it. Raises DataSetError: it is in UTF-16 or UTF-32. Raises OSError: it can't be read."""
    with path.open("rb") as file:
        start = file.read(4)
    compression = next((name for magic, name in _COMPRESSIONS.items() if start.startswith(magic)), None)
    stream = pa.input_stream(str(path), compression=compression)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or start == b"\x00\x00\xfe\xff":
        refuse(path, "text in UTF-8", "UTF-16 or UTF-32", f"Convert it: iconv -f UTF-16 -t UTF-8 {path.name}.")
    return stream


def blocks(path: Path) -> Iterator[bytes]:
    """The text in blocks of whole lines, about 8 MB each, without the byte order mark. Raises as `open_text`."""
    with open_text(path) as stream:
        left, first = b"", True
        while piece := stream.read(_BLOCK_BYTES):
            if first:
                piece, first = piece.removeprefix(_UTF8_MARK), False
            whole, line_break, rest = (left + piece).rpartition(b"\n")
            if line_break:
                yield whole + line_break
            left = rest
        if left:
            yield left


def one_line(error: Exception) -> str:
    """A library's message on one line, without a full stop."""
    return " ".join(str(error).split()).rstrip(".")
