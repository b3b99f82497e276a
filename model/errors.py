"""Errors of the package `model`.

ModelError
├── DigestMismatch     weights would not have the digest that a delta names
├── FeatureError       a record's features can't be used
├── SnapshotMismatch   weights don't fit the schema or the model that they are loaded into
└── UpdateNotFinite    learning a batch would leave the model with numbers that aren't finite
"""

from __future__ import annotations

__all__ = ["DigestMismatch", "FeatureError", "ModelError", "SnapshotMismatch", "UpdateNotFinite"]


class ModelError(Exception):
    """Base class of the errors of `model`."""


class DigestMismatch(ModelError):
    """Weights would not have the digest that a delta names."""


class FeatureError(ModelError):
    """A record's features can't be used; `reason` is a dead letter's code, `path` the part at fault (`$.features.price`)."""

    def __init__(self, message: str, *, reason: str, path: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.path = path


class SnapshotMismatch(ModelError):
    """Weights don't fit the schema or the model that they are loaded into."""


class UpdateNotFinite(ModelError):
    """Learning a batch would make numbers of the model infinite or NaN, or so large that the next updates would."""
