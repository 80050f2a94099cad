"""The metrics that there are, those that the docs name, and those that the Grafana dashboard asks for."""

from __future__ import annotations

import json
import re
from pathlib import Path

from conftest import served, sim_worker, spec_of

DOCS = Path(__file__).parents[3] / "docs"
#: What Prometheus makes of a histogram's name.
SAMPLES = re.compile(r"_(bucket|sum|count)$")


def exported() -> tuple[set[str], set[str]]:
    """(names of families, those of them that are counters) of a running service."""
    with sim_worker() as worker, served([spec_of(worker)]) as client:
        client.ask("POST", "/v1/completions", {"model": "sim", "prompt": [1], "max_tokens": 1})
        page = client.ask("GET", "/metrics")[2].decode()
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE))
    helped = set(re.findall(r"^# HELP (\S+) .", page, re.MULTILINE))
    sampled = {SAMPLES.sub("", name) for name in re.findall(r"^([a-z_]+)(?:\{.*\})? \S+$", page, re.MULTILINE)}
    assert set(types) == helped == sampled
    return set(types), {name for name, kind in types.items() if kind == "counter"}


def documented() -> set[str]:
    """The names in the first column of the tables of docs/operations.md's section on metrics."""
    section = (DOCS / "operations.md").read_text(encoding="utf-8").split("\n## Metrics\n")[1].split("\n## ")[0]
    service, workers = section.split("With labels `worker`")
    names = set()
    for text, prefix in ((service, ""), (workers, "kvrouter_worker_")):
        for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE):
            full = ""
            for name in re.findall(r"`([a-z_]+)(?:\{[a-z]+\})?`", row):
                # "_x" stands for the name before it, with another ending.
                if name.startswith("_"):
                    words = 2 if full.endswith("_total") else 1
                    full = full.rsplit("_", words)[0] + name
                else:
                    full = prefix + name
                names.add(full)
    return names


def test_the_docs_name_every_metric_and_no_other():
    names, counters = exported()
    assert documented() == names
    assert {name for name in names if name.endswith("_total")} == counters


def test_the_grafana_dashboard_asks_for_metrics_that_there_are():
    dashboard = json.loads((DOCS / "dashboards" / "grafana.json").read_text(encoding="utf-8"))
    asked = set()
    for panel in dashboard["panels"]:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            asked |= set(re.findall(r"\b(?:kvrouter|process)_[a-z_]+", target["expr"]))
    assert len(asked) > 10
    assert {SAMPLES.sub("", name) for name in asked} <= exported()[0]
