"""Settings of a training run.

A setting of TRL's GRPOConfig or transformers' TrainingArguments has its name there where it means
the same. Ours are the item action, the rewards, the item table, packing, and the rest of what those
trainers do not have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from r2ec_fast.data.templates import ReasoningTemplates
from r2ec_fast.prompts.builder import PromptConfig
from r2ec_fast.utils.settings import (
    AtLeast,
    Fraction,
    MoreThan,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    PositiveFloat,
    PositiveInt,
    Renamed,
    accept_old_names,
    check_ranges,
)
from r2ec_kernels import RecPOLossConfig
from r2ec_kernels._dispatch import IMPLEMENTATIONS
from r2ec_kernels.index.index import SCANS
from r2ec_kernels.loss.config import (
    ESTIMATORS,
    IMPORTANCE_SAMPLING_MODES,
    ITEM_NEGATIVES,
    RATIO_LEVELS,
    check_importance_bounds,
)

# TRL's loss types, and the paper's "sum" -> `reduction` of r2ec_kernels.recpo_loss
REDUCTIONS = {
    "dapo": "token",
    "bnpo": "token",  # divided by another count, see PolicyUpdate
    "grpo": "sequence",
    "dr_grpo": "constant",
    "sum": "sum",
}
RENAMED = {
    "kl_weight": Renamed("beta"),
    "importance_cap": Renamed("vllm_importance_sampling_clip_max"),
    "vllm_importance_sampling_cap": Renamed("vllm_importance_sampling_clip_max"),
    "reduction": Renamed(
        "loss_type", {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo", "sum": "sum"}
    ),
}


@accept_old_names(RENAMED, removed_in="0.3.0")
@dataclass
class RecPOConfig:
    """Everything a run depends on; written beside every checkpoint. Defaults are the paper's.

    One optimiser step uses ``per_device_train_batch_size`` × ``gradient_accumulation_steps`` ×
    processes users; a forward pass holds at most ``max_tokens_per_microbatch`` tokens, whatever
    those are. Raises ValueError, naming the setting, for a value outside its range.
    """

    output_dir: str = "runs/r2ec"
    """Where checkpoints, metrics and the trained model are written."""
    objective: Annotated[str, OneOf("recpo", "contrastive", "reasoning_sft")] = "recpo"
    """recpo: reasoning and item head by reinforcement learning; contrastive: direct mode, in-batch
    softmax without reasoning (ablation and warm start); reasoning_sft: given reasonings and the
    items to read out after them (language warm start)."""
    reasonings: str | ReasoningTemplates | None = None
    """Of reasoning_sft: a JSONL file of reasonings, or templates that make them."""

    # adapters and precision
    use_lora: bool = True
    """Train low-rank adapters; false trains every weight except the token tables."""
    train_embeddings: bool = False
    """With use_lora false, also train the token tables (embeddings and language-model head): for a
    model that starts from random weights."""
    lora_r: PositiveInt = 4
    """Rank of the adapters."""
    lora_alpha: int = 128
    """Scale of the adapters (an update is multiplied by lora_alpha / lora_r)."""
    lora_dropout: Fraction = 0.0
    """Dropout before the adapters, probability."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    # rollout
    num_generations: PositiveInt = 4
    """G, reasonings sampled for one user."""
    max_completion_length: PositiveInt = 512
    """Longest reasoning, tokens (an appended marker not counted)."""
    temperature: PositiveFloat = 1.5
    """Sampling temperature of the reasoning, also the one its log-probabilities are taken at."""
    top_k: NonNegativeInt = 200
    """Sample among the k likeliest tokens; 0 = all."""
    max_tokens_in_flight: PositiveInt = 65536
    """Prompt and completion tokens in one generation batch."""
    rollout_server: str | None = None
    """URL of a running vLLM server of the same base model, such as http://localhost:8000, which
    samples the reasonings with the adapters of each step; none = transformers, in this process."""

    # reward and loss
    reward_softmax_weight: Fraction = 0.05
    """Weight of the target's softmax probability in the reward, 0 to 1; the rest is NDCG's. The
    paper's β, not TRL's."""
    reward_ndcg_k: PositiveInt = 1000
    """Ranks beyond it earn no NDCG reward, items."""
    relabel_topk: PositiveInt = 1
    """Best reasonings of a group that train the item action."""
    estimator: Annotated[str, OneOf(*ESTIMATORS)] = "grpo"
    """Advantage: "grpo" (reward less the group's mean, divided by its standard deviation) or "rloo"
    (less the mean of the group's others, not scaled). TRL has no such setting: its GRPOTrainer
    knows the first (scale_rewards "group"), its RLOOTrainer the second."""
    loss_type: Annotated[str, OneOf(*REDUCTIONS)] = "sum"
    """What the losses of a reasoning's actions, its tokens and its item action, are divided by:
    "sum", the paper's (reasonings of the step), or by TRL's names "dapo" (tokens of the whole
    step), "bnpo" (tokens of one accumulation step of a process, then the mean over these), "grpo"
    (each reasoning's tokens, then the mean over reasonings), "dr_grpo" (reasonings of the step
    times max_completion_length)."""
    importance_sampling_level: Annotated[str, OneOf(*RATIO_LEVELS)] = "token"
    """The ratio new to old policy: one a "token", or one a "sequence", the geometric mean of its
    tokens' (GSPO)."""
    epsilon: NonNegativeFloat = 0.2
    """Lower clip range of the ratios."""
    epsilon_high: NonNegativeFloat = 0.2
    """Upper clip range of the ratios (reference code: 0.28)."""
    item_weight: NonNegativeFloat = 1.0
    """Weight of the item action; 1, the paper's: as much as one token of its reasoning. With
    reasoning_sft, of the items' mean cross-entropy beside the tokens'; 0 = none."""
    direct_weight: NonNegativeFloat = 0.0
    """Of reasoning_sft: weight of the same items' mean cross-entropy read out in direct mode, so
    that learning to write does not cost what a contrastive warm start taught. With item_weight
    also 0: language alone, and no item is encoded."""
    item_negatives: Annotated[str, OneOf(*ITEM_NEGATIVES)] = "in-batch"
    """Candidates of the item action's softmax: "in-batch" targets or the whole "catalog" (which
    wants refresh_steps 1: a model learns to tell fresh rows from stale ones)."""
    sampled_negatives: NonNegativeInt = 0
    """Items of the catalog, drawn uniformly in every step and encoded with it, that join the
    in-batch candidates; for steps of few users."""
    beta: NonNegativeFloat = 0.0
    """KL coefficient: weight of the KL term to the backbone without adapters; 0 = none (the paper,
    whose β is reward_softmax_weight)."""
    vllm_importance_sampling_mode: Annotated[str, OneOf(*IMPORTANCE_SAMPLING_MODES)] = (
        "token_truncate"
    )
    """Correction for an engine with other numerics (vLLM): its ratio is one a token ("token_...")
    or one a reasoning ("sequence_..."), and outside the bounds it becomes the bound
    ("..._truncate") or 0 ("..._mask"). TRL's default, "sequence_mask", multiplies what top_k
    leaves out over all tokens of a reasoning: for top_k 0."""
    vllm_importance_sampling_clip_max: Annotated[float | None, MoreThan(0)] = 3.0
    """Upper bound of the correction's ratio; none = no bound."""
    vllm_importance_sampling_clip_min: Annotated[float | None, AtLeast(0)] = None
    """Lower bound of the correction's ratio; none = no bound."""
    impl: Annotated[str, OneOf(*IMPLEMENTATIONS)] = "auto"
    """Kernels of the loss: "auto", "triton", "torch" or "reference"; equal but for rounding."""
    dynamic_sampling_rounds: NonNegativeInt = 0
    """Sample groups whose rewards tie again, at most so many times a step; 0 = never. Each round
    costs its tokens and a scoring pass."""
    num_iterations: PositiveInt = 1
    """Optimiser steps on one batch of rollouts."""

    # optimiser
    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    optim: Annotated[str, OneOf("adamw_torch", "paged_adamw_8bit")] = "adamw_torch"
    """"adamw_torch", or "paged_adamw_8bit" (needs bitsandbytes)."""
    lr_scheduler_type: Annotated[
        str, OneOf("constant_with_warmup", "constant", "linear", "cosine")
    ] = "constant_with_warmup"
    """"constant_with_warmup", "constant", "linear" or "cosine" (the last two after the warm-up)."""
    warmup_steps: NonNegativeInt = 32
    """Steps of linear warm-up."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the gradient's norm; 0 = never."""
    per_device_train_batch_size: PositiveInt = 24
    """Users in one accumulation step of a process (TRL's GRPOTrainer counts completions, here
    num_generations a user)."""
    gradient_accumulation_steps: PositiveInt = 1
    """Accumulation steps in one optimiser step."""
    max_tokens_per_microbatch: PositiveInt = 16384
    """Token budget of one forward and backward pass; a larger group runs alone."""
    max_steps: int = -1
    """Optimiser steps; -1 = num_train_epochs decide."""
    num_train_epochs: PositiveFloat = 1.0
    """Passes over the training examples where max_steps is -1."""

    # item table
    refresh_steps: NonNegativeInt = 100
    """Re-encode the whole catalog every so many steps; 0 = only for evaluations."""
    refresh_mode: Annotated[str, OneOf("full", "rolling")] = "full"
    """"full": all rows at once, every refresh_steps; "rolling": after each step the oldest rows, so
    many that none is older than refresh_steps."""
    fresh_targets: bool = False
    """Write the rows of a step's targets, encoded anew, into the table before its rewards, as the
    paper does. Their rivals' rows are older, so targets then win for their freshness alone
    (reward/staleness_bias); off: all rows that give a reward are of one age."""
    index_scan: Annotated[str, OneOf(*SCANS)] = "auto"
    """First pass of the item index: "auto", "none", "fp16", "bf16" or "int8"; same results."""

    # evaluation, logs, checkpoints
    eval_steps: NonNegativeInt = 100
    """Validate every so many steps; 0 = only at the end."""
    eval_samples: NonNegativeInt = 0
    """Validation examples, seeded sample; 0 = all."""
    eval_reasoning: bool | None = None
    """Evaluate with greedy reasoning; none = yes, but for contrastive."""
    eval_direct: bool = True
    """Also rank without reasoning at evaluations with reasoning, and log the paired difference
    (eval_valid_reasoned_minus_direct_ndcg@10): one forward pass over the prompts."""
    diagnostic_samples: NonNegativeInt = 64
    """Validation examples, seeded sample, that show what RecPO has to choose from: before its first
    step (readiness/...), and their groups at every validation (groups/best_beats_direct), which
    costs num_generations reasonings for each; 0 = never."""
    early_stopping_patience: NonNegativeInt = 0
    """Stop after so many validations without a better eval_valid_ndcg@10; 0 = never."""
    load_best_model_at_end: bool = True
    """Export the checkpoint with the best eval_valid_ndcg@10 rather than the last."""
    logging_steps: PositiveInt = 1
    """Log every so many steps."""
    log_completions_steps: NonNegativeInt = 0
    """Write the reasonings of one user to samples.jsonl every so many steps; 0 = never."""
    log_entropy: bool = False
    """Log the mean entropy of the sampled tokens' distributions (nats): a few percent more time."""
    save_steps: NonNegativeInt = 100
    """Checkpoint every so many steps; 0 = only at the end."""
    save_total_limit: PositiveInt = 2
    """Checkpoints kept beside the best one."""
    resume_from_checkpoint: str | None = None
    """A checkpoint directory, or "latest" of output_dir."""
    report_to: Annotated[str, OneOf("none", "tensorboard", "wandb", "trackio")] = "none"
    """"none", "tensorboard", "wandb" or "trackio", beside metrics.jsonl."""
    fsdp: bool = False
    """Shard weights, gradients and optimiser state over the processes (FSDP2); also on where
    accelerate's configuration asks for FSDP."""
    ddp_timeout: PositiveInt = 1800
    """Seconds after which a process that does not answer the others ends the run."""
    seed: int = 42
    """Of the order of examples, the sampling and the initialisation."""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_importance_bounds(
            "vllm_importance_sampling",
            self.vllm_importance_sampling_clip_min,
            self.vllm_importance_sampling_clip_max,
        )
        if isinstance(self.reasonings, Mapping):
            self.reasonings = ReasoningTemplates(**self.reasonings)
        if self.refresh_mode == "rolling" and not self.refresh_steps:
            raise ValueError("refresh_steps: refresh_mode='rolling' needs at least 1, got 0")
        if self.rollout_server is not None and not self.use_lora:
            raise ValueError("rollout_server: needs use_lora, a server takes new adapters only")
        if self.train_embeddings and self.use_lora:
            raise ValueError("train_embeddings: needs use_lora false, adapters leave the tables")
        if self.relabel_topk > self.num_generations:
            raise ValueError(
                f"relabel_topk: expected at most num_generations ({self.num_generations}), "
                f"got {self.relabel_topk}"
            )

    @property
    def reasons(self) -> bool:
        """Whether evaluations of this run write a reasoning first."""
        if self.eval_reasoning is not None:
            return self.eval_reasoning
        return self.objective != "contrastive"

    @property
    def trains_items(self) -> bool:
        """Whether steps read items out; language alone needs no item table."""
        language_alone = self.objective == "reasoning_sft" and not (
            self.item_weight or self.direct_weight
        )
        return not language_alone

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
            reduction=REDUCTIONS[self.loss_type],
            ratio_level=self.importance_sampling_level,
            estimator=self.estimator,
            best=self.relabel_topk,
            item_weight=self.item_weight,
            item_temperature=item_temperature,
            similarity=similarity,
            softcap=softcap,
            temperature=self.temperature / logit_scale,
            item_negatives=self.item_negatives,
            max_completion_length=self.max_completion_length,
            kl_weight=self.beta,
            importance_sampling_mode=self.vllm_importance_sampling_mode,
            importance_sampling_clip_min=self.vllm_importance_sampling_clip_min,
            importance_sampling_clip_max=self.vllm_importance_sampling_clip_max,
            entropy=self.log_entropy,
            impl=self.impl,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RecPOConfig:
        """The settings that `to_dict` wrote, in this release or the one before, such as "config"
        of a checkpoint's trainer_state.json."""
        return cls(**values)


@dataclass
class ModelConfig:
    """Which backbone, and how it speaks of items."""

    name_or_path: str = "google/gemma-2-2b-it"
    """A name on the Hub, or a directory; also a directory written by an earlier run."""
    dtype: str = "auto"
    """"auto", "float32", "bfloat16" or "float16"."""
    gguf_file: str | None = None
    """Read the weights from this GGUF file of the directory."""
    use_liger_kernel: bool = False
    """Liger's kernels for norms, activations and rotary embeddings (GPUs, extra `cuda`)."""
    similarity: str = "cosine"
    """Of the item head: "cosine", "dot" or "l2"."""
    item_temperature: float = 0.02
    """τ: item scores are divided by it."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """Wording and token budgets of the prompts."""
