"""The manifest of a version: what it was made from, what it scored, and which files belong to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from state.errors import SnapshotCorrupt
from state.gate import GateReport

__all__ = ["MANIFEST_FILE", "SERVING_FILE", "TRAINER_FILE", "FileEntry", "Manifest", "finite_or_null", "nan_for_null"]

MANIFEST_FILE = "manifest.json"
SERVING_FILE = "serving.safetensors"
TRAINER_FILE = "trainer.safetensors"


class FileEntry(msgspec.Struct, frozen=True):
    """One file of a version: its size in bytes and its SHA-256 in hex."""

    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is known of one version, without its weights.

    `offsets` maps a partition of `examples` to the next offset to train; `watermark_ms` is event time. `metrics` are
    those of the window before the snapshot. `verdict` is what the gate knew of the version. `topic_ids` are Kafka's ids of
    `examples` and `snapshots`, by which a topic that was made anew is told from the one that the version was trained on.
    `negative_rate` is the share of negatives that the weights were learned from: whoever scores with them corrects by it
    (`model.sampling`). A metric that isn't finite is written as null and read as NaN.
    Fields that this code doesn't know are ignored, so that older readers read newer manifests.
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
    metrics: dict[str, float] = msgspec.field(default_factory=dict)
    verdict: GateReport | None = None
    topic_ids: dict[str, str] = msgspec.field(default_factory=dict)
    schema_hash: str = ""
    features: dict[str, Any] = msgspec.field(default_factory=dict)
    model: dict[str, Any] = msgspec.field(default_factory=dict)
    files: dict[str, FileEntry] = msgspec.field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files.values())

    def encode(self) -> bytes:
        """As JSON for people too: indented, UTF-8."""
        document = msgspec.to_builtins(self)
        document["metrics"] = finite_or_null(self.metrics)
        return msgspec.json.format(msgspec.json.encode(document), indent=2)

    @classmethod
    def decode(cls, data: bytes, *, where: str) -> Manifest:
        """Read a manifest back.

        Raises:
            SnapshotCorrupt: it isn't JSON, or a field is missing or of the wrong kind; `where` names the file.
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
    """JSON has no NaN or infinity: null stands for both."""
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def nan_for_null(metrics: Any) -> Any:
    """The way back of `finite_or_null`; anything but a mapping is handed on, for the decoder to refuse."""
    if metrics is None:
        return {}
    if not isinstance(metrics, dict):
        return metrics
    return {name: math.nan if value is None else value for name, value in metrics.items()}
