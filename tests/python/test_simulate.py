"""The fleet simulator from Python and from the command line; workloads; the regret table."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from kvrouter import policy_names
from kvrouter.cli import app
from kvrouter.simulate import PROFILES, WORKLOADS, regret, simulate, workloads
from kvrouter.simulate.calibrate import _non_negative

FIELDS = {"workload", "workers", "policy", "seed", "tokens_per_s", "step_s", "ttft_p99_s", "hit_rate", "imbalance"}


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_workloads_are_deterministic_and_served(name):
    first, again, other = (workloads.make(name, 2, seed, scale=0.1) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first.columns().values(), again.columns().values(), strict=True))
    assert first.columns()["segment_seed"].tolist() != other.columns()["segment_seed"].tolist()
    result = simulate(first, 2, "adaptive", seed=1)
    assert result.requests == len(first)
    assert result.tokens_per_s > 0
    assert simulate(first, 2, "adaptive", seed=1).seconds == result.seconds


def test_sharing_is_what_the_workload_says():
    hits = {name: simulate(workloads.make(name, 2, 0, scale=0.2), 2, "adaptive").hit_rate for name in WORKLOADS}
    assert hits["unique"] == 0
    assert hits["grpo"] > 0.7
    assert hits["hot_spot"] > 0.7
    assert hits["few_shot"] > 0.7


def test_a_trace_of_your_own(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [
        {"timestamp": 1000 * i, "input_length": 1100, "output_length": 4, "hash_ids": [1, 2, 10 + i]} for i in range(3)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    requests = workloads.trace_requests("mine", workloads.read_trace(path), speed=2)
    assert requests.arrival == [0, 0.5, 1]
    assert requests.segment_length[:3] == [512, 512, 76]
    assert simulate(requests, 1, "round_robin").hit_rate == pytest.approx(2 * 1024 / 3300)
    result = CliRunner().invoke(
        app, ["simulate", "--trace", str(path), "--workers", "1", "--policy", "linear", "--json"]
    )
    assert result.exit_code == 0
    assert json.loads(result.stdout)["workload"] == "mine"
    path.write_text('{"timestamp": 1}\n')
    with pytest.raises(ValueError, match=r"mine.jsonl, line 1: needs timestamp"):
        workloads.read_trace(path)


def test_delays_and_losses_reach_the_router():
    requests = workloads.make("thrash", 2, 0, scale=0.4)
    prompt = simulate(requests, 2, "linear")
    late = simulate(requests, 2, "linear", event_delay_s=30.0)
    assert late.hit_rate < prompt.hit_rate - 0.15
    steady = simulate(requests, 2, "adaptive")
    disturbed = simulate(requests, 2, "adaptive", event_delay_s=2.0, load_loss=1.0)
    assert disturbed.seconds < 1.05 * steady.seconds


def test_slow_workers_get_less_of_adaptive():
    requests = workloads.make("unique", 4, 0, scale=0.3)
    slowdown = [1, 1, 1, 3]
    assert (
        simulate(requests, 4, "adaptive", slowdown=slowdown).ttft_p99_s
        < simulate(requests, 4, "round_robin", slowdown=slowdown).ttft_p99_s
    )


def test_command_line_prints_a_line_a_policy():
    arguments = ["simulate", "--workload", "grpo", "--workers", "2", "--scale", "0.2", "--seed", "3", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--policy", "all", "--event-delay-ms", "100"])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["policy"] for row in rows] == policy_names()
    assert all(row.keys() >= FIELDS for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "nonsense"], "there are: grpo"),
        (["--policy", "nonsense"], "there are: adaptive"),
        (["--profile", "nonsense"], "there are: h100-8b"),
        (["--num-blocks", "4"], "num_blocks"),
        (["--trace", "/does/not/exist"], "exist"),
    ],
)
def test_command_line_says_what_does_not_fit(arguments, message):
    result = CliRunner().invoke(app, ["simulate", "--workers", "2", "--scale", "0.1", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_profiles_are_the_rooflines_they_say():
    h100, a100 = PROFILES["h100-8b"], PROFILES["a100-8b"]
    assert a100.prefill_token_s / h100.prefill_token_s == pytest.approx(989 / 312)
    assert a100.weights_s / h100.weights_s == pytest.approx(3.35 / 2.039)
    assert 1 / h100.prefill_token_s == pytest.approx(30_800, rel=0.01)
    assert h100.num_blocks * 64 * 131_072 < 80e9 - 16.06e9


def test_regret_is_relative_to_the_best_of_the_cell():
    rows = [
        {"workload": "grpo", "workers": 2, "policy": policy, "seed": seed, "seconds": seconds * (1 + seed)}
        for policy, seconds in (("adaptive", 2.0), ("linear", 3.0))
        for seed in (0, 1)
    ]
    results = regret.Results(rows)
    assert results.regrets("grpo", 2, (0, 1), "seconds") == pytest.approx({"adaptive": 1.0, "linear": 1.5})
    assert results.mean("grpo", 2, "linear", (0, 1, 7), "seconds") == pytest.approx(3 * 2**0.5)


def test_regret_table_end_to_end(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(workloads, "WORKLOADS", {name: WORKLOADS[name] for name in ("grpo", "few_shot", "unique")})
    monkeypatch.setattr("kvrouter.simulate.WORKLOADS", workloads.WORKLOADS)
    assert regret.main(["--quick", "--processes", "1", "--output", str(tmp_path)]) == 0
    page = (tmp_path / "policies.md").read_text()
    assert "| grpo | 2 |" in page
    assert (tmp_path / "policies.png").exists()
    rows = [json.loads(line) for line in (tmp_path / "policies.jsonl").read_text().splitlines()]
    assert {row["policy"] for row in rows} == {*policy_names(), regret.BATCHED}
    assert regret.main(["--quick", "--redo", "adaptive", "--processes", "1", "--output", str(tmp_path)]) == 0
    assert len((tmp_path / "policies.jsonl").read_text().splitlines()) == len(rows)


def test_least_squares_leave_out_what_would_be_negative():
    rows = np.array([[1.0, 1, 0], [1, 2, 0], [1, 3, 1], [1, 4, 1]])
    truth = np.array([0.5, 0.25, 0.0])
    assert _non_negative(rows, rows @ truth, np.ones(4)) == pytest.approx(truth, abs=1e-9)
    assert (_non_negative(rows, np.array([1.0, 2, 2.5, 3.5]), np.ones(4)) >= 0).all()
