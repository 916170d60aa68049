"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from r2ec_fast.serve.service import Service

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
COUNTS = tuple(2**n for n in range(0, 15, 2))


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "r2ec_requests",
            "Requests answered, by route and status (499: the client left).",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "r2ec_request_seconds",
            "Time of a recommendation, by mode.",
            ["mode"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "r2ec_time_to_first_token_seconds",
            "Time until the first text of a reasoning, or a direct answer.",
            ["mode"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._sizes = {
            "batch_tokens": Histogram(
                "r2ec_batch_tokens",
                "Tokens of a pass over prompts.",
                buckets=COUNTS,
                registry=self.registry,
            ),
            "step_rows": Histogram(
                "r2ec_step_rows",
                "Reasonings that a decoding step wrote a token of.",
                buckets=COUNTS[:6],
                registry=self.registry,
            ),
        }

    def observe(self, name: str, value: float) -> None:
        """A figure of the worker."""
        self._sizes[name].observe(value)

    def request_done(self, route: str, method: str, status: int, seconds: float) -> None:
        self.requests.labels(route, method, str(status)).inc()

    def watch(self, service: Service) -> None:
        """Also tell how the service stands, at the moment of asking."""
        self.registry.register(_State(service))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _State(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        worker, catalog = self._service.worker, self._service.catalog
        gauges = {
            "r2ec_requests_waiting": ("Requests in the queue.", worker.waiting),
            "r2ec_requests_running": ("Reasonings under way.", worker.running),
            "vllm:num_requests_waiting": ("As r2ec_requests_waiting.", worker.waiting),
            "vllm:num_requests_running": ("As r2ec_requests_running.", worker.running),
            "r2ec_table_version": ("Changes of the item table.", catalog.version),
            "r2ec_table_items": ("Items in the table.", len(catalog)),
            "r2ec_state_cache_entries": ("User states that are kept.", len(worker.cache)),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        yield CounterMetricFamily(
            "r2ec_state_cache_hits", "States that were known.", value=worker.cache.hits
        )
        yield CounterMetricFamily(
            "r2ec_state_cache_misses", "States that had to be computed.", value=worker.cache.misses
        )
