"""Folders of immutable files, in an object store or in a local folder that survives kill -9 and power loss.

A file is created once and never overwritten. Object stores have a conditional put for this; `_put_without_condition` is for
those that don't. In a local folder the data goes to a temporary file, which is flushed to the disk and then linked to its name:
a link fails if the name is taken, and the file is whole before it has its name.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError
from obstore.exceptions import NotFoundError as ObjectNotFound
from obstore.store import ObjectStore

from state.errors import SnapshotError
from state.object_store import explained, open_store, store_kind

__all__ = ["Blobs", "Entry", "LocalBlobs", "blobs_at"]

log = logging.getLogger(__name__)

# The errors that a missing object raises: object stores and the local file system differ.
_MISSING = (FileNotFoundError, ObjectNotFound)
_EXISTS = (AlreadyExistsError, FileExistsError)
# A full disk, and a full quota.
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Entry(NamedTuple):
    """A file in a folder: its size in bytes, and the store's tag of its content (None where it has none)."""

    size: int
    tag: str | None = None


class _Found(NamedTuple):
    """A file that was read."""

    data: bytearray
    tag: str | None


class Blobs:
    """Files in folders one level deep, in any store that obstore supports. Several threads can use it at once."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._lock = threading.Lock()
        self._opened: ObjectStore | None = None
        self._has_conditions: bool | None = None  # None: not tried yet

    def _store(self) -> ObjectStore:
        with self._lock:
            if self._opened is None:
                self._opened = open_store(self.url)
            return self._opened

    def folders(self) -> list[str]:
        """Names of all folders, in no particular order."""
        return [str(name).strip("/") for name in self._listing(None)["common_prefixes"]]

    def folders_with(self, name: str) -> list[str]:
        """The folders that have a file of this name, by one listing of the whole store."""
        try:
            pages = obstore.list(self._store())
            paths = (str(entry["path"]).split("/") for page in pages for entry in page)
            return [parts[0] for parts in paths if len(parts) == 2 and parts[1] == name]
        except (BaseError, OSError) as error:
            raise self._failed("list", "", "", error) from error

    def entries(self, folder: str) -> dict[str, Entry]:
        """A folder's files by name; none if the folder doesn't exist."""
        listing = self._listing(folder)
        return {str(entry["path"]).rsplit("/", 1)[-1]: Entry(int(entry["size"]), _tag(entry)) for entry in listing["objects"]}

    def read(self, folder: str, name: str) -> bytearray:
        """The content of a file, in memory of its own.

        Raises:
            FileNotFoundError: the file doesn't exist.
            SnapshotError: the store can't be reached or rejects the request.
        """
        return self._found(folder, name).data

    def _found(self, folder: str, name: str) -> _Found:
        try:
            found = obstore.get(self._store(), f"{folder}/{name}")
            return _Found(bytearray(found.bytes()), _tag(found.meta))
        except _MISSING as error:
            raise FileNotFoundError(self.path(folder, name)) from error
        except (BaseError, OSError) as error:
            raise self._failed("read", folder, name, error) from error

    def create(self, folder: str, name: str, parts: Sequence[bytes | memoryview]) -> str | None:
        """Write a new file, whole or not at all.

        The answer to a request can get lost after the store has done it, and obstore repeats a request whose connection was
        cut. So if the store says that the file exists, or gives no answer, the file is read: the same content is taken for this
        writer's own. Content must therefore differ between writers (`state.version_writer`).

        Args:
            parts: the content, one after the other.

        Returns:
            The store's tag of the content where another writer could replace it, since the store has no conditional puts. Else
            None.

        Raises:
            FileExistsError: the file exists with other content; it isn't changed.
            SnapshotError: the store can't be reached or rejects the request.
        """
        data = b"".join(parts)
        try:
            return self._put_new(folder, name, data)
        except _EXISTS as error:
            failed: Exception = FileExistsError(self.path(folder, name))
            cause: Exception = error
        except (BaseError, OSError) as error:
            failed, cause = self._failed("write", folder, name, error), error
        found = None
        with contextlib.suppress(FileNotFoundError, SnapshotError):
            found = self._found(folder, name)
        if found is None or found.data != data:
            raise failed from cause
        return None if self._has_conditions else found.tag

    def delete(self, folder: str, name: str) -> None:
        """Remove a file if it exists."""
        try:
            obstore.delete(self._store(), f"{folder}/{name}")
        except _MISSING:
            return
        except (BaseError, OSError) as error:
            raise self._failed("delete", folder, name, error) from error

    def delete_folder(self, folder: str, *, leftovers: bool = False) -> None:
        """Remove an empty folder. Object stores have no folders, so this does nothing there.

        Args:
            leftovers: remove the temporary files of writers that were killed, too.
        """

    def path(self, folder: str, name: str = "") -> str:
        """The address of a folder or file, for messages."""
        return "/".join(part for part in (self.url.rstrip("/"), folder, name) if part)

    def _put_new(self, folder: str, name: str, data: bytes) -> str | None:
        """One attempt to write a file that doesn't exist."""
        if self._conditional(folder):
            # Several parts at once can't be conditional. They aren't needed: files are small (`state.pieces`).
            self._put(f"{folder}/{name}", data, mode="create")
            return None
        return self._put_without_condition(f"{folder}/{name}", data)

    def _put(self, path: str, data: bytes, *, mode: Literal["create", "overwrite"]) -> str | None:
        return _tag(obstore.put(self._store(), path, data, mode=mode, use_multipart=False))

    def _put_without_condition(self, path: str, data: bytes) -> str | None:
        """Look whether a file exists, write it, and look whether it is still this writer's.

        Two writers of one name that look at the same moment both write it. The first one finds the other's file by the second
        look, here or before its manifest. In the worst case both believe to have written a version: only one of them is
        announced, since the registry knows which trainer is the newest, and readers compare each file with the manifest's hash.
        """
        store = self._store()
        with contextlib.suppress(*_MISSING):
            obstore.head(store, path)
            raise FileExistsError(path)
        tag = self._put(path, data, mode="overwrite")
        found = obstore.head(store, path)
        if found["size"] != len(data) or (tag is not None and _tag(found) != tag):
            raise FileExistsError(path)
        return tag

    def _conditional(self, folder: str) -> bool:
        """Whether the store has conditional puts.

        S3 has had them since 2024. Of its imitations some reject the condition and some ignore it, so an S3 store is tried once
        in each process that writes, with a file of one byte.
        """
        if self._has_conditions is None:
            self._has_conditions = store_kind(self.url) != "s3" or self._tried(f"{folder}/.probe-{secrets.token_hex(8)}")
            if not self._has_conditions:
                log.warning(
                    "snapshots.url: %s ignores or rejects the condition of a write (If-None-Match). Two trainers that write "
                    "the same version at the same moment can damage it; readers notice, and take another one",
                    self.url,
                )
        return self._has_conditions

    def _tried(self, path: str) -> bool:
        # Without repetitions: a store that rejects the condition as "not implemented" would be asked for a minute.
        store = open_store(self.url, repeat=False)
        try:
            for content in (b"1", b"2"):
                obstore.put(store, path, content, mode="create", use_multipart=False)
        except _EXISTS:
            return True
        except BaseError as error:
            if isinstance(error, NotSupportedError) or "NotImplemented" in str(error) or " 501 " in str(error):
                return False
            raise
        finally:
            with contextlib.suppress(BaseError, OSError):
                obstore.delete(self._store(), path)
        return False

    def _listing(self, folder: str | None) -> dict[str, list]:  # type: ignore[type-arg]
        try:
            return dict(obstore.list_with_delimiter(self._store(), folder))
        except _MISSING:
            return {"common_prefixes": [], "objects": []}
        except (BaseError, OSError) as error:
            raise self._failed("list", folder or "", "", error) from error

    def _failed(self, action: str, folder: str, name: str, error: Exception) -> SnapshotError:
        cure = "Check that the store exists and that this process may use it."
        if isinstance(error, OSError) and error.errno in _FULL:
            cure = "Free space there, or keep fewer versions: `headrace snapshot gc --dry-run` says which are kept, and why."
        return SnapshotError(f"snapshot store: can't {action} {self.path(folder, name)}: {explained(self.url, error)}. {cure}")


