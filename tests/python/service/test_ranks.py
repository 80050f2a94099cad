"""One server with data-parallel ranks: each is a worker of its own."""

from __future__ import annotations

import contextlib
import json
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from conftest import BLOCK_SIZE, Client, served, wait_for
from kvrouter.doctor import examine_worker
from kvrouter.service_client import ServiceClient
from kvrouter.worker_spec import WorkerSpec, endpoint_of_rank, read_workers_file
from kvrouter.workers_file import WorkersFile

zmq = pytest.importorskip("zmq", reason="pyzmq is not installed")
msgpack = pytest.importorskip("msgpack", reason="msgpack is not installed")

PROMPT = list(range(10, 10 + 4 * BLOCK_SIZE))
METRICS = """vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
vllm:num_requests_waiting{engine="0",model_name="m"} 0
vllm:num_requests_waiting{engine="1",model_name="m"} 7
vllm:num_requests_running{engine="0",model_name="m"} 1
vllm:num_requests_running{engine="1",model_name="m"} 2
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 100
vllm:prefix_cache_queries_total{engine="1",model_name="m"} 300
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 10
vllm:prefix_cache_hits_total{engine="1",model_name="m"} 20
vllm:cache_config_info{block_size="16",engine="0"} 1
"""


class RankedServer:
    """As vLLM with ``--data-parallel-size``: one HTTP port, KV events of each rank on port + rank.

    A prompt is "cached" by the rank that the X-data-parallel-rank header names.
    """

    def __init__(self, ranks: int) -> None:
        self.asked_ranks: list[str | None] = []
        self._lock = threading.Lock()
        self._context = zmq.Context()
        self._sockets, self.base_port = self._bind(ranks)
        self._sequence = [0] * ranks
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                body = {"/metrics": METRICS, "/v1/models": json.dumps({"data": [{"id": "m"}]})}.get(self.path, "{}")
                self.answer(body.encode())

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.serve(self.headers.get_all("X-data-parallel-rank") or [], request["prompt"])
                self.answer(b'{"usage": {"completion_tokens": 1}}')

            def answer(self, body):
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.spec = WorkerSpec(
            f"http://127.0.0.1:{self._http.server_port}",
            f"tcp://127.0.0.1:{self.base_port}",
            data_parallel_size=ranks,
        )

    def _bind(self, ranks: int):
        """Ports in a row."""
        while True:
            first = self._context.socket(zmq.PUB)
            sockets = [first]
            base = first.bind_to_random_port("tcp://127.0.0.1", 20000, 30000)
            with contextlib.suppress(zmq.ZMQError):
                for rank in range(1, ranks):
                    sockets.append(self._context.socket(zmq.PUB))
                    sockets[-1].bind(f"tcp://127.0.0.1:{base + rank}")
                return sockets, base
            for opened in sockets:
                opened.close(0)

    def serve(self, ranks: list[str], prompt: list[int]) -> None:
        with self._lock:
            self.asked_ranks.append(ranks[0] if len(ranks) == 1 else str(ranks))
            if len(ranks) != 1:
                return
            rank = int(ranks[0])
            blocks = len(prompt) // BLOCK_SIZE
            stored = {
                "type": "BlockStored",
                "block_hashes": [hash(tuple(prompt[: (i + 1) * BLOCK_SIZE])) & (2**63 - 1) for i in range(blocks)],
                "parent_block_hash": None,
                "token_ids": prompt[: blocks * BLOCK_SIZE],
                "block_size": BLOCK_SIZE,
                "medium": "GPU",
            }
            payload = msgpack.packb([time.time(), [stored], rank])
            self._sockets[rank].send_multipart([b"", struct.pack(">Q", self._sequence[rank]), payload])
            self._sequence[rank] += 1

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        for opened in self._sockets:
            opened.close(0)
        self._context.term()


@pytest.fixture
def ranked():
    server = RankedServer(2)
    yield server
    server.close()


def ask(client: Client, prompt=PROMPT, headers=None):
    status, answered, _ = client.ask("POST", "/v1/completions", {"model": "m", "prompt": prompt}, headers)
    assert status == 200
    return answered["x-kvrouter-worker-id"], answered["x-kvrouter-overlap-blocks"]


