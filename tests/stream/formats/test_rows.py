"""A row without the field `features`: what is a feature of it, and what stands beside."""

from __future__ import annotations

import json

from stream.formats.rows import json_row, row_json

ROW = {"impression_id": "i", "timestamp": 1, "user": "u", "price": 1.5, "propensity": 0.125, "score": 0.5, "delta": 3}


def test_what_the_contract_names_stands_beside_the_features():
    expected = {"impression_id": "i", "timestamp": 1, "propensity": 0.125, "score": 0.5, "delta": 3}
    for event in (row_json(dict(ROW)), json_row(json.dumps(ROW).encode())):
        assert json.loads(event) == {**expected, "features": {"user": "u", "price": 1.5}}
