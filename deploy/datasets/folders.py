"""Where data sets are on this machine: the folders that are searched, the cache, and writing a folder all or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.errors import DataSetError

__all__ = ["cache_folder", "cache_to_write", "look_for", "replacing"]

CHECKOUT = Path(__file__).resolve().parents[2]


def cache_folder() -> Path:
    """The folder of fetched data sets: `headrace/data` in the user's cache (`$XDG_CACHE_HOME`, else `~/.cache`)."""
    # The XDG specification says to ignore a relative path.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "headrace" / "data"


def cache_to_write() -> Path:
    """The same folder, created if it is missing. Call it before anything is downloaded.

    Raises:
        DataSetError: this user can't write there.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataSetError(
            f"cache of data sets: expected a folder that can be written, found {error.strerror} at {folder}. Set "
            "XDG_CACHE_HOME to another folder, or put the files into a folder of HEADRACE_DATA_DIR."
        ) from error
    return folder


def look_for(folder: str, files: tuple[str, ...]) -> Path | None:
    """The first folder of that name with all the files: in HEADRACE_DATA_DIR, then in `data/`, then in the cache.

    HEADRACE_DATA_DIR may also be the data set's folder itself. `data/` is looked for in the working directory and in the
    checkout.

    Raises:
        DataSetError: HEADRACE_DATA_DIR is set and is not a folder.
    """
    parents = [Path("data"), CHECKOUT / "data", cache_folder()]
    given = os.environ.get("HEADRACE_DATA_DIR")
    if given:
        if not Path(given).is_dir():
            raise DataSetError(
                f"HEADRACE_DATA_DIR: expected a folder, found nothing at {given}. Correct the path, or unset the variable to "
                f"look in data/ and {cache_folder()}."
            )
        parents = [Path(given), Path(given).parent, *parents] if Path(given).name == folder else [Path(given), *parents]
    for parent in parents:
        if all((parent / folder / file).is_file() for file in files):
            return parent / folder
    return None


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder, which replaces `folder` when the block succeeds: nobody ever finds half a data set."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename can't cross file systems.
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
    try:
        yield part
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
