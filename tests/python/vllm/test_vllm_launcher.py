"""The launcher: settings, command lines, and a real fleet of embedded workers."""

from __future__ import annotations

import json
import os
import socket
import urllib.request
from importlib import util

import pytest

from kvrouter.vllm import engines, launcher
from kvrouter.vllm.engines import EngineOptions, WorkerPorts, spread_core, worker_command, worker_environment
from kvrouter.vllm.ports import PortTakenError, find_free_ports
from kvrouter.vllm.startup import failure_message, likely_setting
from kvrouter.vllm.tiny_model import make_tiny_model
from process_state import runs

PORTS = WorkerPorts(http=8001, kv_events=5558, replay=5758, load=5658)


def make_options(**changes) -> EngineOptions:
    settings = {
        "engine": "vllm",
        "num_workers": 2,
        "model": "some/model",
        "served_model_name": "some/model",
        "tiny_model": None,
        "block_size": 64,
        "host": "127.0.0.1",
        "num_gpu_blocks": None,
        "max_model_len": 8192,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
        "kv_events": True,
        "load_publisher": True,
        "extra_args": (),
        "env": {},
    }
    return EngineOptions(**{**settings, **changes})


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(engines, "is_cpu_vllm", lambda: True)
    monkeypatch.setattr(engines, "vllm_installed", lambda: True)
    monkeypatch.setattr(engines, "load_plugin_installed", lambda: True)


@pytest.fixture
def on_two_gpus(monkeypatch):
    monkeypatch.setattr(engines, "is_cpu_vllm", lambda: False)
    monkeypatch.setattr(engines, "gpu_ids", lambda: ("4", "6"))


def value_of(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


@pytest.mark.parametrize(
    ("num_workers", "cores", "expected"),
    [
        (2, [0, 1], [0, 1]),
        (2, [0, 1, 2, 3], [0, 2]),
        (3, [4, 9], [4, 9, 4]),
        (1, [7, 8], [7]),
        (3, range(8), [0, 2, 5]),
    ],
)
def test_spread_core_workers_are_apart(num_workers, cores, expected):
    assert [spread_core(index, num_workers, list(cores)) for index in range(num_workers)] == expected


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "tgi"}, "engine must be 'vllm' or 'sim'"),
        ({"num_workers": 0}, "num_workers must be at least 1"),
        ({"block_size": 16}, "block_size must be a multiple of 32"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"num_gpu_blocks": 0}, "num_gpu_blocks must be at least 1"),
        ({"num_gpu_blocks": 127}, "num_gpu_blocks = 127 .* max_model_len = 8192"),
    ],
)
def test_check_options_impossible_setting_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        engines.check_options(make_options(**changes))


@pytest.mark.usefixtures("on_cpu")
def test_check_options_missing_vllm_or_plugin_says_what_to_do(monkeypatch):
    engines.check_options(make_options())
    monkeypatch.setattr(engines, "load_plugin_installed", lambda: False)
    with pytest.raises(RuntimeError, match=r"install the package.*load_publisher=False"):
        engines.check_options(make_options())
    engines.check_options(make_options(load_publisher=False))
    monkeypatch.setattr(engines, "vllm_installed", lambda: False)
    with pytest.raises(RuntimeError, match="install_vllm"):
        engines.check_options(make_options(load_publisher=False))


@pytest.mark.usefixtures("on_cpu")
def test_worker_command_of_a_tiny_model_on_cpu(tmp_path):
    tiny = make_tiny_model(tmp_path)
    options = make_options(tiny_model=tiny, model=str(tmp_path), num_gpu_blocks=448, extra_args=("--seed", "5"))
    command = worker_command(options, 1, PORTS)
    assert value_of(command, "--load-format") == "dummy"
    assert value_of(command, "--dtype") == "float32"
    assert value_of(command, "--tokenizer") == str(tiny.tokenizer)
    assert value_of(command, "--num-gpu-blocks-override") == "448"
    assert value_of(command, "--port") == "8001"
    config = json.loads(value_of(command, "--kv-events-config"))
    assert (config["endpoint"], config["replay_endpoint"]) == ("tcp://*:5558", "tcp://*:5758")
    assert command[-2:] == ["--seed", "5"]
    assert "--kv-events-config" not in worker_command(make_options(kv_events=False), 1, PORTS)


@pytest.mark.usefixtures("on_cpu")
def test_worker_environment_on_cpu_has_a_core_and_room_for_the_blocks(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 7})
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setenv("KVROUTER_BASE_METRICS_PORT", "1")
    options = make_options(tiny_model=make_tiny_model(tmp_path), model=str(tmp_path), num_gpu_blocks=2000)
    env = worker_environment(options, 1, PORTS)
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "5"
    # 2,000 blocks of 64 tokens of 16 KiB.
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert env["KVROUTER_LOAD_ENDPOINT"] == "tcp://127.0.0.1:5658"
    assert "KVROUTER_BASE_METRICS_PORT" not in env
    assert env["HF_HUB_OFFLINE"] == "1"
    assert (
        worker_environment(make_options(env={"VLLM_CPU_KVCACHE_SPACE": "9"}), 0, PORTS)["VLLM_CPU_KVCACHE_SPACE"] == "9"
    )
    assert "KVROUTER_LOAD_ENDPOINT" not in worker_environment(make_options(load_publisher=False), 0, PORTS)


