"""Folders of immutable files, in an object store or in a local folder that survives kill -9 and power loss.

A file is created once and never overwritten. Object stores have a conditional put for this. In a local folder the data goes to
a temporary file, which is flushed to the disk and then linked to its name: a link fails if the name is taken, and the file is
whole before it has its name. obstore's own LocalStore doesn't flush, so it is only used for listings.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.exceptions import NotFoundError as ObjectNotFound
from obstore.store import LocalStore, ObjectStore, from_url

from state.errors import SnapshotError

__all__ = ["Blobs", "LocalBlobs", "blobs_at"]

# The errors that a missing object raises: object stores and the local file system differ.
_MISSING = (FileNotFoundError, ObjectNotFound)


class Blobs:
    """Files in folders one level deep, in any store that obstore supports."""

    def __init__(self, url: str) -> None:
        self.url = url

    def _store(self) -> ObjectStore:
        if not hasattr(self, "_opened"):
            try:
                self._opened = from_url(self.url)
            except (BaseError, ValueError) as error:
                raise SnapshotError(
                    f"snapshots.url {self.url!r}: expected a folder, file://, s3://, gs:// or az:// (credentials "
                    f"from the environment), found: {_first_line(error)}. Correct it; `headrace config show` prints it."
                ) from error
        return self._opened

    def folders(self) -> list[str]:
        """Names of all folders, in no particular order."""
        return [str(name).strip("/") for name in self._listing(None)["common_prefixes"]]

    def folders_with(self, name: str) -> list[str]:
        """The folders that have a file of this name, by one listing of the whole store."""
        try:
            pages = obstore.list(self._store())
            paths = (str(entry["path"]).rsplit("/", 2) for page in pages for entry in page)
            return [parts[-2] for parts in paths if len(parts) > 1 and parts[-1] == name]
        except (BaseError, OSError) as error:
            raise self._failed("list", "", "", error) from error

    def files(self, folder: str) -> dict[str, int]:
        """Sizes in bytes of a folder's files, by name; none if the folder doesn't exist."""
        listing = self._listing(folder)
        return {str(entry["path"]).rsplit("/", 1)[-1]: int(entry["size"]) for entry in listing["objects"]}

    def read(self, folder: str, name: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: the file doesn't exist.
            SnapshotError: the store can't be reached or rejects the request.
        """
        try:
            return bytes(obstore.get(self._store(), f"{folder}/{name}").bytes())
        except _MISSING as error:
            raise FileNotFoundError(self.path(folder, name)) from error
        except (BaseError, OSError) as error:
            raise self._failed("read", folder, name, error) from error

    def create(self, folder: str, name: str, data: bytes) -> None:
        """Write a new file, whole or not at all.

        Raises:
            FileExistsError: the file exists; it isn't changed.
            SnapshotError: the store can't be reached or rejects the request.
        """
        try:
            obstore.put(self._store(), f"{folder}/{name}", data, mode="create")
        except (AlreadyExistsError, FileExistsError) as error:
            raise FileExistsError(self.path(folder, name)) from error
        except (BaseError, OSError) as error:
            raise self._failed("write", folder, name, error) from error

    def delete(self, folder: str, name: str) -> None:
        """Remove a file if it exists."""
        try:
            obstore.delete(self._store(), f"{folder}/{name}")
        except _MISSING:
            return
        except (BaseError, OSError) as error:
            raise self._failed("delete", folder, name, error) from error

    def delete_folder(self, folder: str) -> None:
        """Remove an empty folder. Object stores have no folders, so this does nothing there."""

    def path(self, folder: str, name: str = "") -> str:
        """The address of a folder or file, for messages."""
        return "/".join(part for part in (self.url.rstrip("/"), folder, name) if part)

    def _listing(self, folder: str | None) -> dict[str, list]:  # type: ignore[type-arg]
        try:
            return dict(obstore.list_with_delimiter(self._store(), folder))
        except _MISSING:
            return {"common_prefixes": [], "objects": []}
        except (BaseError, OSError) as error:
            raise self._failed("list", folder or "", "", error) from error

    def _failed(self, action: str, folder: str, name: str, error: Exception) -> SnapshotError:
        return SnapshotError(
            f"snapshot store: can't {action} {self.path(folder, name)}: {_first_line(error)}. "
            "Check that the store exists and that this process may use it."
        )


class LocalBlobs(Blobs):
    """A folder on this machine. Reading and listing create nothing: the folder is created with the first file."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self._root = root

    def _store(self) -> ObjectStore:
        return LocalStore(self._root)

    def folders(self) -> list[str]:
        return super().folders() if self._root.is_dir() else []

    def folders_with(self, name: str) -> list[str]:
        return [folder for folder in self.folders() if (self._root / folder / name).is_file()]

    def files(self, folder: str) -> dict[str, int]:
        return super().files(folder) if (self._root / folder).is_dir() else {}

    def read(self, folder: str, name: str) -> bytes:
        try:
            return (self._root / folder / name).read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._failed("read", folder, name, error) from error

    def create(self, folder: str, name: str, data: bytes) -> None:
        home = self._root / folder
        # A unique name: two writers of the same version must not share a temporary file.
        temporary = home / f".{name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        try:
            home.mkdir(parents=True, exist_ok=True)
            _sync_folder(self._root)
            try:
                with temporary.open("xb") as file:
                    file.write(data)
                    file.flush()
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
            if (self._root / folder).is_dir():
                _sync_folder(self._root / folder)
        except OSError as error:
            raise self._failed("delete", folder, name, error) from error

    def delete_folder(self, folder: str) -> None:
        with contextlib.suppress(OSError):  # it isn't empty: another process has a file in it
            (self._root / folder).rmdir()


def blobs_at(url: str) -> Blobs:
    """The store at `snapshots.url`: a folder path, a file:// URL, or any URL that obstore supports."""
    if url.startswith("file://"):
        return LocalBlobs(Path(unquote(urlsplit(url).path)))
    if "://" not in url:
        return LocalBlobs(Path(url).expanduser())
    return Blobs(url)


def _sync_folder(path: Path) -> None:
    """Flush a folder: a new name in it is only on the disk after this."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_line(error: Exception) -> str:
    """The first line of an error's message; after it, obstore adds pages of debug output."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
