"""The Schema Registry's HTTP interface, as Confluent defined it: schemas by id, with the schemas that they refer to.

| request | answer |
| --- | --- |
| `GET /schemas/ids/{id}` | type, text and references of a schema |
| `GET /schemas/ids/{id}?format=serialized` | for Protobuf, the descriptor in base64; needed when the text is something else |
| `GET /subjects/{subject}/versions/{version}` | a schema that another one refers to; takes the same `format` |

The schema of an id never changes, so an answer is never asked for twice. There are three kinds of answers:

- the schema;
- "no such schema" (404 with error code 40403), which is believed when it comes twice (`reader.py`), since a registry that
  follows another one may be a moment behind;
- any other answer, and none at all: the registry is out of order, and the request is repeated.

The requests are made with aiohttp: Faust depends on it, it doesn't block the event loop, and one GET is all that is needed.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import Callable
from urllib.parse import quote

import aiohttp
import msgspec

from stream.formats.avro import avro_decoder
from stream.formats.protobuf import file_descriptor, protobuf_decoder
from stream.formats.refused import Refused, RefusedError
from stream.settings import SchemaRegistrySettings

__all__ = ["Decoder", "OutOfOrder", "SchemaRegistry", "Unknown"]

# Number of schemas that one schema may refer to, directly and indirectly.
MAX_REFERENCES = 500
MAX_ANSWER_BYTES = 16 << 20
_UNKNOWN_SCHEMA = 40403


class OutOfOrder(Exception):
    """The registry didn't answer, or its answer is none that the interface defines. The text says what happened."""


class Unknown(Exception):
    """The registry has no schema with this id."""


class Decoder(msgspec.Struct, frozen=True):
    """The decoder of a schema. `decode` is None for JSON Schema, whose payload is JSON already."""

    kind: str
    decode: Callable[[bytes], object] | None


class _Reference(msgspec.Struct):
    name: str
    subject: str
    version: int


class _Schema(msgspec.Struct, rename="camel"):
    schema: str
    schema_type: str = "AVRO"
    references: list[_Reference] = []


class _Error(msgspec.Struct):
    error_code: int = 0
    message: str = ""


_schema = msgspec.json.Decoder(_Schema).decode
_error = msgspec.json.Decoder(_Error).decode


class SchemaRegistry:
    """Sends requests to the registry, and keeps only connections.

    Args:
        settings: `url` must be set. Several urls, separated by commas, are tried in their order.
    """

    def __init__(self, settings: SchemaRegistrySettings) -> None:
        self._settings = settings
        self.urls = [each.strip().rstrip("/") for each in (settings.url or "").split(",")]
        self._session: aiohttp.ClientSession | None = None

    async def decoder(self, schema_id: int) -> Decoder | Refused:
        """The decoder of a schema, or why the schema can't be used.

        Raises:
            Unknown: there is no such schema.
            OutOfOrder: the registry gives no usable answer.
        """
        path = f"/schemas/ids/{schema_id}"
        schema = await self._ask(path)
        if schema.schema_type == "JSON":
            return Decoder("json", None)
        if schema.schema_type not in ("AVRO", "PROTOBUF"):
            text = f"expected AVRO, JSON or PROTOBUF, found type {schema.schema_type!r}"
            return Refused("unusable_schema", "$", f"schema id {schema_id}: {text}")
        protobuf = schema.schema_type == "PROTOBUF"
        try:
            text = await self._text(schema, path, protobuf)
            references: dict[str, str] = {}
            await self._resolve(schema, protobuf, references, depth=0)
            # Building a decoder for hundreds of types may take a while.
            build = protobuf_decoder if protobuf else avro_decoder
            decode = await asyncio.to_thread(build, text, references)
        except RefusedError as error:
            return error.refused._replace(message=f"schema id {schema_id}: {error.refused.message}")
        return Decoder("protobuf" if protobuf else "avro", decode)

    async def _resolve(self, schema: _Schema, protobuf: bool, found: dict[str, str], depth: int) -> None:
        """Collect the schemas that a schema refers to, each after those that it refers to itself."""
        for reference in schema.references:
            if reference.name in found:
                continue
            if len(found) >= MAX_REFERENCES or depth > MAX_REFERENCES:
                raise RefusedError("unusable_schema", "$", f"expected at most {MAX_REFERENCES} references, found more")
            path = f"/subjects/{quote(reference.subject, safe='')}/versions/{reference.version}"
            try:
                referred = await self._ask(path)
                text = await self._text(referred, path, protobuf)
            except Unknown:
                raise RefusedError(
                    "unusable_schema",
                    "$",
                    f"expected the schema {reference.name} that it refers to, found no version {reference.version} of subject "
                    f"{reference.subject}",
                ) from None
            await self._resolve(referred, protobuf, found, depth + 1)
            found[reference.name] = text

    async def _text(self, schema: _Schema, path: str, protobuf: bool) -> str:
        """A schema's text; for Protobuf its descriptor, unless the registry offers none."""
        if not protobuf or file_descriptor(schema.schema) is not None:
            return schema.schema
        return (await self._ask(f"{path}?format=serialized")).schema

    async def _ask(self, path: str) -> _Schema:
        """One request. Raises Unknown and OutOfOrder."""
        troubles: list[str] = []
        for url in self.urls:
            try:
                return await self._get(url + path)
            except (aiohttp.ClientError, OSError, TimeoutError, OutOfOrder) as error:
                troubles.append(f"GET {url}{path}: {error if str(error) else type(error).__name__}")
        raise OutOfOrder("; ".join(troubles))

    async def _get(self, url: str) -> _Schema:
        if self._session is None:
            self._session = self._new_session()
        async with self._session.get(url) as answer:
            body = await answer.content.read(MAX_ANSWER_BYTES)
            try:
                if answer.status == 200:
                    return _schema(body)
                code = _error(body).error_code if answer.status == 404 else 0
            except msgspec.DecodeError as error:
                raise OutOfOrder(f"status {answer.status}, expected a schema in JSON, found {body[:80]!r} ({error})") from None
        if answer.status == 404 and code in (_UNKNOWN_SCHEMA, 40401, 40402):
            raise Unknown
        raise OutOfOrder(f"status {answer.status} ({answer.reason}), {body[:120]!r}")

    def _new_session(self) -> aiohttp.ClientSession:
        chosen = self._settings
        headers = {"Accept": "application/vnd.schemaregistry.v1+json, application/json"}
        if chosen.token is not None:
            headers["Authorization"] = f"Bearer {chosen.token.get_secret_value()}"
        elif chosen.username is not None:
            password = chosen.password.get_secret_value() if chosen.password is not None else ""
            login = base64.b64encode(f"{chosen.username}:{password}".encode()).decode()
            headers["Authorization"] = f"Basic {login}"
        context: ssl.SSLContext | bool = True
        if chosen.ssl_cafile is not None:
            context = ssl.create_default_context(cafile=str(chosen.ssl_cafile))
        return aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=chosen.request_timeout_ms / 1_000),
            connector=aiohttp.TCPConnector(ssl=context, limit=8),
        )

    async def close(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()
