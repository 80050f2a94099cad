"""The dashboard in a real browser: what it shows is what /metrics says."""

from __future__ import annotations

import os
import shutil

import pytest

from conftest import BLOCK_SIZE, served, sim_worker, spec_of, wait_for

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def service():
    with (
        sim_worker() as first,
        sim_worker() as second,
        served([spec_of(first), spec_of(second)], limits={"health_interval_s": 0.1}) as client,
    ):
        for group in range(3):
            for _ in range(4):
                prompt = [group + 1] * (5 * BLOCK_SIZE)
                client.ask("POST", "/v1/completions", {"model": "sim", "prompt": prompt, "max_tokens": 2})
                wait_for(lambda: sum(w["running"] + w["waiting"] for w in client.workers()) == 0)
        # The workers' own counters are asked for every five seconds.
        wait_for(lambda: sum(w["prefix_cache_queries"] for w in client.workers()) == 12 * 5 * BLOCK_SIZE)
        yield client


def number(text: str) -> float:
    return float(text.replace(",", "").rstrip("%"))


def test_values_equal_metrics(browser, service):
    page = browser.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(service.url)
    page.wait_for_selector("body[data-ready]")
    metrics = service.metrics()
    assert number(page.inner_text("#requests")) == metrics["kvrouter_requests_total"] == 12
    assert number(page.inner_text("#in_flight")) == metrics["kvrouter_requests_in_flight"]
    assert number(page.inner_text("#index_blocks")) == metrics["kvrouter_index_blocks"]
    predicted = metrics["kvrouter_predicted_hit_tokens_total"] / metrics["kvrouter_routed_prompt_tokens_total"]
    assert number(page.inner_text("#predicted")) == pytest.approx(100 * predicted, abs=0.051)
    columns = {
        "requests": "requests_total",
        "errors": "errors_total",
        "in_flight": "requests_in_flight",
        "waiting": "waiting_requests",
        "running": "running_requests",
        "cached_blocks": "cached_blocks",
        "event_batches": "kv_event_batches_total",
        "gaps": "kv_event_gaps_total",
    }
    for worker in service.workers():
        labels = f'{{worker="{worker["worker_id"]}",url="{worker["url"]}"}}'
        row = f'tr[data-worker="{worker["worker_id"]}"]'
        for key, name in columns.items():
            shown = number(page.inner_text(f'{row} [data-key="{key}"]'))
            assert shown == metrics[f"kvrouter_worker_{name}{labels}"], key
        queries = metrics[f"kvrouter_worker_prefix_cache_queries_total{labels}"]
        if queries:
            hits = metrics[f"kvrouter_worker_prefix_cache_hits_total{labels}"]
            shown = number(page.inner_text(f'{row} [data-key="hit_rate"]'))
            assert shown == pytest.approx(100 * hits / queries, abs=0.051)
    assert page.locator(".decision").count() == 12
    assert page.locator(".decision .chip.win").count() == 12
    assert page.locator("#hot tr").count() == 6  # prefixes of one block and of four, of three prompts
    assert errors == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser, service, scheme):
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.goto(service.url)
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 20, 22)"}[scheme]
    if folder := os.environ.get("KVROUTER_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/dashboard_phone_{scheme}.png")
        page.set_viewport_size({"width": 1200, "height": 1000})
        page.screenshot(path=f"{folder}/dashboard_{scheme}.png")
    page.close()


def test_it_asks_for_the_token(browser):
    with sim_worker() as worker, served([spec_of(worker)], api_token="secret") as client:
        page = browser.new_page()
        page.goto(client.url)
        page.fill("#token", "secret")
        page.click("#login button")
        page.wait_for_selector("body[data-ready]")
        assert page.locator("#workers tr").count() == 1
        page.close()
