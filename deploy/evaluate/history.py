"""How much more row history knows when a label is learned than it knew when the impression was scored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from deploy.evaluate.figures import Estimate, Judged, blocks_of, difference, estimate
from deploy.evaluate.play import Lifts
from deploy.evaluate.stream import Bools, Floats, Int64s
from model.schema import FeatureSchema

__all__ = ["ALL_FIELDS", "HistoryFigures", "history_figures"]

ALL_FIELDS = "all fields"

# A sum of lifts is scaled before it is turned into a score, so that no two scores become 1: 34 fields add up to 50 and more.
_SCALE = 0.1


class HistoryFigures(NamedTuple):
    """AUC of what the history of one field says alone.

    at_impression  with the counts as they were when the impression was scored
    at_label       with the counts as they were when its label was learned
    leak           the latter less the former, paired
    """

    field: str
    at_impression: Estimate
    at_label: Estimate
    leak: Estimate


def history_figures(schema: FeatureSchema, lifts: Lifts, measured: Int64s, clicked: Bools) -> Iterator[HistoryFigures]:
    """The figures of the sum over all fields, then those of each field.

    Args:
        measured: (M,), the impressions that are judged.
        clicked: (N,), whether each impression was clicked.
    """
    served, learned = (each[measured].astype(np.float64) for each in lifts)
    there = ~np.isnan(learned[:, 0])  # a negative that the join leaves out has no label
    blocks, labels = blocks_of(len(measured)), clicked[measured].astype(np.float64)

    def figures(field: str, at_impression: Floats, at_label: Floats) -> HistoryFigures:
        each = []
        for lift in (at_impression, at_label):
            scores = 1 / (1 + np.exp(-_SCALE * lift[there]))
            judged = Judged(scores, labels[there], np.ones(len(scores)), None, blocks[there])
            each.append(estimate(judged, int(blocks.max()) + 1))
        first, second = each
        return HistoryFigures(field, first.estimate("auc"), second.estimate("auc"), difference([second], [first])["auc"])

    yield figures(ALL_FIELDS, served.sum(axis=1), learned.sum(axis=1))
    for number, spec in enumerate((*schema.singles, *schema.lists)):
        yield figures(spec.name, served[:, number], learned[:, number])
