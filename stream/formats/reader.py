"""`Formats`: values as they came → the contract's JSON."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import ssl
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stream.errors import StreamError
from stream.formats.envelopes import CONNECT, DEBEZIUM, unwrapped, unwrapped_row
from stream.formats.frames import HEADER_BYTES, schema_id, schema_ids
from stream.formats.refused import Refused, RefusedError
from stream.formats.rows import row_json
from stream.records.record import Record
from stream.settings import SchemaRegistrySettings

if TYPE_CHECKING:
    from stream.formats.schema_registry import Decoder, SchemaRegistry

__all__ = ["FRAMES", "Formats", "open_formats"]

log = logging.getLogger(__name__)

FRAMES = "f"
_ENVELOPES = {"none": "", "connect": CONNECT, "debezium": DEBEZIUM}  # `join.envelope` → its letter in a form
# Wait between two requests to a registry that is out of order; doubled each time.
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 15.0
# Wait between the first and the second request for a schema that the registry doesn't have.
CONFIRM_S = 2.0
# Wait before the registry is asked again for a schema that it doesn't have.
UNKNOWN_S = 60.0
# Limit for the ids without a schema that are remembered. Only values that aren't frames at all bring so many.
MAX_UNKNOWN = 10_000

# Limit for requests at a time, and the number of schemas to fetch above which `trouble` reports them: no producer has so many
# new schemas at once, so these are bytes that only look like frames.
AT_ONCE, MANY = 8, 100
# Registries keep ids in Java's `int`, and answer something else than "no such schema" to a larger number.
MAX_ID = 0x7FFF_FFFF

_PACKAGES = {"aiohttp": "aiohttp", "fastavro": "fastavro", "google.protobuf": "protobuf"}


class Formats:
    """Opens the values of a worker's records. All its partitions share the schemas.

    Attributes:
        decoded: number of frames decoded so far, by the type of their schema.
    """

    def __init__(self, registry: SchemaRegistry | None = None, failed: Callable[[], None] = lambda: None) -> None:
        self._registry, self._failed = registry, failed
        self._decoders: dict[int, Decoder | Refused] = {}
        self._unknown: dict[int, float] = {}  # id → when the registry is asked again (monotonic)
        self._asking = asyncio.Lock()
        self._away: str | None = None  # the last error of the registry, while it is out of order
        self._left = 0  # schemas that are still to be fetched
        self.decoded: Counter[str] = Counter()

    def form(self, envelope: str) -> str:
        """The formats that events may have: frames when there is a schema registry, and the envelope of `join.envelope`."""
        return (FRAMES if self._registry is not None else "") + _ENVELOPES[envelope]

    async def prepare(self, records: Sequence[Record], form: str) -> None:
        """Fetch the schemas of these records' frames. Waits for as long as the registry is out of order.

        Raises:
            StreamError: the records must be read with a registry, and `schema_registry.url` isn't set any more.
        """
        if FRAMES not in form:
            return
        wanted = schema_ids([record.value for record in records])
        if wanted <= self._decoders.keys():
            return
        if self._registry is None:
            raise StreamError(
                "schema_registry.url: expected the registry that records of this partition were read with, found the setting "
                "unset. Pending records can't be read again without it: set it until these records are settled (window + 2 "
                "dedupe horizons of event time)."
            )
        async with self._asking:
            now = time.monotonic()
            new = wanted - self._decoders.keys()
            asked = {each for each in new if 0 < each <= MAX_ID and self._unknown.get(each, now) <= now}
            unknown = await self._fetch(asked)
            if unknown:
                await asyncio.sleep(CONFIRM_S)
                unknown = await self._fetch(unknown)
            if len(self._unknown) + len(unknown) > MAX_UNKNOWN:
                self._unknown.clear()
            self._unknown.update(dict.fromkeys(unknown, time.monotonic() + UNKNOWN_S))

    async def _fetch(self, wanted: set[int]) -> set[int]:
        """Fetch these schemas. Returns the ids without a schema."""
        unknown, ids = set[int](), sorted(wanted)
        try:
            for start in range(0, len(ids), AT_ONCE):
                self._left = len(ids) - start
                part = ids[start : start + AT_ONCE]
                there = await asyncio.gather(*(self._ask(each) for each in part))
                unknown.update(each for each, found in zip(part, there, strict=True) if not found)
        finally:
            self._left = 0
        return unknown

    async def _ask(self, schema_id: int) -> bool:
        """Fetch one schema, however long that takes. Returns False when there is none."""
        from stream.formats.schema_registry import OutOfOrder, Unknown

        assert self._registry is not None
        wait_s = FIRST_WAIT_S
        while True:
            try:
                self._decoders[schema_id] = await self._registry.decoder(schema_id)
                self._unknown.pop(schema_id, None)
                there = True
            except Unknown:
                there = False
            except OutOfOrder as error:
                self._failed()
                if self._away is None:
                    log.warning(
                        "the schema registry doesn't answer (%s): records that need it wait; the request is repeated", error
                    )
                self._away = str(error)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
                continue
            if self._away is not None:
                log.info("the schema registry answers again")
                self._away = None
            return there

    @property
    def trouble(self) -> str | None:
        """Why records wait for the registry, for people; None when they don't wait, or not for long."""
        if self._away is not None:
            return f"the schema registry doesn't answer: {self._away}"
        return f"the schema registry is asked for {self._left} schemas" if self._left > MANY else None

    def open(self, records: Sequence[Record], form: str) -> list[bytes | Refused | None]:
        """For each record its JSON, or why there is none. A value in no format of this form is returned as it is.

        `prepare` must have had the same records.
        """
        envelope = form.replace(FRAMES, "")
        found: list[bytes | Refused | None] = []
        for record in records:
            value, number = record.value, None
            try:
                number = schema_id(value) if FRAMES in form else None
                if number is not None:
                    value = self._unframed(value or b"", number, envelope)
                elif value and envelope:
                    value = unwrapped(value, envelope)
                found.append(value)
            except RefusedError as error:
                found.append(error.refused)
            except UnicodeDecodeError as error:
                found.append(Refused("bad_utf8", "$", f"expected UTF-8, found {error.reason} in a string of the event"))
            except Exception as error:  # one record must not end all workers that read it, whatever a library raises
                log.exception("%s/%s/%s could not be opened", record.topic, record.partition, record.offset)
                reason = "malformed_json" if number is None else "malformed_frame"
                found.append(Refused(reason, "$", f"expected an event, found one that can't be read ({type(error).__name__})"))
        return found

    def _unframed(self, value: bytes, number: int, envelope: str) -> bytes:
        decoder = self._decoders.get(number)
        if decoder is None:
            text = f"expected a schema with id {number}, found none in the registry"
            if not number:
                text += ". Ids begin with 1: the producer may write ids of 8 bytes (Apicurio: use its 4-byte id handler)"
            raise RefusedError("unknown_schema", "$", text)
        if isinstance(decoder, Refused):
            raise RefusedError(*decoder)
        payload = value[HEADER_BYTES:]
        try:
            if decoder.decode is None:
                event = unwrapped(payload, envelope) if envelope else payload
            else:
                event = row_json(unwrapped_row(decoder.decode(payload), envelope))
        except RefusedError as error:
            reason, path, message = error.refused
            raise RefusedError(reason, path, f"schema id {number}: {message}") from error
        self.decoded[decoder.kind] += 1
        return event

    async def close(self) -> None:
        if self._registry is not None:
            await self._registry.close()


def open_formats(settings: SchemaRegistrySettings, failed: Callable[[], None] = lambda: None) -> Formats:
    """The formats of a worker with these settings. Opens no connection.

    Args:
        failed: called for each request to the registry that got no usable answer.

    Raises:
        StreamError: `url` is set, and a package that is needed then is missing, or the file of authorities can't be read.
    """
    if settings.url is None:
        return Formats()
    missing = [name for module, name in _PACKAGES.items() if not _there(module)]
    if missing:
        raise StreamError(
            f"schema_registry.url is set: expected the packages {', '.join(_PACKAGES.values())}, found no "
            f"{', '.join(missing)}. Run `make setup` in the checkout, which installs them."
        )
    if settings.ssl_cafile is not None:
        try:
            ssl.create_default_context(cafile=str(settings.ssl_cafile))
        except (OSError, ssl.SSLError) as error:
            raise StreamError(
                f"schema_registry.ssl_cafile: expected a PEM file of authorities at {settings.ssl_cafile}, found: {error}. "
                "Correct the path or the file."
            ) from error
    from stream.formats.schema_registry import SchemaRegistry

    return Formats(SchemaRegistry(settings), failed)


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False
