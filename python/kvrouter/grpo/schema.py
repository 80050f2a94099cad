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
    replay: bool = False


@dataclass
class AsyncGrpoConfig:
    """Rollouts beside training (``async_grpo_train``), instead of one after the other.

    max_trajectory_age_steps: a sample is trained on at most so many steps after the one whose weights it was begun
        with; rollouts run so many steps ahead.
    in_flight_weight_updates: new weights come between two tokens of the samples under way; false: these are waited for.
    recompute_kv_cache_after_weight_updates: new weights empty the prefix caches and the router's index; false: both are
        kept, and samples are begun on KV that older weights have made.
    """

    enabled: bool = False
    max_trajectory_age_steps: int = 1
    in_flight_weight_updates: bool = False
    recompute_kv_cache_after_weight_updates: bool = True


@dataclass
class GrpoConfig:
    """The algorithm.

    num_prompts_per_step, num_generations_per_prompt: a step trains on their product of samples.
    max_num_steps: steps of the whole training, those before a resume included; max_num_epochs: passes over the data,
        whichever ends first (null: no matter how many).
    max_rollout_turns: responses of a conversation, at most; 1: every problem's first question alone.
    use_leave_one_out_baseline: a sample's baseline is the mean of the others of its prompt; false: of all of them.
    normalize_rewards: divide advantages by the standard deviation that belongs to the baseline.
    advantage_clip_low, advantage_clip_high: bounds of the advantage; null: none.
    overlong_filtering: samples that ended by their length do not count in the loss.
    val_period: steps between validations, 0 for none; val_at_start, val_at_end: before the first and after the last.
    max_val_samples: of the validation set, the first so many; null: all.  val_batch_size: so many at once; null: all.
    seed: of warm-up, data order and sampling.
    router: keys given here win over ``policy.generation.router_cfg``.
    """

    num_prompts_per_step: int = 8
    num_generations_per_prompt: int = 8
    max_num_steps: int = 10
    max_num_epochs: int | None = None
    max_rollout_turns: int = 1
    use_leave_one_out_baseline: bool = True
    normalize_rewards: bool = True
    advantage_clip_low: float | None = None
    advantage_clip_high: float | None = None
    overlong_filtering: bool = False
    val_period: int = 5
    val_at_start: bool = True
    val_at_end: bool = True
    max_val_samples: int | None = None
    val_batch_size: int | None = None
    seed: int = 42
    async_grpo: AsyncGrpoConfig = field(default_factory=AsyncGrpoConfig)
    router: dict[str, Any] = field(default_factory=dict, metadata={"schema": RouterSettings})


@dataclass
class LossConfig:
    """The loss; see ``kvrouter.grpo.loss.clipped_policy_loss``.

    use_importance_sampling_correction: needed where the engine's weights are not the policy's (``grpo.async_grpo``).
    """

    reference_policy_kl_penalty: float = 0.01
    reference_policy_kl_type: Literal["k1", "k2", "k3"] = "k3"
    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2
    ratio_clip_c: float | None = None
    force_on_policy_ratio: bool = False
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

    dataset_name: ``arithmetic`` (generated sums behind few-shot prompts), ``arithmetic_turns`` (conversations of such,
        see ``grpo.max_rollout_turns``) or ``jsonl``.
    size, num_prefixes, num_shots, max_operand, seed: of ``arithmetic``: problems, different few-shot prompts, solved
        examples in each, the largest number to add.
    min_turns, num_turns, num_shots_per_turn: of ``arithmetic_turns``: fewest and most questions in a conversation, and
        the solved examples that come with each after the first.
    data_path, input_key, output_key: of ``jsonl``: the file, and the names of prompt and answer in each object.
    """

    dataset_name: Literal["arithmetic", "arithmetic_turns", "jsonl"] = "arithmetic"
    size: int = 256
    num_prefixes: int = 4
    num_shots: int = 32
    max_operand: int = 9
    min_turns: int = 4
    num_turns: int = 4
    num_shots_per_turn: int = 24
    seed: int = 0
    data_path: str | None = None
    input_key: str = "input"
    output_key: str = "output"


@dataclass
class DataConfig:
    """max_input_seq_length: a longer prompt is an error, not cut."""

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
class WandbConfig:
    """Where Weights & Biases files the run."""

    project: str = "kvrouter-grpo"
    name: str | None = None


@dataclass
class LoggerConfig:
    """What a training leaves.

    log_dir: of ``metrics.jsonl``, ``config.yaml``, plots and TensorBoard's files.
    compare_with: ``log_dir`` of another run, say one without router, whose figures are drawn beside this one's.
    num_val_samples_to_print: answers to print at each validation.
    rollouts_enabled: write ``rollouts.jsonl``, a line a sample.
    """

    log_dir: str = "out/grpo"
    tensorboard_enabled: bool = False
    wandb_enabled: bool = False
    wandb: WandbConfig = field(default_factory=WandbConfig)
    plots_enabled: bool = True
    compare_with: str | None = None
    num_val_samples_to_print: int = 0
    rollouts_enabled: bool = False


@dataclass
class CheckpointingConfig:
    """Every ``save_period`` steps and at the end; the newest ``keep_top_k`` are kept (null: all).

    checkpoint_dir: null: ``checkpoints`` in ``logger.log_dir``.
    """

    enabled: bool = False
    checkpoint_dir: str | None = None
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
    "grpo.use_dynamic_sampling": False,
    "grpo.adv_estimator.name": "grpo",
    # Engines bind ports themselves and say which.
    "grpo.router.worker_addresses": None,
    "grpo.router.worker_ports": None,
    "policy.generation.router_cfg.worker_addresses": None,
    "policy.generation.router_cfg.worker_ports": None,
    "grpo.reward_scaling.enabled": False,
    "grpo.reward_shaping.enabled": False,
    "policy.dtensor_cfg.enabled": False,
    "policy.megatron_cfg.enabled": False,
    "policy.sequence_packing.enabled": False,
    "policy.dynamic_batching.enabled": False,
    "policy.precision": "float32",
    "policy.make_sequence_length_divisible_by": 1,
    "policy.scheduler": None,
    "policy.generation.colocated.enabled": False,
    "policy.generation.vllm_cfg.enable_vllm_metrics_logger": False,
    "checkpointing.metric_name": None,
    "logger.mlflow_enabled": False,
    "logger.swanlab_enabled": False,
    "logger.monitor_gpus": False,
}
