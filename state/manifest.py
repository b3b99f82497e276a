"""The manifest of a version: what it was trained on, its metrics, and its files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from state.errors import SnapshotCorrupt
from state.gate_report import GateReport
from state.history import History
from state.rewinds import Rewinds, SkippedRange

__all__ = [
    "DENSE_FILE",
    "MANIFEST_FILE",
    "SERVING_FILE",
    "SERVING_NAMES",
    "TRAINER_FILE",
    "FileEntry",
    "Manifest",
    "finite_or_null",
    "nan_for_null",
]

MANIFEST_FILE = "manifest.json"
DENSE_FILE = "dense.safetensors"
SERVING_FILE = "serving.safetensors"  # of format 1
TRAINER_FILE = "trainer.safetensors"
SERVING_NAMES = ("serving", "dense")
"""With which the names of the files begin that a scorer reads."""


class FileEntry(msgspec.Struct, frozen=True):
    """One file of a version: its size in bytes and its SHA-256 in hex."""

    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything known about one version, except its weights.

    offsets        by partition of `examples`: the next offset to train
    watermark_ms   event time of the newest impression trained (ms since epoch)
    metrics        those of the window before the snapshot; a metric that isn't finite is written as null and read as NaN
    verdict        the gate's report on the version
    topic_ids      Kafka's ids of `examples` and `snapshots`: a topic that was deleted and created again has another id than the
                   one that the version was trained on
    negative_rate  share of negatives that the weights were learned from; scores are corrected by it (`model.sampling`)
    format         how the files are laid out (`state.pieces`): 1 has all serving weights in one file, 2 has them in pieces
    rows           rows of the serving weights; None in format 1
    chain          the line of weights that the version is a point of: model name, epoch and ordinal, such as "deepfm/12/0"
    sequence       number of the last delta of the chain that the weights contain; None: no point of a published chain
    digest         of the serving weights (`model.digest`), 16 hex digits
    deltas_offset  offset in `deltas` after that delta: where a scorer that has loaded the version goes on reading
    skipped        stretches of `examples` before `offsets` that were left out when the trainer was sent back (`state.rewinds`)
    rewinds        how the trainer was sent back until then, and all stretches that are left out, also those that it hasn't come
                   to yet; None: never. A registry that is lost is made again from it
    row_precision  how scorers have the rows, of which the digest is. The files hold all digits, for further training
    history        what the weights learned from a data set before the stream; None when they are of the stream alone

    Versions of 0.1.0 have none of the last nine; the defaults say so.
    Unknown fields are ignored, so that older readers can read newer manifests.
    """

    version: int
    parent: int | None = None
    base: int | None = None
    kind: Literal["full", "delta"] = "full"
    epoch: int = 0
    created_at_ms: int = 0
    offsets: dict[str, int] = msgspec.field(default_factory=dict)
    watermark_ms: int = 0
    examples_seen: int = 0
    negative_rate: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    format: Annotated[int, msgspec.Meta(ge=1)] = 1
    rows: Annotated[int, msgspec.Meta(ge=0)] | None = None
    chain: str = ""
    sequence: Annotated[int, msgspec.Meta(ge=0)] | None = None
    digest: Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{16})?$")] = ""
    deltas_offset: Annotated[int, msgspec.Meta(ge=0)] | None = None
    row_precision: Literal["float32", "float16"] = "float32"
    metrics: dict[str, float] = msgspec.field(default_factory=dict)
    verdict: GateReport | None = None
    topic_ids: dict[str, str] = msgspec.field(default_factory=dict)
    skipped: tuple[SkippedRange, ...] = ()
    rewinds: Rewinds | None = None
    history: History | None = None
    schema_hash: str = ""
    features: dict[str, Any] = msgspec.field(default_factory=dict)
    model: dict[str, Any] = msgspec.field(default_factory=dict)
    files: dict[str, FileEntry] = msgspec.field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files.values())

    @property
    def serving_size(self) -> int:
        """Bytes of the files that a scorer reads."""
        return sum(entry.size for name, entry in self.files.items() if name.startswith(SERVING_NAMES))

    def encode(self) -> bytes:
        """As indented JSON in UTF-8, readable for people too."""
        document = msgspec.to_builtins(self)
        document["metrics"] = finite_or_null(self.metrics)
        return msgspec.json.format(msgspec.json.encode(document), indent=2)

    @classmethod
    def decode(cls, data: bytes | bytearray, *, where: str) -> Manifest:
        """Decode a manifest. `where` names the file, for the error.

        Raises:
            SnapshotCorrupt: the data isn't JSON, or a field is missing or of the wrong type.
        """
        try:
            document = msgspec.json.decode(data)
            if isinstance(document, dict):
                document["metrics"] = nan_for_null(document.get("metrics"))
            return msgspec.convert(document, cls)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise SnapshotCorrupt(
                f"{where}: expected a manifest, found {len(data)} bytes that don't read as one ({error}). "
                "Roll back to another version: `headrace snapshot list`."
            ) from error


def finite_or_null(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON can write them: null for NaN and for infinity."""
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def nan_for_null(metrics: Any) -> Any:
    """The reverse of `finite_or_null`. Anything but a mapping is returned as it is, for the decoder to reject."""
    if metrics is None:
        return {}
    if not isinstance(metrics, dict):
        return metrics
    return {name: math.nan if value is None else value for name, value in metrics.items()}
