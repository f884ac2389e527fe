"""Metrics for Prometheus, named like vLLM's with our prefix: of the engine, HTTP, the API keys and the canary.

They are collected on request, from one process; nothing is stored in files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import get_args

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from fastllama.runtime.outputs import FinishReason
from fastllama.runtime.serving.statistics import HistogramSnapshot, Snapshot
from fastllama.serve import page
from fastllama.serve.health import CanaryResult

CONTENT_TYPE = CONTENT_TYPE_LATEST
PREFIX = "fastllama:"
PHASES = ("loading", "ready", "draining", "down")
ROUTES = frozenset(
    {
        "/",
        "/health",
        "/ready",
        "/metrics",
        "/version",
        "/tokenize",
        "/detokenize",
        "/v1/models",
        "/v1/models/{id}",
        "/v1/chat/completions",
        "/v1/completions",
        *page.FILES,
    }
)
_OTHER = "other"  # all other routes: labels must not depend on the client

# Name, its value in a Snapshot, and its help text.
_GAUGES: tuple[tuple[str, Callable[[Snapshot], float], str], ...] = (
    ("num_requests_running", lambda now: now.num_running, "Sequences that hold pages of the KV cache."),
    ("num_requests_waiting", lambda now: now.num_queued, "Accepted requests that are not yet scheduled."),
    (
        "kv_cache_usage_perc",
        lambda now: 1 - now.num_available_pages / now.num_pages if now.num_pages else 0.0,
        "Fraction of the KV cache in use. Pages held only by the prefix cache count as free.",
    ),
)
_COUNTERS: tuple[tuple[str, Callable[[Snapshot], float], str], ...] = (
    ("requests_accepted", lambda now: now.num_accepted, "Requests that were queued."),
    ("requests_rejected", lambda now: now.num_rejected, "Requests that found the queue full."),
    ("requests_failed", lambda now: now.num_failed, "Requests that ended with an error."),
    ("prompt_tokens", lambda now: now.num_prompt_tokens, "Prompt tokens of scheduled requests."),
    ("generation_tokens", lambda now: now.num_generated_tokens, "Generated tokens."),
    ("prefix_cache_queries", lambda now: now.num_prompt_tokens, "Tokens looked up in the prefix cache."),
    ("prefix_cache_hits", lambda now: now.num_cached_tokens, "Tokens found in the prefix cache."),
    ("host_cache_hits", lambda now: now.num_host_hit_tokens, "Tokens copied back from the host cache."),
    ("num_preemptions", lambda now: now.num_preemptions, "Sequences preempted, to be recomputed."),
    ("spec_decode_num_draft_tokens", lambda now: now.num_draft_tokens, "Draft tokens verified."),
    ("spec_decode_num_accepted_tokens", lambda now: now.num_accepted_tokens, "Draft tokens accepted."),
)
_HISTOGRAMS: tuple[tuple[str, Callable[[Snapshot], HistogramSnapshot], str], ...] = (
    ("request_queue_time_seconds", lambda now: now.queue_seconds, "From a request's arrival until it is scheduled."),
    (
        "time_to_first_token_seconds",
        lambda now: now.first_token_seconds,
        "From a request's arrival to its first token.",
    ),
    (
        "inter_token_latency_seconds",
        lambda now: now.inter_token_seconds,
        "Between two tokens of a sample; those of one step count as evenly spaced.",
    ),
    ("e2e_request_latency_seconds", lambda now: now.request_seconds, "From a request's arrival to its end."),
)


class Metrics(Collector):
    """The collector of /metrics.

    snapshot: the engine's counters; None while the model is loaded, when the engine's metrics are left out.
    build: labels of build_info, read at each rendering, so that the model's may be added later.
    phase: one of PHASES. healthy: whether /health returns 200. Each is left out if not given.

    Not thread-safe.
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot | None],
        build: Mapping[str, str],
        *,
        phase: Callable[[], str] | None = None,
        healthy: Callable[[], bool] | None = None,
    ) -> None:
        self._snapshot, self._build, self._phase, self._healthy = snapshot, build, phase, healthy
        self._http: Counter[tuple[str, int]] = Counter()
        self._tokens: Counter[tuple[str, str]] = Counter()
        self._canary: Counter[CanaryResult] = Counter()
        self._last_canary: CanaryResult | None = None
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def observe_http(self, route: str, status: int) -> None:
        """Count a response; route: one of ROUTES, or counted as "other". status: 499 if the client disconnected."""
        self._http[route if route in ROUTES else _OTHER, status] += 1

    def count_tokens(self, key: str, prompt: int, generated: int) -> None:
        """Count tokens of a key by its name, which is empty if the server has no keys."""
        self._tokens[key, "prompt"] += prompt
        self._tokens[key, "generated"] += generated

    def observe_canary(self, result: CanaryResult) -> None:
        """Count a canary request by its result."""
        self._canary[result] += 1
        if result != "skipped":
            self._last_canary = result

    def render(self) -> bytes:
        """Returns the text of /metrics, of content type CONTENT_TYPE."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yields the current metrics; called by prometheus_client."""
        yield _gauge("build_info", "Version and model, as labels; always 1.", [(dict(self._build), 1)])
        if self._phase is not None:
            now = self._phase()
            phases = [({"phase": each}, float(each == now)) for each in PHASES]
            yield _gauge("phase", "1 for the phase that the service is in.", phases)
        if self._healthy is not None:
            yield _gauge("healthy", "1 if /health returns 200.", [({}, float(self._healthy()))])
        responses = [({"route": route, "status": str(status)}, n) for (route, status), n in self._http.items()]
        yield _counter("http_requests", "HTTP responses; status 499: the client left.", responses)
        tokens = [({"key": key, "kind": kind}, n) for (key, kind), n in self._tokens.items()]
        yield _counter("tokens", "Tokens of prompts and answers by the name of the API key.", tokens)
        results = [({"result": each}, self._canary[each]) for each in get_args(CanaryResult)]
        yield _counter("canary_requests", "Canary requests by result.", results)
        if self._last_canary is not None:
            agrees = float(self._last_canary == "agreed")
            yield _gauge("canary_agreement", "1 if the last canary's answer agreed with the first.", [({}, agrees)])
        snapshot = self._snapshot()
        if snapshot is not None:
            yield from _engine_metrics(snapshot)


