from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from kvrouter.bench.settings import EngineName
from kvrouter.ray.bench.records import RayRequestRecord, figures_of
from kvrouter.ray.bench.settings import Integration, RayBenchSettings
from kvrouter.ray.bench.work import make_batches


def settings(**changes) -> RayBenchSettings:
    return RayBenchSettings(**{"engine": EngineName.SIM, "batch_size": 8, "seq_len": 256, "num_blocks": 64} | changes)


def test_modes_of_a_run():
    assert settings().integrations == [Integration.SIMPLE]
    assert settings(use_manual_routing=True).integrations == [Integration.MANUAL]
    assert settings(use_integrated_routing=True).integrations == [Integration.INTEGRATED]
    assert settings(compare_modes=True).integrations == list(Integration)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_manual_routing": True, "compare_modes": True}, "--use-manual-routing"),
        ({"num_generations_per_prompt": 3}, "--num-generations-per-prompt"),
        ({"gpus_per_node": 3, "tensor_parallel_size": 2}, "--tensor-parallel-size"),
        ({"num_blocks": 8, "seq_len": 1000}, "--num-blocks"),
        ({"prefix_len": 256}, "--prefix-len"),
        ({"prefix_len": 32}, "--prefix-len"),
        ({"model": "m", "num_blocks": None}, "--num-prefixes"),
        ({"engine": EngineName.VLLM, "vocab_size": 5000}, "--vocab-size"),
    ],
)
def test_options_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes).validate()


def test_default_prefixes_fill_the_fleet_but_not_one_worker():
    chosen = settings(num_nodes=4, gpus_per_node=8)
    blocks = chosen.prefixes * chosen.shared_len // chosen.block_size
    assert chosen.num_workers == 32
    assert 64 < blocks < 32 * 64


def test_batches_are_the_same_for_the_same_seed():
    chosen = settings(num_prefixes=3, num_iterations=2, warmup_iterations=1)
    batches = make_batches(chosen)
    assert [batch.first_index for batch in batches] == [0, 8, 16]
    for batch, again in zip(batches, make_batches(chosen), strict=True):
        assert np.array_equal(batch.data["input_ids"], again.data["input_ids"])
    ids, prefixes = batches[0].data["input_ids"], batches[0].prefix_ids
    assert ids.shape == (8, 256)
    same = np.flatnonzero(prefixes == prefixes[0])
    assert len(same) > 1
    assert (ids[same, : chosen.shared_len] == ids[same[0], : chosen.shared_len]).all()
    assert len({tuple(row) for row in ids.tolist()}) == 8  # every prompt has a tail of its own


def test_generations_of_a_prompt_stand_together_unless_shuffled():
    ordered = make_batches(settings(num_generations_per_prompt=4))[0].data["input_ids"]
    assert (ordered[0] == ordered[:4]).all()
    assert not (ordered[0] == ordered[4]).all()
    shuffled = make_batches(settings(num_generations_per_prompt=4, shuffle=True))[0].data["input_ids"]
    assert sorted(map(tuple, ordered.tolist())) == sorted(map(tuple, shuffled.tolist()))
    assert not np.array_equal(ordered, shuffled)


def test_no_prefixes_no_shared_block():
    ids = np.concatenate([batch.data["input_ids"] for batch in make_batches(settings(num_prefixes=0))])
    assert len({tuple(row[:64]) for row in ids.tolist()}) == len(ids)


def record(worker: int, node: int, remote: bool, transit_ms: float) -> RayRequestRecord:
    return RayRequestRecord(
        0, 0, worker, 1, 100, 64, 10, router_us=500.0, ttft_ms=20.0, latency_ms=50.0, attempts=1,
        transit_ms=transit_ms, node=node, remote=remote,
    )  # fmt: skip


def test_figures():
    records = [record(0, 0, False, 1.0), record(0, 0, False, 3.0), record(1, 1, True, 8.0)]
    figures = figures_of(records, wall_s=2.0, decisions_s=0.02, hit_rate=0.5, num_workers=2, num_nodes=2, block_size=64)
    assert figures["tokens_per_worker"] == [220, 110]
    assert figures["imbalance"] == pytest.approx(4 / 3)
    assert figures["requests_per_node"] == [2, 1]
    assert figures["transit_ms"]["local"] == {"p50": 2.0, "p99": pytest.approx(2.98), "requests": 2}
    assert figures["transit_ms"]["remote"]["p50"] == 8.0
    assert figures["router_share_of_request"] == pytest.approx(0.01)
    assert figures["router_share_of_wall"] == pytest.approx(0.01)
    assert figures["all_tokens_per_s"] == pytest.approx(165.0)
    json.dumps(figures, allow_nan=False)


def test_the_command_line_has_every_flag_and_says_what_does_not_fit():
    import typer

    from kvrouter.ray.bench.command import bench_ray

    app = typer.Typer()
    app.command()(bench_ray)
    runner = CliRunner()
    shown = runner.invoke(app, ["--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    flags = (
        "num-nodes gpus-per-node model batch-size seq-len num-iterations warmup-iterations use-manual-routing "
        "use-integrated-routing compare-modes block-size base-kv-events-port base-metrics-port generation-max-tokens "
        "num-generations-per-prompt num-prefixes shuffle sequential seed engine output"
    )
    for flag in flags.split(" "):
        assert f"--{flag}" in shown, flag
    refused = runner.invoke(app, ["--engine", "sim", "--batch-size", "8", "--num-generations-per-prompt", "3"])
    assert refused.exit_code == 2
    assert "--num-generations-per-prompt" in refused.output
