"""How strongly each kind of action pulls at the model: reasoning tokens, and item actions."""

from __future__ import annotations

import torch

from r2ec_fast.train import distributed

TOKENS, ITEM = 0, 1


class ActionGradients:
    """The gradient that each kind of action leaves on one parameter that both share.

    The parameter is a gain of the last hidden state: with every state h of the backbone replaced by
    ``gain * h``, its gradient at ``gain = 1`` is the sum over rows of dL/dh * h, a vector of d
    numbers. Each kind's sum runs over the rows of all micro-batches and processes of a step, the
    candidates' states among those of the item action.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._sums = torch.zeros((2, width), device=device)

    def watch(self, kind: int, states: torch.Tensor) -> None:
        """Add the gradient of ``states`` [R, d] when a backward pass reaches them."""
        if states.requires_grad:
            values = states.detach()
            states.register_hook(lambda gradient: self.add(kind, gradient, values))

    def add(self, kind: int, gradient: torch.Tensor, states: torch.Tensor) -> None:
        """Add ``gradient`` [R, d] of ``states`` [R, d]."""
        self._sums[kind] += (gradient.detach() * states.detach()).sum(0, dtype=torch.float32)

    def norms(self) -> dict[str, float]:
        """Euclidean norms over all processes, and their ratio where the tokens' is not 0."""
        tokens, item = distributed.sum_(self._sums.double()).norm(dim=1).tolist()
        found = {"grad_norm/tokens": tokens, "grad_norm/item_action": item}
        return found | ({"grad_norm/item_to_tokens": item / tokens} if tokens else {})
