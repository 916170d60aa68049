"""With RecPO's own parts off, the token term is TRL's GRPO loss and Liger's: values and gradients.

``pytest -s -k table`` prints the differences.
"""

import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from r2ec_kernels import RecPOLossConfig, grouped_advantage, linear_logprob, recpo_loss
from r2ec_kernels.loss.config import IMPORTANCE_SAMPLING_MODES

GROUPS, GROUP, LENGTH, WIDTH, VOCAB = 2, 3, 6, 8, 41
REDUCTIONS = {"grpo": "sequence", "bnpo": "token", "dr_grpo": "constant", "dapo": "token"}
LEVELS = {"grpo": ("token", "sequence"), "bnpo": ("token",), "dr_grpo": ("token",)}
OPTIONS = {
    "plain": {},
    "asymmetric clip": {"epsilon": 0.1, "epsilon_high": 0.28},
    "kl": {"kl_weight": 0.07},
    **{
        mode: {
            "importance_sampling_mode": mode,
            "importance_sampling_clip_min": 0.8 if mode.startswith("token") else 0.4,
            "importance_sampling_clip_max": 1.4 if mode.startswith("token") else 3.0,
        }
        for mode in IMPORTANCE_SAMPLING_MODES
    },
}
# relative differences of the value and of the gradient; Liger multiplies in float32
TOLERANCES = {"trl": (1e-12, 1e-12), "liger": (2e-5, 2e-6)}


IMPORTANCE_SETTINGS = [f"importance_sampling_{name}" for name in ("mode", "clip_min", "clip_max")]


def corrects(options):
    return "importance_sampling_mode" in options


def of_rows(values, lengths):
    return [row[:length].tolist() for row, length in zip(values, lengths, strict=True)]


