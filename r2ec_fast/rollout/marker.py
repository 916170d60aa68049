"""Finding the marker text in a growing row of tokens."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class MarkerStop:
    """Says whether the newest token completes the marker.

    The marker is plain text and a tokenizer may write it in several ways (`<`, `answer`, `>` or
    ` <`, `answer`, `>\\n`), so the decoded tail is searched, not the ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, marker: str) -> None:
        if not marker:
            raise ValueError("marker must be a non-empty string")
        self.marker = marker
        self._tokenizer = tokenizer
        # every token of the marker spells at least one of its bytes; spare room for silent tokens
        self._tail = len(marker.encode()) + 4
        self._may_close: dict[int, bool] = {}

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def closes(self, ids: Sequence[int]) -> bool:
        """True if the text of `ids` holds the marker; the earlier tokens are known not to."""
        last = int(ids[-1])
        may_close = self._may_close.get(last)
        if may_close is None:
            # a token whose bytes are only part of a character decodes to U+FFFD: look further
            text = self._decode([last])
            may_close = self.marker[-1] in text or "\ufffd" in text
            self._may_close[last] = may_close
        return may_close and self.marker in self._decode(ids[-self._tail :])
