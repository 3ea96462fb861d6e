"""What the server counts, as Prometheus reads it.

Owns the names, units and labels: base units, routes by their template, nothing that names a person, a key or a reply.
Knows nothing of what is counted beyond the service that it looks at when it is asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client import Counter as Counts
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from liveweight import __version__
from liveweight.server.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """The figures of one application."""

    def __init__(self, service: Service) -> None:
        """Nothing is counted yet."""
        self._registry = CollectorRegistry()
        self._requests = Counts(
            "liveweight_http_requests",
            "Requests answered.",
            ["method", "route", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "liveweight_http_request_duration_seconds",
            "Time to the end of an answer.",
            ["method", "route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first = Histogram(
            "liveweight_http_time_to_first_byte_seconds",
            "Time to the first byte of an answer's body.",
            ["method", "route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_Looked(service))

    def answered(self, method: str, route: str, status: int, seconds: float, first: float | None) -> None:
        """Count one answer. A method that nobody knows has no line of its own: anybody can make up many."""
        method = method if method in _METHODS else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)
        if first is not None:
            self._first.labels(method, route).observe(first)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)


class _Looked(Collector):
    """What is read off the service when somebody asks."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> list[Metric]:
        """Nothing is looked at before somebody asks."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The figures of now."""
        service = self._service
        live, batcher = service.live, service.batcher
        info = live.engine.info
        yield _labelled(
            "liveweight_info",
            "The program and its model.",
            {"version": __version__, "model": info.name, "architecture": info.architecture, "dtype": info.dtype},
        )
        yield CounterMetricFamily("liveweight_tokens_generated", "Tokens made.", value=batcher.tokens)
        yield CounterMetricFamily("liveweight_tokens_read", "Tokens of prompts read.", value=batcher.prompt_tokens)
        yield GaugeMetricFamily("liveweight_replies_running", "Replies being made.", value=batcher.running)
        yield GaugeMetricFamily("liveweight_replies_waiting", "Replies that wait.", value=batcher.waiting)
        yield GaugeMetricFamily(
            "liveweight_weights_version", "Number of the weights' version.", value=live.engine.version.number
        )
        changes = GaugeMetricFamily("liveweight_changes", "Changes in the ledger.", labels=["state"])
        counted = Counter(change.state for change in live.ledger.changes(info.hash))
        for state in ("active", "off", "undone", "refused", "failed"):
            changes.add_metric([state], counted.get(state, 0))
        yield changes
        jobs = GaugeMetricFamily("liveweight_jobs", "Jobs that wait or run.", labels=["status"])
        for status in ("queued", "running"):
            jobs.add_metric([status], len(service.jobs.list(limit=1000, status=status)))
        yield jobs


def _labelled(name: str, told: str, labels: dict[str, Any]) -> Metric:
    family = GaugeMetricFamily(name, told, labels=list(labels))
    family.add_metric([str(value) for value in labels.values()], 1)
    return family
