"""Opening an object store: S3, Google Cloud Storage or Azure, with credentials from the environment."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import ObjectStore, from_url

from state.errors import SnapshotError

__all__ = ["explained", "open_store", "store_kind"]

# One request, from the first byte to the last, in seconds. A piece has 20 MB (`state.pieces`), so a store that takes or gives
# less than 170 kB/s isn't usable; at that speed a version of 150 MB would take a quarter of an hour. Where a store stops in the
# middle, the request is given up after this time, and a new one is made.
REQUEST_S = 120
# Seconds until a host must have accepted a connection.
CONNECT_S = 10
# Seconds from the first attempt within which a request is repeated, if the store rejects it for the moment (5xx), or the
# connection is cut. Longer outages are for the caller: a trainer writes another version later, a scorer answers with the one
# that it has.
REPEAT_S = 60

# Where an object store is that isn't the cloud's own, such as MinIO, Ceph or a test's.
_ENDPOINTS = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT",
    "AZURE_STORAGE_ENDPOINT",
    "AZURE_ENDPOINT",
    "GOOGLE_BASE_URL",
)

_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_REGION), or run where an instance or task role provides them",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS to a service account's file, or run where the machine's account provides them",
    "azure": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (or AZURE_STORAGE_SAS_TOKEN), or use a managed identity",
}
# In errors of stores that were given no credentials: the clients then ask the cloud's own metadata service for some.
_NO_CREDENTIALS = (
    "169.254.169.254",
    "169.254.170.2",
    "/latest/api/token",
    "metadata.google.internal",
    "Account must be specified",
    "MissingCredentials",
    "Missing Credentials",
)
# Codes of stores that were given credentials that they don't accept.
_WRONG_CREDENTIALS = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "AuthenticationFailed",
    "AuthorizationFailure",
    "ExpiredToken",
)


def open_store(url: str, *, repeat: bool = True) -> ObjectStore:
    """The store at a URL. Nothing is sent yet.

    Args:
        repeat: whether requests that fail are repeated.

    Raises:
        SnapshotError: the URL isn't one of a store, or its settings in the environment don't fit together.
    """
    try:
        return from_url(url, **_options(url, repeat))
    except (BaseError, ValueError) as error:
        raise SnapshotError(
            f"snapshots.url {url!r}: expected a folder, file://, s3://, gs:// or az:// (credentials "
            f"from the environment), found: {explained(url, error)}. Correct it; `headrace config show` prints it."
        ) from error


def store_kind(url: str) -> str:
    """What kind of store a URL names: `s3`, `gcs`, `azure`, or another of obstore's; empty for a URL that it doesn't know."""
    try:
        return str(obstore.parse_scheme(url))
    except (BaseError, ValueError):
        return ""


def explained(url: str, error: Exception) -> str:
    """What a store's error means for whoever runs this: its first line, and what to set where credentials are missing."""
    text = str(error).strip()
    # After its first line, obstore adds pages of debug output.
    line = text.splitlines()[0] if text else type(error).__name__
    variables = _CREDENTIALS.get(store_kind(url), "")
    if variables and any(part in text for part in _NO_CREDENTIALS):
        return f"no credentials in the environment ({line}). Set {variables}"
    if variables and any(part in text for part in _WRONG_CREDENTIALS):
        return f"credentials that it doesn't accept ({line}). Correct {variables}"
    return line


def _options(url: str, repeat: bool) -> dict[str, Any]:
    if store_kind(url) not in _CREDENTIALS:
        return {}
    client: dict[str, Any] = {"timeout": timedelta(seconds=REQUEST_S), "connect_timeout": timedelta(seconds=CONNECT_S)}
    # obstore leaves the environment's client options aside once some are given, and rejects http without this one. Whoever sets
    # an address that begins with http:// wants it.
    if any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS):
        client["allow_http"] = True
    # At most 10 repetitions, as is obstore's default.
    retries = {"retry_timeout": timedelta(seconds=REPEAT_S), "max_retries": 10 if repeat else 0}
    return {"client_options": client, "retry_config": retries}
