"""Showing the progress of the demo on stderr: a live table on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = ["Figures", "View"]

LINE_EVERY_S = 10.0


@dataclass(slots=True)
class Figures:
    """The figures of one moment of the run; None where one isn't known yet."""

    sent: int = 0
    total: int | None = None
    events_per_s: float = 0.0
    joined: int = 0
    pending: int = 0
    learned: int = 0
    lag: int = 0
    auc: float | None = None
    normalised_entropy: float | None = None
    calibration: float | None = None
    served_auc: float | None = None
    version: int | None = None
    scores_per_s: float = 0.0


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}"


class View:
    """Use as a context manager. `show` replaces the figures, as often as you like; `say` prints a line that stays."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(), expand=True
        )
        self._task = self._progress.add_task("impressions", total=None)
        self._live: Live | None = None
        self._last_line = 0.0

    def __enter__(self) -> View:
        if self._console.is_terminal:
            self._live = Live(self._panel(Figures()), console=self._console, refresh_per_second=4)
            self._live.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*exc)
            self._live = None

    def say(self, text: str) -> None:
        """Print one line, which stays above the live table."""
        self._console.print(text, highlight=False)

    def show(self, figures: Figures) -> None:
        """Show these figures instead of the ones before."""
        self._progress.update(self._task, completed=figures.sent, total=figures.total)
        if self._live is not None:
            self._live.update(self._panel(figures))
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.say(
                f"sent {figures.sent:,}  joined {figures.joined:,}  learned {figures.learned:,}"
                f"  version {figures.version or '–'}  AUC {_number(figures.auc)}  NE {_number(figures.normalised_entropy)}"
            )

    def _panel(self, figures: Figures) -> Panel:
        table = Table.grid(padding=(0, 3), expand=True)
        for _ in range(4):
            table.add_column(overflow="fold")  # a number is never cut
        rows = [
            ("events/s", f"{figures.events_per_s:,.0f}", "AUC (window)", _number(figures.auc)),
            ("joined", f"{figures.joined:,}", "NE (window)", _number(figures.normalised_entropy)),
            ("pending", f"{figures.pending:,}", "calibration", _number(figures.calibration, 3)),
            ("learned", f"{figures.learned:,}", "served AUC", _number(figures.served_auc)),
            ("trainer lag", f"{figures.lag:,}", "version served", str(figures.version or "–")),
            ("scores/s", f"{figures.scores_per_s:,.0f}", "", ""),
        ]
        for left, left_value, right, right_value in rows:
            table.add_row(f"[dim]{left}[/]", left_value, f"[dim]{right}[/]", right_value)
        return Panel(Group(self._progress, table), title=self._title, border_style="cyan")
