"""The router process: what a client on the network sees."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from kvrouter.api import RouterAPI


@pytest.fixture
def api():
    made = RouterAPI(num_workers=2, base_kv_events_port=1, base_metrics_port=101, port=0)
    made.serve()
    yield made
    made.close()


def post(api, path, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{api.port}{path}", data=data, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_find_best_worker(api):
    api.router._core.index.store(1, None, [5, 6], [1, 2])
    status, answer = post(api, "/find_best_worker", {"local_hashes": [5, 6, 7], "num_tokens": 200})
    assert (status, answer) == (200, {"worker_id": 1, "overlap_blocks": 2})


def test_round_robin(api):
    answers = [post(api, "/find_worker_round_robin", {"local_hashes": [], "num_tokens": 1}) for _ in range(3)]
    assert [answer["worker_id"] for _, answer in answers] == [0, 1, 0]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "not valid JSON"),
        ({"num_tokens": 5}, "local_hashes"),
        ({"local_hashes": [-1], "num_tokens": 5}, "local_hashes"),
        ({"local_hashes": [2**64], "num_tokens": 5}, "a number that is malformed or out of range"),
        ({"local_hashes": [1], "num_tokens": 0}, "num_tokens must be positive"),
    ],
)
def test_bad_input(api, body, reason):
    status, answer = post(api, "/find_best_worker", body)
    assert status == 400
    assert reason in answer["detail"]


def test_port_taken_names_port_and_setting():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        api = RouterAPI(num_workers=1, port=port)
        with pytest.raises(OSError, match=rf"port {port}.*--port"):
            api.serve()
        assert not api.router.running


def test_async_start_and_stop():
    async def life():
        api = RouterAPI(num_workers=1, port=0)
        await api.start()
        await api.start()
        assert api.port != 0
        await api.stop()
        await api.stop()

    asyncio.run(life())


def test_process_serves_and_stops_on_sigterm():
    command = [sys.executable, "-m", "kvrouter.api", "--port", "0", "--num-workers", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        port = int(line.rsplit(":", 1)[1])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            assert json.load(answer) == {"status": "ok"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0


def test_process_says_what_is_wrong():
    command = [sys.executable, "-m", "kvrouter.api", "--num-workers", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "num_workers must be at least 1" in done.stderr
