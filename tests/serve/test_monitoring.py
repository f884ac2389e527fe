"""The board and the alerts in docs/monitoring ask for metrics, labels and values that /metrics has."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastllama.serve.log import AccessRecord
from fastllama.serve.metrics import PHASES, ROUTES
from tests.serve.test_metrics import families, full

DOCS = Path(__file__).parents[2] / "docs"
BOARD: dict[str, Any] = json.loads((DOCS / "monitoring" / "grafana.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((DOCS / "monitoring" / "alerts.yml").read_text(encoding="utf-8"))
RULES: list[dict[str, Any]] = [rule for group in ALERTS["groups"] for rule in group["rules"]]
PANELS: list[dict[str, Any]] = BOARD["panels"]
PAGE = (DOCS / "use" / "monitoring.md").read_text(encoding="utf-8")

METRIC = re.compile(r"\b((?:fastllama:|process_)\w+|up\b)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
SCRAPED = {"job", "instance"}  # labels that Prometheus adds
WORDS = {"sum", "by", "rate", "increase", "histogram_quantile", "and", "or"}


def expressions() -> list[str]:
    board = [target["expr"] for panel in PANELS for target in panel["targets"]]
    return board + [" ".join(rule["expr"].split()) for rule in RULES]


def exported() -> tuple[dict[str, str], dict[str, dict[str, set[str]]]]:
    """The type of each sample's metric, and the values of each of its labels."""
    kinds = {"up": "gauge"}
    labels: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    metrics = full()
    for route in ROUTES:
        metrics.observe_http(route, 503)
    metrics.observe_http("/v1/completions", 404)
    for family in families(metrics).values():
        for sample in family.samples:
            counts = sample.name.endswith(("_total", "_bucket", "_count", "_sum"))
            kinds[sample.name] = "counter" if counts else "gauge"
            for name, value in sample.labels.items():
                labels[sample.name][name].add(value)
    return kinds, labels


KINDS, LABELS = exported()


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_asks_for_what_is_exported(expression: str) -> None:
    found = METRIC.findall(expression)
    assert found
    for metric, matchers in found:
        assert metric in KINDS
        for label, how, value in MATCHER.findall(matchers):
            assert label in SCRAPED | LABELS[metric].keys(), f"{metric} has no label {label}"
            if label not in SCRAPED:
                same = re.fullmatch if how in ("=~", "!~") else lambda wanted, given: wanted == given
                assert any(same(value, each) for each in LABELS[metric][label]), f"no {label} is {value}"
    grouped = {label for labels in re.findall(r"by \(([^)]*)\)", expression) for label in labels.split(", ")}
    assert grouped <= SCRAPED.union(*(LABELS[metric].keys() for metric, _ in found))


@pytest.mark.parametrize("expression", expressions())
def test_rates_are_of_counters_and_quantiles_of_buckets(expression: str) -> None:
    counted = re.findall(r"(?:rate|increase)\(([\w:]+)", expression)
    assert [KINDS[metric] for metric in counted] == ["counter"] * len(counted)
    bare = [metric for metric, _ in METRIC.findall(expression) if metric not in counted]
    assert [KINDS[metric] for metric in bare] == ["gauge"] * len(bare)
    if "histogram_quantile" in expression:
        assert re.search(r"by \((?:instance, )?le\) \(rate\([\w:]+_bucket[{\[]", expression)
    for opening, closing in ("()", "{}", "[]"):
        assert expression.count(opening) == expression.count(closing)
    outside = re.sub(r"\{[^}]*\}|by \([^)]*\)|\[[^]]*\]", " ", expression)
    assert set(re.findall(r"(?<![\w:])[a-z]\w*(?![\w:])", outside)) <= WORDS | KINDS.keys()


def test_the_board_has_no_two_panels_in_one_place() -> None:
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in PANELS)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert {x for x, _ in cells} == set(range(24)), "Grafana's grid"
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)


def test_the_board_names_only_variables_that_it_defines() -> None:
    defined = {each["name"] for each in BOARD["templating"]["list"]} | {"__rate_interval", "__all"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD))) <= defined
    assert "id" not in BOARD, "an import gives one"


def test_every_alert_states_how_bad_it_is_and_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}


def test_the_page_has_every_metric_and_every_field_of_the_log() -> None:
    rows = re.findall(r"^\| `(\w[^| ]*(?:, [^|]*)?)` \|", PAGE, re.MULTILINE)
    named = {name.split("{")[0] for row in rows for name in row.split("`, `")}
    ours = {name.removeprefix("fastllama:") for name in families(full()) if name.startswith("fastllama:")}
    fields = set(AccessRecord.__dataclass_fields__)
    assert named == ours | fields
    assert all(f"`{phase}`" in PAGE for phase in PHASES)


def test_the_page_has_the_labels_of_each_metric() -> None:
    written = {name: set(labels.split(", ")) for name, labels in re.findall(r"`(\w+)\{([\w, ]+)\}`", PAGE)}
    shown = {
        name.removeprefix("fastllama:").removesuffix("_total"): set(labels)
        for name, labels in LABELS.items()
        if not name.endswith(("_bucket", "build_info"))  # le is every histogram's, and the build has what it has
    }
    assert written == {name: labels for name, labels in shown.items() if labels}
