"""The rows of a batch while they are sampled, in tensors that keep their shapes and addresses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from r2ec_fast.rollout.job import Job
from r2ec_fast.rollout.sampling import sample_tokens
from r2ec_fast.rollout.static.decoder import StaticDecoder


class Slots:
    """n rows on the device.

    Args:
        decoder: has read the prompts of the rows.
        keys: int64 [n], see `noise.row_keys`.
        job: what is asked for.
        newest: holds the newest states after each pass of the model, see `newest_states`.

    Attributes:
        tokens: int64 [n], what each row reads next.
        finished: bool [n], rows that have drawn a token which ends a text. They read it again and
            again; what they draw is of no use.
        state: [n, d], newest states after a step, where the job wants them; else None.
    """

    def __init__(
        self, decoder: StaticDecoder, keys: Tensor, job: Job, newest: list[Tensor]
    ) -> None:
        self._decoder, self._keys, self._params = decoder, keys, job.params
        self._newest = newest
        device, rows = keys.device, len(keys)
        self._eos = torch.tensor(sorted(job.ends.eos_token_ids), dtype=torch.int64, device=device)
        self._column = torch.zeros(1, dtype=torch.int64, device=device)  # of the next draw
        # as wide as the cache: the steps after the last draw that counts draw too
        self._drawn = torch.zeros(rows, job.room, dtype=torch.int64, device=device)
        self._log_prob = torch.zeros(rows, job.room, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.state: Tensor | None = None
        if job.wants_states:
            self.state = newest[0].new_zeros(rows, newest[0].shape[-1])

    def draw(self, logits: Tensor) -> None:
        """Draw each row's next token from logits [n, V]."""
        drawn = sample_tokens(logits, self._keys, self._column, self._params)
        self._drawn.index_copy_(1, self._column, drawn.tokens[:, None])
        self._log_prob.index_copy_(1, self._column, drawn.log_prob[:, None])
        self.tokens.copy_(torch.where(self.finished, self.tokens, drawn.tokens))
        self.finished |= (drawn.tokens[:, None] == self._eos).any(1)
        self._column += 1

    def step(self) -> None:
        """Every row reads its token and draws the next one. Nothing in here depends on a number
        that the host would have to know, so a graph may replay it."""
        logits = self._decoder.step(self.tokens, None)
        if self.state is not None:
            self.state.copy_(self._newest[0])
        self.draw(logits)

    def read(self, first: int, last: int) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens and log-probabilities of draws `first` .. `last` - 1, a list a row; the host
        waits."""
        part = slice(first, last)
        return self._drawn[:, part].tolist(), self._log_prob[:, part].tolist()

    def place(self, tokens: Sequence[int], positions: Sequence[int]) -> None:
        """The next step reads `tokens`, n, each at its place among the row's own tokens."""
        self.tokens.copy_(torch.tensor(tokens))
        self._decoder.place(torch.tensor(positions))
