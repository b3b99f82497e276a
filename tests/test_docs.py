"""The pages say what the code does, and the other way round."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import yaml

from deploy.docs import metrics, pages
from headrace.events import encode_click, encode_impression, encode_request
from state.chain import REFUSALS
from state.held_click import HeldClick
from stream.join.plan import Plan
from stream.records.dead_letter import REASONS, DeadLetter
from stream.records.delta import DELTA_PROBLEMS
from stream.records.example import CORRECTION, FIRST, Example
from stream.records.heartbeat import Heartbeat
from stream.settings import TopicSettings
from stream.topics.contract import topic_contracts
from tests.stream.join.written import written

ROOT = Path(__file__).resolve().parents[1]
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "headrace.json"
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
ASYNCAPI: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "asyncapi.yaml").read_text())


def anchor_of(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def schema(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}", "components": ASYNCAPI["components"]}


@pytest.mark.parametrize("name", sorted(pages()))
def test_generated_pages_are_up_to_date(name: str) -> None:
    assert (ROOT / name).read_text() == pages()[name], "run `make docs`"


def test_asyncapi_has_every_topic_and_no_other() -> None:
    contracts = {contract.name: contract for contract in topic_contracts(TopicSettings())}
    channels = {channel["address"]: channel for channel in ASYNCAPI["channels"].values()}
    assert channels.keys() == contracts.keys()
    for name, channel in channels.items():
        binding = channel["bindings"]["kafka"]
        assert ",".join(binding["topicConfiguration"]["cleanup.policy"]) == contracts[name].configs["cleanup.policy"]


def test_asyncapi_references_resolve() -> None:
    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                target: Any = ASYNCAPI
                for part in node["$ref"].removeprefix("#/").split("/"):
                    target = target[part]
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(ASYNCAPI)


def test_what_the_client_sends_is_what_asyncapi_says() -> None:
    _, impression = encode_impression("i", 1_700_000_000_005, {"a": "x", "b": 1.5, "c": ["d"], "e": None}, 0.5, 3)
    _, click = encode_click("i", 1_700_000_000_006)
    _, request = encode_request("r", {"u": "1"}, [("a", {"x": 1})], 1_700_000_000_009)
    for name, value in (("impression", impression), ("click", click), ("scoreRequest", request)):
        jsonschema.validate(msgspec.json.decode(value), schema(name))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"impression_id": "i", "timestamp": "5", "features": {}}, schema("impression"))


def test_headers_are_what_asyncapi_says() -> None:
    kinds = ((-1, FIRST, -1), (9, FIRST, -1), (9, CORRECTION, 12))
    examples = [Example(b"i", b"{}", 5, 7, click_ms, kind, arrived_ms) for click_ms, kind, arrived_ms in kinds]
    plan = Plan(examples=examples, left_out=[3, 1, 2], held={(5, 9): HeldClick(11, 12), (6, 10): HeldClick(12)})
    for rate in (1.0, 0.05):
        for key, value, headers in written(plan, rate):
            name = {b"left_out": "leftOut", b"matched": "matched"}.get(dict(headers)["kind"] or b"", "example")
            jsonschema.validate({name: value.decode() for name, value in headers}, schema(f"{name}Headers"))
            if key is None:
                jsonschema.validate(msgspec.json.decode(value or b""), schema(name))
    letter = DeadLetter("orphan_click", "text", "$", "clicks", 0, 3, b"k", b"v")
    jsonschema.validate({name: value.decode() for name, value in letter.out_headers()}, schema("deadLetterHeaders"))


def test_heartbeats_are_what_asyncapi_says() -> None:
    beat = Heartbeat(worker="w", version=-1, since_ms=0, host="h", registry_offset=4, at_ms=9, fallback_of=3)
    jsonschema.validate(msgspec.json.decode(msgspec.json.encode(beat)), schema("heartbeat"))
    assert ASYNCAPI["components"]["schemas"]["heartbeat"]["properties"].keys() == set(Heartbeat.__struct_fields__)


def test_every_reason_code_is_documented() -> None:
    page = (ROOT / "docs" / "events.md").read_text()
    table = dict(re.findall(r"^\| `([a-z_0-9]+)` \| (.+) \|$", page.split("| reason | what it says |")[1], re.MULTILINE))
    assert table == REASONS
    assert set(ASYNCAPI["components"]["schemas"]["deadLetterHeaders"]["properties"]["reason"]["enum"]) == set(REASONS)


def test_every_problem_of_a_delta_is_documented() -> None:
    page = (ROOT / "docs" / "events.md").read_text()
    rows = page.split("| problem | what it says |")[1].split("\n\n")[0]
    assert dict(re.findall(r"^\| `([a-z_0-9]+)` \| (.+) \|$", rows, re.MULTILINE)) == DELTA_PROBLEMS


def test_every_reason_to_refuse_a_delta_is_documented() -> None:
    page = (ROOT / "docs" / "scoring.md").read_text()
    rows = page.split("answers with its last whole state:")[1].split("\n\n")[1]
    assert dict(re.findall(r"^\| `([a-z_]+)` \| (.+) \|$", rows, re.MULTILINE)) == REFUSALS


def test_the_code_uses_no_other_reason_code() -> None:
    """Codes are written where a record is judged; a code that is not in the table would be undocumented."""
    used = set()
    for room in ("stream", "model"):
        for path in (ROOT / room).rglob("*.py"):
            used |= set(
                re.findall(
                    r"DeadLetter(?:\.of)?\(\s*(?:record,\s*|events\.records\[index\],\s*)?\"([a-z_0-9]+)\"", path.read_text()
                )
            )
            used |= set(re.findall(r"_reject\(\s*\"([a-z_0-9]+)\"", path.read_text()))
    assert {"late_impression", "not_finite"} <= used, "the pattern no longer finds where codes are written"
    assert used <= REASONS.keys()


def known_metrics() -> dict[str, str]:
    """Every name that a scrape has, and the metric's type."""
    known = {}
    for each in (each for described in metrics().values() for each in described):
        endings = ("_bucket", "_sum", "_count") if each.kind == "histogram" else ("",)
        known |= {f"{each.name}{ending}": each.kind for ending in endings} | {each.name: each.kind}
    return known


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md")), *sorted((ROOT / "deploy").rglob("*.yml")), DASHBOARD],
    ids=str,
)
def test_a_metric_that_is_named_exists(path: Path) -> None:
    used = set(re.findall(r"\b(?:headrace_(?:join|trainer|scorer|worker)|process)_[a-z0-9_]+\b", path.read_text()))
    assert {
        name for name in used if name.startswith("headrace_") or name.endswith(("_bytes", "_seconds"))
    } <= known_metrics().keys()


