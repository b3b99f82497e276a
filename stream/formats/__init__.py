"""The formats that a value of `impressions` or `clicks` may have besides plain JSON, and how it becomes the contract's JSON.

```python
formats = Formats(registry)                   # `registry` is None where `schema_registry.url` isn't set
await formats.prepare(records, form)          # fetches the schemas that these records name; waits while the registry is down
values = formats.open(records, form)          # for each record JSON bytes, or a `Refused` that says why there are none
```

| file | what it knows |
| --- | --- |
| `frames.py` | Confluent's frame: a zero byte, the schema's id, the payload |
| `schema_registry.py` | the Schema Registry's HTTP interface: schemas by id, with the schemas that they refer to |
| `avro.py`, `protobuf.py` | a schema's text → a function from payload to Python objects |
| `envelopes.py` | envelopes of Kafka Connect's JsonConverter and of Debezium |
| `rows.py` | a decoded record → the contract's JSON |
| `hints.py` | recognises values that can't be used, for the texts of their dead letters |
| `reader.py` | `Formats`, which combines these |

A form says which formats to look for: "f" frames, "c" Connect's envelopes, "d" Debezium's. It is kept with the settings that
records were decided under (`stream.join.settings_history`), so that a rebuild reads each record as it was read at first.
"""

from __future__ import annotations

from stream.formats.reader import Formats, open_formats
from stream.formats.refused import Refused

__all__ = ["Formats", "Refused", "open_formats"]
