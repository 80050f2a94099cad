"""The gateway's data path: what a client sees, whatever workers and clients do."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import urllib.request

import pytest

from conftest import BLOCK_SIZE, Client, served, sim_worker, spec_of, wait_for
from kvrouter.serve import KvService, ServeOptions
from kvrouter.service_client import ServiceClient
from kvrouter.worker_spec import WorkerSpec, read_workers_file
from kvrouter.workers_file import WorkersFile

PROMPT = list(range(10, 10 + 4 * BLOCK_SIZE))


def completion(prompt=PROMPT, **fields):
    return {"model": "sim", "prompt": prompt, "max_tokens": 4} | fields


def test_completion_as_the_worker_answers_it(gateway):
    status, headers, body = gateway.ask("POST", "/v1/completions", completion())
    assert status == 200
    assert json.loads(body)["usage"]["completion_tokens"] == 4
    assert headers["x-kvrouter-worker-id"] in "01"
    assert headers["x-kvrouter-overlap-blocks"] == "0"


def test_second_request_goes_where_the_first_is_cached(gateway):
    _, first, _ = gateway.ask("POST", "/v1/completions", completion())
    wait_for(lambda: sum(w["cached_blocks"] for w in gateway.workers()) >= 4)
    for _ in range(4):
        _, headers, _ = gateway.ask("POST", "/v1/completions", completion())
        assert headers["x-kvrouter-worker-id"] == first["x-kvrouter-worker-id"]
        assert headers["x-kvrouter-overlap-blocks"] == "4"
    metrics = gateway.metrics()
    assert metrics["kvrouter_routed_prompt_tokens_total"] == 5 * len(PROMPT)
    assert metrics["kvrouter_predicted_hit_tokens_total"] == 4 * len(PROMPT)


def test_text_is_tokenized_by_a_worker_and_cached(gateway):
    text = " ".join(f"w{token}" for token in PROMPT)
    gateway.ask("POST", "/v1/completions", completion())
    wait_for(lambda: sum(w["cached_blocks"] for w in gateway.workers()) >= 4)
    for _ in range(2):
        status, headers, _ = gateway.ask("POST", "/v1/completions", completion(text))
        assert (status, headers["x-kvrouter-overlap-blocks"]) == (200, "4")
    metrics = gateway.metrics()
    assert metrics["kvrouter_tokenizer_cache_misses_total"] == 1
    assert metrics["kvrouter_tokenizer_cache_hits_total"] == 1


def test_stream_comes_in_pieces(gateway):
    request = urllib.request.Request(
        gateway.url + "/v1/completions", data=json.dumps(completion(stream=True, max_tokens=8)).encode()
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line for line in answer.read().decode().split("\n\n") if line]
    assert len(events) == 9
    assert events[-1] == "data: [DONE]"


def test_models_of_all_workers_and_requests_by_model(two_workers):
    with sim_worker(model="other") as other, served([spec_of(w) for w in [*two_workers, other]]) as client:
        assert {model["id"] for model in client.json("GET", "/v1/models")["data"]} == {"sim", "other"}
        for _ in range(3):
            _, headers, _ = client.ask("POST", "/v1/completions", completion(model="other"))
            assert headers["x-kvrouter-worker-id"] == "2"
        status, _, body = client.ask("POST", "/v1/completions", completion(model="none"))
        assert status == 404
        assert "none" in json.loads(body)["error"]["message"]


def test_a_bad_request_is_the_workers_to_refuse(gateway):
    status, _, body = gateway.ask("POST", "/v1/completions", completion(max_tokens=0))
    assert status == 400
    assert "max_tokens" in body.decode()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b'{"model": 1}', b'{"stream": "yes"}', b"\xff\xfe"])
def test_nonsense_is_a_400(gateway, body):
    status, _, answer = gateway.ask("POST", "/v1/completions", body)
    assert status == 400
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"


def test_unknown_paths_need_no_body_and_reach_a_worker(gateway):
    assert gateway.ask("GET", "/v1/nothing")[0] == 404
    assert gateway.ask("POST", "/reset_prefix_cache")[0] == 200


def test_a_dead_worker_is_gone_round(two_workers):
    with served([spec_of(w) for w in two_workers], limits={"health_interval_s": 3600.0}) as client:
        two_workers[0].stop()
        for i in range(6):
            status, headers, _ = client.ask("POST", "/v1/completions", completion([i + 1] * 40))
            assert (status, headers["x-kvrouter-worker-id"]) == (200, "1")
        two_workers[1].stop()
        status, headers, _ = client.ask("POST", "/v1/completions", completion())
        assert status in (502, 503)
        assert headers["retry-after"]


def test_health_follows_the_workers(two_workers):
    with served([spec_of(w) for w in two_workers]) as client:
        assert client.ask("GET", "/ready")[0] == 200
        for worker in two_workers:
            worker.stop()
        wait_for(lambda: client.ask("GET", "/ready")[0] == 503)
        assert client.ask("GET", "/health")[0] == 200
        status, headers, _ = client.ask("POST", "/v1/completions", completion())
        assert (status, headers["retry-after"]) == (503, "1")


class BreakingServer:
    """A worker that answers /health and /v1/models, and breaks off whatever else it is asked."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.closed_by_peer = threading.Event()
        self.hold = False
        self.heads: list[bytes] = []  # of what was not a GET
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = connection.recv(65536)
            if head.startswith(b"GET"):
                body = b'{"data": [{"id": "sim"}]}'
                connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
                connection.sendall(body)
                return
            self.heads.append(head.partition(b"\r\n\r\n")[0])
            connection.sendall(self._answer)
            while self.hold:
                if not connection.recv(65536):
                    self.closed_by_peer.set()
                    return

    def stop(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def breaking(answer, hold=False, **options):
    server = BreakingServer(answer)
    server.hold = hold
    limits = {"health_interval_s": 0.1} | options
    with KvService(
        ServeOptions(workers=[WorkerSpec(server.url)], port=0, block_size=BLOCK_SIZE, max_workers=2, limits=limits)
    ) as service:
        client = Client(service.url)
        wait_for(lambda: all(w["healthy"] and w["models"] for w in client.workers()))
        yield client, server
        server.stop()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_trace_context_is_passed_on():
    trace = {
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "tracestate": "vendor=t61rcWkgMzE,other=00f067aa0ba902b7",
    }
    with breaking(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}") as (client, server):
        assert client.ask("POST", "/v1/completions", completion(), trace | {"X-Request-Id": "abc"})[0] == 200
    lines = server.heads[-1].decode().lower().split("\r\n")
    for name, value in (trace | {"X-Request-Id": "abc"}).items():
        assert lines.count(f"{name}: {value}".lower()) == 1, name


def test_headers_of_the_connection_stay_here_and_a_folded_one_is_one_line():
    body = json.dumps(completion()).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, X-Hop\r\nX-Hop: 1\r\n"
        b"X-Folded: a\r\n Transfer-Encoding: chunked\r\nContent-Length: %d\r\n\r\n"
    )
    with breaking(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}") as (client, server):
        host, port = client.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(head % len(body) + body)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    (sent,) = server.heads
    names = [line.partition(":")[0].lower() for line in sent.decode().split("\r\n")[1:]]
    assert sorted(names) == ["content-length", "host", "x-folded"]


