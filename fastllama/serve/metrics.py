"""Metrics for Prometheus, in vLLM's names with our prefix: the engine's counters, HTTP's, each key's, the canary's.

They are read when they are asked for, from one process; nothing is kept in files.
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
_OTHER = "other"  # every other route: what clients make up must not become a label

# Name, how a Snapshot says it, and what it is.
_GAUGES: tuple[tuple[str, Callable[[Snapshot], float], str], ...] = (
    ("num_requests_running", lambda now: now.num_running, "Sequences that hold pages of the KV cache."),
    ("num_requests_waiting", lambda now: now.num_queued, "Accepted requests that have not begun."),
    (
        "kv_cache_usage_perc",
        lambda now: 1 - now.num_available_pages / now.num_pages if now.num_pages else 0.0,
        "KV cache in use; 1 is all of it. Pages that only the prefix cache holds are free.",
    ),
)
_COUNTERS: tuple[tuple[str, Callable[[Snapshot], float], str], ...] = (
    ("requests_accepted", lambda now: now.num_accepted, "Requests that were queued."),
    ("requests_rejected", lambda now: now.num_rejected, "Requests that found the queue full."),
    ("requests_failed", lambda now: now.num_failed, "Requests that ended with an error."),
    ("prompt_tokens", lambda now: now.num_prompt_tokens, "Prompt tokens of requests that have begun."),
    ("generation_tokens", lambda now: now.num_generated_tokens, "Generated tokens."),
    ("prefix_cache_queries", lambda now: now.num_prompt_tokens, "Tokens that were looked for in the prefix cache."),
    ("prefix_cache_hits", lambda now: now.num_cached_tokens, "Tokens that were found in the prefix cache."),
    ("host_cache_hits", lambda now: now.num_host_hit_tokens, "Tokens whose keys and values came from the host cache."),
    ("num_preemptions", lambda now: now.num_preemptions, "Sequences that gave up their pages, to be computed again."),
    ("spec_decode_num_draft_tokens", lambda now: now.num_draft_tokens, "Draft tokens that were verified."),
    ("spec_decode_num_accepted_tokens", lambda now: now.num_accepted_tokens, "Draft tokens that were accepted."),
)
_HISTOGRAMS: tuple[tuple[str, Callable[[Snapshot], HistogramSnapshot], str], ...] = (
    ("request_queue_time_seconds", lambda now: now.queue_seconds, "From a request's arrival until it begins."),
    (
        "time_to_first_token_seconds",
        lambda now: now.first_token_seconds,
        "From a request's arrival to its first token.",
    ),
    (
        "inter_token_latency_seconds",
        lambda now: now.inter_token_seconds,
        "Between two tokens of a sample; those of one step count as evenly apart.",
    ),
    ("e2e_request_latency_seconds", lambda now: now.request_seconds, "From a request's arrival to its end."),
)


class Metrics(Collector):
    """What /metrics shows.

    snapshot: the engine's counters, None while the model is loaded: then only what is known without it is shown.
    build: labels of build_info, read at each rendering, so that those of the model may come later.
    phase: one of PHASES. healthy: whether /health answers 200. Each is shown where it is given.

    Not safe to call from several threads.
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
        """Count a response; route: one of ROUTES, all else counts as "other". status: 499 where the client left."""
        self._http[route if route in ROUTES else _OTHER, status] += 1

    def count_tokens(self, key: str, prompt: int, generated: int) -> None:
        """Count tokens of a key, by its name; empty where the server has no keys."""
        self._tokens[key, "prompt"] += prompt
        self._tokens[key, "generated"] += generated

    def observe_canary(self, result: CanaryResult) -> None:
        """Count what a canary request came to."""
        self._canary[result] += 1
        if result != "skipped":
            self._last_canary = result

    def render(self) -> bytes:
        """The text of /metrics, whose content type is CONTENT_TYPE."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client: the metrics as they are now."""
        yield _gauge("build_info", "What runs; always 1.", [(dict(self._build), 1)])
        if self._phase is not None:
            now = self._phase()
            phases = [({"phase": each}, float(each == now)) for each in PHASES]
            yield _gauge("phase", "1 for the phase that the service is in.", phases)
        if self._healthy is not None:
            yield _gauge("healthy", "1 where /health answers 200.", [({}, float(self._healthy()))])
        responses = [({"route": route, "status": str(status)}, n) for (route, status), n in self._http.items()]
        yield _counter("http_requests", "HTTP responses; status 499: the client left.", responses)
        tokens = [({"key": key, "kind": kind}, n) for (key, kind), n in self._tokens.items()]
        yield _counter("tokens", "Tokens of prompts and answers by the name of the API key.", tokens)
        results = [({"result": each}, self._canary[each]) for each in get_args(CanaryResult)]
        yield _counter("canary_requests", "Canary requests by what they came to.", results)
        if self._last_canary is not None:
            agrees = float(self._last_canary == "agreed")
            yield _gauge("canary_agreement", "1 where the last canary's answer agreed with the first.", [({}, agrees)])
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
    """Prometheus' buckets are cumulative: each counts all values up to its bound, the last one all there are."""
    bounds = [*map(floatToGoString, found.bounds), "+Inf"]
    buckets = list(zip(bounds, map(float, accumulate(found.counts)), strict=True))
    return HistogramMetricFamily(PREFIX + name, text, buckets=buckets, sum_value=found.total)
