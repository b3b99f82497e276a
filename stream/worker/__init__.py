"""One skeleton under the three workers.

| file | what it holds |
| --- | --- |
| `skeleton.py` | `Worker`: what join, trainer and scorer derive from |
| `lifecycle.py` | `serve`: a worker's process from start to drain |
| `app.py` | the Faust app's options |
| `guards.py` | `fatal`, and tasks whose failure ends the process |
| `watchdog.py` | ends a process that has work and makes no progress |
| `membership.py` | notices that another worker has the same instance id |
| `http.py` | `/metrics`, `/healthz`, `/readyz` |
| `metrics.py` | the metrics that every worker has |
| `collector.py` | Python's garbage collector |
"""

from __future__ import annotations

from stream.worker.guards import fatal, guarded
from stream.worker.lifecycle import serve
from stream.worker.metrics import new_prometheus
from stream.worker.skeleton import Worker
from stream.worker.watchdog import Part, source_part

__all__ = ["Part", "Worker", "fatal", "guarded", "new_prometheus", "serve", "source_part"]
