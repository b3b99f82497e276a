"""The container files, as far as they can be checked without Docker."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.datasets.movielens import MovieLens100K
from deploy.local_kafka.jars import kafka_version
from deploy.settings import Settings
from model.schema import FeatureSchema

ROOT = Path(__file__).resolve().parents[2]
FILES = {"base": ROOT / "docker-compose.yml", "gpu": ROOT / "deploy" / "compose.gpu.yml"}
WORKERS = ("join", "trainer", "scorer")
PINNED = r"^[a-z0-9./-]+:v?\d+\.\d+\.\d+$"

# The part of the compose specification that these files use. Closed: a mistyped key is an error, as `docker compose` has it.
TEXT_MAP = {"type": "object", "patternProperties": {"^[A-Z][A-Z0-9_]*$": {"type": "string"}}, "additionalProperties": False}
TEXTS = {"type": "array", "items": {"type": "string"}}
DURATION = {"type": "string", "pattern": r"^\d+(s|m)$"}
SERVICE = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "image": {"type": "string", "pattern": PINNED},
        "build": {
            "type": "object",
            "required": ["context", "dockerfile"],
            "additionalProperties": False,
            "properties": {"context": {"type": "string"}, "dockerfile": {"type": "string"}},
        },
        "command": TEXTS,
        "environment": TEXT_MAP,
        "init": {"type": "boolean"},
        "restart": {"enum": ["no", "always", "on-failure", "unless-stopped"]},
        "stop_grace_period": DURATION,
        # On this machine only.
        "ports": {"type": "array", "items": {"type": "string", "pattern": r"^127\.0\.0\.1:\d+:\d+$"}},
        "volumes": {"type": "array", "items": {"type": "string", "pattern": r"^([a-z-]+:|\./[\w./-]+:)?/[\w./-]+(:ro)?$"}},
        "configs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["source", "target"],
                "additionalProperties": False,
                "properties": {"source": {"type": "string"}, "target": {"type": "string", "pattern": "^/"}},
            },
        },
        "depends_on": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "required": ["condition"],
                "additionalProperties": False,
                "properties": {"condition": {"enum": ["service_healthy", "service_completed_successfully"]}},
            },
        },
        "healthcheck": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "test": {"type": "array", "prefixItems": [{"const": "CMD"}], "items": {"type": "string"}, "minItems": 2},
                "interval": DURATION,
                "timeout": DURATION,
                "start_period": DURATION,
                "retries": {"type": "integer", "minimum": 1},
                "disable": {"type": "boolean"},
            },
        },
        "deploy": {
            "type": "object",
            "required": ["resources"],
            "additionalProperties": False,
            "properties": {
                "resources": {
                    "type": "object",
                    "required": ["reservations"],
                    "properties": {
                        "reservations": {
                            "type": "object",
                            "required": ["devices"],
                            "properties": {
                                "devices": {
                                    "type": "array",
                                    "items": {
                                        "type": "object",
                                        "required": ["driver", "count", "capabilities"],
                                        "properties": {
                                            "driver": {"const": "nvidia"},
                                            "count": {"type": "integer", "minimum": 1},
                                            "capabilities": {"const": ["gpu"]},
                                        },
                                    },
                                }
                            },
                        }
                    },
                }
            },
        },
    },
}
SCHEMA = {
    "type": "object",
    "required": ["services"],
    "additionalProperties": False,
    "patternProperties": {"^x-": {"type": "object"}},
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]*$"},
        "services": {"type": "object", "additionalProperties": SERVICE},
        "volumes": {"type": "object", "additionalProperties": {"type": "null"}},
        "configs": {
            "type": "object",
            "additionalProperties": {"type": "object", "required": ["file"], "additionalProperties": False,
                                     "properties": {"file": {"type": "string"}}},
        },
    },
}  # fmt: skip


def load(name: str) -> dict[str, Any]:
    loaded = yaml.safe_load(FILES[name].read_text())
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found = load("base")["services"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", FILES)
def test_structure(name: str) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(load(name))


def test_the_schema_refuses_what_compose_would() -> None:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    refused: list[dict[str, Any]] = [
        {"services": {"a": {"imagee": "a:1.0.0"}}},
        {"services": {"a": {"image": "a:latest"}}},
        {"services": {"a": {"image": "a:1.0.0", "ports": ["9092:9092"]}}},
        {"services": {"a": {"image": "a:1.0.0", "depends_on": {"b": {"condition": "healthy"}}}}},
        {"services": {}, "volume": {}},
    ]
    for wrong in refused:
        assert not validator.is_valid(wrong), wrong


def test_services_and_their_order(services: dict[str, Any]) -> None:
    assert set(services) == {"kafka", "topics", *WORKERS, "prometheus", "grafana"}
    assert services["topics"]["depends_on"] == {"kafka": {"condition": "service_healthy"}}
    assert services["topics"]["restart"] == "no"
    for worker in WORKERS:
        assert services[worker]["command"] == ["run", worker]
        assert services[worker]["depends_on"] == {"topics": {"condition": "service_completed_successfully"}}
        assert "/healthz" in services[worker]["healthcheck"]["test"][-1]
        assert services[worker]["build"] == {"context": ".", "dockerfile": "deploy/Dockerfile"}
    for service in services.values():
        for name, needed in service.get("depends_on", {}).items():
            if needed["condition"] == "service_healthy":
                assert "test" in services[name]["healthcheck"]
            else:
                assert services[name]["restart"] == "no", "a job that is started again never completes"


def test_names_that_are_used_exist(services: dict[str, Any]) -> None:
    base = load("base")
    assert set(load("gpu")["services"]) <= set(services)
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), source
            elif not source.startswith("/"):
                assert source in base["volumes"], source
        for config in service.get("configs", []):
            assert config["source"] in base["configs"]
            assert config["target"] == service["environment"]["HEADRACE_CONFIG"]


@pytest.mark.parametrize("name", FILES)
def test_every_variable_is_a_setting(name: str) -> None:
    known = {"HEADRACE_CONFIG"}
    for section, field in Settings.model_fields.items():
        nested = getattr(field.annotation, "model_fields", None)
        known |= {f"HEADRACE_{section}__{key}".upper() for key in nested} if nested else {f"HEADRACE_{section}".upper()}
    used = {
        variable
        for service in load(name)["services"].values()
        for variable in service.get("environment", {})
        if variable.startswith("HEADRACE_")
    }
    assert used  # tests/test_docs.py knows that each exists


def test_the_settings_inside_are_valid(services: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for service in (*services.values(), *load("gpu")["services"].values()):
        for variable, value in service.get("environment", {}).items():
            monkeypatch.setenv(variable, value)
    file = load("base")["configs"]["settings"]["file"]
    default = re.fullmatch(r"\$\{HEADRACE_FILE:-(.+)\}", file)
    assert default is not None
    monkeypatch.setenv("HEADRACE_CONFIG", str(ROOT / default[1]))
    settings = Settings()
    assert (settings.http.host, settings.http.port) == ("0.0.0.0", 9100)
    assert settings.trainer.device == settings.scorer.device == "cuda"
    host, port = settings.kafka.bootstrap_servers.split(":")
    listeners = services["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"].split(",")
    assert f"INSIDE://{host}:{port}" in listeners
    mounts = {volume.split(":")[-2 if volume.endswith(":ro") else -1] for w in WORKERS for volume in services[w]["volumes"]}
    assert {str(settings.state_dir), settings.snapshots.url} == mounts
    assert settings.features == MovieLens100K().schema()


def test_the_default_features_are_movielens() -> None:
    told = tomllib.loads((ROOT / "deploy" / "compose.toml").read_text())
    assert FeatureSchema.model_validate(told["features"]) == MovieLens100K().schema()


def test_the_same_kafka_as_the_local_one(services: dict[str, Any]) -> None:
    assert services["kafka"]["image"] == f"apache/kafka:{kafka_version()}"
    environment = services["kafka"]["environment"]
    names = {listener.split(":")[0] for listener in environment["KAFKA_LISTENERS"].split(",")}
    mapped = {entry.split(":")[0] for entry in environment["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"].split(",")}
    assert names == mapped == {"INSIDE", "OUTSIDE", "CONTROLLER"}
    assert environment["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"


def test_prometheus_scrapes_every_worker(services: dict[str, Any]) -> None:
    (job,) = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert set(found["names"]) == set(WORKERS)
    assert str(found["port"]) == services["join"]["environment"]["HEADRACE_HTTP__PORT"]


def test_grafana_reads_what_is_provisioned() -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "headrace.json").read_text())
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    used: set[str] = set()
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == source["uid"]
        for target in panel["targets"]:
            used |= set(re.findall(r"headrace_\w+", target["expr"]))
    assert used  # tests/test_docs.py knows that each exists


def test_the_image_is_pinned_and_built_by_the_lock() -> None:
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    images = {line.split()[1] for line in lines if line.startswith("FROM ")}
    assert images == {"python:3.12-slim-bookworm"}
    text = "\n".join(lines)
    assert "--require-hashes" in text
    assert "\nUSER headrace\n" in text
    ignored = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]}
    assert copied == {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
