"""How often the rule of `state.canary_rule` is wrong, and after how many clicks it decides, on simulated streams.

    .venv/bin/python bench/canary.py              # about 3 minutes on one core
    .venv/bin/python bench/canary.py --runs 20    # too few for a result

Each impression has a true logit. Champion, model in training and candidate see it with errors of their own. An error's size is
chosen such that the expected log loss differs by a given part. The last line is one JSON object.
"""

from __future__ import annotations

import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import report
from state.canary import Canary, Mode
from state.canary_evidence import Evidence
from state.canary_rule import judge_canary

FloatArray = npt.NDArray[np.float64]

SPREAD = 1.2  # of true logits
NOISE = 0.35  # of the champion's logits around the true ones: some 1.5 % of its log loss
STEP_CLICKS = 10  # expected clicks of the candidate's share between two looks
CHAMPION_ROWS = 4  # impressions of the champion's side of a canary, for each of the candidate's
MAX_CLICKS = 6_000  # of the candidate: then the time is over


class Candidate(NamedTuple):
    """A candidate: the log loss that it is expected to lose, a shift of its logits, and of the logits of what it shows."""

    worse: float = 0.0
    shift: float = 0.0
    shows: float = 0.0


CANDIDATES = {
    "as good": Candidate(),
    "1 % better": Candidate(worse=-0.01),
    "1 % worse, the margin": Candidate(worse=0.01),
    "2 % worse": Candidate(worse=0.02),
    "5 % worse": Candidate(worse=0.05),
    "predicts 30 % too many clicks": Candidate(shift=0.26),
    "shows what is clicked 20 % less": Candidate(shows=-0.22),
}


class Ended(NamedTuple):
    """How a trial ended, and after how many clicks of the candidate."""

    outcome: str
    clicks: float


def trial(candidate: Candidate, mode: Mode, click_rate: float, seed: int) -> Ended:
    """Play one trial to its end."""
    rng = np.random.default_rng(seed)
    base = _base(click_rate)
    noise = _noise(base, candidate.worse)
    canary = Canary(mode=mode, version=2, share=0.05, at_ms=0, operation="trial")
    evidence = Evidence(of="trial", mode=mode)
    rows = max(int(STEP_CLICKS / click_rate), 1)
    while True:
        truth = base + candidate.shows + SPREAD * rng.standard_normal(rows)
        clicked = _clicked(rng, truth)
        champions, live = _champion(rng, truth)
        candidates = truth + noise * (0.5 * (champions - truth) / NOISE + 0.866 * rng.standard_normal(rows)) + candidate.shift
        ones = np.ones(rows)
        if mode == "shadow":
            evidence.add_pairs(clicked, ones, candidates, champions)
        else:
            evidence.add_side(clicked, ones, candidates, live, is_candidate=True)
            truth = base + SPREAD * rng.standard_normal(rows * CHAMPION_ROWS)
            champions, live = _champion(rng, truth)
            evidence.add_side(_clicked(rng, truth), np.ones(len(truth)), champions, live, is_candidate=False)
        if evidence.close_stretch():
            over = canary.thresholds.limit_ms if evidence.clicks >= MAX_CLICKS else 0
            verdict = judge_canary(canary, evidence, over)
            if verdict.outcome:
                return Ended(verdict.outcome, evidence.clicks)


def _champion(rng: np.random.Generator, truth: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Logits of the champion, and of the model in training, which has learned a little more."""
    error = rng.standard_normal(len(truth))
    later = 0.95 * error + 0.31 * rng.standard_normal(len(truth))
    return truth + NOISE * error, truth + NOISE * later


def _clicked(rng: np.random.Generator, truth: FloatArray) -> FloatArray:
    return (rng.random(len(truth)) < _sigmoid(truth)).astype(np.float64)


def _sigmoid(logits: FloatArray) -> FloatArray:
    return np.asarray(1 / (1 + np.exp(-logits)))


@lru_cache
def _base(click_rate: float) -> float:
    """The mean of true logits with this share of clicks."""
    logits = SPREAD * np.random.default_rng(0).standard_normal(200_000)
    low, high = -12.0, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _sigmoid(logits + middle).mean() < click_rate else (low, middle)
    return low


@lru_cache
def _noise(base: float, worse: float) -> float:
    """The size of the candidate's error with which its expected log loss is worse by a part than the champion's."""
    if worse == 0:
        return NOISE
    rng = np.random.default_rng(0)
    truth = base + SPREAD * rng.standard_normal(400_000)
    error, chance = rng.standard_normal(len(truth)), _sigmoid(truth)

    def loss(noise: float) -> float:
        logits = truth + noise * error
        return float((np.logaddexp(0, logits) - chance * logits).mean())

    wanted = (1 + worse) * loss(NOISE)
    low, high = 0.0, 3.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(middle) < wanted else (low, middle)
    return low


@click.command()
@click.option("--runs", default=400, show_default=True, help="Trials of each kind.")
@click.option("--click-rate", default=0.03, show_default=True)
def main(runs: int, click_rate: float) -> None:
    """Print a table, and one JSON object."""
    document: dict[str, object] = {"runs": runs, "click_rate": click_rate}
    modes: tuple[Mode, Mode] = ("shadow", "canary")
    for mode in modes:
        for name, candidate in CANDIDATES.items():
            if candidate.shows and mode == "shadow":
                continue
            ended = [trial(candidate, mode, click_rate, seed) for seed in range(runs)]
            counts = Counter(each.outcome for each in ended)
            clicks = float(np.median([each.clicks for each in ended]))
            shares = {outcome: counts[outcome] / runs for outcome in ("promoted", "taken_back", "undecided")}
            click.echo(
                f"{mode:7s} {name:32s} "
                + "  ".join(f"{outcome} {share:6.1%}" for outcome, share in shares.items())
                + f"  after {clicks:,.0f} clicks (median)"
            )
            document[f"{mode}: {name}"] = {**shares, "median_clicks": clicks}
    report(**document)


if __name__ == "__main__":
    main()
