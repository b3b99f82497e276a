"""What `headrace model compare` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec

from deploy.cli.tables import print_table
from deploy.cli.times import clock, duration

if TYPE_CHECKING:
    from state.comparison import Comparison
    from state.registry import RegistryState
    from state.tracks import Track
    from stream.records.heartbeat import Heartbeat
    from stream.registry.track_operations import TracksSeen

__all__ = ["compared_json", "print_compared"]

_FIGURES = {"log_loss": "log loss", "normalised_entropy": "NE", "auc": "AUC", "calibration": "calibration"}


def compared_json(seen: TracksSeen, name: str | None, now_ms: int) -> dict[str, Any]:
    """Everything that is shown. `name` shows one challenger only.

    Raises:
        RegistryError: there is no such challenger.
    """
    from stream.errors import RegistryError

    serving = seen.main.serving
    others = [track for track in seen.tracks if track.name != serving.track]
    if name is not None:
        if name not in (track.name for track in others):
            names = ", ".join(track.name for track in others) or "there is none"
            raise RegistryError(
                f"track {name!r}: expected a challenger ({names}), found "
                + ("the track that serves." if name == serving.track else "none of that name.")
                + " A trainer makes one: `headrace run trainer --track NAME`."
            )
        others = [track for track in others if track.name == name]
    last = serving.last
    live = [beat for beat in seen.live if beat.track == serving.track]
    return {
        "serving": {
            "track": serving.track,
            "since_ms": None if last is None else last.at_ms,
            "who": None if last is None else last.who,
            "reason": None if last is None else last.reason,
            **_published(seen.states.get(serving.track), now_ms),
            "weights_age_ms": max((beat.weights_age_ms for beat in live if beat.weights_age_ms is not None), default=None),
            "scorers": len(live),
        },
        "challengers": [_challenger(track, seen.states.get(track.name), seen.live, now_ms) for track in others],
    }


def _published(state: RegistryState | None, now_ms: int) -> dict[str, Any]:
    newest = None if state is None else state.versions.get(max(state.versions, default=0))
    withheld = None if state is None else state.withheld
    return {
        "champion": None if state is None else state.champion.version,
        "newest": None if newest is None else newest.version,
        "newest_age_ms": None if newest is None else max(now_ms - newest.created_at_ms, 0),
        "learned_to_ms": None if newest is None else newest.watermark_ms,
        "trainer": None if state is None else state.trainer.who or None,
        "withheld": None if withheld is None else withheld.reason,
    }


def _challenger(track: Track, state: RegistryState | None, live: list[Heartbeat], now_ms: int) -> dict[str, Any]:
    from state.comparison import Comparison, finding_of

    found = Comparison() if state is None else state.comparison
    # What was counted for an earlier share, or beside another track, says nothing of this one.
    current = found if track.share and found.of.split("/")[0] == track.share_operation else Comparison()
    finding = finding_of(current, track.name)
    beats = {beat.worker: shadow for beat in live for shadow in beat.shadows if shadow.track == track.name}
    ages = [each.weights_age_ms for each in beats.values() if each.weights_age_ms is not None]
    return {
        "track": track.name,
        "share": track.share,
        "share_since_ms": track.share_at_ms or None,
        "share_who": track.share_who or None,
        "share_reason": track.share_reason or None,
        **_published(state, now_ms),
        "weights_age_ms": max(ages, default=None),
        "ready": sorted(worker for worker, each in beats.items() if each.version >= 0),
        "problems": {worker: each.problem for worker, each in sorted(beats.items()) if each.problem},
        "comparison": _comparison_json(current, now_ms),
        "verdict": finding.verdict if track.share else "no_share",
        "low": finding.low,
        "high": finding.high,
        "words": finding.words if track.share else _without_share(track.name),
    }


def _without_share(name: str) -> str:
    return f"{name} scores no requests. `headrace model shadow {name} --share 5%` begins a comparison."


def _comparison_json(found: Comparison, now_ms: int) -> dict[str, Any] | None:
    if not found.of:
        return None
    return {
        "against": found.against,
        "since_ms": found.since_ms or None,
        "age_ms": max(now_ms - found.at_ms, 0),
        "impressions": found.impressions,
        "clicks": found.clicks,
        "track": msgspec.to_builtins(found.track),
        "serving": msgspec.to_builtins(found.serving),
        "change": found.change,
        "error": found.error,
        "version": found.version,
    }


def print_compared(document: dict[str, Any]) -> None:
    """Print it for people."""
    serving = document["serving"]
    since = ""
    if serving["since_ms"] is not None:
        since = f" since {clock(serving['since_ms'])} ({serving['who']}: {serving['reason']})"
    click.echo(f"{serving['track']} serves{since}; {_newest(serving)}; {serving['scorers']} live scorers")
    if not document["challengers"]:
        click.echo("There is no challenger. A trainer makes one: `headrace run trainer --track NAME`.")
    for each in document["challengers"]:
        click.echo()
        _print_challenger(each, serving)


def _print_challenger(each: dict[str, Any], serving: dict[str, Any]) -> None:
    share = "no share of the requests"
    if each["share"]:
        share = f"{each['share'] * 100:g} % of the requests since {clock(each['share_since_ms'])} ({each['share_who']}: "
        share += f"{each['share_reason']})"
    click.echo(f"{each['track']}: {share}; {_newest(each)}")
    if each["withheld"] is not None:
        click.echo(f"its gate withholds its versions: {each['withheld']}")
    found = each["comparison"]
    if found is not None and found["impressions"]:
        rows = [
            [track["track"], *(_shown(found[side][figure]) for figure in _FIGURES), _age(track["weights_age_ms"])]
            for side, track in (("serving", serving), ("track", each))
        ]
        print_table(("track", *_FIGURES.values(), "age of weights"), rows, right=(*_FIGURES.values(), "age of weights"))
        click.echo(
            f"{found['impressions']:,.0f} impressions that both have scored, {found['clicks']:,.0f} clicks, counted "
            f"{duration(found['age_ms'])} ago"
        )
    if each["share"]:
        click.echo(f"ready in {len(each['ready'])} of {serving['scorers']} scorers")
    for worker, problem in each["problems"].items():
        click.echo(f"scorer {worker}: {problem}")
    click.echo(each["words"])


def _newest(side: dict[str, Any]) -> str:
    if side["newest"] is None:
        return "no version yet"
    return f"newest version {side['newest']}, {duration(side['newest_age_ms'])} old"


def _age(age_ms: int | None) -> str:
    return "-" if age_ms is None else duration(age_ms)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
