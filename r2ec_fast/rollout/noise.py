"""Counter-based Gumbel noise: every number is a pure function of its key, so no state is kept.

The key of one number is (seed, user key, sample, step, token position, token id). Two runs which
agree on the key agree on the number, whatever else is in the batch and on whatever device it runs.
Keys are mixed with the SplitMix64 finaliser (Steele, Lea, Flood 2014).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_WORD = 1 << 64


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as `value` modulo 2^64."""
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask drops the copied sign bits
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix64(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of 64-bit words held in int64 `x` of any shape."""
    x = (x ^ _shift_right(x, 30)) * _signed(_FIRST)
    x = (x ^ _shift_right(x, 27)) * _signed(_SECOND)
    return x ^ _shift_right(x, 31)


def _absorb(state: Tensor, word: Tensor) -> Tensor:
    return mix64(state ^ mix64(word + _signed(_GOLDEN)))


def row_keys(
    user_keys: Sequence[int],
    num_generations: int,
    *,
    seed: int,
    step: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Key of each rollout row: (seed, step, user key, sample).

    Args:
        user_keys: B integers (taken modulo 2^64).
        num_generations: G samples a user.

    Returns:
        int64 [B * G] in the order user 0 sample 0, user 0 sample 1, ...
    """
    users = torch.tensor([_signed(int(key)) for key in user_keys], dtype=torch.int64)
    state = torch.full_like(users, _signed(int(seed)))
    state = _absorb(state, torch.full_like(users, _signed(int(step))))
    state = _absorb(state, users).repeat_interleave(num_generations)
    samples = torch.arange(num_generations, dtype=torch.int64).repeat(len(users))
    return _absorb(state, samples).to(device)


def gumbel(keys: Tensor, position: int | Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise for each candidate token of each row.

    Args:
        keys: int64 [n] from `row_keys`.
        position: index of the token within the completion, from 0; or int64 [1] that holds it.
        token_ids: int64 [n, c], the candidates.

    Returns:
        float64 [n, c]; finite everywhere.
    """
    if not isinstance(position, Tensor):
        position = torch.full_like(keys, position)
    state = _absorb(keys, position)
    bits = _absorb(state[:, None], token_ids)
    # 53 random bits, centred in their cell: never 0, never 1
    uniform = (_shift_right(bits, 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))
