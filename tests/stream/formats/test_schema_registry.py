"""What a worker asks the schema registry, and what it makes of the answers: nothing is lost because a registry is away."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from stream.errors import StreamError
from stream.formats import Formats, Refused, open_formats
from stream.settings import SchemaRegistrySettings
from tests.stream.formats.stand_in import StandIn, framed

EVENT = b'{"impression_id":"i","timestamp":1}'


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr("stream.formats.reader.CONFIRM_S", 0.02)
    monkeypatch.setattr("stream.formats.reader.FIRST_WAIT_S", 0.02)
    with StandIn() as running:
        running.register(7, "JSON", {})
        yield running


def records(*ids: int) -> list[Any]:
    return [SimpleNamespace(value=framed(each, EVENT)) for each in ids]


async def read(formats: Formats, *ids: int) -> list[Any]:
    await formats.prepare(records(*ids), "f")
    return formats.open(records(*ids), "f")


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_a_registry_out_of_order_is_asked_until_it_answers(registry, status, caplog):
    """404 is "no such schema" only with the interface's own code: another one is a wrong address, or a proxy."""
    caplog.set_level(logging.INFO)
    failures = Counter[str]()

    async def go() -> list[Any]:
        formats = open_formats(SchemaRegistrySettings(url=registry.url), lambda: failures.update(["x"]))
        registry.status = status
        registry.forget(7)
        if status == 404:
            registry._found = lambda path: (None, 0)  # type: ignore[method-assign]
        waiting = asyncio.ensure_future(read(formats, 7))
        while failures.total() < 3:
            await asyncio.sleep(0.01)
        assert not waiting.done()
        assert formats.trouble is not None
        assert f"status {status}" in formats.trouble
        registry.status = None
        vars(registry).pop("_found", None)
        registry.register(7, "JSON", {})
        found = await waiting
        assert formats.trouble is None
        await formats.close()
        return found

    assert asyncio.run(go()) == [EVENT]
    said = [each.message for each in caplog.records if "schema registry" in each.message]
    assert len(said) == 2
    assert said[0].startswith(f"the schema registry doesn't answer (GET {registry.url}/schemas/ids/7: status {status}")
    assert said[1] == "the schema registry answers again"


def test_waiting_can_be_given_up(registry):
    """A partition that goes to another worker must not wait for the registry first."""

    async def go() -> None:
        formats = open_formats(SchemaRegistrySettings(url="http://127.0.0.1:1"))
        waiting = asyncio.ensure_future(formats.prepare(records(7), "f"))
        await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.wait([waiting], timeout=1)
        assert waiting.cancelled()
        await formats.close()

    asyncio.run(go())


def test_each_schema_is_asked_once_by_all_partitions(registry):
    async def go() -> None:
        formats = open_formats(SchemaRegistrySettings(url=registry.url))
        await asyncio.gather(*(read(formats, 7, 7) for _ in range(5)))
        await read(formats, 7)
        await formats.close()

    asyncio.run(go())
    assert registry.asked == ["/schemas/ids/7"]


def test_a_schema_that_comes_a_moment_late_is_not_unknown(registry, monkeypatch):
    """A registry that follows another one says "no such schema" until it has caught up."""
    monkeypatch.setattr("stream.formats.reader.CONFIRM_S", 0.3)

    async def go() -> list[Any]:
        formats = open_formats(SchemaRegistrySettings(url=registry.url))
        asyncio.get_running_loop().call_later(0.1, registry.register, 8, "JSON", {})
        found = await read(formats, 8)
        await formats.close()
        return found

    assert asyncio.run(go()) == [EVENT]


def test_an_unknown_schema_is_refused_and_asked_for_again_later(registry, monkeypatch):
    async def go() -> list[Any]:
        formats = open_formats(SchemaRegistrySettings(url=registry.url))
        found = await read(formats, 404)
        assert registry.asked == ["/schemas/ids/404"] * 2
        found += await read(formats, 404)
        assert len(registry.asked) == 2
        registry.register(404, "JSON", {})
        formats._unknown[404] = 0.0
        found += await read(formats, 404)
        await formats.close()
        return found

    refused = Refused("unknown_schema", "$", "expected a schema with id 404, found none in the registry")
    assert asyncio.run(go()) == [refused, refused, EVENT]


