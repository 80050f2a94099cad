"""The fleet simulator is calibrated: the same requests on real vLLM workers and on simulated ones.

Step times are fitted on other requests than those that are compared, on the same processes, before and after.  A
machine whose speed changed meanwhile cannot tell 15%: it is compared again, and after a few times given up, saying so.
"""

from __future__ import annotations

import pytest

from kvrouter.bench.policies import PolicyRun, make_load
from kvrouter.simulate import PROFILES, simulate
from kvrouter.simulate.calibrate import calibrate
from kvrouter.vllm.launcher import launch_workers

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

NUM_BLOCKS = 448
HIT_RATE, TIME = 0.02, 0.15  # how far apart real and simulated may be
STEADY = 0.08  # the machine's speed may change so much during a comparison
ATTEMPTS = 4


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    logs = tmp_path_factory.mktemp("fleet")
    with launch_workers(2, engine="vllm", num_gpu_blocks=NUM_BLOCKS, max_model_len=2048, log_dir=logs) as workers:
        yield workers


def simulated(load, measured):
    return simulate(
        load.as_requests(), 2, "round_robin", seed=1, profile=measured.profile, network_delay_s=measured.request_s
    )


def test_hit_rate_and_time(fleet):
    urls = [worker.url for worker in fleet.workers]
    run = PolicyRun(fleet, "round_robin", seed=1)
    run(make_load("group", 2, NUM_BLOCKS, 0.1, seed=9))  # warms up
    load = make_load("thrash", 2, NUM_BLOCKS, 0.35, seed=5)
    changes = []
    after = calibrate(urls, fleet.model, PROFILES["cpu-tiny"], seed=0)
    for attempt in range(1, ATTEMPTS + 1):
        before, real = after, run(load)
        after = calibrate(urls, fleet.model, PROFILES["cpu-tiny"], seed=attempt)
        expected = [simulated(load, measured) for measured in (before, after)]
        for figures in expected:
            assert figures.hit_rate == pytest.approx(real["hit_rate"], abs=HIT_RATE)
        seconds = [figures.seconds for figures in expected]
        changes.append(max(seconds) / min(seconds) - 1)
        print(f"attempt {attempt}: real {real}, simulated by what was measured before and after: {seconds}")
        if changes[-1] <= STEADY:
            assert sum(seconds) / 2 == pytest.approx(real["seconds"], rel=TIME)
            return
        print(f"the machine's speed changed by {changes[-1]:.0%}: again")
    pytest.skip(
        "hit rates agree; times could not be compared, as the machine's speed changed each time, by "
        + ", ".join(f"{change:.0%}" for change in changes)
    )
