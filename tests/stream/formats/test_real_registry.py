"""Against a real registry: Apicurio's, in memory, on the loopback. Runs where `SCHEMA_REGISTRY_JAR` names its runner.

docs/producers.md says how to get it. It takes about 15 s and half a gigabyte of memory.
"""

from __future__ import annotations

import asyncio
import base64
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from stream.formats import Refused, open_formats
from stream.settings import SchemaRegistrySettings
from tests.stream.formats.official_frames import AVRO, EVENT, FEATURES_FILE, FILE, JSON, OFFICIAL
from tests.stream.formats.real_registry import JAR, WITHOUT, real_registry, register
from tests.stream.formats.stand_in import framed

pytestmark = pytest.mark.skipif(not JAR, reason=WITHOUT)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with real_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


def opened(url: str, value: bytes) -> bytes | Refused | None:
    async def go() -> bytes | Refused | None:
        formats = open_formats(SchemaRegistrySettings(url=url))
        records = [SimpleNamespace(value=value)]
        await formats.prepare(records, "f")
        [found] = formats.open(records, "f")
        await formats.close()
        return found

    return asyncio.run(go())


def text_of(file: Any) -> str:
    return base64.b64encode(file.SerializeToString()).decode()


def test_what_confluents_serializers_write(url):
    ids = {"avro": register(url, "a", "AVRO", json.dumps(AVRO)), "json": register(url, "j", "JSON", json.dumps(JSON))}
    register(url, "features.proto", "PROTOBUF", text_of(FEATURES_FILE))
    needs = [{"name": "features.proto", "subject": "features.proto", "version": 1}]
    ids["protobuf"] = register(url, "p", "PROTOBUF", text_of(FILE), needs)
    for kind, frame in OFFICIAL.items():
        found = opened(url, framed(ids[kind], frame[5:]))
        assert isinstance(found, bytes), found
        assert json.loads(found) == EVENT[kind]


def test_a_proto_text_without_descriptors_is_named(url):
    number = register(url, "t", "PROTOBUF", 'syntax = "proto3";\nmessage Click { string impression_id = 1; }\n')
    found = opened(url, framed(number, b"\x00"))
    assert isinstance(found, Refused)
    assert found.reason == "unusable_schema"
    assert "doesn't serve `format=serialized`" in found.message


def test_what_it_does_not_have(url, monkeypatch):
    monkeypatch.setattr("stream.formats.reader.CONFIRM_S", 0.05)
    for number in (0, 999_999, 2**31 - 1, 2**31, 2**32 - 1):
        found = opened(url, framed(number, b"{}"))
        assert isinstance(found, Refused)
        assert found.reason == "unknown_schema"


def test_its_answers_are_the_stand_ins(url):
    number = register(url, "s", "AVRO", json.dumps({**AVRO, "name": "Other"}))
    with urllib.request.urlopen(f"{url}/schemas/ids/{number}") as answer:
        found = json.loads(answer.read())
    assert json.loads(found["schema"])["name"] == "Other"
    assert found.get("schemaType", "AVRO") == "AVRO"
    for path, code in (("/schemas/ids/999999", 40403), ("/subjects/nobody/versions/1", 40401)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(url + path)
        with caught.value as error:
            assert (error.code, json.loads(error.read())["error_code"]) == (404, code)