def test_ids_that_no_registry_has_are_not_asked_for(registry):
    """Bytes that only look like a frame: a registry may say to such an id what stands for out of order."""

    async def go() -> list[Any]:
        formats = open_formats(SchemaRegistrySettings(url=registry.url))
        found = await read(formats, 0, 2**31, 2**32 - 1)
        await formats.close()
        return found

    found = asyncio.run(go())
    assert [each.reason for each in found] == ["unknown_schema"] * 3
    assert "8 bytes" in found[0].message
    assert registry.asked == []


def test_a_run_of_bytes_that_only_look_like_frames(registry):
    """Hundreds of ids that nobody has: they are asked for, and the watchdog is told so meanwhile."""

    async def go() -> list[Any]:
        formats = open_formats(SchemaRegistrySettings(url=registry.url))
        reading = asyncio.ensure_future(read(formats, *range(1_000, 1_400), 7))
        while not formats._left:
            await asyncio.sleep(0.001)
        assert formats.trouble is not None
        assert formats.trouble.startswith("the schema registry is asked for ")
        found = await reading
        assert formats.trouble is None
        await formats.close()
        return found

    found = asyncio.run(go())
    assert Counter(each.reason for each in found[:-1]) == {"unknown_schema": 400}
    assert found[-1] == EVENT


def test_several_addresses_and_who_asks(registry):
    def asked_with(**settings: Any) -> dict[str, str]:
        async def go() -> None:
            formats = open_formats(SchemaRegistrySettings(url=f"http://127.0.0.1:1, {registry.url}/", **settings))
            assert await read(formats, 7) == [EVENT]
            await formats.close()

        asyncio.run(go())
        return registry.headers[-1]

    assert "Authorization" not in asked_with()
    basic = asked_with(username="shop", password=SecretStr("geheim"))["Authorization"]
    assert base64.b64decode(basic.removeprefix("Basic ")) == b"shop:geheim"
    assert asked_with(token=SecretStr("t"))["Authorization"] == "Bearer t"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "registry:8081"}, "expected http:// or https:// and a host"),
        ({"url": "http://a,ftp://b"}, "expected http:// or https:// and a host"),
        ({"url": "http://user:secret@registry"}, "expected no user in the address"),
        ({"url": "http://a", "token": "t", "username": "u"}, "expected username or token, found both"),
        ({"url": "http://a", "password": "p"}, "password is set: expected username too"),
    ],
)
def test_settings_that_cannot_work(settings, said):
    with pytest.raises(ValidationError, match=said):
        SchemaRegistrySettings(**settings)


def test_a_file_of_authorities_that_is_none(tmp_path: Path):
    file = tmp_path / "ca.pem"
    file.write_text("none")
    for path in (file, tmp_path / "absent.pem"):
        with pytest.raises(StreamError, match=r"schema_registry.ssl_cafile: expected a PEM file of authorities at"):
            open_formats(SchemaRegistrySettings(url="https://a", ssl_cafile=path))


def test_records_that_were_read_with_a_registry_need_it_again():
    """The setting was removed while they were pending: a rebuild says so, and doesn't take them for dead letters."""

    async def go() -> None:
        formats = Formats()
        await formats.prepare(records(7), "")
        await formats.prepare([SimpleNamespace(value=EVENT)], "f")
        with pytest.raises(StreamError, match=r"schema_registry.url: expected the registry that records of this partition"):
            await formats.prepare(records(7), "f")

    asyncio.run(go())


def test_an_answer_that_is_no_schema_is_out_of_order(registry):
    registry._found = lambda path: ({"not": "a schema"}, 0)  # type: ignore[method-assign]

    async def go() -> str | None:
        formats = open_formats(SchemaRegistrySettings(url=registry.url))
        waiting = asyncio.ensure_future(read(formats, 7))
        while formats.trouble is None:
            await asyncio.sleep(0.01)
        trouble = formats.trouble
        waiting.cancel()
        await asyncio.wait([waiting])
        await formats.close()
        return trouble

    assert "expected a schema in JSON, found" in (asyncio.run(go()) or "")


def test_the_stand_in_answers_as_the_interface_says(registry):
    """What `tests/stream/formats/test_real_registry.py` sees of a real one."""
    import urllib.error
    import urllib.request

    with urllib.request.urlopen(f"{registry.url}/schemas/ids/7") as answer:
        assert json.loads(answer.read()) == {"schema": "{}", "schemaType": "JSON"}
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{registry.url}/schemas/ids/8")
    with caught.value as error:
        assert (error.code, json.loads(error.read())["error_code"]) == (404, 40403)
