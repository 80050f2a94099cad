"""The manual and the integrated way in."""

from __future__ import annotations

import asyncio

import pytest
from ray_support import cluster, hits, prompts, router_cfg, sim_config, wait_until

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kvrouter[ray]'")

from kvrouter import KvRouter, compute_block_hashes  # noqa: E402
from kvrouter.ray import BatchedDataDict, RayWorkerBuilder, RoutedVllmWorkerGroup  # noqa: E402

# --- manual and integrated ---


def test_manual_mode(generation):
    asyncio.run(generation.stop_router())
    addresses = generation.worker_addresses()
    with KvRouter(
        num_workers=2,
        base_kv_events_port=generation.cfg["router_cfg"]["base_kv_events_port"],
        base_metrics_port=generation.cfg["router_cfg"]["base_metrics_port"],
        worker_addresses=[address.host for address in addresses],
        worker_ports=[address.kv_events_port for address in addresses],
    ) as router:
        assert router.wait_until_connected(30)
        data = prompts(1, seed=15)

        async def to(worker):
            results = [result async for _, result in generation.generate_async(data, worker_id=worker)]
            return results[0]

        assert asyncio.run(to(1))["gen_leader_worker_idx"] == [1]
        wait_until(lambda: router.status()["workers"][1]["cached_blocks"] >= 4, "the events of worker 1")
        assert router.best_worker(tokens=data["input_ids"][0, :260]) == 1
        assert asyncio.run(to(1))["num_cached_tokens"].tolist() == [hits(260)]
    with pytest.raises(ValueError, match="worker_id must be from 0 to 1"):
        asyncio.run(to(2))


async def test_integrated_mode(ray_node):
    place = cluster()
    group = RoutedVllmWorkerGroup(place, RayWorkerBuilder(config=sim_config()), router_config=router_cfg())
    try:
        with pytest.raises(RuntimeError, match=r"Router not started. Call await start_router\(\) first."):
            await group.get_best_worker_id([1, 2, 3])
        await group.start_router(enable_kv_indexer=True)
        await group.start_router()
        data = BatchedDataDict(prompts(6, seed=16))
        rows = list(data.rows())
        tokens = [row["input_ids"][0, :260] for row in rows]
        workers = await group.get_best_worker_ids_batch(tokens)
        refs = [
            group.run_single_worker_single_data("generate", group.get_dp_leader_worker_idx(worker), data=row)
            for worker, row in zip(workers, rows, strict=True)
        ]
        assert [result["num_cached_tokens"][0] for result in await asyncio.gather(*refs)] == [0] * 6
        held = lambda: sum(worker["cached_blocks"] for worker in group.router.status()["workers"])  # noqa: E731
        await asyncio.to_thread(wait_until, lambda: held() >= 24, "24 blocks in the router's index")
        # By tokens, by hashes, one by one: the same answer.
        hashes = [compute_block_hashes(of_prompt) for of_prompt in tokens]
        assert await group.get_best_worker_ids_batch(tokens) == workers
        assert await group.get_best_worker_ids_batch(hashes, [260] * 6) == workers
        assert [await group.get_best_worker_id(of_prompt) for of_prompt in tokens] == workers
        assert [await group.get_best_worker_id(of_prompt, 260) for of_prompt in hashes] == workers
        ref = await group.generate_with_routing("generate", hashes[0], 260, data=rows[0], greedy=True)
        assert (await ref)["num_cached_tokens"].tolist() == [hits(260)]
        turns = [await group.get_worker_round_robin(hashes[0], 260) for _ in range(4)]
        assert sorted(turns) == [0, 0, 1, 1]
        with pytest.raises(ValueError, match="6 lists of hashes for 1 numbers of tokens"):
            await group.get_best_worker_ids_batch(hashes, [260])
        with pytest.raises(ValueError, match="num_tokens must be positive"):
            await group.get_best_worker_id([], 0)
    finally:
        assert await group.shutdown_async()
        assert await group.shutdown_async()
        place.shutdown()


async def test_integrated_mode_with_routing_disabled(ray_node):
    place = cluster(1)
    group = RoutedVllmWorkerGroup(place, RayWorkerBuilder(config=sim_config(router_cfg=None)))
    try:
        with pytest.raises(RuntimeError, match="Cannot start router when routing is disabled"):
            await group.start_router()
        with pytest.raises(RuntimeError, match="Routing is disabled"):
            await group.get_best_worker_id([1])
    finally:
        assert group.shutdown()
        place.shutdown()
