"""Chat prompts of users and items, as token ids.

The wording is that of the paper's reference code (arXiv 2505.16994, figure 5), so that checkpoints
and numbers stay comparable.
A user prompt is the instruction followed by one line per past event; an item prompt is the
instruction followed by the item's text, with the assistant's turn opened by the marker. Both go
through the tokenizer's chat template.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from r2ec_fast.prompts.control_tokens import ControlTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from r2ec_fast.data import Catalog, History
    from r2ec_fast.packing.ragged import Ragged

USER_TEMPLATE = (
    "Analyze in depth and finally recommend next {category_singular} I might purchase inside "
    "{emb_token} and {emb_end_token}.\n"
    "For example, {emb_token}a product{emb_end_token}.\n\n"
    "Below is my historical {category} purchases and ratings (out of 5):"
)
ITEM_TEMPLATE = (
    "Summarize key attributes of the following {category_singular} inside "
    "{emb_token} and {emb_end_token}."
)
FIELD_LABELS = {
    "average_rating": "User Rating",
    "rating_number": "Number of Buyers",
    "description": "Description",
}
ELLIPSIS = "..."
_SENTINEL = "MESSAGE-OF-THE-USER"


@dataclass(frozen=True)
class PromptConfig:
    """Wording and size of the prompts.

    Args:
        category: plural name of what is sold, as the user prompt writes it.
        category_singular: singular name of the same.
        emb_token: text after which the user and item vectors are read; plain text, not a new
            vocabulary entry.
        emb_end_token: its closing counterpart, named in the instruction only.
        window: most recent events shown (events).
        max_user_tokens: limit of a user prompt (tokens, without the reasoning); oldest events are
            dropped first.
        max_item_tokens: limit of an item prompt (tokens, with the marker); the end of the item's
            text is cut.
        item_fields: catalog columns written after the title, in this order; a column or value that
            is missing is left out.
        description_words: the description is cut after this many words.
        user_template: instruction of the user prompt; may use {category}, {category_singular},
            {emb_token}, {emb_end_token}.
        item_template: instruction of the item prompt; same placeholders.
    """

    category: str = "products"
    category_singular: str = "product"
    emb_token: str = "<answer>"
    emb_end_token: str = "</answer>"
    window: int = 20
    max_user_tokens: int = 2048
    max_item_tokens: int = 768
    item_fields: tuple[str, ...] = ("average_rating", "rating_number", "description")
    description_words: int = 100
    user_template: str = USER_TEMPLATE
    item_template: str = ITEM_TEMPLATE

    def __post_init__(self) -> None:
        for name in ("window", "max_user_tokens", "max_item_tokens", "description_words"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.emb_token:
            raise ValueError("emb_token must not be empty")
        object.__setattr__(self, "item_fields", tuple(self.item_fields))

    def instruction(self, template: str) -> str:
        """`template` with its placeholders filled in; ValueError names one that does not exist."""
        known = {
            "category": self.category,
            "category_singular": self.category_singular,
            "emb_token": self.emb_token,
            "emb_end_token": self.emb_end_token,
        }
        try:
            return template.format(**known)
        except (KeyError, IndexError) as error:
            raise ValueError(
                f"prompt template has the placeholder {{{error.args[0]}}}; known: {sorted(known)}"
            ) from error


@dataclass(frozen=True)
class UserFrame:
    """What stands around the events of every user prompt.

    Args:
        bos: token ids before everything; empty where a chat template writes them itself.
        head: text before the first event: chat frame, instruction and a new line.
        closing: text after the last event.
        bare: token ids of the whole prompt without an event.
    """

    bos: list[int]
    head: str
    closing: str
    bare: list[int]


def format_age(seconds: float) -> str:
    """An age in seconds as `3d 4.2h`, `5h 12.0min` or `7.5min`. ValueError if it is negative."""
    if seconds < 0:
        raise ValueError(f"an event lies {-seconds:.0f} s after the target's time")
    days, rest = divmod(seconds, 86_400)
    hours, rest = divmod(rest, 3_600)
    if days:
        return f"{days:.0f}d {hours + rest / 3_600:.1f}h"
    if hours:
        return f"{hours:.0f}h {rest / 60:.1f}min"
    return f"{rest / 60:.1f}min"


class PromptBuilder:
    """Writes histories and items as token ids.

    Args:
        tokenizer: a Hugging Face tokenizer. Its chat template is used where it has one (no system
            message is sent, so templates that refuse a system role work); without one the plain
            text is followed by a blank line.
        catalog: the items; titles come from its `title` column.
        config: wording and limits.

    Attributes:
        titles: text of each item in a user prompt: one line, no special tokens.
        marker_ids: token ids of the marker alone.
        harmless: text -> the same text with its control tokens broken up.

    Raises:
        ValueError: the chat template refuses a conversation without system message or does not
            contain the user's message verbatim, or a bare instruction alone is longer than its
            limit.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        catalog: Catalog,
        config: PromptConfig | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.catalog = catalog
        self.config = config or PromptConfig()
        self.harmless = ControlTokens(tokenizer).broken
        self.titles = [self.clean_title(title) for title in catalog.titles]
        self._columns = {
            field: catalog.fields[field].to_list()
            for field in self.config.item_fields
            if field in catalog.fields.columns
        }
        self._user_instruction = self.config.instruction(self.config.user_template)
        self._item_instruction = self.config.instruction(self.config.item_template)
        self._before, self._after = self._chat_frame()
        self._plain_bos = self._bos_without_template()
        self.marker_ids: list[int] = tokenizer(
            self.config.emb_token, add_special_tokens=False
        ).input_ids
        self._check_limits()

    def user_text(self, history: History) -> str:
        """The user's message: the instruction and the newest `window` events, oldest first."""
        return self._join(self._lines(history))

    def item_text(self, item: int) -> str:
        """The message about one item (internal id): the instruction and its whole text, uncut by
        tokens.
        """
        return f"{self._item_instruction}\n\n{self._item_body(item)}"

    def user_ids(self, history: History) -> list[int]:
        """Token ids of the user prompt, ready for the reasoning; at most `max_user_tokens`.

        Events are dropped from the old end, as few as possible; where not even the newest event
        fits, none is shown.
        """
        lines = self._lines(history)
        limit = self.config.max_user_tokens
        ids = self._encode(self._join(lines))
        if len(ids) <= limit:
            return ids
        keep = self._estimate_kept(lines, limit)
        ids = self._encode_newest(lines, keep)
        while len(ids) > limit:
            keep -= 1
            ids = self._encode_newest(lines, keep)
        while True:
            longer = self._encode_newest(lines, keep + 1)
            if len(longer) > limit:
                return ids
            keep, ids = keep + 1, longer

    def user_frame(self) -> UserFrame:
        """What `user_text` and the chat frame write around the events."""
        instruction = self._user_instruction
        return UserFrame(
            bos=self._plain_bos,
            head=f"{self._before}{instruction}\n",
            closing=self._after,
            bare=self._encode(instruction),
        )

    def user_prefix_ids(self) -> list[int]:
        """Token ids that user prompts begin with, whatever the history: the chat frame and the
        instruction, as far as the first event's text cannot change how they are cut into tokens.
        """
        from r2ec_fast.packing.ragged import Ragged, common_prefix  # torch: not for a config alone

        lines = ("[x]", "0.1min ago", "12d ago", "")
        starts = Ragged.of([self._encode(self._join([line])) for line in lines])
        length = min(common_prefix(starts), int(starts.lengths.min()) - 1)
        return starts[0][:length].tolist()

    def item_ids(self, item: int) -> list[int]:
        """Token ids of one item prompt (internal id), ending in the marker; at most
        `max_item_tokens`.
        """
        return self.items_ids([item])[0].tolist()

    def items_ids(self, items: Sequence[int]) -> Ragged:
        """`item_ids` of M items, tokenised in one batch: M rows."""
        from r2ec_fast.packing.ragged import Ragged  # torch: not for a config alone

        texts = [self._frame(self.item_text(item)) for item in items]
        if not texts:
            return Ragged.of([])
        rows = self.tokenizer(texts, add_special_tokens=False).input_ids
        budget = self.config.max_item_tokens - len(self.marker_ids) - len(self._plain_bos)
        out = []
        for item, row in zip(items, rows, strict=True):
            fitting = row if len(row) <= budget else self._cut_item(item, budget)
            out.append([*self._plain_bos, *fitting, *self.marker_ids])
        return Ragged.of(out)

    def clean_title(self, text: str) -> str:
        """Item text as prompts show it: one line, and it cannot open or close a chat turn."""
        return self.harmless(" ".join(str(text).split()))

    def _lines(self, history: History) -> list[str]:
        if len(history.items) == 0:
            raise ValueError("history is empty: a prompt needs at least one event")
        first = max(0, len(history.items) - self.config.window)
        return [self._line(history, i) for i in range(first, len(history.items))]

    def _line(self, history: History, i: int) -> str:
        line = f"[{self.titles[history.items[i]]}]"
        if history.timestamps is not None and history.target_time is not None:
            age = format_age(int(history.target_time) - int(history.timestamps[i]))
            line = f"{age} ago: {line}"
        if history.ratings is not None and not math.isnan(history.ratings[i]):
            line = f"{line} ({round(float(history.ratings[i]), 2)})"
        return line

    def _join(self, lines: Sequence[str]) -> str:
        return "\n".join([self._user_instruction, *lines])

    def _encode_newest(self, lines: Sequence[str], keep: int) -> list[int]:
        return self._encode(self._join(lines[len(lines) - keep :]))

    def _estimate_kept(self, lines: Sequence[str], limit: int) -> int:
        """How many of the newest lines should fit, from the token counts of the lines alone."""
        lengths = [
            len(row)
            for row in self.tokenizer(
                [f"\n{line}" for line in lines], add_special_tokens=False
            ).input_ids
        ]
        total, keep = len(self._encode(self._user_instruction)), 0
        for length in reversed(lengths):
            total += length
            if total > limit:
                break
            keep += 1
        return min(keep, len(lines) - 1)

    def _item_body(self, item: int) -> str:
        parts = [f"Title: {self.titles[item]}"]
        for field, values in self._columns.items():
            value = values[item]
            if value is None or (isinstance(value, float) and math.isnan(value)):
                continue
            text = self.clean_title(value)
            if field == "description":
                words = text.split(" ")
                if len(words) > self.config.description_words:
                    text = " ".join(words[: self.config.description_words]) + ELLIPSIS
            if text:
                label = FIELD_LABELS.get(field, field.replace("_", " ").title())
                parts.append(f"{label}: {text}")
        return "\n".join(parts)

    def _cut_item(self, item: int, budget: int) -> list[int]:
        """The longest beginning of the item's text (by characters) that fits `budget` tokens."""
        body = self._item_body(item)

        def encode(kept: int) -> list[int]:
            text = f"{self._item_instruction}\n\n{body[:kept].rstrip()}{ELLIPSIS}"
            return self.tokenizer(self._frame(text), add_special_tokens=False).input_ids

        low, high = 0, len(body)
        while low < high:
            middle = (low + high + 1) // 2
            if len(encode(middle)) <= budget:
                low = middle
            else:
                high = middle - 1
        return encode(low)

    def _frame(self, message: str) -> str:
        return f"{self._before}{message}{self._after}"

    def _encode(self, message: str) -> list[int]:
        ids = self.tokenizer(self._frame(message), add_special_tokens=False).input_ids
        return [*self._plain_bos, *ids]

    def _chat_frame(self) -> tuple[str, str]:
        """What the chat template writes before and after the message. Rendered once: a template is
        slow, and one that writes today's date would make two runs differ."""
        if not self.tokenizer.chat_template:
            return "", "\n\n"
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": _SENTINEL}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template raises what it likes, most often a TemplateError
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                "the tokenizer's chat template refuses a conversation of one user message "
                f"({reason}); prompts have no system message: give the tokenizer a chat_template "
                "that works without one"
            ) from error
        assert isinstance(text, str)  # it was asked for text, of one conversation
        if text.count(_SENTINEL) != 1:
            raise ValueError(
                "the tokenizer's chat template must contain the user's message once and unchanged, "
                f"got {text!r} for the message {_SENTINEL!r}"
            )
        before, after = text.split(_SENTINEL)
        return before, after

    def _bos_without_template(self) -> list[int]:
        # a chat template writes its own beginning-of-text token
        if self.tokenizer.chat_template:
            return []
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and bos in self.tokenizer("").input_ids else []

    def _check_limits(self) -> None:
        shortest = len(self._encode(self._user_instruction))
        if shortest > self.config.max_user_tokens:
            raise ValueError(
                f"max_user_tokens is {self.config.max_user_tokens}, "
                f"but the instruction alone has {shortest} tokens"
            )
        item = len(self._encode(f"{self._item_instruction}\n\n{ELLIPSIS}")) + len(self.marker_ids)
        if item > self.config.max_item_tokens:
            raise ValueError(
                f"max_item_tokens is {self.config.max_item_tokens}, "
                f"but the instruction alone has {item} tokens"
            )
