"""Writes the seeds of the fuzz targets: ``python tests/fuzz/make_corpus.py``.

KV events come from a session with two real vLLM workers (tests/golden) and from batches made here in both layouts;
the rest are one input of each kind that the targets' code tells apart.  Files named ``seed-*`` are written anew; the
others, inputs that once broke something, stay.
"""

from __future__ import annotations

import json
import lzma
import struct
from collections.abc import Iterator
from pathlib import Path

import msgpack

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "golden" / "vllm-0.32.0.bin"


def golden_payloads() -> Iterator[bytes]:
    """The event batches of the real session."""
    data, at = GOLDEN.read_bytes(), 0

    def u32() -> int:
        nonlocal at
        at += 4
        return int(struct.unpack_from("<I", data, at - 4)[0])

    while at < len(data):
        for frame in range(u32()):
            size = u32()
            at += size
            if frame == 2:
                yield data[at - size : at]


def stream(block_size: int, *batches: tuple[int, bytes]) -> bytes:
    """An input of the target kv_events: batches with how far each moves the sequence number."""
    sizes = {64: 0, 4: 1, 1: 2, 16: 3}
    head = bytes([sizes[block_size]])
    return head + b"".join(struct.pack("<bH", step, len(payload)) + payload for step, payload in batches)


def kv_events() -> dict[str, bytes]:
    def batch(*events: object) -> bytes:
        return bytes(msgpack.packb([1.5, list(events), 0]))

    def stored(hashes: list, parent: object, tokens: int, **more: object) -> dict[str, object]:
        return {
            "type": "BlockStored",
            "block_hashes": hashes,
            "parent_block_hash": parent,
            "token_ids": list(range(tokens)),
            "block_size": 4,
            **more,
        }

    removed = {"type": "BlockRemoved", "block_hashes": [2]}
    cleared = {"type": "AllBlocksCleared"}
    keys = [["adapter", "salt"], None]
    seeds = {f"vllm-{i}": stream(64, (1, payload)) for i, payload in enumerate(golden_payloads())}
    return seeds | {
        "maps": stream(4, (1, batch(stored([1, 2], None, 8), removed)), (1, batch(stored([3], 2, 4), cleared))),
        "arrays": stream(
            4,
            (1, batch(["BlockStored", [1, 2], None, list(range(8)), 4, None, "GPU", None, None, 0, "full_attention"])),
            (1, batch(["BlockRemoved", [1], "GPU", 0], ["AllBlocksCleared"])),
        ),
        "bytes": stream(4, (1, batch(stored([b"a" * 32, b"b" * 32], b"c" * 32, 8)))),
        "keys": stream(4, (1, batch(stored([1, 2], None, 8, lora_name="adapter", lora_id=1, extra_keys=keys)))),
        "groups": stream(
            4,
            (1, batch(stored([1], None, 4, group_idx=1, kv_cache_spec_kind="sliding_window", medium="CPU"))),
            (1, batch({**removed, "group_idx": 63, "locality": "REMOTE"}, {"type": "Other", "a": [1, {"b": 2}]})),
        ),
        "gap": stream(4, (1, batch(stored([1], None, 4))), (5, batch(cleared)), (-3, batch(removed))),
        "restart": stream(4, (9, batch(stored([1], None, 4))), (-9, batch(stored([1], 7, 4)))),
        "orphan": stream(1, (1, batch({**stored([2], 1, 1), "block_size": 1})), (1, batch(stored([1], None, 4)))),
        "contradiction": stream(4, (1, batch(stored([1], None, 4), {**stored([1], 1, 4), "token_ids": [9, 9, 9, 9]}))),
        "depth": stream(4, (1, b"\x93\xc0\x91" + b"\x91" * 300 + b"\xc0")),
        "length": stream(4, (1, b"\x93\xc0\x91\x82\xa9token_ids\xdd\xff\xff\xff\xff")),
    }


def load_message() -> dict[str, bytes]:
    return {
        "whole": b'{"kv_cache_usage": 0.25, "num_waiting_reqs": 3, "num_running_reqs": 7, "iteration": 1}',
        "least": b'{"kv_cache_usage": 1, "num_waiting_reqs": 0}',
        "negative": b'{"kv_cache_usage": -1, "num_waiting_reqs": -1}',
        "huge": b'{"kv_cache_usage": 1e-400, "num_waiting_reqs": 18446744073709551616}',
        "utf8": b'{"kv_cache_usage": 0, "num_waiting_reqs": 1, "\xff\xc0": 1}',
        "depth": b'{"kv_cache_usage": ' + b"[" * 200,
    }


