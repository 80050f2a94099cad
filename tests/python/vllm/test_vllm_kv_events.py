"""kv_events_config: the ports and addresses of a worker's KV events."""

from __future__ import annotations

import pytest

from kvrouter.vllm.kv_events import kv_events_config


def test_kv_events_config_worker_n_has_base_port_plus_n():
    assert kv_events_config(3) == {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "tcp://*:5560",
        "replay_endpoint": "tcp://*:5760",
        "topic": "kv",
    }


def test_kv_events_config_given_replay_base_and_topic_are_used():
    config = kv_events_config(1, 6000, base_replay_port=9000, topic="")
    assert (config["endpoint"], config["replay_endpoint"], config["topic"]) == ("tcp://*:6001", "tcp://*:9001", "")


def test_kv_events_config_without_replay_has_no_endpoint_for_it():
    assert "replay_endpoint" not in kv_events_config(0, replay=False)


@pytest.mark.parametrize(("host", "endpoint"), [("0.0.0.0", "tcp://*:5557"), ("::", "tcp://[::]:5557")])
def test_kv_events_config_any_address_becomes_what_vllm_binds(host, endpoint):
    assert kv_events_config(0, host=host)["endpoint"] == endpoint


def test_kv_events_config_other_host_is_refused_because_vllm_would_connect():
    with pytest.raises(ValueError, match=r"host must be '\*'.*'127.0.0.1'"):
        kv_events_config(0, host="127.0.0.1")


@pytest.mark.parametrize(
    ("worker", "settings", "message"),
    [
        (-1, {}, "worker must not be negative"),
        (0, {"base_kv_events_port": 0}, "base_kv_events_port must be between 1 and 65535, not 0"),
        (0, {"base_kv_events_port": 70000}, "base_kv_events_port must be between 1 and 65535"),
        (10, {"base_kv_events_port": 65530}, "base_kv_events_port = 65530 is too high.*65540"),
        (0, {"base_kv_events_port": 65500}, r"base_replay_port \(by default base_kv_events_port \+ 200\)"),
        (9, {"base_replay_port": 65530}, "base_replay_port = 65530 is too high"),
        (0, {"base_replay_port": 5557}, "base_replay_port gives worker 0 port 5557"),
        (0, {"base_kv_events_port": "5557"}, "base_kv_events_port must be a whole number"),
        (0, {"base_kv_events_port": True}, "base_kv_events_port must be a whole number"),
    ],
)
def test_kv_events_config_impossible_port_names_its_setting(worker, settings, message):
    with pytest.raises(ValueError, match=message):
        kv_events_config(worker, **settings)
