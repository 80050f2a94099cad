"""setup: cluster, data, policy, generation and router of a training, from its config."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kvrouter.grpo.checkpoint import load_newest
from kvrouter.grpo.checks import check_training_config
from kvrouter.grpo.data import END_OF_ANSWER, Problem, load_dataset
from kvrouter.grpo.environment import Environment, ExactAnswerEnvironment
from kvrouter.grpo.policy import Policy
from kvrouter.grpo.schema import MasterConfig
from kvrouter.grpo.tokenizer import CHARACTER_VOCAB_SIZE, TextTokenizer, character_tokenizer, load_tokenizer
from kvrouter.grpo.warmup import warm_up
from kvrouter.ray import RayVirtualCluster, VllmGeneration
from kvrouter.ray.config import check_generation_config, router_config_from
from kvrouter.vllm.tiny_model import make_tiny_model

logger = logging.getLogger("kvrouter.grpo")

WARMUP_PROBLEMS = 512
#: Added to the training set's seed, so that the warm-up's problems are others.
WARMUP_SEED = 1000


@dataclass
class Training:
    """All that a training is made of; ends engines and router when it is left as a context.

    first_step: steps done before, by a training that this one resumes; first_version: the engines' number of the
        weights behind it.
    """

    config: MasterConfig
    cluster: RayVirtualCluster
    generation: VllmGeneration
    policy: Policy
    tokenizer: TextTokenizer
    train: list[Problem]
    validation: list[Problem]
    environment: Environment
    first_step: int = 0
    first_version: int = 0
    warmup: dict[str, float] = field(default_factory=dict)

    def close(self) -> None:
        """Ends router, engines and the cluster's reservations; a second call does nothing."""
        self.generation.shutdown()
        self.cluster.shutdown()

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def setup(config: MasterConfig) -> Training:
    """Builds a training.  Ray must be running.

    A checkpoint in ``checkpointing.checkpoint_dir`` is resumed if checkpointing is enabled; else the model is warmed up
    as ``policy.warmup`` says.  Raises ValueError, naming the key, for a config that does not fit, RuntimeError when an
    engine does not start.
    """
    check_training_config(config)
    train = load_dataset(config.data.train, "data.train")
    validation = load_dataset(config.data.validation, "data.validation")
    environment = ExactAnswerEnvironment(config.env.exact_answer)
    torch.manual_seed(config.grpo.seed)
    is_tiny = config.policy.model_name == "tiny"
    model_path = _tiny_model(config) if is_tiny else config.policy.model_name
    tokenizer_name = config.policy.tokenizer.name or (None if is_tiny else model_path)
    tokenizer = character_tokenizer() if tokenizer_name is None else load_tokenizer(tokenizer_name)
    # All that may be wrong with the config is found before minutes are spent on warm-up and engines.
    generation_config = generation_settings(config, model_path, tokenizer)
    check_generation_config(generation_config)
    _check_prompts(config, train, validation, tokenizer)
    policy = Policy(config.policy, model_path, random_weights=is_tiny)
    first_step, warmup = _resume_or_warm_up(config, policy, validation, environment, tokenizer)
    engines = config.policy.generation.colocated.resources.gpus_per_node or config.cluster.gpus_per_node
    cluster = RayVirtualCluster([engines] * config.cluster.num_nodes, use_gpus=config.cluster.use_gpus, name="grpo")
    try:
        generation = VllmGeneration(cluster, generation_config)
    except BaseException:
        cluster.shutdown()
        raise
    return Training(
        config, cluster, generation, policy, tokenizer, train, validation, environment, first_step, warmup=warmup
    )


def _check_prompts(
    config: MasterConfig, train: Sequence[Problem], validation: Sequence[Problem], tokenizer: TextTokenizer
) -> None:
    """Raises ValueError, naming the keys, for data that cannot be trained on."""
    longest = max(len(tokenizer.encode(problem.prompt)) for problem in [*train, *validation])
    allowed = max_input_tokens(config)
    if longest > allowed:
        raise ValueError(
            f"a prompt has {longest} tokens, and {allowed} are allowed: set data.max_input_seq_length, or "
            "policy.max_total_sequence_length and policy.generation.max_new_tokens"
        )
    grpo = config.grpo
    if grpo.max_num_epochs is not None and grpo.max_num_epochs * len(train) < grpo.num_prompts_per_step:
        raise ValueError(
            f"grpo.max_num_epochs ({grpo.max_num_epochs}) of {len(train)} problems are less than one step's "
            f"grpo.num_prompts_per_step ({grpo.num_prompts_per_step})"
        )


def max_input_tokens(config: MasterConfig) -> int:
    """Of a prompt, at most."""
    room = config.policy.max_total_sequence_length - config.policy.generation.max_new_tokens
    limit = config.data.max_input_seq_length
    return room if limit is None else min(room, limit)