def worker_pages() -> dict[str, bytes]:
    metrics = (
        "# HELP vllm:num_requests_running Number of requests in model execution batches.\n"
        'vllm:num_requests_running{engine="0",model_name="m"} 1.0\n'
        'vllm:num_requests_waiting{engine="0",model_name="m"} 2.0\n'
        'vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25\n'
        'vllm:prefix_cache_queries_total{engine="0"} 1e+02\nvllm:prefix_cache_hits_total{engine="0"} 50\n'
        'vllm:cache_config_info{mamba_block_size="1",block_size="16",engine="0"} 1.0\n'
    )
    models = {"object": "list", "data": [{"id": "m", "parent": None}, {"id": "a", "parent": "m"}]}
    return {
        "metrics": metrics.encode(),
        "older": b"vllm:gpu_cache_usage_perc 0.5\r\nvllm:num_requests_waiting 1\r\n",
        "odd-values": b"vllm:kv_cache_usage_perc nan\nvllm:num_requests_waiting{} -1e999\nvllm:num_requests_running -0",
        "models": json.dumps(models).encode(),
    }


def worker_url() -> dict[str, bytes]:
    texts = ["http://localhost:8000", "http://[::1]:8000/", "tcp://127.0.0.1:5557", "tcp://[::1]:1", "ipc:///tmp/x",
             "http://h:9999999999999999999", "tcp://*:0", "http://a b:1", "inproc://x", "http://h:8000/v1"]  # fmt: skip
    return {str(i): text.encode() for i, text in enumerate(texts)}


def http_connection() -> dict[str, bytes]:
    get = b"GET /health?x=1 HTTP/1.1\r\nHost: a\r\n\r\n"
    post = b"POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
    chunked = b"POST /p HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nT: v\r\n\r\n"
    requests = {
        "pipelined": get + post + get,
        "chunked": chunked,
        "expect": post.replace(b"Host: a", b"Expect: 100-continue"),
        "absolute": b"GET http://h:1/p?q HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        "head": b"HEAD / HTTP/1.1\r\nConnection: close\r\n\r\n",
        "both-lengths": chunked.replace(b"Transfer", b"Content-Length: 3\r\nTransfer"),
        "long-length": b"POST / HTTP/1.1\r\nContent-Length: 18446744073709551616\r\n\r\n",
        "negative-length": b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        "huge-chunk": chunked.replace(b"5;x=y", b"ffffffffffffffff"),
        "folded": b"GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n",
        "long-head": b"GET / HTTP/1.1\r\nA: " + b"x" * 1100,
    }
    return {
        f"{name}-{mode}": bytes([mode, piece]) + request
        for name, request in requests.items()
        for mode, piece in ((0, 255), (1, 0), (2, 1), (3, 2))
        if mode == 0 or name in ("pipelined", "chunked", "head")
    }


def service_api() -> dict[str, bytes]:
    hashes = {"local_hashes": [1, 2, 18446744073709551615], "num_tokens": 12}
    bodies = [
        (0, hashes),
        (0, {"local_hashes": [], "num_tokens": 18446744073709551615}),
        (1, {"requests": [hashes, hashes]}),
        (1, {"requests": [{"local_hashes": [1], "num_tokens": 2**63}] * 3}),
        (2, hashes),
        (3, {"worker_id": 1, "until_cleared": True}),
        (3, {"worker_id": -1}),
        (4, {"tokens": [1, 2, 3, 4, 4294967295], "lora_name": "a"}),
        (4, {"requests": [{"tokens": [1, 2, 3, 4]}, {"tokens": [1, 2, 3, 4, 5]}]}),
        (4, {"prompt": "hi", "model": "m"}),
        (4, {"messages": [{"role": "user", "content": "hi"}]}),
        (5, {"url": "http://h:1", "kv_events": "tcp://h:2", "replay": None, "load": "tcp://h:3"}),
        (6, {"draining": False}),
    ]
    seeds = {f"{i}": bytes([path]) + json.dumps(body).encode() for i, (path, body) in enumerate(bodies)}
    paths = ["/workers", "/workers/", "/workers/1/drain", "/workers/99999999999", "/health", "/\xff"]
    return seeds | {f"path-{i}": b"\x08" + path.encode("latin-1") for i, path in enumerate(paths)}


def gateway_request() -> dict[str, bytes]:
    text = [{"type": "text", "text": "hi"}]
    bodies: list[dict[str, object]] = [
        {"model": "m", "prompt": [1, 2, 4294967295], "stream": True},
        {"prompt": [[1, 2], [3]]},
        {"prompt": "hi", "add_special_tokens": False},
        {"prompt": ["hi", "you"], "model": None},
        {"messages": [{"role": "user", "content": "hi"}], "tools": [{"a": [[[]]]}], "chat_template_kwargs": {"k": 1}},
        {"messages": [{"role": "user", "content": text}, {"content": None}]},
        {"messages": [{"content": [{"type": "image_url"}]}]},
        {"prompt": [-1, 1.5, 1e300, 4294967296]},
    ]
    seeds = {str(i): json.dumps(body).encode() for i, body in enumerate(bodies)}
    return seeds | {"utf8": b'{"prompt": "\xff\xed\xa0\x80"}', "escapes": rb'{"prompt": "\ud800\u0000\udc00"}'}