def test_a_stream_that_breaks_off_ends_with_an_error_event():
    with breaking(HEAD + b"9\r\ndata: {}\n\r\n") as (client, _):
        status, _, body = client.ask("POST", "/v1/completions", completion(stream=True))
    assert status == 200
    *_, last = [event for event in body.decode().split("\n\n") if event]
    assert json.loads(last.strip().removeprefix("data: "))["error"]["code"] == 502


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_a_worker_that_fails_is_a_502(answer):
    with breaking(answer) as (client, _):
        status, _, body = client.ask("POST", "/v1/completions", completion())
    assert status == 502
    assert json.loads(body)["error"]["type"] == "upstream_error"


def test_the_breaker_opens_and_tries_again():
    with breaking(b"", breaker_failures=2, breaker_open_s=0.3) as (client, _):
        for _ in range(2):
            assert client.ask("POST", "/v1/completions", completion())[0] == 502
        assert client.ask("POST", "/v1/completions", completion())[0] == 503
        assert client.workers()[0]["breaker"] == "open"
        wait_for(lambda: client.ask("POST", "/v1/completions", completion())[0] == 502)  # the trial


def test_a_slow_worker_is_given_up():
    with breaking(b"", hold=True, first_byte_timeout_s=0.2) as (client, _):
        assert client.ask("POST", "/v1/completions", completion())[0] == 502


def test_client_gone_closes_the_workers_connection():
    with breaking(HEAD + b"8\r\ndata: x\n\r\n", hold=True) as (client, server):
        host, port = client.url.removeprefix("http://").split(":")
        body = json.dumps(completion(stream=True)).encode()
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            assert b"200 OK" in connection.recv(65536)
        assert server.closed_by_peer.wait(30)
        wait_for(lambda: client.metrics()["kvrouter_client_disconnects_total"] == 1)
        assert client.metrics()["kvrouter_requests_in_flight"] == 0


def test_full_workers_queue_and_a_full_queue_refuses():
    limits = {"max_concurrency": 1, "max_queue": 1, "queue_timeout_s": 0.3}
    with breaking(HEAD, hold=True, **limits) as (client, _):
        host, port = client.url.removeprefix("http://").split(":")
        body = json.dumps(completion(stream=True)).encode()
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            wait_for(lambda: client.workers()[0]["in_flight"] == 1)
            answers = []
            waiting = threading.Thread(
                target=lambda: answers.append(client.ask("POST", "/v1/completions", completion()))
            )
            waiting.start()
            wait_for(lambda: client.metrics()["kvrouter_requests_queued"] == 1 or answers)
            if not answers:
                status, headers, _ = client.ask("POST", "/v1/completions", completion())
                assert status in (429, 503)
                assert headers["retry-after"] == "1"
            waiting.join()
            assert answers[0][0] == 503
            assert answers[0][1]["retry-after"] == "1"