def test_every_metric_is_documented_with_type_labels_and_meaning() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    assert len(known_metrics()) > 80
    for each in (each for described in metrics().values() for each in described):
        assert each.meaning.endswith("."), f"{each.name}: its help is a sentence"
        labels = ", ".join(f"`{label}`" for label in each.labels)
        assert f"| `{each.name}` | {each.kind} | {labels} | {each.meaning} |" in page


def test_metrics_are_made_where_the_pages_look_for_them() -> None:
    makers = re.compile(r"from prometheus_client import .*\b(?:Counter|Gauge|Histogram|Summary|Info|Enum)\b")
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "stream").rglob("*.py") if makers.search(path.read_text())}
    made = {f"stream/{worker}/metrics.py" for worker in ("join", "trainer", "scorer", "worker")}
    scorers = {"scorer/following_metrics.py", "scorer/candidate_metrics.py", "scorer/challenger_metrics.py"}
    besides = scorers | {"trainer/canary_metrics.py", "trainer/challenge_metrics.py", "trainer/table_metrics.py"}
    assert found == made | {f"stream/{name}" for name in besides}
    for room in ("deploy", "headrace", "model", "state"):
        assert not [path for path in (ROOT / room).rglob("*.py") if makers.search(path.read_text())]


def test_links_between_pages_resolve() -> None:
    """Files and headings: a heading's anchor is its words in lower case, joined by hyphens."""
    pages_by_hand = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    anchors = {page: {anchor_of(heading) for heading in HEADING.findall(page.read_text())} for page in pages_by_hand}
    for page in pages_by_hand:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            path = (page.parent / target).resolve() if target else page
            assert path.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors[path], f"{page.name} links to {target}#{anchor}"


@pytest.mark.parametrize("page", ["reliability.md", "join-rules.md"])
def test_the_tests_that_a_page_names_exist(page: str) -> None:
    """`test_name`, or `folder/test_file.py::test_name` below tests/; a name may be cut with an ellipsis."""
    tests = ROOT / "tests"
    there = {
        str(path.relative_to(tests)): re.findall(r"def (test_\w+)\(", path.read_text()) for path in tests.rglob("test_*.py")
    }
    everywhere = [name for names in there.values() for name in names]
    named = re.findall(r"`(?:([\w/]+\.py)::)?(test_\w+?)(…?)`", (ROOT / "docs" / page).read_text())
    assert len(named) > 5
    missing = []
    for file, name, cut in named:
        names = there.get(file, []) if file else everywhere
        if not (any(each.startswith(name) for each in names) if cut else name in names):
            missing.append(f"{file}::{name}")
    assert missing == []


ROOMS = ("headrace", "stream", "model", "state", "deploy", "bench", "tests", "docs")
BY_HAND = [
    *sorted(ROOT.glob("*.md")),
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem not in ("cli", "settings")),
]


@pytest.mark.parametrize("page", BY_HAND, ids=str)
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    """A code span that is a path from the top of the checkout, such as `stream/join/logic.py`; join-rules.md names tests."""
    top = ROOT / "tests" if page.name == "join-rules.md" else ROOT
    named = re.findall(rf"`((?:{'|'.join(ROOMS)})/[\w./-]*)(?:::\w+)?`", page.read_text())
    missing = [name for name in named if not (ROOT / name).exists() and not (top / name).exists()]
    assert missing == []
