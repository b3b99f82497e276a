"""What writing and reading a version costs in a local folder, beside `cp` and `cat` of the same files.

python bench/store.py --rows 10000000 --dim 16        # 760 MB of serving weights, about 1 minute

One JSON line: seconds and MB/s, each the best of `--rounds`, files that are read from the page cache. `cp` ends when the data
is in the page cache; `cp_synced` is with its flush to the disk, which a version always has. `longest_gap_ms` is the longest
time that another thread of the process had to wait for the interpreter, of all rounds; `peak_growth_mb` is by how much the
process' largest memory grew over what it was before the first one.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from model.rows import Rows
from state.manifest import Manifest
from state.pieces import Piece, piece_rows
from state.settings import SnapshotSettings
from state.store import SnapshotStore

TICK_S = 0.0005


def main() -> None:
    """Measure, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=None, help="folder on the disk to measure; a temporary one otherwise")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.dir) as folder:
        print(json.dumps(_measure(Path(folder), given.rows, given.dim, given.rounds)))


def _measure(root: Path, rows: int, dim: int, rounds: int) -> dict[str, object]:
    store = SnapshotStore(SnapshotSettings(url=str(root / "versions")))
    embedding = torch.randn(piece_rows(dim), dim)

    def pieces() -> Iterator[Piece]:
        for start in range(0, rows, len(embedding)):
            count = min(len(embedding), rows - start)
            keys = torch.arange(start, start + count)
            yield Piece(Rows(keys, embedding[:count], embedding[:count, 0]), {})

    best: dict[str, float] = {}
    gaps = dict.fromkeys(("write", "read"), 0.0)

    def timed(name: str, call: Callable[[], object]) -> None:
        with _Gaps() as gap:
            began = time.perf_counter()
            call()
            best[name] = min(best.get(name, 1e9), time.perf_counter() - began)
        if name in gaps:
            gaps[name] = max(gaps[name], gap.longest_s)

    size, before_kb = 0, _peak_kb()
    for version in range(1, rounds + 1):
        folder, copy = root / "versions" / f"v{version:010d}", root / "copy"
        manifest = Manifest(version=version)
        timed("write", lambda manifest=manifest: store.write_version(manifest, dense={}, small=None, pieces=pieces()))  # type: ignore[misc]
        size = store.manifest(version).size
        timed("read", lambda version=version: sum(len(piece) for piece in store.read(version).rows()))  # type: ignore[misc]
        files = sorted(folder.glob("*.safetensors"))
        timed("cat", lambda files=files: _cat(files))  # type: ignore[misc]
        timed("cp", lambda folder=folder, copy=copy: subprocess.run(["cp", "-r", folder, copy], check=True))  # type: ignore[misc]
        shutil.rmtree(copy)
        command = ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', folder, copy]
        timed("cp_synced", lambda command=command: subprocess.run(command, check=True))  # type: ignore[misc]
        shutil.rmtree(copy)
        store.delete(version)
    figures: dict[str, object] = {"rows": rows, "dim": dim, "bytes": size}
    for name, seconds in best.items():
        figures |= {f"{name}_s": round(seconds, 3), f"{name}_mb_s": round(size / seconds / 1e6)}
    figures["peak_growth_mb"] = round((_peak_kb() - before_kb) / 1024)
    return figures | {f"{name}_longest_gap_ms": round(1000 * gap, 1) for name, gap in gaps.items()}


def _peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _cat(files: list[Path]) -> None:
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)


class _Gaps:
    """The longest time that a thread, which wants to run every half millisecond, had to wait."""

    def __enter__(self) -> _Gaps:
        self.longest_s = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *trace: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        last = time.perf_counter()
        while not self._done.is_set():
            time.sleep(TICK_S)
            now = time.perf_counter()
            self.longest_s = max(self.longest_s, now - last - TICK_S)
            last = now


if __name__ == "__main__":
    main()
