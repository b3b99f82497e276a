"""The view of `headrace snapshot watch`: a table that changes in place, lines for a file, or JSON for programs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import click
import msgspec

from deploy.cli.common import on_terminal
from deploy.cli.snapshot_view import canary_json
from deploy.cli.times import clock, duration
from state.canary import CanaryOutcome, Side
from stream.errors import RegistryError
from stream.registry.canary_operations import CanaryOperations
from stream.registry.operations import Seen

__all__ = ["seen_json", "watch_trial"]


def seen_json(seen: Seen) -> dict[str, Any]:
    """What one line of `headrace snapshot watch --format json` says."""
    return {
        **(canary_json(seen.state.canary) or {}),
        "champion": seen.state.champion.version,
        "scorers": [
            {
                "worker": beat.worker,
                "ready": beat.candidate == seen.state.canary.version,
                "problem": beat.candidate_problem or None,
            }
            for beat in seen.live
        ],
    }


async def watch_trial(operations: CanaryOperations, timeout_ms: int | None, *, json: bool) -> CanaryOutcome | None:
    """Show the trial until it ends, and return its outcome; None when the time is over.

    Raises:
        RegistryError: there never was a trial.
    """
    until = None if timeout_ms is None else time.monotonic() + timeout_ms / 1_000
    shown: dict[str, Any] = {}
    view = _Lines() if json or not on_terminal() else _Table()
    async with contextlib.aclosing(operations.watch()) as looks:
        with view:
            async for seen in looks:
                canary = seen.state.canary
                if not canary.version:
                    raise RegistryError(
                        "watch: expected a shadow or canary, found that there was none yet. Begin one: "
                        "`headrace snapshot canary VERSION --share 5%`."
                    )
                document = seen_json(seen)
                if document != shown:
                    shown = document
                    if json:
                        click.echo(msgspec.json.encode(document))
                    else:
                        view.show(seen)
                if canary.outcome:
                    return canary.outcome
                if until is not None and time.monotonic() >= until:
                    return None
    raise asyncio.CancelledError


class _Lines:
    """One line for each change."""

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def show(self, seen: Seen) -> None:
        """Print what has changed."""
        click.echo("  ".join(f"{name}: {value}" for name, value in _pairs(seen)))


class _Table:
    """A table that changes in place. The last state stays on the terminal."""

    def __enter__(self) -> _Table:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(console=Console(), refresh_per_second=4)
        self._live.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._live.__exit__(*exc)

    def show(self, seen: Seen) -> None:
        """Show this state instead of the one before."""
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        for name, value in _pairs(seen):
            table.add_row(name, Text(value))
        self._live.update(table)


def _pairs(seen: Seen) -> list[tuple[str, str]]:
    state, canary = seen.state, seen.state.canary
    champion = "none" if state.champion.version is None else f"version {state.champion.version}"
    pairs = [
        (canary.mode, f"version {canary.version}, {canary.share * 100:g} % of the requests"),
        ("champion", champion),
        ("since", f"{clock(canary.at_ms)} by {canary.who}: {canary.reason}"),
    ]
    progress = canary.progress
    if progress is None:
        pairs.append(("so far", "no labelled example yet"))
    else:
        pairs += [("candidate's", _side(progress.candidate)), ("champion's", _side(progress.champion))]
        if progress.change is not None and progress.error is not None:
            pairs.append(("log loss", f"{progress.change * 100:+.2f} % ± {progress.error * 100:.2f} % against the champion"))
        if not canary.outcome:
            pairs.append(("so far", progress.verdict))
    ready = [beat.worker for beat in seen.live if beat.candidate == canary.version]
    if canary.outcome:
        took = duration(max(canary.ended_at_ms - canary.at_ms, 0))
        pairs.append((canary.outcome.replace("_", " "), f"after {took}, by {canary.ended_who}: {canary.ended_reason}"))
    else:
        pairs.append(("ready in", f"{len(ready)} of {len(seen.live)} scorers ({', '.join(ready) or 'none'})"))
        pairs += [(beat.worker, beat.candidate_problem) for beat in seen.live if beat.candidate_problem]
    return pairs


def _side(side: Side) -> str:
    words = f"{side.clicks:,.0f} clicks of {side.examples:,.0f} impressions"
    if side.log_loss is not None and side.log_loss_error is not None:
        words += f", log loss {side.log_loss:.5f} ± {side.log_loss_error:.5f}"
    if side.calibration is not None:
        words += f", calibration {side.calibration:.3f}"
    return words
