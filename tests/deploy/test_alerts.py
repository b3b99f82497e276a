"""The alert rules, as far as they can be checked without Prometheus: shape, metrics that exist, a line in the docs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.docs import metrics
from stream.settings import ScorerSettings

ROOT = Path(__file__).resolve().parents[2]
TEXT = {"type": "string", "minLength": 10}
# Prometheus' own format of rule files, as far as it is used here. Closed: it ignores no key that it doesn't know.
RULE = {
    "type": "object",
    "required": ["alert", "expr", "for", "labels", "annotations"],
    "additionalProperties": False,
    "properties": {
        "alert": {"type": "string", "pattern": "^Headrace[A-Za-z]+$"},
        "expr": TEXT,
        "for": {"type": "string", "pattern": r"^\d+m$"},
        "labels": {
            "type": "object",
            "required": ["severity"],
            "additionalProperties": False,
            "properties": {"severity": {"enum": ["warning", "critical"]}},
        },
        "annotations": {
            "type": "object",
            "required": ["summary", "description"],
            "additionalProperties": False,
            "properties": {"summary": TEXT, "description": TEXT},
        },
    },
}
SCHEMA = {
    "type": "object",
    "required": ["groups"],
    "additionalProperties": False,
    "properties": {
        "groups": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "rules"],
                "additionalProperties": False,
                "properties": {"name": {"type": "string"}, "rules": {"type": "array", "items": RULE, "minItems": 1}},
            },
        }
    },
}
LOADED = yaml.safe_load((ROOT / "deploy" / "alerts.yml").read_text())
RULES: dict[str, dict[str, Any]] = {rule["alert"]: rule for group in LOADED["groups"] for rule in group["rules"]}


def known() -> dict[str, tuple[str, ...]]:
    """Every metric of the workers, and its labels."""
    found = [each for described in metrics().values() for each in described]
    endings = ("", "_bucket", "_sum", "_count")
    return {f"{each.name}{ending}": each.labels for each in found for ending in endings}


def test_structure() -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(LOADED)
    assert len(RULES) == sum(len(group["rules"]) for group in LOADED["groups"]), "each name once"


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_about_metrics_and_labels_that_exist(name: str) -> None:
    rule, metrics = RULES[name], known()
    used = set(re.findall(r"headrace_\w+", rule["expr"]))
    assert used <= metrics.keys() and (used or rule["expr"].startswith("up"))
    # Those that Prometheus gives every series, by deploy/prometheus.yml.
    labels = {"instance", "job", "worker"} | {label for metric in used for label in metrics[metric]}
    for metric, matchers in re.findall(r"(\w+)\{([^}]*)\}", rule["expr"]):
        assert set(re.findall(r"(\w+)=", matchers)) <= set(metrics.get(metric, ())) | {"instance", "job", "worker"}
    told = set(re.findall(r"\$labels\.(\w+)", "".join(rule["annotations"].values())))
    aggregated = re.findall(r"^sum(?: by \((\w+)\))?", rule["expr"])
    assert told <= (set(filter(None, aggregated)) if aggregated else labels)
    for opening, closing in ("()", "{}", "[]"):
        assert rule["expr"].count(opening) == rule["expr"].count(closing)


def test_limits_are_the_settings_defaults() -> None:
    assert RULES["HeadraceScorerStale"]["expr"].endswith(f"> {ScorerSettings().lease_ms / 1000:g}")


def test_prometheus_reads_the_rules() -> None:
    files = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["rule_files"]
    mounted = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["prometheus"]["volumes"]
    assert [f"./deploy/alerts.yml:{name}:ro" in mounted for name in files] == [True]


def test_every_alert_is_documented() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    table = page.split("| alert | when |")[1].split("\n\n")[0]
    assert [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")] == list(RULES)
