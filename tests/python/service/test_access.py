"""Who may ask for what, and what hostile clients get."""

from __future__ import annotations

import json
import socket

import pytest

from conftest import Client, served, spec_of, wait_for

SECRET = "xyzzy-prompt-secret"


@pytest.fixture
def guarded(two_workers, tmp_path):
    options = {"api_token": "api-token", "admin_token": "admin-token", "access_log": str(tmp_path / "access.log")}
    with served([spec_of(worker) for worker in two_workers], **options) as client:
        yield client


@pytest.mark.parametrize("token", ["", "api-toke", "api-tokenx", "Api-token", "admin-toke\u00e9"])
def test_wrong_tokens_are_refused(guarded, token):
    stranger = Client(guarded.url, token.encode().decode("latin-1"))
    for method, path in (
        ("POST", "/v1/completions"),
        ("GET", "/metrics"),
        ("GET", "/workers"),
        ("POST", "/workers"),
        ("POST", "/route"),
        ("GET", "/dashboard.json"),
        ("POST", "/find_best_worker"),
    ):
        status, headers, body = stranger.ask(method, path, b"{}" if method == "POST" else None)
        assert status == 401, path
        assert headers["www-authenticate"] == "Bearer"
        assert b"token" in body
    for path in ("/", "/health", "/ready"):
        assert stranger.ask("GET", path)[0] == 200


def test_the_api_token_is_no_admin(guarded):
    user = Client(guarded.url, "api-token")
    assert user.ask("GET", "/workers")[0] == 200
    for method, path in (
        ("POST", "/workers"),
        ("DELETE", "/workers/0"),
        ("POST", "/reset"),
        ("POST", "/reset_prefix_cache"),
        ("POST", "/v1/load_lora_adapter"),
    ):
        assert user.ask(method, path, b"{}")[0] == 403, path
    assert guarded.ask("POST", "/reset")[0] == 200


def test_admin_calls_from_other_sites_are_refused(two_workers):
    with served([spec_of(worker) for worker in two_workers]) as client:
        assert client.ask("POST", "/reset", b"", {"Origin": "http://evil.example"})[0] == 403
        assert client.ask("POST", "/reset", b"", {"Origin": client.url})[0] == 200


def test_logs_hold_no_prompt_and_no_token(guarded, tmp_path, caplog):
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    body = {"model": "sim", "prompt": SECRET, "max_tokens": 2}
    status, _, _ = guarded.ask("POST", f"/v1/completions?key={SECRET}", body, {"traceparent": trace})
    assert status == 200
    text = wait_for((tmp_path / "access.log").read_text)  # it is written when the answer has gone
    record = json.loads(text.splitlines()[-1])
    assert (record["status"], record["path"], record["traceparent"]) == (200, "/v1/completions", trace)
    assert record["prompt_tokens"] == 1
    for secret in (SECRET, "api-token", "admin-token"):
        assert secret not in text + caplog.text


def raw(client: Client, request: bytes) -> bytes:
    host, port = client.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: +4\r\n\r\nabcd",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 4\r\nContent-Length: 4, 5\r\n\r\nabcd",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 0x4\r\n\r\nabcd",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\nabcd",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 4\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length:\r\n 4\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nabc",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\nHost: x\n\n",
        b"GET / HTTP/1.1\r\nHost: x\nX: y\r\n\r\n",
        b"GET / HTTP/1.1\r\n: no name\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: a\x00b\r\n\r\n",
        b"GET  / HTTP/1.1\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_malformed_http_is_one_400(guarded, request_bytes):
    before = guarded.metrics()["kvrouter_requests_total"]
    answer = raw(guarded, request_bytes)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400", b"HTTP/1.1 505"))
    assert answer.count(b"HTTP/1.") == 1
    assert guarded.metrics()["kvrouter_requests_total"] == before


def test_sizes_are_limited(two_workers):
    limits = {"max_body_bytes": 1000, "max_header_bytes": 2000}
    with served([spec_of(worker) for worker in two_workers], limits=limits) as client:
        assert raw(client, b"GET / HTTP/1.1\r\nX: " + b"x" * 3000).startswith(b"HTTP/1.1 431")
        head = b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5000\r\n\r\n"
        assert raw(client, head).startswith(b"HTTP/1.1 413")
        assert client.ask("GET", "/health")[0] == 200


@pytest.mark.parametrize("path", ["/v1/../reset_prefix_cache", "/v1/%2e%2e/reset", "/v1/x%0d%0aHost:%20y"])
def test_paths_that_could_mean_another_need_the_admin(guarded, path):
    assert raw(guarded, f"POST {path} HTTP/1.1\r\nAuthorization: Bearer api-token\r\n\r\n".encode()).startswith(
        b"HTTP/1.1 403"
    )
