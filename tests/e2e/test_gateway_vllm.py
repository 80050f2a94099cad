"""The gateway before two real vLLM workers, through OpenAI's own client."""

from __future__ import annotations

import asyncio
import time

import pytest

from kvrouter.doctor import examine_service, examine_worker
from kvrouter.serve import KvService, ServeOptions, detect_block_size
from kvrouter.service_client import ServiceClient
from kvrouter.vllm.launcher import WorkerFleet
from kvrouter.worker_spec import WorkerSpec

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def gateway(vllm_fleet: WorkerFleet):
    workers = [
        WorkerSpec(worker.url, worker.kv_events_endpoint, worker.replay_endpoint, worker.load_endpoint)
        for worker in vllm_fleet.workers
    ]
    block_size = detect_block_size(workers, 30)
    assert block_size == vllm_fleet.block_size
    with KvService(ServeOptions(workers=workers, port=0, block_size=block_size, max_workers=2)) as service:
        yield service


@pytest.fixture(scope="module")
def openai_module():
    return pytest.importorskip("openai", reason="the openai client is not installed (vLLM brings it)")


@pytest.fixture(scope="module")
def client(openai_module, gateway):
    with openai_module.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", timeout=120) as made:
        deadline = time.monotonic() + 30
        while not made.models.list().data:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield made


def test_models(client, vllm_fleet):
    assert [model.id for model in client.models.list().data] == [vllm_fleet.model]


def test_completion_whole_and_streamed_agree(client, vllm_fleet):
    ask = {"model": vllm_fleet.model, "prompt": list(range(100, 300)), "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**ask)
    assert whole.usage.prompt_tokens == 200
    streamed = list(client.completions.create(**ask, stream=True))
    assert len(streamed) > 1
    assert "".join(part.choices[0].text for part in streamed) == whole.choices[0].text


def test_a_text_is_routed_by_the_workers_own_tokens(client, vllm_fleet):
    text = " ".join(f"word{i}" for i in range(300))
    ask = {"model": vllm_fleet.model, "prompt": text, "max_tokens": 2}
    first = client.completions.with_raw_response.create(**ask)
    blocks = first.parse().usage.prompt_tokens // vllm_fleet.block_size
    assert blocks > 0
    deadline = time.monotonic() + 30
    # The worker's events take a moment; until then, the prompt may go to the other worker.
    while int(client.completions.with_raw_response.create(**ask).headers["x-kvrouter-overlap-blocks"]) != blocks:
        assert time.monotonic() < deadline


def test_chat_whole_streamed_and_async(client, openai_module, gateway, vllm_fleet):
    ask = {
        "model": vllm_fleet.model,
        "messages": [{"role": "user", "content": "Say something of some length."}],
        "max_tokens": 8,
        "temperature": 0,
        "extra_body": {"chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"},
    }
    whole = client.chat.completions.create(**ask)
    streamed = "".join(
        part.choices[0].delta.content or "" for part in client.chat.completions.create(**ask, stream=True)
    )
    assert streamed == whole.choices[0].message.content

    async def ask_async() -> list[str]:
        async with openai_module.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", timeout=120) as made:
            answers = await asyncio.gather(*(made.chat.completions.create(**ask) for _ in range(4)))
            stream = await made.chat.completions.create(**ask, stream=True)
            parts = [part.choices[0].delta.content or "" async for part in stream]
            return [answer.choices[0].message.content for answer in answers] + ["".join(parts)]

    assert asyncio.run(ask_async()) == [whole.choices[0].message.content] * 5


def test_errors_reach_the_client_as_openai_has_them(client, openai_module, vllm_fleet):
    with pytest.raises(openai_module.NotFoundError):
        client.completions.create(model="no-such-model", prompt=[1], max_tokens=1)
    with pytest.raises(openai_module.BadRequestError):
        client.completions.create(model=vllm_fleet.model, prompt=[1], max_tokens=-1)


def test_doctor_finds_nothing_to_mend(gateway, vllm_fleet):
    """And with a wrong block size and a wrong endpoint, what to mend."""
    worker = vllm_fleet.workers[0]
    spec = WorkerSpec(worker.url, worker.kv_events_endpoint, worker.replay_endpoint, worker.load_endpoint)
    findings = list(examine_worker(spec, vllm_fleet.block_size, 30, probe=True))
    assert [f for f in findings if f.ok is not True] == []
    for said in ("prefix caching on", "in order", "clock", "publishes its load"):
        assert any(said in f.text for f in findings), said
    wrong = WorkerSpec(worker.url, "tcp://127.0.0.1:1")
    bad = [f for f in examine_worker(wrong, 2 * vllm_fleet.block_size, 1, probe=True) if f.ok is False]
    assert ["--block-size" in bad[0].help, "enable_kv_cache_events" in bad[1].help] == [True, True]
    assert [f for f in examine_service(ServiceClient(gateway.url), 2) if f.ok is False] == []
