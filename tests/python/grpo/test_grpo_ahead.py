"""When new weights come to engines that are at work."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="torch is not installed: run scripts/install_vllm.py")
pytest.importorskip("transformers", reason="transformers is not installed: run scripts/install_vllm.py")
pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvrouter[ray]'")
pytest.importorskip("omegaconf", reason="OmegaConf is not installed: pip install 'kvrouter[grpo]'")

from kvrouter.grpo import async_trainer, config_from
from kvrouter.grpo.async_trainer import RolloutsAhead


def source_of(monkeypatch, in_flight, recompute):
    """A source with one rollout under way and no more to begin, and what its refits were asked for."""
    refits = []
    monkeypatch.setattr(async_trainer, "refit", lambda training, keep_kv_cache: refits.append(keep_kv_cache))
    settings = {"in_flight_weight_updates": in_flight, "recompute_kv_cache_after_weight_updates": recompute}
    config = config_from({"grpo": {"max_num_steps": 1, "async_grpo": settings}})
    source = RolloutsAhead(SimpleNamespace(config=config, train=[]))
    source._next = 2
    rollout = Future()
    source._groups = {1: [rollout]}
    return source, rollout, refits


@pytest.mark.parametrize("recompute", [True, False])
def test_in_flight_nothing_is_waited_for(monkeypatch, recompute):
    source, rollout, refits = source_of(monkeypatch, True, recompute)
    source.refit()
    assert refits == [not recompute]
    assert not rollout.done()


def test_otherwise_what_is_under_way_is_waited_for(monkeypatch):
    source, rollout, refits = source_of(monkeypatch, False, True)
    refitting = threading.Thread(target=source.refit)
    refitting.start()
    refitting.join(0.2)
    assert refitting.is_alive()
    assert refits == []
    rollout.set_result([])
    refitting.join(60)
    assert refits == [False]


def test_the_end_cancels_what_is_under_way(monkeypatch):
    source, rollout, _ = source_of(monkeypatch, False, True)
    source.close()
    assert rollout.cancelled()


def test_what_one_group_fails_with_leaves_the_others_to_be_cancelled(monkeypatch):
    source, rollout, _ = source_of(monkeypatch, False, True)
    failed = Future()
    failed.set_exception(OSError("lost"))
    source._groups[1].insert(0, failed)
    with pytest.raises(OSError, match="lost"):
        source.take(1)
    source.close()
    assert rollout.cancelled()
