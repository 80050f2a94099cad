"""``python -m kvrouter.sim`` as a process: ready line, errors that name the flag, clean stops."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest


def start(*flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kvrouter.sim", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_until_a_signal_and_exits_cleanly(number):
    process = start("--port", "0", "--load-endpoint", "tcp://127.0.0.1:*", "--time-scale", "0", "--model", "m")
    try:
        line = process.stdout.readline()
        assert line.startswith("ready: http://127.0.0.1:") and " kv_events=off " in line
        url = line.split()[1]
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps({"model": "m", "prompt": "w5 w6", "max_tokens": 3}).encode()
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 3
        process.send_signal(number)
        out, err = process.communicate(timeout=10)
        assert (process.returncode, out, err) == (0, "", "")
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--num-blocks", "10"), ("--num-blocks", "--max-model-len")),
        (("--replay-endpoint", "tcp://127.0.0.1:*"), ("--replay-endpoint", "--kv-events-endpoint")),
        (("--load-endpoint", "nonsense"), ("--load-endpoint", "nonsense")),
        (("--vocab-size", "2"), ("--vocab-size",)),
    ],
)
def test_bad_options_are_told_by_their_flags(flags, words):
    process = start("--port", "0", *flags)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


def test_port_taken_names_the_port_and_the_flag():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start("--port", str(port))
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert f"127.0.0.1:{port}" in err and "--port" in err


def test_impossible_values_are_refused_by_the_parser():
    for flags in (("--port", "70000"), ("--block-size", "0"), ("--time-scale", "-1"), ("--seed", "-1")):
        process = start(*flags)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 2
        assert flags[0] in err
