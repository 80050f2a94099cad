"""Training configs: files, defaults, overrides, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("omegaconf", reason="OmegaConf is not installed: pip install 'kvrouter[grpo]'")

from omegaconf import OmegaConf

from kvrouter.grpo.checks import check_training_config
from kvrouter.grpo.config import config_from, load_config

EXAMPLE = Path(__file__).parents[3] / "examples" / "configs" / "grpo_with_router_example.yaml"


@pytest.fixture
def write(tmp_path):
    def write_one(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write_one


def test_the_example_is_valid_and_has_the_router_on():
    config = load_config(EXAMPLE)
    assert config.grpo.router["enabled"] is True
    assert load_config(EXAMPLE, ["grpo.router.enabled=false"]).grpo.router["enabled"] is False


def test_defaults_are_inherited_in_order_and_over_levels(write):
    write("root.yaml", "grpo: {seed: 1, max_num_steps: 2}\nloss_fn: {ratio_clip_min: 0.1}")
    write("middle.yaml", "defaults: root.yaml\ngrpo: {seed: 3}")
    write("other.yaml", "grpo: {val_period: 9}")
    config = load_config(write("leaf.yaml", "defaults: [middle.yaml, other.yaml]\ngrpo: {max_num_steps: 5}"))
    assert (config.grpo.seed, config.grpo.max_num_steps, config.grpo.val_period) == (3, 5, 9)
    assert config.loss_fn.ratio_clip_min == 0.1


def test_defaults_in_a_circle_and_missing_files_are_told(write):
    write("a.yaml", "defaults: b.yaml")
    path = write("b.yaml", "defaults: a.yaml")
    with pytest.raises(ValueError, match=r"circle: b\.yaml -> a\.yaml -> b\.yaml"):
        load_config(path)
    with pytest.raises(ValueError, match=r"no config file .*none\.yaml \(named by defaults in .*c\.yaml"):
        load_config(write("c.yaml", "defaults: none.yaml"))
    with pytest.raises(ValueError, match="is not YAML"):
        load_config(write("d.yaml", "a: [1"))
    with pytest.raises(ValueError, match="must hold keys"):
        load_config(write("e.yaml", "[1, 2]"))


def test_interpolation(write):
    path = write(
        "c.yaml",
        "grpo: {num_prompts_per_step: 4, num_generations_per_prompt: 8}\n"
        "policy: {train_global_batch_size: '${mul:${grpo.num_prompts_per_step},${grpo.num_generations_per_prompt}}'}",
    )
    assert load_config(path).policy.train_global_batch_size == 32
    with pytest.raises(ValueError, match=r"cannot be resolved.*nowhere"):
        load_config(write("d.yaml", "grpo: {seed: '${nowhere}'}"))


def test_overrides_in_hydras_form(write):
    path = write("c.yaml", "grpo: {seed: 1, max_num_steps: 7}\npolicy: {optimizer: {kwargs: {lr: 0.1, eps: 1.0e-9}}}")
    config = load_config(
        path,
        [
            "grpo.seed=2",
            "grpo.val_period=0",  # not in the file, but in the schema
            "++policy.optimizer.kwargs.weight_decay=1e-2",
            "+policy.generation.vllm_kwargs.max_num_seqs=8",
            "~policy.optimizer.kwargs.eps",
            "~grpo.max_num_steps",
            "policy.generation.stop_strings=[a,b]",
            "policy.train_global_batch_size=null",
        ],
    )
    assert (config.grpo.seed, config.grpo.val_period, config.grpo.max_num_steps) == (2, 0, 10)
    assert config.policy.optimizer.kwargs == {"lr": 0.1, "weight_decay": 0.01}
    assert config.policy.generation.vllm_kwargs == {"max_num_seqs": 8}
    assert config.policy.generation.stop_strings == ["a", "b"]
    assert config.policy.train_global_batch_size is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.seed", "must be key=value"),
        ("=3", "must be key=value"),
        ("+grpo.seed=3", "sets grpo.seed already: use grpo.seed=3"),
        ("~grpo.val_period", "does not set grpo.val_period"),
        ("++grpo.new=1", "unknown key grpo.new"),
        ("grpo.seed=[", "override 'grpo.seed=\\['"),
    ],
)
def test_overrides_that_are_refused(write, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(write("c.yaml", "grpo: {seed: 1}"), [override])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"grop": {}}, r"unknown key grop: did you mean grpo\?"),
        (
            {"grpo": {"num_prompt_per_step": 1}},
            r"key grpo.num_prompt_per_step: did you mean grpo.num_prompts",
        ),
        (
            {"grpo": {"router": {"blocksize": 1}}},
            r"unknown key grpo.router.blocksize: did you mean grpo.router.block",
        ),
        ({"policy": {"generation": {"router_cfg": {"mod": 1}}}}, r"did you mean policy.generation.router_cfg.mode\?"),
        ({"grpo": {"temperature": 1}}, r"unknown key grpo.temperature: did you mean policy.generation.temperature\?"),
        ({"env": {"zzzzzz": 1}}, r"unknown key env.zzzzzz: env has exact_answer"),
        ({"grpo": {"seed": "x"}}, r"grpo.seed must be of type int, not 'x' \(str\)"),
        ({"grpo": {"seed": True}}, "grpo.seed must be of type int, not True"),
        ({"grpo": {"seed": None}}, "grpo.seed must be of type int, not None"),
        ({"grpo": {"seed": 1.5}}, "grpo.seed must be of type int"),
        ({"grpo": {"val_at_start": 1}}, "grpo.val_at_start must be of type bool"),
        ({"grpo": 3}, "grpo must hold keys with values, not 3"),
        ({"grpo": {"router": {"enabled": "yes"}}}, "grpo.router.enabled must be of type bool, not 'yes'"),
        ({"grpo": {"router": {"mode": "best"}}}, "grpo.router.mode must be one of 'best_worker', 'round_robin'"),
        ({"policy": {"generation": {"stop_token_ids": [1, "a"]}}}, r"stop_token_ids\[1\] must be of type int"),
        ({"policy": {"generation": {"stop_token_ids": 1}}}, "stop_token_ids must be a list"),
        ({"policy": {"generation": {"vllm_cfg": 1}}}, "vllm_cfg must hold keys"),
        (
            {"grpo": {"use_dynamic_sampling": True}},
            "use_dynamic_sampling: True is not supported yet: set .*=false",
        ),
        ({"grpo": {"async_grpo": {"max_age_steps": 1}}}, "did you mean grpo.async_grpo.max_trajectory_age_steps"),
        ({"policy": {"generation": {"colocated": {"enabled": True}}}}, "set policy.generation.colocated.enabled=false"),
        ({"logger": {"mlflow_enabled": True}}, "logger.mlflow_enabled: True is not supported yet"),
    ],
)
def test_what_is_wrong_is_named(tree, message):
    with pytest.raises(ValueError, match=message):
        config_from(tree)


def test_what_is_turned_off_is_accepted():
    config = config_from(
        {
            "grpo": {"use_dynamic_sampling": False, "adv_estimator": {"name": "grpo"}},
            "policy": {"sequence_packing": {"enabled": False}, "generation": {"colocated": {"enabled": False}}},
        }
    )
    assert config == config_from({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy.logprob_batch_size": 0}, "policy.logprob_batch_size must be at least 1, got 0"),
        ({"grpo.async_grpo.max_trajectory_age_steps": 0}, "max_trajectory_age_steps must be at least 1, got 0"),
        ({"grpo.num_generations_per_prompt": 1}, "use_leave_one_out_baseline needs grpo.num_generations_per_prompt"),
        ({"policy.train_global_batch_size": 7}, r"train_global_batch_size \(7\) must divide the 64 samples"),
        ({"grpo.async_grpo.enabled": True}, "needs loss_fn.use_importance_sampling_correction=true"),
        ({"grpo.seed": -1}, "grpo.seed must be at least 0"),
        ({"policy.generation.top_p": 0.9}, "policy.generation.top_p must be 1 and top_k null"),
        ({"policy.generation.stop_strings": ["x"]}, "stop_strings needs a tokenizer in the engines"),
        ({"policy.generation.temperature": 0.0}, "policy.generation.temperature must be above 0"),
        ({"policy.generation.backend": "megatron"}, "policy.generation.backend must be 'vllm', not 'megatron'"),
    ],
)
def test_values_that_do_not_fit_are_named(changes, message):
    tree = OmegaConf.create({})
    for key, value in changes.items():
        OmegaConf.update(tree, key, value, force_add=True)
    with pytest.raises(ValueError, match=message):
        check_training_config(config_from(tree))
    check_training_config(config_from({}))


def test_router_settings_are_kept_as_given():
    config = config_from({"grpo": {"router": {"block_size": 32}}})
    assert config.grpo.router == {"block_size": 32}
