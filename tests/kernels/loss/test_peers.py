"""With RecPO's own parts off, the token term is TRL's GRPO loss and Liger's: values and gradients.

``pytest -s -k table`` prints the differences.
"""

import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from r2ec_kernels import RecPOLossConfig, grouped_advantage, linear_logprob, recpo_loss

GROUPS, GROUP, LENGTH, WIDTH, VOCAB = 2, 3, 6, 8, 41
REDUCTIONS = {"grpo": "sequence", "bnpo": "token", "dr_grpo": "constant", "dapo": "token"}
LEVELS = {"grpo": ("token", "sequence"), "bnpo": ("token",), "dr_grpo": ("token",)}
OPTIONS = {
    "plain": {},
    "asymmetric clip": {"epsilon": 0.1, "epsilon_high": 0.28},
    "kl": {"kl_weight": 0.07},
    "sampler correction": {"importance_cap": 1.4},
}
# relative differences of the value and of the gradient; Liger multiplies in float32
TOLERANCES = {"trl": (1e-12, 1e-12), "liger": (2e-5, 2e-6)}


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
        self.correction = (self.old - self.sampler).exp().clamp(max=1.4)

    def log_prob(self, hidden):
        logits = torch.log_softmax(hidden @ self.weight.T, -1)
        return logits.gather(2, self.tokens[..., None])[..., 0]

    def ours(self, name, level, options):
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
            sampler_log_prob=self.sampler[self.mask] if "importance_cap" in options else None,
            num_tokens=self.mask.sum(),
            config=config,
        )
        return loss.loss.detach(), torch.autograd.grad(loss.loss, hidden)[0]

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
            use_vllm="importance_cap" in options,
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
            "importance_sampling_ratio": self.correction,
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
            vllm_is_ratio=self.correction.float() if "importance_cap" in options else None,
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
