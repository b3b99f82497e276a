"""Metrics that every worker has."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector

__all__ = ["new_prometheus", "start_time"]


def new_prometheus() -> CollectorRegistry:
    """A Prometheus registry that already has the process' own figures (CPU, memory, open files)."""
    prometheus = CollectorRegistry()
    ProcessCollector(registry=prometheus)
    return prometheus


def start_time(prometheus: CollectorRegistry) -> Gauge:
    """The one metric of ours that every worker has."""
    return Gauge("headrace_worker_start_time_seconds", "When this worker started.", ["worker"], registry=prometheus)
