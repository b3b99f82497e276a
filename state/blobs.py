"""Folders of immutable files: an object store, or a local folder that survives kill -9 and power loss.

A file is created once and never overwritten. Object stores have a conditional put for that. A local folder gets a
temporary file that is flushed to the disk and then linked to its name: a link refuses a name that is taken, and the
file is whole before it has a name. obstore's own LocalStore flushes nothing, so it only lists here.
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

# What a missing object raises: object stores and the local file system differ.
_MISSING = (FileNotFoundError, ObjectNotFound)


class Blobs:
    """Files in folders one level deep, in any store that obstore speaks to."""

    def __init__(self, url: str) -> None:
        self.url = url

    def _store(self) -> ObjectStore:
        if not hasattr(self, "_opened"):
            try:
                self._opened = from_url(self.url)
            except (BaseError, ValueError) as error:
                raise SnapshotError(
                    f"snapshots.url {self.url!r}: expected a folder, file://, s3://, gs:// or az:// (credentials "
                    f"from the environment), found: {_first_line(error)}. Mend it; `headrace config show` prints it."
                ) from error
        return self._opened

    def folders(self) -> list[str]:
        """Names of all folders, in no order."""
        return [str(name).strip("/") for name in self._listing(None)["common_prefixes"]]

    def folders_with(self, name: str) -> list[str]:
        """The folders that hold a file of this name: one listing of the whole store."""
        try:
            pages = obstore.list(self._store())
            paths = (str(entry["path"]).rsplit("/", 2) for page in pages for entry in page)
            return [parts[-2] for parts in paths if len(parts) > 1 and parts[-1] == name]
        except (BaseError, OSError) as error:
            raise self._failed("list", "", "", error) from error

    def files(self, folder: str) -> dict[str, int]:
        """File name → size in bytes."""
        listing = self._listing(folder)
        return {str(entry["path"]).rsplit("/", 1)[-1]: int(entry["size"]) for entry in listing["objects"]}

    def read(self, folder: str, name: str) -> bytes:
        """The whole file.

        Raises:
            FileNotFoundError: it isn't there.
            SnapshotError: the store can't be reached or refuses.
        """
        try:
            return bytes(obstore.get(self._store(), f"{folder}/{name}").bytes())
        except _MISSING as error:
            raise FileNotFoundError(self.path(folder, name)) from error
        except (BaseError, OSError) as error:
            raise self._failed("read", folder, name, error) from error

    def create(self, folder: str, name: str, data: bytes) -> None:
        """Write a file that isn't there yet, whole or not at all.

        Raises:
            FileExistsError: it is there; nothing was changed.
            SnapshotError: the store can't be reached or refuses.
        """
        try:
            obstore.put(self._store(), f"{folder}/{name}", data, mode="create")
        except (AlreadyExistsError, FileExistsError) as error:
            raise FileExistsError(self.path(folder, name)) from error
        except (BaseError, OSError) as error:
            raise self._failed("write", folder, name, error) from error

    def delete(self, folder: str, name: str) -> None:
        """Remove a file; one that isn't there is fine."""
        try:
            obstore.delete(self._store(), f"{folder}/{name}")
        except _MISSING:
            return
        except (BaseError, OSError) as error:
            raise self._failed("delete", folder, name, error) from error

    def delete_folder(self, folder: str) -> None:
        """Remove what is left of an emptied folder; object stores have none."""

    def path(self, folder: str, name: str = "") -> str:
        """How messages name a file."""
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
            "Check that the store is there and that this process may use it."
        )


class LocalBlobs(Blobs):
    """A folder of this machine. Looking makes nothing: the folder appears with the first file."""

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
        # A name nobody else has: two writers of one version must not share the temporary file.
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
        with contextlib.suppress(OSError):  # somebody's file is in it: then it stays
            (self._root / folder).rmdir()


def blobs_at(url: str) -> Blobs:
    """The store that `snapshots.url` names: a folder path, file://, or what obstore understands."""
    if url.startswith("file://"):
        return LocalBlobs(Path(unquote(urlsplit(url).path)))
    if "://" not in url:
        return LocalBlobs(Path(url).expanduser())
    return Blobs(url)


def _sync_folder(path: Path) -> None:
    """A new name is only on the disk once its folder is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_line(error: Exception) -> str:
    """obstore's messages go on for pages of debug output."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
