"""A stand-in of the Schema Registry's HTTP interface, and what producers' serializers make by it."""

from __future__ import annotations

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import fastavro
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

__all__ = ["StandIn", "avro_frame", "framed", "message_of", "proto_file"]


class StandIn:
    """A registry on the loopback; `url` is where.

    Attributes:
        asked: the paths that were asked for, in order.
        status: of every answer, in the place of the right one; None while it is in order.
    """

    def __init__(self, *, serialized: bool = True) -> None:
        self._schemas: dict[int, dict[str, Any]] = {}
        self._versions: dict[tuple[str, int], int] = {}
        self._texts: dict[int, str] = {}
        self._serialized = serialized
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.status: int | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version, wbufsize = "HTTP/1.1", -1  # connections stay, and an answer is one packet

            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def register(
        self,
        schema_id: int,
        kind: str,
        schema: Any,
        *,
        subject: str = "s",
        references: tuple[tuple[str, str, int], ...] = (),
    ) -> None:
        """Add a schema as version `schema_id` of a subject. For Protobuf `schema` is a FileDescriptorProto."""
        text = schema if isinstance(schema, str) else "" if kind == "PROTOBUF" else json.dumps(schema)
        if kind == "PROTOBUF" and not isinstance(schema, str):
            self._texts[schema_id] = base64.b64encode(schema.SerializeToString()).decode()
            text = f"// the text of {schema.name}"
        answer: dict[str, Any] = {"schema": text}
        if kind != "AVRO":  # the registry leaves its default out
            answer["schemaType"] = kind
        if references:
            answer["references"] = [{"name": n, "subject": s, "version": v} for n, s, v in references]
        self._schemas[schema_id] = answer
        self._versions[subject, schema_id] = schema_id

    def forget(self, schema_id: int) -> None:
        """Delete a schema for good."""
        del self._schemas[schema_id]

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        self.asked.append(request.path)
        self.headers.append(dict(request.headers))
        found, code = self._found(parts.path)
        if found is not None and self._serialized and parse_qs(parts.query).get("format") == ["serialized"]:
            schema_id = next(each for each, answer in self._schemas.items() if answer is found)
            found = {**found, "schema": self._texts.get(schema_id, found["schema"])}
        status = self.status or (404 if found is None else 200)
        body = json.dumps(found if status == 200 else {"error_code": code, "message": "said by the stand-in"}).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/vnd.schemaregistry.v1+json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def _found(self, path: str) -> tuple[dict[str, Any] | None, int]:
        match path.strip("/").split("/"):
            case ["schemas", "ids", number]:
                return self._schemas.get(int(number)), 40403
            case ["subjects", subject, "versions", version]:
                return self._schemas.get(self._versions.get((unquote(subject), int(version)), -1)), 40402
        return None, 404


def framed(schema_id: int, payload: bytes) -> bytes:
    return b"\0" + schema_id.to_bytes(4) + payload


def avro_frame(schema_id: int, schema: Any, record: Any, named: dict[str, Any] | None = None) -> bytes:
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, fastavro.parse_schema(schema, named_schemas={} if named is None else named), record)
    return framed(schema_id, stream.getvalue())


def proto_file(name: str, *messages: tuple[str, list[tuple[Any, ...]]], imports: tuple[str, ...] = ()) -> Any:
    """A FileDescriptorProto of package `shop`; a field is (name, number, type), and a type's name, a label or a oneof."""
    file = descriptor_pb2.FileDescriptorProto(name=name, package="shop", syntax="proto3", dependency=imports)
    for message_name, fields in messages:
        message = file.message_type.add(name=message_name)
        for field_name, number, kind, *more in fields:
            field = message.field.add(name=field_name, number=number, label=1)
            if isinstance(kind, str):
                field.type, field.type_name = 11, kind
            else:
                field.type = kind
            if "repeated" in more:
                field.label = 3
            if "optional" in more:
                field.proto3_optional = True
                field.oneof_index = len(message.oneof_decl)
                message.oneof_decl.add(name=f"_{field_name}")
    return file


def message_of(full_name: str, *files: Any) -> Any:
    """The class of a message of these files, which import one another in their order."""
    pool = descriptor_pool.DescriptorPool()
    from google.protobuf import struct_pb2, timestamp_pb2, wrappers_pb2

    for module in (struct_pb2, timestamp_pb2, wrappers_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    for file in files:
        pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(full_name))
