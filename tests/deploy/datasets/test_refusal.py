"""Rows that do not fit: the message names the file, the row and the column, what was expected, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploy.datasets import Columns
from tests.deploy.datasets.files import NO_TIME, T, refused, write_lines

NO_LABEL = "Without a label nobody knows whether it was clicked: fill it, or leave the row out."


NO_COUNT = "Counts and ratings are no labels: make 0 and 1 of them first."


ISO = "a time as 2024-05-01T10:00:00.123Z (the zone may be an offset, or left out for UTC)"


OWN_ID = "map another column (--column id=NAME), or take the rows' numbers (--column id=)."


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (
            [{"ts": T, "f": 1}],
            Columns(),
            ": expected a column 'timestamp' (timestamp), found ts, f. Map another one: --column timestamp=NAME.",
        ),
        (
            [{"timestamp": T, "f": 1}],
            Columns(),
            ": expected a column 'clicked' (clicked), found f. Map another one: --column clicked=NAME.",
        ),
        (
            [{"timestamp": T, "f": 1}],
            Columns(clicked=None),
            ": expected a column of clicks or of click times, found neither. Map one of them: --column clicked=NAME, "
            "--column click_timestamp=NAME.",
        ),
        (
            [{"timestamp": T, "clicked": 0}],
            Columns(),
            ": expected features beside the mapped columns, found none. Map fewer columns, or drop fewer.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1}],
            Columns(item="sku"),
            ": expected a column 'sku' (user, item or candidate feature), found f. Name another one.",
        ),
        (
            [{"timestamp": "noon", "clicked": 0, "f": 1}],
            Columns(),
            f", column timestamp, row 1: expected {ISO}, found 'noon'. Write it so, or as a number (--unit).",
        ),
        (
            [
                {"timestamp": "2023-11-14T22:13:20Z", "clicked": 0, "f": 1},
                {"timestamp": "2023-02-30T00:00:00Z", "clicked": 0, "f": 1},
            ],
            Columns(),
            f", column timestamp, row 2: expected {ISO}, found '2023-02-30T00:00:00Z'. Write it so, or as a number (--unit).",
        ),
        (
            [{"timestamp": "2023-11-14", "clicked": 0, "f": 1}],
            Columns(),
            f", column timestamp, row 1: expected {ISO}, found '2023-11-14'. {NO_TIME}",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1}, {"timestamp": None, "clicked": 0, "f": 1}],
            Columns(),
            ", column timestamp, row 2: expected a time in every row, found null. Fill it, or leave the row out.",
        ),
        (
            [{"timestamp": T + 9, "clicked": 1, "at": T + 5, "f": 1}],
            Columns(click_timestamp="at"),
            ", column at, row 1: expected clicks at or after their impressions, found one 4 ms before. Fix the row, or "
            "check --unit.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "at": T + 5, "f": 1}],
            Columns(click_timestamp="at"),
            ", column at, row 1: expected no click time where the label is 0, found one. Decide for one of them: "
            "--column clicked= takes "
            "the times, --drop at the labels.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": {"a": 1}}],
            Columns(),
            ", column f, row 1: expected a string, a number or a list of strings, found an object. Make columns of its "
            "parts, or leave it "
            "out: --drop f.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": [["a"]]}],
            Columns(),
            ", column f, row 1: expected a string, a number or a list of strings, found a list of lists or objects. "
            "Make columns of its "
            "parts, or leave it out: --drop f.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": [1.5]}],
            Columns(),
            ", column f: expected lists of strings or whole numbers, found the type list<item: double>. Lists hold "
            "strings: make columns "
            "of its parts, or leave it out: --drop f.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": ["a"]}, {"timestamp": T, "clicked": 0, "f": ["a", None]}],
            Columns(),
            ", column f, row 2: expected lists without null, found null. Leave it out of the list.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1}, {"timestamp": T, "clicked": 0, "f": "x"}],
            Columns(),
            ", column f, row 2: expected values of one type, found a string ('x') after a whole number (1). Write them "
            "all as strings, say, "
            "or leave the column out: --drop f.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 2**70}],
            Columns(),
            ", column f, row 1: expected whole numbers of at most 64 bits, found 1180591620717411303424. Write longer "
            "ones as strings, or "
            "leave the column out: --drop f.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 2**53 + 1}, {"timestamp": T, "clicked": 0, "f": 0.5}],
            Columns(),
            ", column f, row 1: expected numbers that a float holds, since the column has fractions, found "
            "9007199254740993. Write the "
            "column as strings.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1, "impression_id": 10**39}],
            Columns(),
            ", column impression_id, row 1: expected whole numbers of at most 38 digits, found one of 40 digits. Write "
            "it as a string.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": "2023-11-14T22:13:20Z"}],
            Columns(),
            ", column f: expected strings, numbers or lists of strings, found a time. A time is no feature: map it (--column "
            "click_timestamp=f), leave it out (--drop f), or convert it.",
        ),
        (
            [{"timestamp": T // 1_000, "clicked": 0, "f": 1}],
            Columns(),
            ", column timestamp, row 1: expected times of the last 40 years in ms, found 1700000000, which looks like "
            "seconds. Pass "
            "--unit s.",
        ),
        (
            [{"timestamp": T * 1_000, "clicked": 0, "f": 1}],
            Columns(),
            ", column timestamp, row 1: expected times of the last 40 years in ms, found 1700000000000000, which looks "
            "like microseconds. "
            "Pass --unit us.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1}],
            Columns(unit="s"),
            ", column timestamp, row 1: expected times of the last 40 years in s, found 1700000000000, which is "
            "plausible in ms. Pass "
            "--unit ms.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1}, {"timestamp": 5, "clicked": 0, "f": 1}],
            Columns(),
            ", column timestamp, row 2: expected times of the last 40 years in ms, found 5. Fix the row, or leave it out.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1, "at": 5}],
            Columns(clicked=None, click_timestamp="at"),
            ", column at, row 1: expected times of the last 40 years in ms, found 5. Fix the row, or leave it out.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1}, {"timestamp": T, "clicked": None, "f": 1}],
            Columns(),
            f", column clicked, row 2: expected 0 or 1 in every row, found null. {NO_LABEL}",
        ),
        (
            [{"timestamp": T, "clicked": 2, "f": 1}],
            Columns(),
            f", column clicked, row 1: expected 0 or 1 in every row, found 2. {NO_COUNT}",
        ),
        (
            [{"timestamp": T, "clicked": -0.5, "f": 1}],
            Columns(),
            f", column clicked, row 1: expected 0 or 1 in every row, found -0.5. {NO_COUNT}",
        ),
        (
            [{"timestamp": T, "clicked": "yes", "f": 1}],
            Columns(),
            ", column clicked, row 1: expected labels that are true and false, or 1 and 0, found the text 'yes'. Convert the "
            "column, or map another one.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1, "impression_id": x} for x in ("a", "b", "a")],
            Columns(),
            ", column impression_id, row 3: expected ids that are unique, found 'a' again, first in row 1. An "
            "impression id is used once: " + OWN_ID,
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1, "impression_id": x} for x in ("a", None)],
            Columns(),
            f", column impression_id, row 2: expected an id in every row, found null. Fill it, {OWN_ID}",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1, "impression_id": x} for x in ("a", "")],
            Columns(),
            ", column impression_id, row 2: expected an id in every row, found an empty string. Fill it, or map "
            "another column.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": 1, "impression_id": 1.5}],
            Columns(),
            ", column impression_id, row 1: expected whole numbers below 2^53, where the type is a float, found 1.5. "
            "Write ids as integers "
            "or strings.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "features": {"f": 1}, "score": 1.5}],
            Columns(),
            ", column score, row 1: expected a probability, found 1.5. Fix it, or leave it out: --column score=.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "features": {"f": 1}, "model_version": -1}],
            Columns(),
            ", column model_version, row 1: expected a version number, 0 or more, found -1. Fix it, or leave it out: --column "
            "model_version=.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "features": {"f": 1}, "delta": 0.5}],
            Columns(),
            ", column delta, row 1: expected a number of deltas, 0 or more, found 0.5. Fix it, or leave it out: "
            "--column delta=.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "features": {"f": 1}, "f": 2}],
            Columns(),
            ": expected one feature of the name 'f', found a column and a member of `features`. Leave both out (--drop "
            "f), or rename one.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "features": {"f": 1}}, {"timestamp": T, "clicked": 0, "features": None}],
            Columns(),
            ", column features, row 2: expected an object of features, found null. Fix the line.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "f": "x" * 2_000_000}],
            Columns(),
            ", row 1: expected events of at most 1048588 bytes (topics.max_message_bytes), found 2000006. Leave "
            "columns out (--drop), or "
            "raise topics.max_message_bytes.",
        ),
        (
            [{"timestamp": T, "clicked": 0, "": 1}],
            Columns(),
            ": expected features with names, found an empty name. Rename the column.",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, rows: list[dict[str, Any]], columns: Columns, message: str) -> None:
    file = write_lines(tmp_path / "log.jsonl", rows)
    assert refused(file, columns=columns) == f"log.jsonl{message}"
