"""Evaluation without Kafka: the trainer's own code over a data set, each impression scored as it would have been served.

`stream`   impressions of a data set or of a simulation, decoded for one schema
`labels`   the labels of a stream as the join sends them, and when the trainer has them
`play`     one pass: learns the labels and scores the impressions, each at its own time
`figures`  AUC, normalised entropy and calibration with confidence intervals, alone and paired
`groups`   which impressions are judged together: top values of a field, rare values, deciles, pieces of time
`runs`     several runs of one data set, each with its own settings, over one or more seeds
`report`   the results as a document, and as tables
"""

from __future__ import annotations