def test_each_rank_is_a_worker(ranked):
    with served([ranked.spec]) as client:
        workers = client.workers()
        assert [(w["worker_id"], w["rank"]) for w in workers] == [(0, 0), (1, 1)]
        assert [w["kv_events_endpoint"] for w in workers] == [
            f"tcp://127.0.0.1:{ranked.base_port + rank}" for rank in (0, 1)
        ]
        # Its own engine's samples alone.
        wait_for(lambda: [w["kv_usage"] for w in client.workers()] == [0.25, 0.75])
        wait_for(lambda: [w["waiting"] for w in client.workers()] == [0, 7])
        wait_for(lambda: [w["prefix_cache_queries"] for w in client.workers()] == [100, 300])
        worker, overlap = ask(client)
        assert overlap == "0"
        wait_for(lambda: client.workers()[int(worker)]["cached_blocks"] == 4)
        # What a client says of ranks is not its to say.
        assert ask(client, headers={"X-Data-Parallel-Rank": "7"}) == (worker, "4")
        assert ranked.asked_ranks == [worker, worker]
        labels = f'{{worker="1",url="{ranked.spec.url}",rank="1"}}'
        assert client.metrics()[f"kvrouter_worker_waiting_requests{labels}"] == 7


def test_they_come_and_go_together(ranked, tmp_path):
    with served([]) as client:
        added = client.json("POST", "/workers", ranked.spec.to_dict())
        assert added["worker_ids"] == [0, 1]
        assert client.ask("POST", "/workers", ranked.spec.to_dict())[0] == 409
        client.json("POST", "/workers/0/drain", {"draining": True})
        wait_for(lambda: all(w["healthy"] and w["models"] and w["state"] == "up" for w in client.workers()))
        assert [ask(client, [i] * 40)[0] for i in range(3)] == ["1"] * 3
        for worker in added["worker_ids"]:
            client.json("DELETE", f"/workers/{worker}")
        assert client.workers() == []

        file = tmp_path / "workers.json"
        file.write_text("[]")
        watched = WorkersFile(file, ServiceClient(client.url))
        for entries, count in (([ranked.spec.to_dict()], 2), ([], 0)):
            file.write_text(json.dumps(entries))
            watched.follow()
            assert len(client.workers()) == count
        assert read_workers_file(file) == []


def test_all_of_them_or_none(ranked):
    with served([]) as client:
        for change, said in (
            ({"data_parallel_size": 5}, "--max-workers"),  # there is room for four
            ({"data_parallel_size": -1}, "data_parallel_size"),
            ({"data_parallel_size": "2"}, "data_parallel_size"),
            ({"data_parallel_size": 100_000}, "data_parallel_size"),
            ({"kv_events": "tcp://127.0.0.1:65535"}, "rank 1"),
            ({"kv_events": "ipc:///tmp/x"}, "rank 1"),
        ):
            status, _, body = client.ask("POST", "/workers", ranked.spec.to_dict() | change)
            assert (status, said in body.decode()) == (400, True), change
            assert client.workers() == []


def test_doctor_looks_at_each_rank(ranked):
    findings = list(examine_worker(ranked.spec, BLOCK_SIZE, 20, probe=True))
    in_order = [f.subject for f in findings if "in order" in f.text and f.ok]
    assert in_order == [f"{ranked.spec.url} rank {rank}" for rank in (0, 1)]
    assert sorted(ranked.asked_ranks) == ["0", "1"]


def test_ports_of_ranks():
    spec = WorkerSpec.parse("http://h:8000,data_parallel_size=2,kv_events=tcp://h:5557,replay=tcp://h:5757")
    assert [(r.kv_events, r.replay, r.load) for r in spec.ranks()] == [
        ("tcp://h:5557", "tcp://h:5757", ""),
        ("tcp://h:5558", "tcp://h:5758", ""),
    ]
    with pytest.raises(ValueError, match="no port"):
        endpoint_of_rank("ipc:///tmp/x", 1)
