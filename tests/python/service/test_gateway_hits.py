"""The gateway reads from answers what workers found in their caches, and holds it against what it predicted."""

from __future__ import annotations

import pytest

from conftest import BLOCK_SIZE, served, sim_worker, spec_of, wait_for

WINDOW = 64
PROMPT = list(range(10, 11 + 4 * BLOCK_SIZE))


@pytest.mark.parametrize("stream", [False, True])
def test_hits_are_read_from_answers(stream: bool) -> None:
    body = {"model": "sim", "prompt": PROMPT, "max_tokens": 2}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    with sim_worker() as worker, served([spec_of(worker)]) as client:
        client.ask("POST", "/v1/completions", body)
        wait_for(lambda: client.workers()[0]["cached_blocks"] >= 4)
        for _ in range(WINDOW):
            assert client.ask("POST", "/v1/completions", body)[0] == 200
        name = f'{{worker="0",url="http://127.0.0.1:{worker.port}"}}'
        metrics = client.metrics()
        assert metrics["kvrouter_worker_hit_reports_total" + name] == WINDOW + 1
        assert metrics["kvrouter_worker_hit_missing_tokens_total" + name] == 0
        assert metrics["kvrouter_worker_hit_surplus_tokens_total" + name] == 0
        assert metrics["kvrouter_worker_hits_diverge" + name] == 0


def test_worker_whose_events_do_not_come_is_found_out() -> None:
    with sim_worker() as worker:
        spec = spec_of(worker)
        silent = type(spec)(spec.url, "", "", spec.load)
        with served([silent]) as client:
            for _ in range(WINDOW):
                client.ask("POST", "/v1/completions", {"model": "sim", "prompt": PROMPT, "max_tokens": 1})
            diverge = [
                value for name, value in client.metrics().items() if name.startswith("kvrouter_worker_hits_diverge")
            ]
            assert diverge == [1]


def test_counters_are_read_where_answers_do_not_tell() -> None:
    body = {"model": "sim", "prompt": PROMPT, "max_tokens": 1, "stream": True}  # without usage
    with sim_worker() as worker, served([spec_of(worker)]) as client:
        client.ask("POST", "/v1/completions", body)
        wait_for(lambda: client.workers()[0]["cached_blocks"] >= 4)
        for _ in range(WINDOW):
            assert client.ask("POST", "/v1/completions", body)[0] == 200
        name = f'{{worker="0",url="http://127.0.0.1:{worker.port}"}}'
        wait_for(lambda: client.metrics()["kvrouter_worker_hit_reports_total" + name] >= WINDOW)
        assert client.metrics()["kvrouter_worker_hits_diverge" + name] == 0
