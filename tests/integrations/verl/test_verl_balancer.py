"""The load balancer for verl, without verl: sessions, prefixes, servers that come and go, its config."""

from __future__ import annotations

import json
import logging
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvrouter[ray]'")

from kvrouter.integrations.verl import KvBalancer, KvRequestLoadBalancer, UnsupportedVerlError, seams
from kvrouter.integrations.verl.balancer import Settings
from kvrouter.integrations.verl.endpoints import reachable, read_description
from kvrouter.sim import SimWorker

BLOCK = 16


def balancer(servers=("a:1", "b:1"), **settings):
    return KvBalancer(dict.fromkeys(servers), {"router_class": "ours", "block_size": BLOCK, **settings})


def prompt(seed, length=160):
    return np.random.default_rng(seed).integers(3, 1000, length).tolist()


def test_a_prefix_that_was_routed_draws_the_next_sample_of_its_prompt():
    lb = balancer()
    first, _ = lb.acquire_server("r0", prompt_ids=prompt(0))
    lb.release_server(first, "r0")
    for n in range(8):
        server, _ = lb.acquire_server(f"r0-{n}", prompt_ids=prompt(0))
        lb.release_server(server, f"r0-{n}")
        assert server == first


def test_prompts_that_share_nothing_spread_over_the_servers():
    lb = balancer()
    servers = [lb.acquire_server(f"r{n}", prompt_ids=prompt(n))[0] for n in range(16)]
    assert 5 <= servers.count("a:1") <= 11


def test_a_conversation_stays_at_its_server_and_its_account_is_kept():
    lb = balancer()
    home, _ = lb.acquire_server("talk", prompt_ids=prompt(1))
    for turn in range(5):
        lb.release_server(home, "talk")
        # Another tokenization of the same conversation: no prefix of it is known.
        assert lb.acquire_server("talk", prompt_ids=prompt(100 + turn))[0] == home
    other, _ = lb.acquire_server("new", prompt_ids=prompt(2))
    assert other != home  # one request in flight at home, none at the other


def test_a_conversation_moves_when_its_server_is_overloaded():
    lb = balancer(overload_slack=2)
    home, _ = lb.acquire_server("talk")
    assert lb.acquire_server("talk")[0] == home
    moved, _ = lb.acquire_server("talk")
    assert moved != home
    assert lb.acquire_server("talk")[0] == moved  # and has a new home


def test_a_decision_for_one_server_keeps_the_account_of_the_others():
    lb = balancer(("a:1", "b:1", "c:1"))
    home, _ = lb.acquire_server("talk", prompt_ids=prompt(0))
    busy, _ = lb.acquire_server("other", prompt_ids=prompt(1))
    lb.release_server(home, "talk")
    lb.acquire_server("talk", prompt_ids=prompt(0))  # may only go home: what is in flight at `busy` has to stay known
    third, _ = lb.acquire_server("third", prompt_ids=prompt(2))
    assert len({home, busy, third}) == 3


def test_servers_that_are_removed_get_nothing_and_may_come_back():
    lb = balancer()
    home, _ = lb.acquire_server("talk", prompt_ids=prompt(0))
    lb.remove_servers([home])
    other, _ = lb.acquire_server("talk", prompt_ids=prompt(0))
    assert other != home
    lb.release_server(home, "talk")  # of a server that is gone
    lb.remove_servers([other])
    with pytest.raises(RuntimeError, match="No available servers in load balancer"):
        lb.acquire_server("talk", prompt_ids=prompt(0))
    lb.add_servers({home: "handle"})
    assert lb.acquire_server("talk", prompt_ids=prompt(0)) == (home, "handle")
    assert lb.get_total_inflight() == 1


def test_an_empty_pool_is_filled_later_and_has_room_for_so_many():
    lb = balancer((), max_servers=1)
    lb.add_servers({"a:1": None})
    with pytest.raises(ValueError, match="max_servers"):
        lb.add_servers({"b:1": None})


def test_a_prompt_that_is_none_is_routed_by_load(caplog):
    lb = balancer()
    with caplog.at_level(logging.WARNING, "kvrouter"):
        assert lb.acquire_server("r", prompt_ids=[-1] * 40)[0] in ("a:1", "b:1")
    assert "by load alone" in caplog.text


