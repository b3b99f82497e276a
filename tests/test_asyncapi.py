"""The payloads in docs/asyncapi.yaml have the fields of the structs that are sent, and the types that msgspec gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from headrace.scores import AnswerError
from state.alias_records import Alias, AliasMove, Deletion, TagChange, VersionTags
from state.canary import Canary, Progress, Side, Thresholds
from state.comparison import Comparison, ServedSide
from state.gate_release import GateRelease
from state.gate_report import GateReport
from state.registry import Champion, Move, TrainerLease, VersionRecord
from state.rewinds import Rewind, Rewinds, SkippedRange
from state.tracks import Serving, Track, Turn
from stream.records import replay
from stream.records.answer import Answer, Problem
from stream.records.delta import DeltaHeader
from stream.records.heartbeat import Heartbeat, ShadowBeat

PAGE: dict[str, Any] = yaml.safe_load((Path(__file__).resolve().parents[1] / "docs" / "asyncapi.yaml").read_text())
# The page's schema → the struct that is encoded.
PAYLOADS = {
    "deltaHeader": DeltaHeader,
    "heartbeat": Heartbeat,
    "replayReceipt": replay._Receipt,
    "scoreAnswer": Answer,
    "versionRecord": VersionRecord,
    "gateReport": GateReport,
    "championRecord": Champion,
    "championMove": Move,
    "trainerRecord": TrainerLease,
    "aliasRecord": Alias,
    "aliasMove": AliasMove,
    "tagsRecord": VersionTags,
    "tagChange": TagChange,
    "deletionRecord": Deletion,
    "rewindsRecord": Rewinds,
    "rewind": Rewind,
    "skippedRange": SkippedRange,
    "canaryRecord": Canary,
    "gateRelease": GateRelease,
    "canaryThresholds": Thresholds,
    "canaryProgress": Progress,
    "canarySide": Side,
    "trackRecord": Track,
    "servingRecord": Serving,
    "servingTurn": Turn,
    "comparisonRecord": Comparison,
    "servedSide": ServedSide,
    "shadowBeat": ShadowBeat,
}


def shape(schema: dict[str, Any], document: dict[str, Any]) -> Any:
    """The types in a JSON schema: names of types, lists of shapes, fields with their shapes; no descriptions or limits."""
    if "$ref" in schema:
        target: Any = document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return shape(target, document)
    if "enum" in schema:
        return sorted(schema["enum"])
    choices = schema.get("anyOf") or schema.get("oneOf")
    if "enum" in schema:  # msgspec gives a Literal no type
        return sorted(schema["enum"])
    if choices is None:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        choices = [{**schema, "type": kind} for kind in kinds]
    found = [
        {"object": {name: shape(each, document) for name, each in choice.get("properties", {}).items()}}
        if choice.get("type") == "object"
        else {"array": [shape(each, document) for each in choice.get("prefixItems") or [choice["items"]]]}
        if choice.get("type") == "array"
        else choice["type"]
        if "type" in choice
        else shape(choice, document)
        for choice in choices
    ]
    return found[0] if len(found) == 1 else sorted(found, key=str)


@pytest.mark.parametrize("name", PAYLOADS)
def test_payloads(name: str) -> None:
    (reference,), components = msgspec.json.schema_components([PAYLOADS[name]])
    document = {"$defs": components}
    page, code = PAGE["components"]["schemas"][name], components[reference["$ref"].rpartition("/")[2]]
    if PAYLOADS[name].__struct_config__.omit_defaults:  # then null, as a default, is never written
        for field in code["properties"].values():
            if "default" in field and field["default"] is None:
                field["anyOf"].remove({"type": "null"})
    assert shape(page, PAGE) == shape(code, document)
    assert set(page.get("required", ())) <= set(code["required"]), "the page promises a field that the code may leave out"


def test_the_client_reads_an_error_as_the_scorer_writes_it() -> None:
    _, written = msgspec.json.schema_components([Problem])
    _, read = msgspec.json.schema_components([AnswerError])
    assert read["AnswerError"]["properties"].keys() == written["Problem"]["properties"].keys()