class LocalBlobs(Blobs):
    """A folder on this machine. Reading and listing create nothing: the folder is created with the first file."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self._root = root

    def folders(self) -> list[str]:
        return [entry.name for entry in self._within("") if entry.is_dir()]

    def folders_with(self, name: str) -> list[str]:
        return [folder for folder in self.folders() if (self._root / folder / name).is_file()]

    def entries(self, folder: str) -> dict[str, Entry]:
        found = {}
        for entry in self._within(folder):
            # Names of temporary files begin with a dot. A file can be deleted between the listing and the look at its size.
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file() and not entry.name.startswith("."):
                    found[entry.name] = Entry(entry.stat().st_size)
        return found

    def read(self, folder: str, name: str) -> bytearray:
        try:
            with (self._root / folder / name).open("rb", buffering=0) as file:
                data = bytearray(os.fstat(file.fileno()).st_size)
                _read_all(file, data)
                return data
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._failed("read", folder, name, error) from error

    def create(self, folder: str, name: str, parts: Sequence[bytes | memoryview]) -> None:
        home = self._root / folder
        # A unique name: two writers of the same version must not share a temporary file.
        temporary = home / f".{name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        try:
            home.mkdir(parents=True, exist_ok=True)
            _sync_folder(self._root)
            try:
                with temporary.open("xb", buffering=0) as file:
                    for part in parts:
                        _write_all(file, part)
                    os.fsync(file.fileno())
                os.link(temporary, home / name)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(home)
        except FileExistsError as error:
            raise FileExistsError(self.path(folder, name)) from error
        except OSError as error:
            raise self._failed("write", folder, name, error) from error

    def delete(self, folder: str, name: str) -> None:
        try:
            (self._root / folder / name).unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):  # the folder is gone too: another process deletes the same version
                _sync_folder(self._root / folder)
        except OSError as error:
            raise self._failed("delete", folder, name, error) from error

    def delete_folder(self, folder: str, *, leftovers: bool = False) -> None:
        with contextlib.suppress(OSError):  # it isn't there, or isn't empty: another process has a file in it
            if leftovers:
                for entry in self._within(folder):
                    if entry.name.startswith(".") and entry.name.endswith(".tmp"):
                        entry.unlink(missing_ok=True)
            (self._root / folder).rmdir()

    def _within(self, folder: str) -> list[Path]:
        try:
            return list((self._root / folder).iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._failed("list", folder, "", error) from error


def blobs_at(url: str) -> Blobs:
    """The store at `snapshots.url`: a folder path, a file:// URL, or any URL that obstore supports."""
    if url.startswith("file://"):
        return LocalBlobs(Path(unquote(urlsplit(url).path)))
    if "://" not in url:
        return LocalBlobs(Path(url).expanduser())
    return Blobs(url)


def _tag(meta: Mapping[str, Any]) -> str | None:
    """A store's tag of a content, without quotes: some stores have them in one answer and not in another."""
    tag = meta.get("e_tag")
    return None if tag is None else str(tag).strip('"')


def _write_all(file: FileIO, part: bytes | memoryview) -> None:
    """Write a part whole: one call can take less than it was given, and takes at most 2 GB."""
    rest = memoryview(part)
    while len(rest):
        rest = rest[file.write(rest) :]


def _read_all(file: FileIO, data: bytearray) -> None:
    """Fill `data` from a file: one call can give less than it is asked for. A file that got shorter leaves its end zero."""
    rest = memoryview(data)
    while len(rest) and (count := file.readinto(rest)):
        rest = rest[count:]


def _sync_folder(path: Path) -> None:
    """Flush a folder: a new name in it is only on the disk after this."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