def test_sessions_are_forgotten_when_told_to():
    lb = balancer()
    lb.acquire_server("talk")
    assert lb.clear_sticky_cache()["cleared_entries"] == 1
    assert lb.clear_sticky_cache()["cleared_entries"] == 0


def test_events_of_a_server_tell_what_it_caches():
    lb = balancer(("a:1", "b:1"))
    with SimWorker(kv_events_endpoint="tcp://127.0.0.1:0", block_size=BLOCK, num_blocks=600, time_scale=0) as sim:
        told = {
            "kv_events": {0: (sim.kv_events_endpoint, None)},
            "block_size": BLOCK,
            "metrics": False,
        }
        lb._register("b:1", read_description("b:1", told))
        tokens, deadline = prompt(7), time.monotonic() + 60
        while lb.get_status()["cached_blocks"]["b:1"] == 0:
            assert time.monotonic() < deadline, "no KV events arrive"
            ask(sim.port, tokens := [tokens[-1], *tokens[:-1]])
            time.sleep(0.02)
        ask(sim.port, prompt(8))
        while lb.acquire_server("probe", prompt_ids=prompt(8))[0] != "b:1":
            assert time.monotonic() < deadline, "the cached prompt does not draw its next sample"
            lb.clear_sticky_cache()
            for name in ("a:1", "b:1"):
                lb.release_server(name, "probe")
    assert lb.get_status()["expected_cached_tokens"] > 0


def ask(port, tokens):
    body = json.dumps({"model": "sim", "prompt": tokens, "max_tokens": 1}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=30).read()


def test_an_engine_says_where_it_publishes():
    told = {"kv_events": {0: ("tcp://*:5557", "tcp://*:5757")}, "block_size": 16, "metrics": True}
    engine = read_description("10.0.0.2:8000", told)
    assert engine.endpoints.kv_events == "tcp://10.0.0.2:5557"
    assert engine.endpoints.replay == "tcp://10.0.0.2:5757"
    assert engine.endpoints.http == "http://10.0.0.2:8000"
    told["kv_events"][1] = ("tcp://*:5558", None)
    assert read_description("10.0.0.2:8000", told).endpoints.kv_events == ""
    assert reachable("tcp://*:0", "10.0.0.2") == ""
    assert reachable("tcp://10.0.0.3:41234", "10.0.0.2") == "tcp://10.0.0.3:41234"


def test_blocks_of_another_size_are_not_listened_to(caplog):
    lb = balancer()
    told = {"kv_events": {0: ("tcp://*:5557", None)}, "block_size": 32, "metrics": False}
    with caplog.at_level(logging.WARNING, "kvrouter"):
        lb._register("c:1", read_description("c:1", told))
    assert "block_size" in caplog.text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"polcy": "linear"}, "unknown keys"),
        ({"overload_ratio": 0.5}, "overload_ratio"),
        ({"max_servers": 0}, "max_servers"),
        ({"policy": "best"}, "policy"),
    ],
)
def test_a_config_that_is_wrong_says_so(settings, said):
    with pytest.raises(ValueError, match=said):
        balancer(**settings)


def test_a_verl_that_is_not_known_is_refused(monkeypatch):
    monkeypatch.setattr(seams.metadata, "version", lambda name: "0.10.0")
    with pytest.raises(UnsupportedVerlError, match=r"verl 0\.10\.0 .*0\.9\.1.*router_config_path"):
        KvRequestLoadBalancer({})


def test_the_shipped_config_is_one_that_can_be_read():
    omegaconf = pytest.importorskip("omegaconf", reason="OmegaConf is not installed")
    path = Path(seams.__file__).with_name("router.yaml")
    config = omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.load(path))
    assert config["router_class"] == "kvrouter.integrations.verl.KvRequestLoadBalancer"
    Settings.read(config)


def test_every_method_that_verl_calls_is_there():
    assert all(callable(getattr(KvRequestLoadBalancer, name)) for name in seams.PLUGIN_METHODS)
