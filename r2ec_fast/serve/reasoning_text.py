"""The text of a reasoning, whole or as it grows."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from r2ec_fast.serve.jobs import Job


class ReasoningText:
    """Reads tokens of reasonings, in one thread at a time.

    Args:
        tokenizer: the model's.
        marker: the text that ends a reasoning, which nobody is shown.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, marker: str) -> None:
        self._tokenizer, self._marker = tokenizer, marker

    def of(self, tokens: Sequence[int]) -> str:
        """The text without the marker."""
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        assert isinstance(text, str)
        return text.split(self._marker)[0]

    def show(self, job: Job, tokens: Sequence[int], *, whole: bool = False) -> None:
        """Hand on what is new of a reasoning, without what may be the beginning of the marker or
        a part of a character."""
        if job.on_text is None:
            return
        text, marker = self.of(tokens), self._marker
        if not whole:
            held = next((n for n in range(len(marker) - 1, 0, -1) if text.endswith(marker[:n])), 0)
            text = text[: len(text) - held].rstrip("\ufffd").rstrip()
        if len(text) > job.shown:
            new, job.shown = text[job.shown :], len(text)
            job.on_text(new)