def workers_file() -> dict[str, bytes]:
    worker = {"url": "http://h:8000", "kv_events": "tcp://h:5557", "replay": "tcp://h:5558", "load": "tcp://h:5657"}
    lists: list[object] = [[worker, {"url": "http://[::1]:1/"}], [], {}, [1], [{"url": "http://h:1", "x": 1}],
                           [{"url": 1}], [{**worker, "load": 5}]]  # fmt: skip
    seeds = {str(i): json.dumps(value).encode() for i, value in enumerate(lists)}
    return seeds | {
        "option": b"http://h:8000,kv_events=tcp://h:1,replay=ipc://x,load=tcp://h:2",
        "utf8": b'[{"url": "http://\xff:1"}]',
        "surrogate": rb'[{"url": "http://\ud800:1"}]',
        "depth": b"[" * 300 + b"]" * 300,
    }


def trace_file() -> dict[str, bytes]:
    line = {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48, 2353]}
    plain = "\n".join(json.dumps({**line, "timestamp": 27482 + i}) for i in range(3)).encode()
    return {
        "plain": b"\0" + plain,
        "xz": b"\1" + lzma.compress(plain),
        "odd": b"\0" + json.dumps({**line, "hash_ids": [-1, 1.5], "timestamp": -1, "input_length": 0}).encode(),
        "huge": b'\0{"timestamp": 1e300, "input_length": 1e18, "output_length": -1, "hash_ids": [1844674407370955161]}',
        "list": b"\0[1]",
    }


def grpo_config() -> dict[str, bytes]:
    configs = HERE.parents[1] / "examples" / "configs"
    seeds = {path.stem: path.read_bytes() for path in configs.glob("*.yaml") if path.stat().st_size < 8192}
    return seeds | {
        "interpolation": b"grpo:\n  seed: ${mul:2,3}\n  max_num_steps: ${grpo.seed}\n",
        "alias": b"a: &x 1\nb: *x\n",
    }


def router_config() -> dict[str, bytes]:
    config = {"num_workers": 2, "base_kv_events_port": 5557, "base_metrics_port": 5657}
    more: list[dict[str, object]] = [
        {},
        {"worker_addresses": ["a", "::1"], "worker_ports": [1, 65535]},
        {"worker_ports": [5557, 5557]},
        {"num_workers": -1},
        {"worker_ports": [1e9, None]},
    ]
    return {str(i): json.dumps({**config, **part}).encode() for i, part in enumerate(more)}


def peer_message() -> dict[str, bytes]:
    names = ["http://a:1", "http://b:2", "http://unknown:3"]

    def told(*events: object) -> bytes:
        message = msgpack.packb([1, 7, 0, 16, names, list(events)])
        return struct.pack("<H", len(message)) + bytes(message)

    routed = [0, 1 << 32, 0, 100, 60, 5, struct.pack("<QQ", 1, 2)]
    state = [3, 0, 1 << 32, [[1 << 32, 0, 100, 60, 5, True], [(1 << 32) + 3, 1, 10, 10, 0, False]]]
    return {
        "life": told(routed) + told([1, 1 << 32]) + told([2, 1 << 32, 40, 0.25]),
        "state": told(routed) + told(state) + told([3, 0, 2, []]) + told([4]),
        "slot-again": told(routed, [0, 2 << 32, 1, 100, 60, 5, b""], [0, 1 << 32, 0, 1, 1, 0, b""]),
        "untracked": told([0, 0, 1, 1, 1, 0, b""]),
        "heartbeat": told() + told(),
        "unknown": told([0, 1 << 32, 2, 100, 60, 5, b""]),
        "odd": told([2, 1, -2, float("nan")], [0, 1, 9, 0, 5, 0, b"123"]),
        "order": told([3, 0, 9, [[3, 0, 1, 1, 0, True], [2, 0, 1, 1, 0, True]]]),
    }


def snapshot() -> dict[str, bytes]:
    blocks = struct.pack("<4Q", 1, 11, 2, 12)
    worker = ["http://a:1", 7, 0xDEADBEEF, True, 3, [[None, blocks], [12, struct.pack("<QQ", 3, 13)]]]
    body = bytes(msgpack.packb([64, [worker, ["http://b:2#1", 0, 1, False, 0, []]]]))
    return {
        "body": body,
        "empty": bytes(msgpack.packb([1, []])),
        "orphans": bytes(msgpack.packb([1, [["x", 0, 0, False, 0, [[99, blocks], [11, blocks]]]]])),
        "header": b"KVRSNAP\n" + struct.pack("<IQQ", 1, len(body), 0) + body,
        "lengths": b"\x92\x10\xdd\xff\xff\xff\xff",
    }


TARGETS = (kv_events, load_message, peer_message, snapshot, worker_pages, worker_url, http_connection, service_api,
           gateway_request, workers_file, trace_file, grpo_config, router_config)  # fmt: skip


def main() -> None:
    for target in TARGETS:
        folder = HERE / "corpus" / target.__name__
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("seed-*"):
            old.unlink()
        for name, data in target().items():
            (folder / f"seed-{name}").write_bytes(data)


if __name__ == "__main__":
    main()