@pytest.mark.usefixtures("on_cpu")
def test_worker_environment_plugin_is_added_to_a_list_of_allowed_ones(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert worker_environment(make_options(), 0, PORTS)["VLLM_PLUGINS"] == "other,kvrouter"
    assert worker_environment(make_options(load_publisher=False), 0, PORTS)["VLLM_PLUGINS"] == "other"


@pytest.mark.usefixtures("on_two_gpus")
def test_worker_environment_each_worker_has_a_gpu_and_shares_it_when_there_are_too_few():
    options = make_options(num_workers=4)
    assert [worker_environment(options, index, PORTS)["CUDA_VISIBLE_DEVICES"] for index in range(4)] == list("4646")
    assert value_of(worker_command(options, 0, PORTS), "--gpu-memory-utilization") == "0.425"
    assert "--gpu-memory-utilization" not in worker_command(make_options(num_workers=2), 0, PORTS)
    assert "VLLM_CPU_OMP_THREADS_BIND" not in worker_environment(options, 0, PORTS)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("setting", ["base_http_port", "base_kv_events_port", "base_metrics_port"])
def test_launch_workers_taken_port_names_port_and_setting(setting):
    found = find_free_ports(2)
    found.release()
    with socket.socket() as server:
        server.bind(("127.0.0.1", found[1]))
        server.listen(1)
        with pytest.raises(PortTakenError, match=rf"port {found[1]} \({setting} \+ 1\).*pid {os.getpid()}"):
            launcher.launch_workers(2, model="some/model", progress=False, **{setting: found[0]})


@pytest.mark.parametrize(
    ("log", "exit_code", "hint"),
    [
        ("api_server.py: error: unrecognized arguments: --x", 2, "extra_args"),
        ("OSError: [Errno 98] Address already in use", 1, "base_http_port"),
        ("zmq.error.ZMQError: Address already in use (addr='tcp://*:5557')", 1, "base_kv_events_port"),
        ("ModuleNotFoundError: No module named 'vllm'", 1, "install_vllm"),
        ("ValueError: ... (8192). Try increasing ... the estimated maximum model length is 100.", 1, "max_model_len"),
        ("torch.OutOfMemoryError: CUDA out of memory", 1, "memory"),
        ("", -9, "memory"),
        ("all is well", 1, None),
    ],
)
def test_likely_setting_points_at_what_to_change(log, exit_code, hint):
    found = likely_setting(exit_code, log)
    assert found is None if hint is None else hint in (found or "")


def test_failure_message_tells_the_signal_and_the_end_of_the_log(tmp_path):
    message = failure_message(3, -11, "\n".join(f"line {n}" for n in range(100)), tmp_path / "worker-3.log")
    assert message.startswith("worker 3 was ended by SIGSEGV while it started.")
    assert "line 99" in message
    assert "line 10\n" not in message
    assert str(tmp_path / "worker-3.log") in message


needs_sim = pytest.mark.skipif(util.find_spec("kvrouter.sim") is None, reason="kvrouter.sim is not installed")


@needs_sim
def test_launch_workers_sim_fleet_is_served_killed_restarted_and_stopped(tmp_path, capfd):
    with launcher.launch_workers(3, engine="sim", log_dir=tmp_path, startup_timeout_s=60) as fleet:
        assert len({worker.url for worker in fleet.workers}) == 3
        assert [worker.kv_events_port - fleet.base_kv_events_port for worker in fleet.workers] == [0, 1, 2]
        assert [worker.metrics_port - fleet.base_metrics_port for worker in fleet.workers] == [0, 1, 2]
        for worker in fleet.workers:
            body = json.dumps({"model": fleet.model, "prompt": [5] * 200, "max_tokens": 2}).encode()
            request = urllib.request.Request(f"{worker.url}/v1/completions", body, {"Content-Type": "application/json"})
            assert json.load(urllib.request.urlopen(request, timeout=30))["usage"]["prompt_tokens"] == 200
        fleet.reset_prefix_caches()
        first = fleet.workers[2].pid
        fleet.kill(2)
        assert [fleet.is_alive(index) for index in range(3)] == [True, True, False]
        # A worker that is gone has no cache to reset.
        fleet.reset_prefix_caches()
        fleet.restart(2, 60)
        assert fleet.is_alive(2)
        assert fleet.workers[2].pid != first
        pids = [worker.pid for worker in fleet.workers]
    assert [pid for pid in pids if runs(pid)] == []
    fleet.stop()
    with pytest.raises(launcher.LaunchError, match="stopped"):
        fleet.restart(0)
    assert "starting 3 sim workers: 3 of 3 healthy after" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["worker-0.log", "worker-1.log", "worker-2.log"]


@needs_sim
def test_launch_workers_worker_that_ends_at_once_is_explained_and_the_others_are_stopped(tmp_path):
    with pytest.raises(launcher.LaunchError, match=r"(?s)ended with exit code 2.*Likely: extra_args.*--no-such-flag"):
        launcher.launch_workers(2, engine="sim", extra_args=["--no-such-flag"], log_dir=tmp_path, progress=False)