def _engine_metrics(now: Snapshot) -> Iterator[Metric]:
    for name, value, text in _GAUGES:
        yield _gauge(name, text, [({}, value(now))])
    for name, value, text in _COUNTERS:
        yield _counter(name, text, [({}, value(now))])
    ended = [({"finished_reason": each}, now.num_finished.get(each, 0)) for each in get_args(FinishReason)]
    yield _counter("request_success", "Samples that have ended, by their finish reason.", ended)
    for name, histogram, text in _HISTOGRAMS:
        yield _histogram(name, text, histogram(now))


def _gauge(name: str, text: str, values: Sequence[tuple[dict[str, str], float]]) -> Metric:
    gauge = GaugeMetricFamily(PREFIX + name, text)
    for labels, value in values:
        gauge.add_sample(gauge.name, labels, value)
    return gauge


def _counter(name: str, text: str, values: Sequence[tuple[dict[str, str], float]]) -> Metric:
    counter = CounterMetricFamily(PREFIX + name, text)
    for labels, value in values:
        counter.add_sample(f"{counter.name}_total", labels, value)
    return counter


def _histogram(name: str, text: str, found: HistogramSnapshot) -> Metric:
    """Returns a histogram with cumulative buckets: each counts all values up to its bound, the last one all values."""
    bounds = [*map(floatToGoString, found.bounds), "+Inf"]
    buckets = list(zip(bounds, map(float, accumulate(found.counts)), strict=True))
    return HistogramMetricFamily(PREFIX + name, text, buckets=buckets, sum_value=found.total)
