"""The client for applications: sends impressions and clicks, asks for scores, reads the answers.

```python
from headrace import Client
with Client("127.0.0.1:9092") as client:
    best = client.ask({"user_id": "u7"}, [("film-1", {"genre": "drama"}), ("film-2", {"genre": "comedy"})]).best()
    client.send_impression("imp-1", features={"user_id": "u7", "film": best.id}, score=best.score)
    client.send_click("imp-1")
```

The client needs kafka-python with its codecs, crc32c and msgspec, and nothing else. Names that aren't in `__all__` can change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headrace.errors import (
    DeliveryError,
    HeadraceError,
    InvalidAnswer,
    InvalidEvent,
    InvalidOption,
    NoAnswer,
    UnusableClient,
)

if TYPE_CHECKING:
    from headrace.client import Client
    from headrace.scores import Answer, AnswerError, Score, ScoreStream

__all__ = [
    "Answer",
    "AnswerError",
    "Client",
    "DeliveryError",
    "HeadraceError",
    "InvalidAnswer",
    "InvalidEvent",
    "InvalidOption",
    "NoAnswer",
    "Score",
    "ScoreStream",
    "UnusableClient",
]

_LAZY = {"Answer": "scores", "AnswerError": "scores", "Client": "client", "Score": "scores", "ScoreStream": "scores"}


def __getattr__(name: str) -> Any:
    # The command line imports this package for its errors alone. kafka-python takes 150 ms to import; `--help` does without.
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"headrace.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