def generation_settings(config: MasterConfig, model_path: str, tokenizer: TextTokenizer) -> dict[str, Any]:
    """``VllmGeneration``'s config: that of ``policy.generation``, with the router's and the tokenizer's."""
    settings: dict[str, Any] = asdict(config.policy.generation)
    stops = {tokenizer.eos_id, *(settings["stop_token_ids"] or ())}
    if config.data.train.dataset_name != "jsonl":
        stops.add(end_of_answer(tokenizer))
    settings.update(
        model_name=model_path,
        stop_token_ids=sorted(stops),
        router_cfg=router_config_from(asdict(config)),
        seed=config.grpo.seed,
        # The weights come from the trainer before the first rollout.
        vllm_cfg={
            "load_format": "dummy",
            "skip_tokenizer_init": not settings["stop_strings"],
            "max_model_len": config.policy.max_total_sequence_length,
            **settings["vllm_cfg"],
        },
        _pad_token_id=tokenizer.pad_id,
    )
    if config.policy.generation.engine == "vllm" and not config.cluster.use_gpus:
        # Every sample has a seed.  vLLM 0.32 rewinds the generator of a request whose prompt it has read in part, which
        # torch's CPU generators cannot ("CPU Generator does not use offset"): the engine dies.
        if settings["vllm_kwargs"].get("enable_chunked_prefill", False):
            raise ValueError(
                "policy.generation.vllm_kwargs.enable_chunked_prefill must be false on CPU: seeds end the engine"
            )
        settings["vllm_kwargs"]["enable_chunked_prefill"] = False
        settings["vllm_kwargs"].setdefault("max_num_batched_tokens", max(2048, settings["vllm_cfg"]["max_model_len"]))
    return settings


def end_of_answer(tokenizer: TextTokenizer) -> int:
    """The token that ends an answer of the arithmetic datasets."""
    answer, ended = tokenizer.encode("0"), tokenizer.encode(f"0{END_OF_ANSWER}")
    if len(ended) != len(answer) + 1 or ended[:-1] != answer:
        raise ValueError(
            "policy.tokenizer.name: the tokenizer has no token of its own for the end of a line, which the arithmetic "
            "datasets need: use data.train.dataset_name=jsonl"
        )
    return ended[-1]


def _tiny_model(config: MasterConfig) -> str:
    tiny = config.policy.tiny
    folder = Path(config.logger.log_dir) / "tiny_model"
    model = make_tiny_model(
        folder, tiny.hidden_size, tiny.num_layers, CHARACTER_VOCAB_SIZE, tiny.max_position_embeddings
    )
    return str(model.path)


def checkpoint_folder(config: MasterConfig) -> Path:
    """Where checkpoints are."""
    return Path(config.checkpointing.checkpoint_dir or Path(config.logger.log_dir) / "checkpoints")


def fingerprint(config: MasterConfig) -> str:
    """What a training must have in common with the one that it resumes."""
    policy, grpo = config.policy, config.grpo
    parts = (
        policy.model_name,
        asdict(policy.tiny) if policy.model_name == "tiny" else None,
        asdict(config.data.train),
        config.data.shuffle,
        (grpo.seed, grpo.num_prompts_per_step, grpo.num_generations_per_prompt),
    )
    return json.dumps(parts)


def _resume_or_warm_up(
    config: MasterConfig,
    policy: Policy,
    validation: Sequence[Problem],
    environment: Environment,
    tokenizer: TextTokenizer,
) -> tuple[int, dict[str, float]]:
    folder = checkpoint_folder(config)
    state = load_newest(folder) if config.checkpointing.enabled else None
    if state is not None:
        if state.get("of") != fingerprint(config):
            raise ValueError(
                f"the checkpoint in {folder} is of another model, dataset or seed: set checkpointing.checkpoint_dir or "
                "logger.log_dir, or remove it"
            )
        policy.load_state(state["policy"])
        logger.info("resuming after step %d", state["step"])
        return int(state["step"]), {}
    warmup = config.policy.warmup
    figures = {}
    if warmup.max_steps > 0:
        if config.data.train.dataset_name == "jsonl":
            raise ValueError("policy.warmup is for the arithmetic datasets: set policy.warmup.max_steps=0")
        problems = load_dataset(
            replace(
                config.data.train,
                size=WARMUP_PROBLEMS,
                num_prefixes=WARMUP_PROBLEMS,
                seed=config.data.train.seed + WARMUP_SEED,
            ),
            "data.train",
        )
        turns = config.grpo.max_rollout_turns
        steps, accuracy = warm_up(
            policy,
            [problem.first_turns(turns) for problem in problems],
            [problem.first_turns(turns) for problem in validation],
            environment,
            tokenizer,
            warmup,
            config.grpo.seed,
        )
        figures = {"steps": float(steps), "accuracy": accuracy}
        logger.info("warm-up: %d steps, %.0f%% of the validation answers right", steps, 100 * accuracy)
    policy.freeze_reference()
    return 0, figures
