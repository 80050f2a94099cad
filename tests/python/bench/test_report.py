from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from bench_support import bench_result
from matplotlib.image import imread
from rich.console import Console

from kvrouter.bench import plots
from kvrouter.bench.report import MODE_LABELS, gain_line, print_report, write_report

PERCENTILES = {"p50", "p95", "p99"}


def printed(result) -> str:
    text = io.StringIO()
    print_report(result, Console(file=text, width=140))
    return text.getvalue()


def row(text: str, label: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if label in line)
    return [cell.strip() for cell in line.strip("│┃ ").split("│")][1:]


def check_shape(figures: dict) -> None:
    assert {"workload", "engine", "modes"} <= set(figures)
    assert list(figures["modes"]) == ["round_robin", "kv_aware"]
    for mode in figures["modes"].values():
        assert isinstance(mode["hit_rate"], float)
        assert isinstance(mode["requests_per_s"], float) and isinstance(mode["tokens_per_s"], float)
        assert set(mode["ttft_ms"]) == set(mode["latency_ms"]) == PERCENTILES
        assert set(mode["router_us"]) == {"p50", "p99"}
        assert sum(mode["requests_per_worker"]) == 40


def test_table_shows_the_figures_with_their_units():
    text = printed(bench_result(["thrash"]))
    assert "thrash: 40 requests of 1600 + 16 tokens, 2 sim workers, 4 users\n" in text
    assert row(text, "hit rate [%]") == ["31.0", "79.0"]
    assert row(text, "requests/s") == ["4.44", "8.89"]
    assert row(text, "requests per worker") == ["20 / 20", "20 / 20"]
    for label in ("TTFT p95 [ms]", "latency p99 [ms]", "router p50 [µs]"):
        assert len(row(text, label)) == 2
    assert "hit rate +48.0 points, throughput +100%, TTFT p50 -76%" in text
    assert "failed for good" not in text


def test_table_of_repeats_shows_medians_and_spread():
    text = printed(bench_result(["thrash"], repeats=3))
    assert "medians of 3 runs each" in text
    assert row(text, "hit rate [%]") == ["32.0 (31.0 to 33.0)", "80.0 (79.0 to 81.0)"]


def test_table_says_what_failed():
    text = printed(bench_result(["thrash"], failed=2))
    assert row(text, "failed for good") == ["2", "2"]


def test_figures_that_are_missing_are_a_dash():
    result = bench_result(["thrash"])
    for run in result.workloads[0].runs["kv_aware"]:
        run["hit_rate"] = None
        run["router_us"] = {"p50": None, "p99": None}
    text = printed(result)
    assert row(text, "hit rate [%]") == ["31.0", "-"]
    assert row(text, "router p99 [µs]")[1] == "-"
    modes = result.workloads[0].as_json()["modes"]
    assert "hit rate" not in gain_line(modes["round_robin"], modes["kv_aware"])


def test_prediction_check_is_reported():
    result = bench_result(["thrash"])
    result.workloads[0].prediction_check = {"requests": 100, "agreement": 0.995, "with_overlap": 68}
    assert "on 99.5% of 100 requests (68 with an overlap)" in printed(result)
    assert result.as_json()["prediction_check"]["agreement"] == 0.995


def test_json_of_one_workload_is_an_object():
    figures = json.loads(json.dumps(bench_result(["group"]).as_json(), allow_nan=False))
    check_shape(figures)
    assert (figures["workload"], figures["engine"]) == ("group", "sim")
    assert "spread" not in figures["modes"]["kv_aware"]
    assert figures["settings"]["workload"] == "group"
    assert "output" not in figures["settings"]


def test_json_of_all_workloads_is_a_list():
    names = ["shared", "thrash", "group", "unique"]
    figures = bench_result(names).as_json()
    assert [item["workload"] for item in figures] == names
    for item in figures:
        check_shape(item)


def test_json_of_repeats_has_medians_and_spread():
    mode = bench_result(["thrash"], repeats=3).as_json()["modes"]["kv_aware"]
    assert mode["hit_rate"] == pytest.approx(0.80)
    assert mode["spread"]["hit_rate"] == pytest.approx([0.79, 0.81])
    assert mode["spread"]["ttft_ms"]["p50"][0] < mode["ttft_ms"]["p50"] < mode["spread"]["ttft_ms"]["p50"][1]


def test_folder_holds_json_requests_and_plots(tmp_path):
    paths = write_report(bench_result(["shared", "thrash"], repeats=2), tmp_path / "deep" / "folder")
    assert {path.name for path in paths} == {
        "results.json",
        "requests.jsonl",
        "hit_rate.png",
        "throughput.png",
        "ttft.png",
        "router_latency.png",
        "requests_per_worker.png",
    }
    lines = [json.loads(line) for line in (tmp_path / "deep/folder/requests.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2 * 2 * 40
    assert {line["workload"] for line in lines} == {"shared", "thrash"}
    for path in paths:
        if path.suffix == ".png":
            check_picture(path)


def check_picture(path: Path) -> None:
    image = imread(path)
    height, width = image.shape[:2]
    assert width >= 600 and height >= 400
    assert len({tuple(pixel) for pixel in image[::7, ::7, :3].reshape(-1, 3).tolist()}) > 3, "more than a blank page"


@pytest.mark.parametrize("plot", [plots.plot_hit_rate, plots.plot_throughput])
def test_bars_carry_the_figures_and_units(plot):
    result = bench_result(["shared", "thrash"], repeats=3)
    figure = plot(result)
    (axes,) = figure.axes
    assert len([bar for bar in axes.patches if bar.get_height() > 0]) == 4
    assert axes.get_ylabel() and axes.get_title(loc="left") + axes.get_title()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["shared", "thrash"]
    texts = {text.get_text() for text in axes.texts}
    assert texts >= ({"32%", "80%"} if plot is plots.plot_hit_rate else {"4.0", "7.3"})


@pytest.mark.parametrize(
    ("plot", "unit"), [(plots.plot_ttft, "[ms]"), (plots.plot_router_latency, "[µs]")], ids=["ttft", "router"]
)
def test_distributions_have_a_panel_a_workload_and_a_curve_a_mode(plot, unit):
    figure = plot(bench_result(["shared", "thrash", "group"]))
    assert len(figure.axes) == 3
    for axes in figure.axes:
        assert unit in axes.get_xlabel()
        assert len(axes.lines) == 2
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        for label, mode in zip(labels, MODE_LABELS.values(), strict=True):
            assert label.startswith(mode) and "p50" in label
        for line in axes.lines:
            assert max(line.get_ydata()) == pytest.approx(100)


def test_worker_bars_add_up_to_the_requests():
    figure = plots.plot_requests_per_worker(bench_result(["thrash"], num_workers=4))
    (axes,) = figure.axes
    assert sum(bar.get_height() for bar in axes.patches) == 80


def test_modes_differ_in_line_style_too():
    assert len(set(plots.LINES.values())) == len(set(plots.COLORS.values())) == len(MODE_LABELS)


def test_plots_bear_runs_without_a_single_figure(tmp_path):
    result = bench_result(["thrash"])
    workload = result.workloads[0]
    for mode in workload.runs:
        workload.records[mode] = [
            dataclasses.replace(record, worker=None, ttft_ms=None, router_us=None) for record in workload.records[mode]
        ]
        for run in workload.runs[mode]:
            run["hit_rate"] = None
    for path in plots.write_plots(result, tmp_path):
        assert path.stat().st_size > 1000