class Batch:
    """Padded completions, as the peers take them, and the same tokens packed."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        rows = GROUPS * GROUP
        lengths = torch.tensor([6, 2, 5, 1, 4, 6])
        self.mask = torch.arange(LENGTH)[None] < lengths[:, None]
        self.hidden = randn(rows, LENGTH, WIDTH)
        self.weight = randn(VOCAB, WIDTH)
        self.tokens = torch.randint(0, VOCAB, (rows, LENGTH), generator=generator)
        self.rewards = torch.rand(GROUPS, GROUP, generator=generator, dtype=torch.float64)
        self.advantages = grouped_advantage(self.rewards).advantages.flatten()
        now = self.log_prob(self.hidden).detach()
        self.old, self.ref, self.sampler = (now + 0.3 * randn(rows, LENGTH) for _ in range(3))
        self.sampler[2, 1] = torch.nan  # the sampler has no number for one token

    def log_prob(self, hidden):
        logits = torch.log_softmax(hidden @ self.weight.T, -1)
        return logits.gather(2, self.tokens[..., None])[..., 0]

    def run(self, name, level, options):
        """(hidden, our result)."""
        hidden = self.hidden.clone().requires_grad_()
        config = RecPOLossConfig(
            reduction=REDUCTIONS[name],
            ratio_level=level,
            max_completion_length=LENGTH,
            item_weight=0.0,
            **options,
        )
        rows = GROUPS * GROUP
        loss = recpo_loss(
            hidden[self.mask],
            self.weight,
            self.tokens[self.mask],
            torch.arange(rows)[:, None].expand(rows, LENGTH)[self.mask],
            self.rewards,
            torch.ones(rows, WIDTH, dtype=torch.float64),
            torch.ones(GROUPS, WIDTH, dtype=torch.float64),
            torch.arange(GROUPS),
            old_log_prob=self.old[self.mask],
            ref_log_prob=self.ref[self.mask] if "kl_weight" in options else None,
            sampler_log_prob=self.sampler[self.mask] if corrects(options) else None,
            num_tokens=self.mask.sum(),
            config=config,
        )
        return hidden, loss

    def ours(self, name, level, options):
        hidden, loss = self.run(name, level, options)
        return loss.loss.detach(), torch.autograd.grad(loss.loss, hidden)[0]

    def correction(self, options, counted=None):
        """Importance ratios by TRL's own method on a stand-in for its trainer, and what it logs;
        ``counted``: the completion tokens that train, in TRL those that no tool wrote."""
        grpo = pytest.importorskip("trl.trainer.grpo_trainer")
        rows, lengths = GROUPS * GROUP, self.mask.sum(1).tolist()
        counted = self.mask if counted is None else counted
        model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
        trainer = SimpleNamespace(
            _generate=lambda prompts: (
                [[0]] * rows,
                of_rows(self.tokens, lengths),
                of_rows(counted.long(), lengths),
                [""] * rows,
                of_rows(self.sampler, lengths),
                {},
                None,
                None,
            ),
            _get_per_token_logps_and_entropies=lambda *a, **k: (self.old, None, None),
            _calculate_rewards=lambda *a: self.rewards.view(-1, 1),
            accelerator=SimpleNamespace(
                device=torch.device("cpu"), gather=lambda x: x, process_index=0, num_processes=1
            ),
            args=SimpleNamespace(
                per_device_train_batch_size=rows,
                gradient_checkpointing_kwargs=None,
                steps_per_generation=1,
                gradient_accumulation_steps=1,
            ),
            model=model,
            _tokenizer=SimpleNamespace(pad_token_id=0),
            pad_to_multiple_of=None,
            environment_factories=None,
            environments=None,
            tools=None,
            mask_truncated_completions=False,
            num_iterations=1,
            use_vllm=True,
            vllm_importance_sampling_correction=True,
            beta=0.0,
            num_generations=GROUP,
            multi_objective_aggregation="sum_then_normalize",
            reward_weights=torch.ones(1),
            scale_rewards="group",
            reward_func_names=["reward"],
            _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
            _metrics={"train": defaultdict(list)},
            _pending_extra_logs={},
            _pending_metrics={},
            log_multimodal=False,
            **{f"vllm_{name}": options.get(name) for name in IMPORTANCE_SETTINGS},
        )
        torch.set_default_dtype(torch.float64)  # it makes tensors of the sampler's numbers
        try:
            method = grpo.GRPOTrainer._generate_and_score_completions
            out = method(trainer, [{"prompt": ""}] * rows)
        finally:
            torch.set_default_dtype(torch.float32)
        return out["importance_sampling_ratio"], trainer._metrics["train"]

    def trl(self, name, level, options):
        """TRL's own method, on a stand-in for its trainer."""
        grpo = pytest.importorskip("trl.trainer.grpo_trainer")
        hidden = self.hidden.clone().requires_grad_()
        log_prob = self.log_prob(hidden)
        one = SimpleNamespace(
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            num_processes=1,
            gather_for_metrics=lambda x: x,
        )
        args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
        trainer = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *a, **k: (
                log_prob,
                torch.zeros_like(log_prob),
                None,
            ),
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level=level,
            beta=options.get("kl_weight", 0.0),
            args=args,
            loss_type=name,
            epsilon_low=options.get("epsilon", 0.2),
            epsilon_high=options.get("epsilon_high", 0.2),
            use_vllm=corrects(options),
            vllm_importance_sampling_correction=True,
            model=SimpleNamespace(training=True),
            current_gradient_accumulation_steps=1,
            max_completion_length=LENGTH,
            accelerator=one,
            _entropy_bonus_enabled=False,
            _metrics={"train": defaultdict(list)},
        )
        inputs = {
            "prompt_ids": self.tokens[:, :0],
            "prompt_mask": self.mask[:, :0],
            "completion_ids": self.tokens,
            "completion_mask": self.mask.long(),
            "advantages": self.advantages,
            "old_per_token_logps": self.old,
            "ref_per_token_logps": self.ref,
            "importance_sampling_ratio": self.correction(options)[0] if corrects(options) else None,
            "num_items_in_batch": self.mask.sum(),
        }
        loss = grpo.GRPOTrainer._compute_loss(trainer, None, inputs)
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    def liger(self, name, level, options):
        """Liger's fused loss; its products are float32."""
        loss_module = pytest.importorskip("liger_kernel.chunked_loss")
        hidden = self.hidden.float().requires_grad_()
        loss = loss_module.LigerFusedLinearGRPOLoss(
            beta=options.get("kl_weight", 0.0),
            compiled=False,
            use_ref_model="kl_weight" in options,
            chunk_size=GROUPS * GROUP,
            epsilon_low=options.get("epsilon", 0.2),
            epsilon_high=options.get("epsilon_high", 0.2),
            loss_type=name,
            max_completion_length=LENGTH,
            importance_sampling_level=level,
        )(
            hidden,
            self.weight.float(),
            self.tokens,
            self.mask.float(),
            self.advantages.float(),
            ref_per_token_logps=self.ref.float(),
            old_per_token_logps=self.old.float(),
            vllm_is_ratio=self.correction(options)[0].float() if corrects(options) else None,
            num_items_in_batch=self.mask.sum(),
        )[0]
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]


def cases():
    return [
        (name, level, option)
        for name in REDUCTIONS
        for level in LEVELS.get(name, ("token",))
        for option in OPTIONS
    ]


