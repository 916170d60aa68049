"""Settings of a training run. Names follow TRL and transformers where the meaning is equal."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from r2ec_fast.prompts.builder import PromptConfig
from r2ec_kernels import RecPOLossConfig

OBJECTIVES = ("recpo", "contrastive")
SCHEDULERS = ("constant_with_warmup", "constant", "linear", "cosine")
OPTIMIZERS = ("adamw_torch", "paged_adamw_8bit")
REFRESH_MODES = ("full", "rolling")
REPORTERS = ("none", "tensorboard", "wandb", "trackio")


@dataclass
class RecPOConfig:
    """Everything a run depends on; written beside every checkpoint. Defaults are the paper's.

    One optimiser step uses ``per_device_train_batch_size`` × ``gradient_accumulation_steps`` ×
    processes users; a forward pass holds at most ``max_tokens_per_microbatch`` tokens, whatever
    those are. Raises ValueError, naming the setting, for a value outside its range.
    """

    output_dir: str = "runs/r2ec"
    """Where checkpoints, metrics and the trained model are written."""
    objective: str = "recpo"
    """recpo: reasoning and item head by reinforcement learning; contrastive: direct mode, in-batch
    softmax without reasoning (ablation and warm start)."""

    # adapters and precision
    use_lora: bool = True
    """Train low-rank adapters; false trains every weight except the token table."""
    lora_r: int = 4
    """Rank of the adapters."""
    lora_alpha: int = 128
    """Scale of the adapters (an update is multiplied by lora_alpha / lora_r)."""
    lora_dropout: float = 0.0
    """Dropout before the adapters, probability."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    # rollout
    num_generations: int = 4
    """G, reasonings sampled for one user."""
    max_completion_length: int = 512
    """Longest reasoning, tokens (an appended marker not counted)."""
    temperature: float = 1.5
    """Sampling temperature of the reasoning, also the one its log-probabilities are taken at."""
    top_k: int = 200
    """Sample among the k likeliest tokens; 0 = all."""
    max_tokens_in_flight: int = 65536
    """Prompt and completion tokens in one generation batch."""
    rollout_server: str | None = None
    """URL of a running vLLM server of the same base model, such as http://localhost:8000, which
    samples the reasonings with the adapters of each step; none = transformers, in this process."""

    # reward and loss
    reward_softmax_weight: float = 0.05
    """β: weight of the target's softmax probability in the reward; 1 - β is NDCG's."""
    reward_ndcg_k: int = 1000
    """Ranks beyond it earn no NDCG reward, items."""
    relabel_topk: int = 1
    """Best reasonings of a group that train the item action."""
    estimator: str = "grpo"
    """Advantage: "grpo" (mean and standard deviation of the group) or "rloo" (leave-one-out)."""
    reduction: str = "token"
    """Of the token terms: "token", "sequence", "constant" or "sum" (the paper's weights)."""
    epsilon: float = 0.2
    """Lower clip range of the ratios."""
    epsilon_high: float = 0.2
    """Upper clip range of the ratios (reference code: 0.28)."""
    item_weight: float = 1.0
    """Weight of the item action's term."""
    item_negatives: str = "in-batch"
    """Candidates of the item action's softmax: "in-batch" targets or the whole "catalog" (which
    wants refresh_steps 1: a model learns to tell fresh rows from stale ones)."""
    sampled_negatives: int = 0
    """Items of the catalog, drawn uniformly in every step and encoded with it, that join the
    in-batch candidates; for steps of few users."""
    kl_weight: float = 0.0
    """Weight of the KL term to the backbone without adapters; 0 = none (the paper)."""
    importance_cap: float | None = None
    """Largest correction of a token for an engine with other numerics (vLLM); none = no bound."""
    dynamic_sampling_rounds: int = 0
    """Sample groups whose rewards tie again, at most so many times a step; 0 = never. Each round
    costs its tokens and a scoring pass."""
    num_iterations: int = 1
    """Optimiser steps on one batch of rollouts."""

    # optimiser
    learning_rate: float = 1e-5
    """Peak learning rate."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    optim: str = "adamw_torch"
    """"adamw_torch", or "paged_adamw_8bit" (needs bitsandbytes)."""
    lr_scheduler_type: str = "constant_with_warmup"
    """"constant_with_warmup", "constant", "linear" or "cosine" (the last two after the warm-up)."""
    warmup_steps: int = 32
    """Steps of linear warm-up."""
    max_grad_norm: float = 1.0
    """Clip the gradient's norm; 0 = never."""
    per_device_train_batch_size: int = 24
    """Users in one accumulation step of a process."""
    gradient_accumulation_steps: int = 1
    """Accumulation steps in one optimiser step."""
    max_tokens_per_microbatch: int = 16384
    """Token budget of one forward and backward pass; a larger group runs alone."""
    max_steps: int = -1
    """Optimiser steps; -1 = num_train_epochs decide."""
    num_train_epochs: float = 1.0
    """Passes over the training examples where max_steps is -1."""

    # item table
    refresh_steps: int = 100
    """Re-encode the whole catalog every so many steps; 0 = only for evaluations."""
    refresh_mode: str = "full"
    """"full": all rows at once, every refresh_steps; "rolling": after each step the oldest rows, so
    many that none is older than refresh_steps."""
    index_scan: str = "auto"
    """First pass of the item index: "auto", "none", "fp16", "bf16" or "int8"; same results."""

    # evaluation, logs, checkpoints
    eval_steps: int = 100
    """Validate every so many steps; 0 = only at the end."""
    eval_samples: int = 0
    """Validation examples, seeded sample; 0 = all."""
    eval_reasoning: bool | None = None
    """Evaluate with greedy reasoning; none = yes for recpo, no for contrastive."""
    early_stopping_patience: int = 0
    """Stop after so many validations without a better eval_valid_ndcg@10; 0 = never."""
    load_best_model_at_end: bool = True
    """Export the checkpoint with the best eval_valid_ndcg@10 rather than the last."""
    logging_steps: int = 1
    """Log every so many steps."""
    log_completions_steps: int = 0
    """Write the reasonings of one user to samples.jsonl every so many steps; 0 = never."""
    log_entropy: bool = False
    """Log the mean entropy of the sampled tokens' distributions (nats): a few percent more time."""
    save_steps: int = 100
    """Checkpoint every so many steps; 0 = only at the end."""
    save_total_limit: int = 2
    """Checkpoints kept beside the best one."""
    resume_from_checkpoint: str | None = None
    """A checkpoint directory, or "latest" of output_dir."""
    report_to: str = "none"
    """"none", "tensorboard", "wandb" or "trackio", beside metrics.jsonl."""
    fsdp: bool = False
    """Shard weights, gradients and optimiser state over the processes (FSDP2); also on where
    accelerate's configuration asks for FSDP."""
    ddp_timeout: int = 1800
    """Seconds after which a process that does not answer the others ends the run."""
    seed: int = 42
    """Of the order of examples, the sampling and the initialisation."""

    def __post_init__(self) -> None:
        _one_of("objective", self.objective, OBJECTIVES)
        _one_of("optim", self.optim, OPTIMIZERS)
        _one_of("lr_scheduler_type", self.lr_scheduler_type, SCHEDULERS)
        _one_of("report_to", self.report_to, REPORTERS)
        _one_of("refresh_mode", self.refresh_mode, REFRESH_MODES)
        if self.refresh_mode == "rolling" and not self.refresh_steps:
            raise ValueError("refresh_steps: refresh_mode='rolling' needs at least 1, got 0")
        for name in (
            "lora_r",
            "num_generations",
            "max_completion_length",
            "max_tokens_in_flight",
            "reward_ndcg_k",
            "relabel_topk",
            "num_iterations",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "max_tokens_per_microbatch",
            "logging_steps",
            "save_total_limit",
            "ddp_timeout",
        ):
            _at_least(name, getattr(self, name), 1)
        for name in (
            "top_k",
            "dynamic_sampling_rounds",
            "warmup_steps",
            "max_grad_norm",
            "refresh_steps",
            "sampled_negatives",
            "eval_steps",
            "eval_samples",
            "early_stopping_patience",
            "save_steps",
            "log_completions_steps",
            "weight_decay",
        ):
            _at_least(name, getattr(self, name), 0)
        for name in ("temperature", "learning_rate", "num_train_epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if self.rollout_server is not None and not self.use_lora:
            raise ValueError("rollout_server: needs use_lora, a server takes new adapters only")
        if self.relabel_topk > self.num_generations:
            raise ValueError(
                f"relabel_topk: expected at most num_generations ({self.num_generations}), "
                f"got {self.relabel_topk}"
            )

    @property
    def reasons(self) -> bool:
        """Whether evaluations of this run write a reasoning first."""
        return self.objective == "recpo" if self.eval_reasoning is None else self.eval_reasoning

    def loss_config(
        self,
        *,
        similarity: str,
        item_temperature: float,
        softcap: float | None,
        logit_scale: float = 1.0,
    ) -> RecPOLossConfig:
        """The part of the settings that defines the loss, with the model's own constants."""
        return RecPOLossConfig(
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
            reduction=self.reduction,
            estimator=self.estimator,
            best=self.relabel_topk,
            item_weight=self.item_weight,
            item_temperature=item_temperature,
            similarity=similarity,
            softcap=softcap,
            temperature=self.temperature / logit_scale,
            item_negatives=self.item_negatives,
            max_completion_length=self.max_completion_length,
            kl_weight=self.kl_weight,
            importance_cap=self.importance_cap,
            entropy=self.log_entropy,
        )

    def to_dict(self) -> dict:
        """Plain values, for a file."""
        return asdict(self)


@dataclass
class ModelConfig:
    """Which backbone, and how it speaks of items."""

    name_or_path: str = "google/gemma-2-2b-it"
    """A name on the Hub, or a directory; also a directory written by an earlier run."""
    dtype: str = "auto"
    """"auto", "float32", "bfloat16" or "float16"."""
    gguf_file: str | None = None
    """Read the weights from this GGUF file of the directory."""
    similarity: str = "cosine"
    """Of the item head: "cosine", "dot" or "l2"."""
    item_temperature: float = 0.02
    """τ: item scores are divided by it."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """Wording and token budgets of the prompts."""


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
