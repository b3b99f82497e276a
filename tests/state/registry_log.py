"""A registry's log in memory, with the operations that decisions are taken by."""

from __future__ import annotations

import shlex

from state import alias_decisions, decisions
from state.changes import Cause, Change
from state.manifest import Manifest
from state.registry import RegistryState, encode_record
from state.settings import SnapshotSettings
from tests.judged import judged

__all__ = ["GATE", "Log", "a_log"]


GATE = SnapshotSettings(good_after_ms=1_000)


class Log:
    """A registry: its state as a reader has it, and its records as the compacted topic keeps them."""

    def __init__(self) -> None:
        self.state = RegistryState()
        self.compacted: dict[str, bytes] = {}
        self.now_ms = 1_000_000
        self.arrived_ms: int | None = None
        """What the broker's clock says; None: what is written is believed."""
        self.count = 0

    def write(self, change: Change) -> object:  # type: ignore[type-arg]
        for key, record in change.records:
            value = encode_record(record)
            assert self.state.apply(key.encode(), value, len(self.compacted), self.arrived_ms) is None
            self.compacted.pop(key, None)
            if value is not None:
                self.compacted[key] = value
        return change.outcome

    def cause(self, reason: str = "why") -> Cause:
        self.count += 1
        return Cause("me", self.now_ms, reason, f"op{self.count}")

    def announce(  # type: ignore[no-untyped-def]
        self, version: int, epoch: int | None = None, *, settings: SnapshotSettings = GATE, loss: float = 0.5, **verdict: object
    ):
        manifest = Manifest(
            version=version,
            epoch=self.state.trainer.epoch if epoch is None else epoch,
            created_at_ms=self.now_ms,
            examples_seen=1_000,
            metrics={"window_examples": 1_000, "window_log_loss": loss, "window_calibration": 1.0},
            verdict=judged(**verdict),
        )
        return self.write(
            decisions.announce(
                self.state, manifest, settings=settings, who="trainer", now_ms=self.now_ms, operation=f"announce{version}"
            )
        )

    def rollback(self, **where: int) -> decisions.Moved:
        target = decisions.rollback_target(self.state, now_ms=self.now_ms, **where)
        return self.write(decisions.rollback(self.state, target, self.cause()))  # type: ignore[return-value]

    def run(self, command: str) -> None:
        """Run an undo command, from its text."""
        words = shlex.split(command)
        assert words[:2] == ["headrace", "snapshot"]
        verb, rest = words[2], words[3:]
        options = {rest[i]: rest[i + 1] for i in range(len(rest) - 1) if rest[i] in ("--reason", "--hold")}
        if verb == "promote":
            hold = True if "--hold" in options else False if "--resume" in rest else None
            change = decisions.promote(
                self.state, int(rest[0]), self.cause(options["--reason"]), hold=hold, hold_reason=options.get("--hold", "")
            )
            self.write(change)
        elif verb == "hold":
            self.write(decisions.hold(self.state, self.cause(options["--reason"])))
        elif verb == "alias":
            cause = self.cause(options["--reason"])
            if rest[0] == "set":
                self.write(alias_decisions.set_alias(self.state, rest[1], int(rest[2]), cause))
            else:
                self.write(alias_decisions.remove_alias(self.state, rest[1], cause))
        else:
            assert verb == "resume"
            self.write(decisions.resume(self.state, self.cause()))

    def served(self) -> tuple[int | None, bool, str]:
        champion = self.state.champion
        return champion.version, champion.hold, champion.hold_reason


def a_log(versions: int = 5, good: tuple[int, ...] = ()) -> Log:
    log = Log()
    log.write(decisions.take_epoch(log.state, who="trainer", now_ms=log.now_ms))
    for version in range(1, versions + 1):
        log.now_ms += 5_000
        log.announce(version)
    log.write(decisions.tag_good(log.state, good, now_ms=log.now_ms))
    return log
