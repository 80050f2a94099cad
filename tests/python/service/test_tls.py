"""TLS, from clients and to workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import ssl
import threading

import pytest
from certificates import make_authority
from typer.testing import CliRunner

from conftest import BLOCK_SIZE, served, sim_worker, spec_of, wait_for
from kvrouter.bench.local_http import HttpError
from kvrouter.cli import app
from kvrouter.serve import KvService, ServeOptions
from kvrouter.service_client import ServiceClient
from kvrouter.worker_spec import WorkerSpec

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="the openssl program is not installed")

COMPLETION = {"model": "sim", "prompt": list(range(10, 10 + 4 * BLOCK_SIZE)), "max_tokens": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def authority(folder):
    return make_authority(folder, "authority")


@pytest.fixture(scope="module")
def stranger(folder):
    return make_authority(folder, "stranger")


@pytest.fixture(scope="module")
def certified(folder, authority):
    certificate, key = authority.issue(folder, "server")
    return {"tls_cert": str(certificate), "tls_key": str(key)}


@pytest.fixture(scope="module")
def secure(certified):
    """The URL of a service that speaks TLS, before a simulated worker."""
    with (
        sim_worker() as worker,
        KvService(
            ServeOptions(
                workers=[spec_of(worker)],
                port=0,
                block_size=BLOCK_SIZE,
                api_token="secret",
                limits={"health_interval_s": 0.1},
                **certified,
            )
        ) as service,
    ):
        yield service.url


@pytest.fixture
def client(secure, authority):
    made = ServiceClient(secure, "secret", authority.certificate, timeout_s=30)
    wait_for(lambda: all(w["healthy"] and w["models"] for w in made.workers()["workers"]))
    return made


def test_whole_and_streamed_answers(client):
    assert client.url.startswith("https://")
    assert client.json("POST", "/v1/completions", COMPLETION)["usage"]["completion_tokens"] == 4
    events = client.text("POST", "/v1/completions", COMPLETION | {"stream": True}).split("\n\n")
    assert events[-2] == "data: [DONE]"
    assert len(events) == 6


def test_an_authority_that_did_not_sign_is_refused(secure, stranger):
    with pytest.raises(HttpError, match="certificate verify failed"):
        ServiceClient(secure, "secret", stranger.certificate).workers()


def test_plain_http_is_told_so(client):
    host, port = client.url.removeprefix("https://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"https://" in answer
    assert client.text("GET", "/health")


def test_old_versions_and_garbage_are_refused(client, authority):
    host, port = client.url.removeprefix("https://").split(":")
    for garbage in (b"\x00" * 64, b"\x16\x03\x01\xff\xff" + b"x" * 64, b""):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(garbage)
            with contextlib.suppress(ConnectionError):
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass
    old = ssl.create_default_context(cafile=str(authority.certificate))
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection((host, int(port)), timeout=30) as connection, pytest.raises(ssl.SSLError):
        old.wrap_socket(connection, server_hostname=host)
    assert client.text("GET", "/health")


def test_openais_client(client, authority):
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    trust = ssl.create_default_context(cafile=str(authority.certificate))
    base = {"base_url": f"{client.url}/v1", "api_key": "secret", "timeout": 60}
    with openai.OpenAI(**base, http_client=openai.DefaultHttpxClient(verify=trust)) as asked:
        whole = asked.completions.create(**COMPLETION)
        streamed = list(asked.completions.create(**COMPLETION, stream=True))
        assert "".join(part.choices[0].text for part in streamed) == whole.choices[0].text

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(**base, http_client=openai.DefaultAsyncHttpxClient(verify=trust)) as asked:
            answers = await asyncio.gather(*(asked.completions.create(**COMPLETION) for _ in range(4)))
            return [answer.choices[0].text for answer in answers]

    assert asyncio.run(ask()) == [whole.choices[0].text] * 4


def test_a_large_body_passes_both_ways(client):
    text = "w5 " * 100_000
    with pytest.raises(HttpError, match="400"):  # longer than the model takes, said by the worker
        client.json("POST", "/v1/completions", COMPLETION | {"prompt": list(range(20_000))})
    tokens = client.json("POST", "/tokenize", {"model": "sim", "prompt": text})["tokens"]
    assert len(tokens) == 100_000


@pytest.mark.parametrize("trust", ["authority", "stranger"])
def test_a_worker_behind_tls(client, authority, stranger, trust):
    # A service is a worker to another one; its API is the same.
    ca = {"authority": authority, "stranger": stranger}[trust].certificate
    with KvService(
        ServeOptions(
            workers=[WorkerSpec(client.url)],
            port=0,
            block_size=BLOCK_SIZE,
            upstream_ca=str(ca),
            limits={"health_interval_s": 0.1},
        )
    ) as outer:
        asked = ServiceClient(outer.url, "secret", timeout_s=30)
        if trust == "stranger":
            wait_for(lambda: "--upstream-ca" in asked.workers()["workers"][0]["health_error"])
            with pytest.raises(HttpError, match="503"):
                asked.json("POST", "/v1/completions", {"prompt": [1]})
            return
        wait_for(lambda: asked.workers()["workers"][0]["healthy"])
        for _ in range(3):
            answer = asked.json("POST", "/v1/completions", {k: v for k, v in COMPLETION.items() if k != "model"})
            assert answer["usage"]["completion_tokens"] == 4


def test_a_certificate_for_another_name_is_refused(folder, authority):
    certificate, key = authority.issue(folder, "other", "DNS:other.example")
    with KvService(ServeOptions(port=0, tls_cert=str(certificate), tls_key=str(key))) as inner:
        options = ServeOptions(workers=[WorkerSpec(inner.url)], port=0, upstream_ca=str(authority.certificate))
        with KvService(options) as outer:
            asked = ServiceClient(outer.url)
            wait_for(lambda: "mismatch" in asked.workers()["workers"][0]["health_error"])


def test_load_is_read_over_tls(folder, certified, authority):
    """A worker without a load publisher, and /metrics over TLS: through a proxy that only adds TLS."""
    with sim_worker(load_endpoint="", kv_events_endpoint="") as worker, TlsProxy(worker.port, certified) as port:
        spec = WorkerSpec(f"https://127.0.0.1:{port}")
        with served([spec], upstream_ca=str(authority.certificate)) as client:
            wait_for(lambda: client.workers()[0]["load_source"] == "metrics")
            assert client.ask("POST", "/v1/completions", COMPLETION)[0] == 200


class TlsProxy:
    """Takes TLS connections, and passes their bytes on to a port of this machine in the clear."""

    def __init__(self, target: int, certified: dict[str, str]) -> None:
        self._target = target
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(certified["tls_cert"], certified["tls_key"])
        self._loop = asyncio.new_event_loop()

    async def _serve(self, reader, writer):
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._target)

        async def pass_on(source, sink):
            try:
                while piece := await source.read(65536):
                    sink.write(piece)
                    await sink.drain()
            except OSError:
                pass
            finally:
                sink.close()

        await asyncio.gather(pass_on(reader, inner_writer), pass_on(inner_reader, writer))

    def __enter__(self) -> int:
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        self._server = self._loop.run_until_complete(starting)
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        return self._server.sockets[0].getsockname()[1]

    def __exit__(self, *error):
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


def test_files_that_cannot_be_used_are_named(folder, certified, stranger, tmp_path):
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    for options, said in (
        ({"tls_cert": str(nonsense), "tls_key": certified["tls_key"]}, "nonsense.pem"),
        ({"tls_cert": certified["tls_cert"], "tls_key": str(stranger.key)}, "stranger.key"),
        ({"tls_cert": str(tmp_path / "none.pem"), "tls_key": certified["tls_key"]}, "none.pem"),
        ({"tls_cert": certified["tls_cert"]}, "--tls-key"),
        ({"upstream_ca": str(nonsense)}, "nonsense.pem"),
    ):
        with pytest.raises(ValueError, match=said):
            KvService(ServeOptions(port=0, **options))


def test_doctor_and_top_with_token_and_authority(client, authority, tmp_path):
    token = tmp_path / "token"
    token.write_text("secret\n")
    asked = ["--router-url", client.url, "--ca-file", str(authority.certificate)]
    for command in (["doctor", *asked], ["top", "--once", *asked]):
        without = CliRunner().invoke(app, command)
        assert without.exit_code == 1, without.output
        assert "--api-token-file" in without.output
        given = CliRunner().invoke(app, [*command, "--api-token-file", str(token)])
        assert given.exit_code == 0, given.output
    assert json.loads(client.text("GET", "/ready")) == {"status": "ready"}