def differences(batch, peer, name, level, option):
    """(value, relative difference of the value, of the gradient)."""
    ours, grad = batch.ours(name, level, OPTIONS[option])
    theirs, their_grad = getattr(batch, peer)(name, level, OPTIONS[option])
    value = abs(float(ours) - float(theirs)) / abs(float(ours))
    return float(ours), value, float((grad - their_grad).norm() / grad.norm())


def assert_equivalent(peer, found):
    for what, difference, most in zip(("value", "gradient"), found, TOLERANCES[peer], strict=True):
        assert difference < most, f"{peer}: {what} differs by {difference:.1e}"


@pytest.mark.parametrize(("name", "level", "option"), cases())
def test_equals_trl(name, level, option):
    _, *found = differences(Batch(), "trl", name, level, option)
    assert_equivalent("trl", found)


@pytest.mark.parametrize(("name", "level", "option"), cases())
def test_equals_liger(name, level, option):
    _, *found = differences(Batch(), "liger", name, level, option)
    assert_equivalent("liger", found)


@pytest.mark.parametrize("mode", IMPORTANCE_SAMPLING_MODES)
@pytest.mark.parametrize("bounds", [(None, 3.0), (0.4, 1.4), (0.6, None)])
def test_importance_ratios_and_their_log_are_trls(mode, bounds):
    batch = Batch()
    options = dict(zip(IMPORTANCE_SETTINGS, (mode, *bounds), strict=True))
    counted = batch.mask.clone()
    counted[1] = False  # a trajectory without a token
    ratio, logged = batch.correction(options, counted)
    assert len(set(ratio[counted if mode.startswith("token") else ...].flatten().tolist())) > 2
    batch.tokens = torch.where(counted, batch.tokens, -100)
    _, found = batch.run("dapo", "token", options)
    for name, value in (
        ("min", found.importance_ratio_min),
        ("mean", found.importance_ratio),
        ("max", found.importance_ratio_max),
    ):
        (expected,) = logged[f"sampling/importance_sampling_ratio/{name}"]
        assert float(value) == pytest.approx(expected, rel=1e-12), name


def test_clip_fraction_is_trls():
    pytest.importorskip("trl")
    batch = Batch()
    ratio = (batch.log_prob(batch.hidden) - batch.old).exp()
    advantage = batch.advantages[:, None]
    low, high = (ratio < 0.8) & (advantage < 0), (ratio > 1.2) & (advantage > 0)
    clipped = ((low | high) & batch.mask).sum() / batch.mask.sum()
    rows = torch.arange(GROUPS * GROUP)[:, None].expand(-1, LENGTH)[batch.mask]
    loss = recpo_loss(
        batch.hidden[batch.mask],
        batch.weight,
        batch.tokens[batch.mask],
        rows,
        batch.rewards,
        torch.ones(6, WIDTH, dtype=torch.float64),
        torch.ones(2, WIDTH, dtype=torch.float64),
        torch.arange(2),
        old_log_prob=batch.old[batch.mask],
    )
    assert clipped > 0 and float(loss.clip_fraction) == pytest.approx(float(clipped))


def equivalences():
    """(case, our value, {peer: differences}) of every case."""
    batch = Batch()
    for case in cases():
        found = {peer: differences(batch, peer, *case) for peer in TOLERANCES}
        yield case, found["trl"][0], {peer: numbers[1:] for peer, numbers in found.items()}


def equivalence_table(rows) -> str:
    """Markdown: our value and the relative differences of value and gradient, peer by peer."""
    lines = [
        "| loss type | ratio | option | value | TRL: value | TRL: gradient "
        "| Liger: value | Liger: gradient |",
        "|---" * 8 + "|",
    ]
    for (name, level, option), ours, found in rows:
        numbers = " | ".join(f"{x:.0e}" for x in (*found["trl"], *found["liger"]))
        lines.append(f"| {name} | {level} | {option} | {ours:.6f} | {numbers} |")
    return "\n".join(lines) + "\n"


def test_equivalence_table():
    """Every figure of it is within its tolerance."""
    pytest.importorskip("trl")
    pytest.importorskip("liger_kernel")
    rows = list(equivalences())
    for _, ours, found in rows:
        assert abs(ours) > 1e-3  # the differences are relative to it
        for peer, numbers in found.items():
            assert_equivalent(peer, numbers)
    table = equivalence_table(rows)
    assert table.count("\n") == 2 + len(cases()) and "nan" not in table
    sys.stdout.write("\n" + table)


def test_a_padded_reference_of_log_probs():
    batch = Batch()
    packed = linear_logprob(batch.hidden[batch.mask], batch.weight, batch.tokens[batch.mask])
    torch.testing.assert_close(packed.log_prob, batch.log_prob(batch.hidden)[batch.mask])
