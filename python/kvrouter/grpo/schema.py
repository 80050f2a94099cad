"""What a training config may hold: NeMo-RL's names, with a default for each key that has one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class RouterSettings:
    """``grpo.router`` and ``policy.generation.router_cfg``; see ``kvrouter.RouterConfig``."""

    enabled: bool = False
    block_size: int = 64
    base_kv_events_port: int = 5557
    base_metrics_port: int = 5657
    mode: Literal["best_worker", "round_robin"] = "best_worker"
    policy: str = "linear"


@dataclass
class GrpoConfig:
    """The algorithm.

    num_prompts_per_step, num_generations_per_prompt: a step trains on their product of samples.
    max_num_steps: steps of the whole training, those before a resume included.
    use_leave_one_out_baseline: a sample's baseline is the mean of the others of its prompt; false: of all of them.
    normalize_rewards: divide advantages by the standard deviation that belongs to the baseline.
    advantage_clip_low, advantage_clip_high: bounds of the advantage; null: none.
    overlong_filtering: samples that ended by their length do not count in the loss.
    val_period: steps between validations, 0 for none; val_at_start, val_at_end: before the first and after the last.
    max_val_samples: of the validation set, the first so many; null: all.
    seed: of warm-up, data order and sampling.
    router: keys given here win over ``policy.generation.router_cfg``.
    """

    num_prompts_per_step: int = 8
    num_generations_per_prompt: int = 8
    max_num_steps: int = 10
    use_leave_one_out_baseline: bool = True
    normalize_rewards: bool = True
    advantage_clip_low: float | None = None
    advantage_clip_high: float | None = None
    overlong_filtering: bool = False
    val_period: int = 5
    val_at_start: bool = True
    val_at_end: bool = True
    max_val_samples: int | None = None
    seed: int = 42
    router: dict[str, Any] = field(default_factory=dict, metadata={"schema": RouterSettings})


@dataclass
class LossConfig:
    """The loss; see ``kvrouter.grpo.loss.clipped_policy_loss``."""

    reference_policy_kl_penalty: float = 0.01
    reference_policy_kl_type: Literal["k1", "k2", "k3"] = "k3"
    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2
    ratio_clip_c: float | None = None
    use_importance_sampling_correction: bool = False
    token_level_loss: bool = True


@dataclass
class TokenizerConfig:
    """name: a tokenizer's folder or name; null: the model's."""

    name: str | None = None


@dataclass
class TinyModelConfig:
    """Sizes of the model that ``policy.model_name: tiny`` makes from random weights."""

    hidden_size: int = 128
    num_layers: int = 2
    max_position_embeddings: int = 1024


@dataclass
class WarmupConfig:
    """A supervised warm-up on the arithmetic dataset, before training and only where nothing is resumed.

    max_steps: of AdamW; 0 for no warm-up.  until_accuracy: ends it earlier, when so many of the validation answers
    are right, teacher-forced.
    """

    max_steps: int = 0
    until_accuracy: float = 1.0
    batch_size: int = 32
    lr: float = 1e-3


@dataclass
class OptimizerConfig:
    """kwargs: of ``torch.optim.AdamW``."""

    name: Literal["torch.optim.AdamW"] = "torch.optim.AdamW"
    kwargs: dict[str, Any] = field(default_factory=lambda: {"lr": 3e-4})


@dataclass
class ColocationResources:
    """gpus_per_node: engines a node (bundles: GPUs, or on CPU just places); null: ``cluster.gpus_per_node``."""

    gpus_per_node: int | None = None


@dataclass
class ColocatedConfig:
    """Whether generation shares its GPUs with training: not supported here, so false."""

    enabled: bool = False
    resources: ColocationResources = field(default_factory=ColocationResources)


@dataclass
class GenerationSettings:
    """Rollouts; see ``kvrouter.ray.GenerationConfig``, which explains the keys and checks those of ``vllm_cfg``.

    max_model_len of ``vllm_cfg`` is ``policy.max_total_sequence_length`` where it is not given.
    """

    backend: str = "vllm"
    engine: Literal["vllm", "sim"] = "vllm"
    max_new_tokens: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    stop_token_ids: list[int] | None = None
    stop_strings: list[str] | None = None
    vllm_cfg: dict[str, Any] = field(default_factory=dict)
    vllm_kwargs: dict[str, Any] = field(default_factory=dict)
    sim_cfg: dict[str, Any] = field(default_factory=dict)
    colocated: ColocatedConfig = field(default_factory=ColocatedConfig)
    router_cfg: dict[str, Any] = field(default_factory=dict, metadata={"schema": RouterSettings})


@dataclass
class PolicyConfig:
    """The policy.

    model_name: a folder or name that ``transformers`` can load, or ``tiny``.
    device: where it is trained: ``cpu``, ``cuda:1``.
    train_global_batch_size: samples of an optimizer step; null: all of a step.
    train_micro_batch_size, logprob_batch_size: samples that go through the model at once.
    max_total_sequence_length: tokens of prompt and response.
    max_grad_norm: gradients are scaled down to this norm; null: never.
    """

    model_name: str = "tiny"
    device: str = "cpu"
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    tiny: TinyModelConfig = field(default_factory=TinyModelConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    train_global_batch_size: int | None = None
    train_micro_batch_size: int = 16
    logprob_batch_size: int = 32
    max_total_sequence_length: int = 512
    max_grad_norm: float | None = 1.0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    generation: GenerationSettings = field(default_factory=GenerationSettings)


@dataclass
class DatasetConfig:
    """One dataset.

    dataset_name: ``arithmetic`` (generated sums behind few-shot prompts) or ``jsonl``.
    size, num_prefixes, num_shots, max_operand, seed: of ``arithmetic``: problems, different few-shot prompts, solved
        examples in each, the largest number to add.
    data_path, input_key, output_key: of ``jsonl``: the file, and the names of prompt and answer in each object.
    """

    dataset_name: Literal["arithmetic", "jsonl"] = "arithmetic"
    size: int = 256
    num_prefixes: int = 4
    num_shots: int = 32
    max_operand: int = 9
    seed: int = 0
    data_path: str | None = None
    input_key: str = "input"
    output_key: str = "output"


@dataclass
class DataConfig:
    """max_input_seq_length: a longer prompt is an error, not cut.  validation: null for the training set's kind."""

    max_input_seq_length: int | None = None
    shuffle: bool = True
    train: DatasetConfig = field(default_factory=DatasetConfig)
    validation: DatasetConfig = field(default_factory=lambda: DatasetConfig(size=64, seed=1))


