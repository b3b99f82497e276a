"""The figures of `bench/real_time.py`: scores as served, on a stream whose true probabilities are known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deploy.evaluate.labels import Labels, at_once
from deploy.evaluate.play import play
from deploy.evaluate.stream import Floats, Stream
from deploy.feeding.simulation import Simulation, Truth
from model.learner import Learner
from model.settings import ModelSettings

__all__ = ["Seen", "Served", "figures", "ideal_in_band", "stretches", "within_window"]

STRETCH_MS = 30_000
YOUNG_MS = 60_000
POOL = 2_000  # impressions of young items that are judged together: some 100 clicks at a CTR of 5 %
BAND = (0.9, 1.1)
YOUNG_BAND = (0.7, 1.4)
SETTLED_MS = 60_000  # after the first labels


@dataclass(frozen=True, slots=True)
class Served:
    """Scores of a stream's N impressions as served.

    scores           (N,): NaN for an impression that was shown without a score
    champion_ms      (N,): event time at which the version that answered was captured; -1 without a score
    first_labels_ms  event time at which the first labels were sent
    """

    scores: npt.NDArray[np.float32]
    champion_ms: npt.NDArray[np.int64]
    first_labels_ms: int


def within_window(simulation: Simulation, window_ms: int) -> float:
    """Share of all clicks that come within the window, for lognormal delays. A model can only learn of these clicks."""
    if simulation.delay != "lognormal":
        raise ValueError(f"delay: expected lognormal, found {simulation.delay}")
    return float(_lognormal_cdf(np.array([float(window_ms)]), simulation.delay_ms)[0])


def _lognormal_cdf(delays_ms: Floats, mean_ms: float) -> Floats:
    z = (np.log(np.maximum(delays_ms, 1e-9)) - (math.log(mean_ms) - 0.5)) / math.sqrt(2)
    return np.array([0.5 * (1 + math.erf(each)) for each in z.tolist()])


def figures(
    stream: Stream, simulation: Simulation, served: Served, window_ms: int, model: ModelSettings, *, reference: bool = True
) -> dict[str, float]:
    """The figures, from one minute after the first labels on. A stretch without scores is out of band.

    Args:
        reference: also train a learner that knows each label at once, for `ne_lost_share`.
    """
    truth = stream.probabilities * within_window(simulation, window_ms)
    measured = stream.shown_ms >= served.first_labels_ms + SETTLED_MS
    scored = measured & ~np.isnan(served.scores)
    ratios = stretches(stream, served.scores, truth, served.first_labels_ms + SETTLED_MS)
    young = np.flatnonzero(scored & (stream.ages_ms >= 0) & (stream.ages_ms < YOUNG_MS))
    pools = [rows for rows in np.split(young, np.arange(POOL, len(young), POOL)) if len(rows) == POOL]
    young_ratios = np.array([served.scores[rows].mean() / truth[rows].mean() for rows in pools])
    answered = measured & (served.champion_ms >= 0)
    ages_ms = stream.shown_ms[answered] - served.champion_ms[answered]
    found = {
        "in_band_share": _share(ratios, BAND),
        "new_items_in_band_share": _share(young_ratios, YOUNG_BAND),
        "champion_age_max_s": round(float(ages_ms.max()) / 1_000, 1) if len(ages_ms) else math.inf,
        "stretches": len(ratios),
        "new_items_pools": len(young_ratios),
        "ratio_lowest": _rounded(np.nanmin(ratios)) if np.isfinite(ratios).any() else math.nan,
        "ratio_highest": _rounded(np.nanmax(ratios)) if np.isfinite(ratios).any() else math.nan,
        "ratio_spread": _rounded(np.nanstd(ratios)) if np.isfinite(ratios).any() else math.nan,
        "scored_share": _rounded(scored.sum() / max(1, measured.sum())),
    }
    if reference:
        known = play(stream, at_once(stream, window_ms), Learner(stream.schema, model, device="cpu")).scores[0]
        best, ours = (1 - normalised_entropy(scores[scored], truth[scored]) for scores in (known, served.scores))
        found["ne_lost_share"] = _rounded(1 - ours / best)
        found["reference_ne"] = _rounded(1 - best)
    return found


def stretches(stream: Stream, scores: npt.NDArray[np.float32], truth: Floats, from_ms: int) -> Floats:
    """Mean prediction over mean truth, for each whole stretch of 30 s from `from_ms` on; NaN for a stretch without scores."""
    ends_ms = np.arange(from_ms, int(stream.shown_ms[-1]) + 1, STRETCH_MS)
    cuts = np.searchsorted(stream.shown_ms, ends_ms)
    ratios = []
    for start, stop in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        scored = ~np.isnan(scores[start:stop])
        ratio = scores[start:stop][scored].mean() / truth[start:stop][scored].mean() if scored.any() else np.nan
        ratios.append(ratio)
    return np.array(ratios)


def normalised_entropy(scores: npt.NDArray[np.float32], truth: Floats) -> float:
    """Normalised entropy with the expected log loss under the truth, which has no noise of single labels."""
    p = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    mean = truth.mean()
    loss = -(truth * np.log(p) + (1 - truth) * np.log1p(-p)).mean()
    return float(loss / -(mean * np.log(mean) + (1 - mean) * np.log1p(-mean)))


@dataclass(frozen=True, slots=True)
class Seen:
    """What an observer behind a join sees of a stream. It answers by versions, as a scorer does.

    labels    the stream's labels, in the order in which they are sent
    hold_ms   how long first labels are held
    every_ms  time between versions
    late_ms   time from the capture of a version until it answers
    """

    labels: Labels
    hold_ms: int
    every_ms: int
    late_ms: int


def ideal_in_band(stream: Stream, simulation: Simulation, from_ms: int, seen: Seen | None = None) -> float:
    """`in_band_share` of an ideal observer, which is the most that a learner can be expected to reach.

    The observer knows all true weights except the hour's effect, and the distributions of this effect and of the delays. It
    answers with its posterior mean.

    Args:
        seen: the labels that the observer gets, and when. None: it sees each click when it happens, and answers anew each
        second.
    """
    hours = stream.shown_ms // simulation.hour_ms
    known = stream.probabilities / np.exp(Truth(simulation).hour_effects[hours % 24])
    grid = np.linspace(-1.0, 1.0, 401)
    effects = np.exp(grid)
    prior = -0.5 * (grid / max(simulation.hour_effect, 1e-6)) ** 2
    delays_ms = np.arange(0, simulation.hour_ms + 1_000, 50)
    arrived = _lognormal_cdf(delays_ms.astype(np.float64), simulation.delay_ms)
    every_ms = 1_000 if seen is None else seen.every_ms
    scores = np.empty(len(stream), np.float32)
    for hour in np.unique(hours).tolist():
        rows = np.flatnonzero(hours == hour)
        shown_ms, clicked_ms, odds = stream.shown_ms[rows], stream.clicked_ms[rows], known[rows]
        if seen is not None:
            of_hour = np.flatnonzero(hours[seen.labels.rows] == hour)  # in the order of known_ms
            out_ms, clicks_out = seen.labels.known_ms[of_hour], np.cumsum(seen.labels.labels[of_hour])
            first_ms = out_ms[~seen.labels.corrects[of_hour]]  # first labels of the hour's impressions, in their order
        answers = (shown_ms - shown_ms[0]) // every_ms
        for answer in np.unique(answers).tolist():
            at = np.flatnonzero(answers == answer)
            now_ms = int(shown_ms[at[0]])
            if seen is None:
                before = slice(0, int(at[0]))
                age_ms = now_ms - shown_ms[before]
                clicks = float(((clicked_ms[before] >= 0) & (clicked_ms[before] <= now_ms)).sum())
            else:
                now_ms -= seen.late_ms
                before = slice(0, int(np.searchsorted(first_ms, now_ms, side="right")))
                age_ms = np.maximum(now_ms - shown_ms[before], seen.hold_ms)
                labels = int(np.searchsorted(out_ms, now_ms, side="right"))
                clicks = float(clicks_out[labels - 1]) if labels else 0.0
            expected = (odds[before] * np.interp(age_ms, delays_ms, arrived)).sum()
            weights = prior + clicks * grid - effects * expected  # log posterior, with Poisson counts since clicks are rare
            weights = np.exp(weights - weights.max())
            scores[rows[at]] = odds[at] * (weights @ effects) / weights.sum()
    return _share(stretches(stream, scores, stream.probabilities, from_ms), BAND)


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The figures over several seeds: means, and the maximum of `champion_age_max_s`."""
    return {
        name: max(row[name] for row in rows) if name == "champion_age_max_s" else _rounded(np.mean([row[name] for row in rows]))
        for name in rows[0]
    }


def _share(ratios: Floats, band: tuple[float, float]) -> float:
    return _rounded(np.mean((ratios >= band[0]) & (ratios <= band[1]))) if len(ratios) else math.nan


def _rounded(value: float | np.floating) -> float:
    return round(float(value), 4)
