"""What of the integration needs no NeMo-RL: settings, and decisions of one turn."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvrouter[ray]'")

from kvrouter.integrations.nemo_rl.config import hand_on_router_config, router_settings
from kvrouter.integrations.nemo_rl.decisions import DecisionsOfATurn
from kvrouter.ray.router_handle import Choice


def generation(**router):
    return {"backend": "vllm", "vllm_cfg": {"async_engine": True}, "router_cfg": router}


def test_no_router_without_enabled():
    assert router_settings({}) is None
    assert router_settings(generation()) is None
    assert router_settings(generation(enabled=False, nonsense=1)) is None


def test_defaults_are_the_guides_and_replay_is_on():
    settings = router_settings(generation(enabled=True))
    assert settings == {
        "enabled": True,
        "block_size": 64,
        "base_kv_events_port": 5557,
        "base_metrics_port": 5657,
        "replay": True,
    }
    assert router_settings(generation(enabled=True, replay=False))["replay"] is False


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"block_sise": 64}, "router_cfg.block_sise is unknown: did you mean block_size"),
        ({"zzz": 64}, "router_cfg.zzz is unknown: it takes enabled, "),
        ({"worker_ports": [1]}, "worker_ports must be unset"),
    ],
)
def test_what_cannot_be_is_named(router, message):
    with pytest.raises(ValueError, match=message):
        router_settings(generation(enabled=True, **router))


def test_the_synchronous_engine_is_refused():
    with pytest.raises(ValueError, match="Router can only be used with async_engine=true"):
        router_settings({"vllm_cfg": {"async_engine": False}, "router_cfg": {"enabled": True}})


def test_grpo_router_wins_key_by_key():
    master = SimpleNamespace(
        grpo=SimpleNamespace(router={"enabled": False}),
        policy={"generation": generation(enabled=True, policy="linear")},
    )
    hand_on_router_config(master)
    assert master.policy["generation"]["router_cfg"]["policy"] == "linear"
    assert router_settings(master.policy["generation"]) is None


def test_other_backends_are_left_alone(caplog):
    of = {"backend": "megatron"}
    hand_on_router_config(SimpleNamespace(grpo=SimpleNamespace(router={"enabled": True}), policy={"generation": of}))
    assert of == {"backend": "megatron"}
    assert "Router is only supported with vLLM backend. Skipping router setup." in caplog.text
    hand_on_router_config(SimpleNamespace(grpo=SimpleNamespace(), policy={"generation": of}))
    assert of == {"backend": "megatron"}


class Router:
    """Takes prompts to the worker of their first token."""

    def __init__(self, answers=True):
        self.asked = []
        self.completed = []
        self.answers = answers

    async def choose(self, prompts):
        self.asked.append(len(prompts))
        await asyncio.sleep(0)
        return [Choice(int(tokens[0]), 0, int(tokens[0]) + 100) for tokens in prompts] if self.answers else None

    def complete(self, choice, output_tokens=None):
        self.completed.append(choice.ticket)


def test_requests_of_a_turn_are_decided_together_and_in_order():
    router = Router()
    decisions = DecisionsOfATurn(router)

    async def rollout():
        choices = await asyncio.gather(*(decisions.choose(np.asarray([n])) for n in range(5)))
        assert [choice.worker for choice in choices] == list(range(5))
        assert (await decisions.choose(np.asarray([7]))).worker == 7

    for _ in range(2):  # a loop each
        asyncio.run(rollout())
    assert router.asked == [5, 1, 5, 1]


def test_a_request_given_up_meanwhile_is_completed():
    router = Router()
    decisions = DecisionsOfATurn(router)

    async def rollout():
        tasks = [asyncio.ensure_future(decisions.choose(np.asarray([n]))) for n in range(2)]
        while not router.asked:
            await asyncio.sleep(0)
        tasks[0].cancel()
        assert (await tasks[1]).worker == 1

    asyncio.run(rollout())
    assert router.completed == [100]


def test_no_answer_is_no_choice():
    assert asyncio.run(DecisionsOfATurn(Router(answers=False)).choose(np.asarray([1]))) is None


def test_an_environment_without_kvrouter_is_named_with_what_helps(tmp_path):
    from kvrouter.integrations.nemo_rl.worker_environment import _check_installed

    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'kvrouter'\" >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match=f"No module named 'kvrouter'.*uv pip install --python {python} kvrouter"):
        _check_installed(str(python))


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "usage"), (["--config"], "usage"), (["no.py"], "no such file")]
)
def test_the_command_says_what_it_wants(arguments, message):
    from kvrouter.integrations.nemo_rl.__main__ import main

    with pytest.raises(SystemExit, match=message):
        main(arguments)