@dataclass
class ExactAnswerConfig:
    """Rewards of the environment that compares the response with the answer."""

    correct_reward: float = 1.0
    wrong_reward: float = 0.0


@dataclass
class EnvConfig:
    """Environments, by name."""

    exact_answer: ExactAnswerConfig = field(default_factory=ExactAnswerConfig)


@dataclass
class LoggerConfig:
    """log_dir: of ``metrics.jsonl``, ``config.yaml``, plots and TensorBoard's files."""

    log_dir: str = "out/grpo"
    tensorboard_enabled: bool = False
    plots_enabled: bool = True


@dataclass
class CheckpointingConfig:
    """Every ``save_period`` steps and at the end; the newest ``keep_top_k`` are kept (null: all)."""

    enabled: bool = False
    checkpoint_dir: str = "out/grpo/checkpoints"
    save_period: int = 10
    keep_top_k: int | None = 2


@dataclass
class ClusterConfig:
    """gpus_per_node: places for engines on a node; use_gpus: whether each is a GPU (false: vLLM on CPU)."""

    gpus_per_node: int = 1
    num_nodes: int = 1
    use_gpus: bool = False


@dataclass
class MasterConfig:
    """A whole training config."""

    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    loss_fn: LossConfig = field(default_factory=LossConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    data: DataConfig = field(default_factory=DataConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


#: Keys of NeMo-RL that are accepted with this value only, as what they turn on does not exist here.
ONLY_VALUE: dict[str, Any] = {
    "grpo.async_grpo.enabled": False,
    "grpo.max_rollout_turns": 1,
    "grpo.use_dynamic_sampling": False,
    "grpo.reward_scaling.enabled": False,
    "grpo.reward_shaping.enabled": False,
    "policy.dtensor_cfg.enabled": False,
    "policy.megatron_cfg.enabled": False,
    "policy.sequence_packing.enabled": False,
    "policy.dynamic_batching.enabled": False,
    "policy.precision": "float32",
    "policy.scheduler": None,
    "policy.generation.colocated.enabled": False,
    "checkpointing.metric_name": None,
    "logger.wandb_enabled": False,
    "logger.mlflow_enabled": False,
    "logger.swanlab_enabled": False,
    "logger.monitor_gpus": False,
}
