"""One problem of the RecPO token loss, its exact answer, and the implementations that solve it.

``losses.py`` and the registry time what is listed in ``PEERS``: (data, hidden, weight) -> loss.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import Unavailable

from r2ec_kernels import RecPOLossConfig, linear_logprob, recpo_loss

TEMPERATURE = 1.5
GROUP = 4
TRL_CHUNK = 32768  # the block of the vocabulary TRL's trainers use


@dataclass(frozen=True)
class Shape:
    tokens: int
    vocab: int
    width: int
    frozen: bool = True
    softcap: float | None = None
    zero_share: float = 0.0  # of the groups: their rewards tie


def tie(rewards: torch.Tensor, share: float) -> torch.Tensor:
    """Rewards [B, G] of which this share of the groups are equal: no advantage, no gradient."""
    rewards = rewards.clone()
    rewards[: round(share * rewards.shape[0])] = 0.5
    return rewards


class Data:
    """Inputs of one shape."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)  # a head takes seconds on a CPU
        self.shape = shape
        tokens, vocab, width = shape.tokens, shape.vocab, shape.width

        def randn(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=device)

        self.hidden = randn(tokens, width).to(device, dtype)
        self.weight = (randn(vocab, width) / width**0.5).to(device, dtype)
        on = {"generator": generator, "device": device}
        self.targets = torch.randint(0, vocab, (tokens,), **on)
        self.rows = GROUP * max(1, tokens // 128)
        per_row = -(-tokens // self.rows)
        self.trajectory = (torch.arange(tokens) // per_row).to(device)
        rewards = torch.rand(self.rows // GROUP, GROUP, **on)
        self.rewards = tie(rewards, shape.zero_share)
        centred = self.rewards - self.rewards.mean(1, keepdim=True)
        advantage = (centred / (self.rewards.std(1, keepdim=True) + 1e-8)).flatten()
        self.advantage = advantage[self.trajectory]
        self.old = -2.0 - randn(tokens).abs() - math.log(vocab / 8.0)
        self.users = randn(self.rows, 64)
        self.items = randn(self.rows // GROUP, 64)

    def loss(self, log_prob: torch.Tensor) -> torch.Tensor:
        """The clipped loss in plain torch, for peers that give log-probabilities."""
        ratio = (log_prob - self.old.to(log_prob.dtype)).exp()
        advantage = self.advantage.to(log_prob.dtype)
        clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return -clipped.mean()


def ours(data: Data, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    config = RecPOLossConfig(
        reduction="token", temperature=TEMPERATURE, softcap=data.shape.softcap, item_weight=0.0
    )
    return recpo_loss(
        hidden,
        weight,
        data.targets,
        data.trajectory,
        data.rewards,
        data.users,
        data.items,
        torch.arange(data.items.shape[0], device=data.items.device),
        old_log_prob=data.old,
        config=config,
    ).loss


def ours_log_prob(data: Data, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    head = {"temperature": TEMPERATURE, "softcap": data.shape.softcap}
    return data.loss(linear_logprob(hidden, weight, data.targets, **head).log_prob)


def materialised(data: Data, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    logits = (hidden @ weight.T).float()
    if data.shape.softcap:
        logits = data.shape.softcap * torch.tanh(logits / data.shape.softcap)
    log_p = torch.log_softmax(logits / TEMPERATURE, -1)
    return data.loss(log_p.gather(1, data.targets[:, None])[:, 0])


def compiled(data: Data, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if hidden.device.type != "cuda":
        raise Unavailable("run on GPUs only: minutes of compilation per shape on a CPU")
    return torch.compile(materialised)(data, hidden, weight)


def trl(data: Data, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    out = ChunkedLogProbFunction.apply(
        hidden, weight, None, data.targets, TEMPERATURE, TRL_CHUNK, data.shape.softcap, 1.0, ()
    )
    return data.loss(out[0])


def liger_grpo(data: Data, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    if data.shape.softcap:
        raise Unavailable("has no soft-cap")
    rows, per_row = data.rows, data.shape.tokens // data.rows
    if rows * per_row != data.shape.tokens:
        raise Unavailable("takes padded rows only: T is not a multiple of the rows")
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        loss_type="bnpo",
        temperature=TEMPERATURE,
        chunk_size=rows,
    )
    return loss(
        hidden.view(rows, per_row, -1),
        weight,
        data.targets.view(rows, per_row),
        torch.ones(rows, per_row, device=hidden.device),
        data.advantage.view(rows, per_row)[:, 0],
        old_per_token_logps=data.old.view(rows, per_row),
    )[0]


def liger_cross_entropy(data: Data, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(softcap=data.shape.softcap)
    return loss(weight, hidden, data.targets)


def cut_cross_entropy(data: Data, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    nll = linear_cross_entropy(
        hidden / TEMPERATURE, weight, data.targets, softcap=data.shape.softcap, reduction="none"
    )
    return data.loss(-nll)


PEERS: dict[str, Callable[[Data, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "recpo_loss": ours,
    "linear_logprob": ours_log_prob,
    "TRL chunked log-prob": trl,
    "Liger GRPO": liger_grpo,
    "materialised logits": materialised,
    "torch.compile": compiled,
    "Liger fused linear CE": liger_cross_entropy,
    "cut-cross-entropy": cut_cross_entropy,
}
# that compute one loss, each within seconds of its first call
SAME_LOSS = (
    "recpo_loss", "linear_logprob", "TRL chunked log-prob", "Liger GRPO", "materialised logits",
)  # fmt: skip


def exact(data: Data, rows: int) -> tuple[float, torch.Tensor]:
    """Loss of all tokens and hidden gradient of the first rows, in float64, 64 rows at a time."""
    total, grads = 0.0, []
    weight = data.weight.double()
    for start in range(0, data.shape.tokens, 64):
        hidden = data.hidden[start : start + 64].double().requires_grad_(start < rows)
        logits = hidden @ weight.T
        if data.shape.softcap:
            logits = data.shape.softcap * torch.tanh(logits / data.shape.softcap)
        log_p = torch.log_softmax(logits / TEMPERATURE, -1)
        part = slice(start, start + 64)
        log_prob = log_p.gather(1, data.targets[part, None])[:, 0]
        ratio = (log_prob - data.old[part].double()).exp()
        advantage = data.advantage[part].double()
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
        loss = loss / data.shape.tokens
        total += float(loss.detach())
        if start < rows:
            grads.append(torch.autograd.grad(loss, hidden)[0])
    return total, torch.cat(grads)


def step(data: Data, peer: Callable) -> tuple[torch.Tensor, ...]:
    """(loss, gradient of hidden[, of weight])."""
    hidden = data.hidden.detach().requires_grad_()
    weight = data.weight.detach().requires_grad_(not data.shape.frozen)
    loss = peer(data, hidden, weight)
    leaves = [hidden] if data.shape.frozen else [hidden, weight]
    return loss.detach(), *torch.autograd.grad(loss, leaves)