def test_a_queued_request_is_served_when_there_is_room(two_workers):
    with (
        sim_worker(time_scale=1.0, step_s=0.02) as worker,
        served([spec_of(worker)], limits={"max_concurrency": 1}) as client,
    ):
        statuses = []
        threads = [
            threading.Thread(
                target=lambda: statuses.append(client.ask("POST", "/v1/completions", completion(max_tokens=8))[0])
            )
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [200] * 6


def test_draining_and_removing(gateway, two_workers):
    gateway.json("POST", "/workers/0/drain", {"draining": True})
    for i in range(4):
        _, headers, _ = gateway.ask("POST", "/v1/completions", completion([i] * 40))
        assert headers["x-kvrouter-worker-id"] == "1"
    gateway.json("DELETE", "/workers/0")
    assert [w["worker_id"] for w in gateway.workers()] == [1]
    added = gateway.json("POST", "/workers", vars(spec_of(two_workers[0])))
    assert added["worker_id"] == 0
    wait_for(lambda: len([w for w in gateway.workers() if w["healthy"] and w["state"] == "up"]) == 2)
    assert gateway.ask("POST", "/workers", vars(spec_of(two_workers[0])))[0] == 409
    assert gateway.ask("DELETE", "/workers/3")[0] == 404
    assert gateway.ask("POST", "/workers", {"url": "ftp://x"})[0] == 400
    assert gateway.ask("POST", "/workers", {"url": "http://127.0.0.1:1", "kv_events": "nonsense"})[0] == 400


def test_an_added_workers_events_are_followed(gateway):
    with sim_worker(model="late") as late:
        gateway.json("POST", "/workers", vars(spec_of(late)))
        wait_for(lambda: any("late" in w["models"] and w["state"] == "up" for w in gateway.workers()))
        gateway.ask("POST", "/v1/completions", completion(model="late"))
        wait_for(lambda: gateway.workers()[2]["cached_blocks"] >= 4)
        _, headers, _ = gateway.ask("POST", "/v1/completions", completion(model="late"))
        assert headers["x-kvrouter-overlap-blocks"] == "4"
        gateway.json("DELETE", "/workers/2")
        assert len(gateway.workers()) == 2


def test_route_explains(gateway):
    gateway.ask("POST", "/v1/completions", completion())
    wait_for(lambda: sum(w["cached_blocks"] for w in gateway.workers()) >= 4)
    answer = gateway.json("POST", "/route", {"tokens": PROMPT})
    assert (answer["overlap_blocks"], answer["num_blocks"], answer["num_tokens"]) == (4, 4, len(PROMPT))
    best = max(answer["workers"], key=lambda worker: worker["score"])
    assert best["worker_id"] == answer["worker_id"]
    text = " ".join(f"w{token}" for token in PROMPT)
    assert gateway.json("POST", "/route", {"prompt": text, "model": "sim"})["overlap_blocks"] == 4
    batch = gateway.json("POST", "/route", {"requests": [{"tokens": PROMPT}, {"tokens": [1, 2]}]})
    assert batch["overlap_blocks"] == [4, 0]
    for body in ({}, {"tokens": []}, {"tokens": [-1]}, {"requests": [{}]}, {"tokens": [1], "lora_name": 1}, []):
        assert gateway.ask("POST", "/route", body)[0] == 400


def test_a_worker_that_is_given_twice_is_said(two_workers):
    spec = spec_of(two_workers[0])
    with pytest.raises(ValueError, match="already"):
        KvService(ServeOptions(workers=[spec, spec], port=0))
    with pytest.raises(ValueError, match="tcp:nonsense"):
        KvService(ServeOptions(workers=[WorkerSpec(spec.url, "tcp:nonsense")], port=0))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host:1",
        "http://host",
        "http://host:1/path",
        "http://h:1,kv_events",
        "http://h:1,kv_events=5557",
        "http://h:1,load=tcp://a:1,load=tcp://a:1",
        "http://h:1,other=tcp://a:1",
        "http://h:1,data_parallel_size=0",
        "http://h:1,data_parallel_size=x",
        "http://h:1,data_parallel_size=5000",
    ],
)
def test_a_malformed_worker_is_refused(text):
    with pytest.raises(ValueError, match="--worker"):
        WorkerSpec.parse(text)


def test_the_workers_file_is_followed(two_workers, tmp_path):
    file = tmp_path / "workers.json"
    first, second = (spec_of(worker) for worker in two_workers)
    file.write_text(json.dumps([vars(first)]))
    with served(read_workers_file(file)) as client:
        watched = WorkersFile(file, ServiceClient(client.url))
        for content, urls in (
            ([vars(first), vars(second)], {first.url, second.url}),
            ([vars(second)], {second.url}),
            ("nonsense", {second.url}),
        ):
            file.write_text(json.dumps(content))
            watched.follow()
            assert {worker["url"] for worker in client.workers()} == urls
