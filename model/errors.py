"""Errors of the room `model`.

ModelError
├── FeatureError       a record's features can't be used
├── SnapshotMismatch   weights don't fit the schema or the model they are loaded into
└── UpdateNotFinite    learning a batch would leave the model with numbers that aren't finite
"""

from __future__ import annotations

__all__ = ["FeatureError", "ModelError", "SnapshotMismatch", "UpdateNotFinite"]


class ModelError(Exception):
    """Root of the errors of `model`."""


class FeatureError(ModelError):
    """A record's features can't be used; `reason` is a code, `path` says where (`$.features.price`)."""

    def __init__(self, message: str, *, reason: str, path: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.path = path


class SnapshotMismatch(ModelError):
    """Weights don't fit the schema or the model they are loaded into."""


class UpdateNotFinite(ModelError):
    """Learning a batch would leave the model with numbers that aren't finite, or so large that the next ones wouldn't be."""
