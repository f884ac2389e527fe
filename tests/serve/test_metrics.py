"""/metrics shows each number of a Snapshot under vLLM's name, labels of closed sets, and histograms that add up."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from fastllama.runtime.serving.statistics import BOUNDS, Histogram, Snapshot
from fastllama.serve import app, page
from fastllama.serve.metrics import CONTENT_TYPE, ROUTES, Metrics

NUMBERS = [each.name for each in fields(Snapshot) if each.name.startswith("num_") and each.name != "num_finished"]
Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]


def histogram(*values: float) -> Histogram:
    found = Histogram()
    for value in values:
        found.observe(value)
    return found


def snapshot() -> Snapshot:
    """One whose numbers are all different: of its counters, 1000, 1001, and so on."""
    values: dict[str, Any] = {name: 1000 + place for place, name in enumerate(NUMBERS)}
    times = {
        "queue_seconds": histogram(0.0001),
        "first_token_seconds": histogram(0.001, 0.3, 0.3),
        "inter_token_seconds": histogram(*[0.02] * 5),
        "request_seconds": histogram(1.0, 1e4),
    }
    values |= {name: each.snapshot() for name, each in times.items()}
    values |= {"num_pages": 100, "num_available_pages": 25, "num_finished": {"stop": 7, "length": 8}}
    return Snapshot(**values)


def families(metrics: Metrics) -> Mapping[str, Metric]:
    """The samples that a scraper reads, by name."""
    return {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}


def samples(metrics: Metrics) -> Samples:
    """Ours, without the prefix."""
    found: Samples = {}
    for family in families(metrics).values():
        for sample in family.samples:
            if sample.name.startswith("fastllama:"):
                name = sample.name.removeprefix("fastllama:")
                found.setdefault(name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def full() -> Metrics:
    """Metrics of a service in use."""
    metrics = Metrics(snapshot, {"version": "1"}, phase=lambda: "ready", healthy=lambda: True)
    metrics.observe_http("/v1/completions", 200)
    metrics.count_tokens("alice", 10, 5)
    metrics.observe_canary("agreed")
    return metrics


def test_every_number_of_a_snapshot_is_shown_under_vllms_name() -> None:
    found, now = samples(full()), snapshot()
    expected = {
        "num_requests_running": now.num_running,
        "num_requests_waiting": now.num_queued,
        "kv_cache_usage_perc": 0.75,
        "requests_accepted_total": now.num_accepted,
        "requests_rejected_total": now.num_rejected,
        "requests_failed_total": now.num_failed,
        "prompt_tokens_total": now.num_prompt_tokens,
        "generation_tokens_total": now.num_generated_tokens,
        "prefix_cache_queries_total": now.num_prompt_tokens,
        "prefix_cache_hits_total": now.num_cached_tokens,
        "host_cache_hits_total": now.num_host_hit_tokens,
        "num_preemptions_total": now.num_preemptions,
        "spec_decode_num_draft_tokens_total": now.num_draft_tokens,
        "spec_decode_num_accepted_tokens_total": now.num_accepted_tokens,
    }
    assert {name: found[name] for name in expected} == {name: {(): value} for name, value in expected.items()}
    shown = {value for each in found.values() for value in each.values()}
    assert {getattr(now, name) for name in NUMBERS} - {now.num_pages, now.num_available_pages} <= shown
    ends = found["request_success_total"]
    assert {label: value for ((_, label),), value in ends.items()} == {
        "stop": 7,
        "length": 8,
        "abort": 0,
        "deadline": 0,
        "error": 0,
    }


def test_a_histogram_is_cumulative_and_its_sum_and_count_are_those_of_its_values() -> None:
    found = samples(full())
    buckets = {dict(labels)["le"]: value for labels, value in found["time_to_first_token_seconds_bucket"].items()}
    assert list(map(float, buckets)) == [*BOUNDS, float("inf")]
    assert [buckets[le] for le in ("0.001", "0.25", "0.5", "250.0", "+Inf")] == [1, 1, 3, 3, 3]
    assert found["time_to_first_token_seconds_count"] == {(): 3}
    assert found["time_to_first_token_seconds_sum"] == {(): 0.601}
    longest = found["e2e_request_latency_seconds_bucket"]
    assert (longest[("le", "250.0"),], longest[("le", "+Inf"),]) == (1, 2), "what no bound holds is in +Inf alone"
    assert found["inter_token_latency_seconds_count"] == {(): 5}
    assert found["request_queue_time_seconds_count"] == {(): 1}


def test_without_an_engine_there_is_what_is_known_without_it() -> None:
    build = {"version": "1"}
    metrics = Metrics(lambda: None, build)
    metrics.observe_http("/ready", 503)
    found = samples(metrics)
    assert set(found) == {"build_info", "http_requests_total", "canary_requests_total"}
    assert found["http_requests_total"] == {(("route", "/ready"), ("status", "503")): 1}
    build["model"] = 'llama "2"\n'
    assert samples(metrics)["build_info"] == {(("model", 'llama "2"\n'), ("version", "1")): 1}


def test_an_engine_that_has_ended_has_no_pages_in_use() -> None:
    values = {each.name: getattr(snapshot(), each.name) for each in fields(Snapshot)}
    ended = Snapshot(**(values | {"num_pages": 0, "num_available_pages": 0}))
    assert samples(Metrics(lambda: ended, {}))["kv_cache_usage_perc"] == {(): 0}


def test_what_clients_make_up_is_no_label() -> None:
    metrics = Metrics(lambda: None, {})
    for place in range(100):
        metrics.observe_http(f"/{place}", 404)
    metrics.observe_http("/v1/models/{id}", 200)
    assert samples(metrics)["http_requests_total"] == {
        (("route", "other"), ("status", "404")): 100,
        (("route", "/v1/models/{id}"), ("status", "200")): 1,
    }


def test_tokens_are_counted_by_key_and_kind() -> None:
    metrics = Metrics(lambda: None, {})
    metrics.count_tokens("alice", 10, 5)
    metrics.count_tokens("alice", 1, 0)
    metrics.count_tokens("", 3, 4)
    assert samples(metrics)["tokens_total"] == {
        (("key", "alice"), ("kind", "prompt")): 11,
        (("key", "alice"), ("kind", "generated")): 5,
        (("key", ""), ("kind", "prompt")): 3,
        (("key", ""), ("kind", "generated")): 4,
    }


def test_phase_health_and_canary_are_as_they_are_now() -> None:
    phase, healthy = "loading", True
    metrics = Metrics(lambda: None, {}, phase=lambda: phase, healthy=lambda: healthy)
    assert "canary_agreement" not in samples(metrics), "not asked yet"
    assert samples(metrics)["phase"][("phase", "loading"),] == 1
    phase, healthy = "down", False
    for agreement, results in ((1, ("agreed", "skipped")), (0, ("disagreed", "skipped")), (1, ("agreed",))):
        for result in results:
            metrics.observe_canary(result)
        assert samples(metrics)["canary_agreement"] == {(): agreement}
    found = samples(metrics)
    assert found["healthy"] == {(): 0}
    assert {label: value for ((_, label),), value in found["phase"].items()} == {
        "loading": 0,
        "ready": 0,
        "draining": 0,
        "down": 1,
    }
    results_of = {label: value for ((_, label),), value in found["canary_requests_total"].items()}
    assert results_of == {"agreed": 2, "disagreed": 1, "no_answer": 0, "failed": 0, "skipped": 2}


def test_every_metric_has_a_type_and_a_help_text_and_the_process_is_seen() -> None:
    for metrics in (full(), Metrics(lambda: None, {})):
        found = families(metrics)
        assert ("process_resident_memory_bytes" in found) == (sys.platform == "linux")
        assert [name for name, family in found.items() if not family.documentation or family.type == "unknown"] == []
        assert [name for name in found if not name.startswith(("fastllama:", "process_"))] == []


def test_two_services_of_one_process_count_apart() -> None:
    one, other = Metrics(lambda: None, {}), Metrics(lambda: None, {})
    one.observe_http("/", 200)
    assert "http_requests_total" not in samples(other)


def test_the_size_of_a_scrape_does_not_grow_with_requests() -> None:
    metrics = full()
    for _ in range(2):
        for route in (*ROUTES, "/made/up"):
            for status in (200, 404, 429, 499, 503):
                metrics.observe_http(route, status)
        size = len(families(metrics)["fastllama:http_requests"].samples)
    assert size == 5 * (len(ROUTES) + 1)
    assert CONTENT_TYPE.startswith("text/plain; version=")


def test_every_endpoint_is_a_route() -> None:
    assert {*app.ENDPOINTS, *page.FILES} == ROUTES
