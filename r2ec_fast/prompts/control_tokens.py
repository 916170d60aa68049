"""Control tokens in texts from outside: found, and broken up."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ControlTokens:
    """The tokens that were added to a tokenizer's vocabulary: chat turns, end of text, tools.

    Tokenizers find them in any text, named as special tokens or not, so a text from outside could
    forge them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = {str(t): t for t in getattr(tokenizer, "added_tokens_decoder", {}).values()}
        every = {*added, *map(str, tokenizer.all_special_tokens)}
        # longest first: one may begin with another
        names = sorted((n for n in every if len(n.strip()) > 1), key=lambda n: (-len(n), n))
        self._pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._normalize: Callable[[str], str] | None = None
        if any(getattr(token, "normalized", False) for token in added.values()):
            backend = getattr(tokenizer, "backend_tokenizer", None)
            normalizer = getattr(backend, "normalizer", None)
            self._normalize = None if normalizer is None else normalizer.normalize_str

    def broken(self, text: str) -> str:
        """``text`` in which a space parts the first character of every such token from the rest."""
        if self._normalize is not None:  # tokens are also found in what the tokenizer makes of it
            normal = self._normalize(text)
            text = normal if self._pattern.search(normal) else text
        while self._pattern.search(text):  # the rest of one may be another
            text = self._pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        return text
