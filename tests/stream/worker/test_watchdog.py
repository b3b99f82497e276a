"""The watchdog sees each part by itself, and only what counts as progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

import pytest

from stream.worker.watchdog import PATIENCE_S, REPORT_S, Part, Watchdog


class Ended(BaseException):
    pass


def end(what: str, error: BaseException) -> NoReturn:
    raise Ended(f"{what}: {error}")


@dataclass
class Bench:
    """A watchdog over two partitions, and a clock."""

    positions: dict[str, int] = field(default_factory=lambda: {"a": 0, "b": 0})
    waiting: dict[str, str | None] = field(default_factory=lambda: {"a": "records", "b": "records"})
    outside: str | None = None
    now_s: float = 1_000.0

    def __post_init__(self) -> None:
        self.dog = Watchdog(self.parts, end)

    def parts(self) -> list[Part]:
        return [Part(name, at, self.waiting[name], self.outside) for name, at in self.positions.items()]

    def live(self, seconds: float, *moving: str) -> None:
        """So many seconds with these parts making progress."""
        for _ in range(int(seconds)):
            self.now_s += 1.0
            for name in moving:
                self.positions[name] += 1
            self.dog.look(self.now_s)


def test_one_of_two_that_hangs_is_named_and_ends_the_process() -> None:
    bench = Bench()
    bench.live(REPORT_S - 5, "b")
    assert bench.dog.stalled is None
    bench.live(10, "b")
    assert bench.dog.stalled is not None
    assert bench.dog.stalled.startswith("a: no progress for 3")
    assert "b:" not in bench.dog.stalled
    with pytest.raises(Ended, match=r"watchdog: a: no progress for 120 s with records"):
        bench.live(PATIENCE_S, "b")


def test_progress_of_whatever_length_is_progress() -> None:
    bench = Bench()
    for _ in range(20):
        bench.live(REPORT_S - 5, "b")
        bench.live(1, "a", "b")
        assert bench.dog.stalled is None


def test_nothing_to_do_is_no_stall() -> None:
    bench = Bench(waiting={"a": None, "b": None})
    bench.live(3 * PATIENCE_S)
    assert bench.dog.stalled is None
    # Work that comes after a long rest has the whole patience before it.
    bench.waiting["a"] = "records"
    bench.live(REPORT_S - 5)
    assert bench.dog.stalled is None


def test_a_reason_outside_is_told_and_ends_nothing() -> None:
    bench = Bench(outside="no broker leads it")
    bench.live(3 * PATIENCE_S, "b")
    assert bench.dog.stalled == "a: no progress for 359 s with records (no broker leads it)"


def test_a_part_that_has_gone_is_forgotten() -> None:
    bench = Bench()
    bench.live(PATIENCE_S - 5, "b")
    del bench.positions["a"]
    bench.live(5, "b")
    assert bench.dog.stalled is None
    bench.positions["a"] = 0
    bench.live(REPORT_S - 5, "b")
    assert bench.dog.stalled is None


def test_a_process_that_was_stopped_was_not_stalled() -> None:
    bench = Bench()
    bench.live(REPORT_S - 10, "b")
    bench.now_s += 10 * PATIENCE_S
    bench.live(2, "b")
    assert bench.dog.stalled is None
