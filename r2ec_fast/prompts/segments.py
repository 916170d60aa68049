"""User prompts from token segments: every item's text is tokenised once, not once a prompt.

A prompt is the concatenation of

    head     chat frame, instruction and a new line
    a line   [age] [item] [rating], for each event; the newest ends with the closing chat frame
    suffix   ids that the caller wants after it (the read-out marker in direct mode)

and each piece is a token segment. That equals tokenising the whole text only where the tokenizer
merges nothing across a cut, so a piece starts where merges seldom reach, at a space or a line's
start, and keeps the new line or frame that follows it. Whether it holds is checked, not assumed:
every kind of cut, every item, age and rating beside the pieces it can meet, and whole prompts on a
sample when the assembler is made. An item that fails sends its prompts to the whole-text path
(`PromptBuilder.user_ids`, the definition of the result); a kind of cut that fails sends all.

For byte-pair encoding, checking neighbours is enough. Take the first merge, in time, that would
cross a cut of the whole text. Until then each piece has been merged by itself, so the same merge
would happen in the text of the two pieces alone, which was checked.
"""

import functools
import importlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from r2ec_fast.packing.packer import Rows, to_rows
from r2ec_fast.prompts.builder import format_age

if TYPE_CHECKING:
    from r2ec_fast.data import Examples, History, RecDataset
    from r2ec_fast.prompts.builder import PromptBuilder

logger = logging.getLogger(__name__)

NO_TIME = np.iinfo(np.int64).min
SECONDS_PER_DAY = 86_400
HOURS = 24
MAX_DAYS = 20_000  # events older than 54 years are bad data: not worth a table
RATING, NEWLINE, CLOSING = range(3)  # what follows an item on its line
_AGES = ("7.5min ago:", "5h 12.0min ago:", "3d 4.2h ago:")
_LINES = ("[x]\n", "(4.5)\n")  # how a line may begin, and end


class PromptAssembler:
    """Writes the user prompts of many histories at once, equal to `PromptBuilder.user_ids`.

    Args:
        builder: wording, limits, tokenizer and catalog.
        suffix: ids appended to every prompt, outside its limit.
        threads: C++ threads.
        sample: random histories compared with the whole-text path when the assembler is made.

    `reason` says why every prompt takes the whole-text path; None where segments are used.
    """

    def __init__(
        self,
        builder: "PromptBuilder",
        *,
        suffix: Sequence[int] = (),
        threads: int = 1,
        sample: int = 64,
    ) -> None:
        self.builder = builder
        self.threads = threads
        self.suffix = np.array(suffix, np.int32)
        self.reason: str | None = None
        self._units = 0
        self._items: Sequence[int] = range(len(builder._titles))
        self._ratings: dict[float, None] = {}
        self._has_ages = False
        self._closing = builder._after
        self._titles = [f"[{title}]" for title in builder._titles]
        self._core = self._make_core()
        if self._core is not None:
            self._check_sample(sample)
        if self.reason is None:
            logger.info("user prompts are assembled from token segments")
        else:
            logger.info("user prompts are tokenised as whole texts: %s", self.reason)

    @property
    def uses_segments(self) -> bool:
        return self.reason is None

    def history_rows(self, histories: Sequence["History"]) -> Rows:
        """Prompts of `histories`, as (values int64 [E], offsets int64 [R+1]).

        Raises ValueError for an empty history, an unknown item or an event after its target's time.
        """
        lengths = np.array([len(h.items) for h in histories], np.int64)
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        timed = [h.timestamps is not None and h.target_time is not None for h in histories]
        item = _concatenate([h.items for h in histories], np.int64)
        timestamp = rating = target_time = None
        if any(timed):
            target_time = np.array(
                [h.target_time if t else NO_TIME for h, t in zip(histories, timed, strict=True)],
                np.int64,
            )
            timestamp = _concatenate(
                [
                    h.timestamps if t else np.zeros(len(h.items), np.int64)
                    for h, t in zip(histories, timed, strict=True)
                ],
                np.int64,
            )
        if any(h.ratings is not None for h in histories):
            rating = _concatenate(
                [
                    np.full(len(h.items), np.nan) if h.ratings is None else h.ratings
                    for h in histories
                ],
                np.float32,
            )
        events = (item, timestamp, rating, bounds[:-1], bounds[1:], target_time)
        return self._rows(events, lambda x: histories[x])

    def example_rows(self, dataset: "RecDataset", examples: "Examples") -> Rows:
        """Prompts of `examples`, read from the dataset's event arrays without a copy."""
        data, window = dataset.data, self.builder.config.window
        start = data.offsets[examples.user]
        last = start + examples.position
        first = np.maximum(start, last - window)
        target_time = None if data.timestamp is None else data.timestamp[last]
        events = (data.item, data.timestamp, data.rating, first, last, target_time)
        return self._rows(
            events,
            lambda x: dataset.history(int(examples.user[x]), int(examples.position[x]), window),
        )

    def example_ids(self, dataset: "RecDataset", examples: "Examples") -> list[list[int]]:
        """`example_rows` as lists, one a prompt."""
        values, offsets = self.example_rows(dataset, examples)
        return [row.tolist() for row in np.split(values, offsets[1:-1])] if len(examples) else []

    # ---- assembling -----------------------------------------------------------------------------

    def _rows(self, events: tuple, history_of: Any) -> Rows:
        size = len(events[3])
        measured = self._measure(events) if self._core is not None and size else None
        if measured is None:
            rows = [[*self.builder.user_ids(history_of(x)), *self.suffix] for x in range(size)]
            return to_rows(rows)
        histories, length, lines = measured
        whole = {
            int(x): [*self.builder.user_ids(history_of(x)), *self.suffix]
            for x in np.flatnonzero(lines < 0)
        }
        for x, ids in whole.items():
            length[x] = len(ids)
        offsets = np.zeros(size + 1, np.int64)
        np.cumsum(length, out=offsets[1:])
        values = np.empty(offsets[-1], np.int64)
        self._core.write(histories, lines, offsets, values, self.threads)
        for x, ids in whole.items():
            values[offsets[x] : offsets[x + 1]] = ids
        return values, offsets

    def _measure(self, events: tuple) -> tuple[Any, np.ndarray, np.ndarray] | None:
        """(histories, length, lines), building what segments are missing; None: whole texts."""
        item, timestamp, rating, first, last, target_time = (
            None if a is None else np.ascontiguousarray(a) for a in events
        )
        if target_time is not None and not self._has_ages:
            self._add_ages()
        histories = self._extension.Histories(
            item=item.astype(np.int64, copy=False),
            timestamp=timestamp,
            rating=None if rating is None else rating.astype(np.float32, copy=False),
            first=first,
            last=last,
            target_time=target_time,
        )
        while self.reason is None:
            length, lines, tables, ratings, units = self._core.measure(histories, self.threads)
            if not (tables or ratings or units):
                return histories, length, lines
            for table in range(6):
                if tables >> table & 1:
                    self._add_items(table >= 3, table % 3)
            if ratings:
                self._add_ratings(ratings)
            if units:
                self._add_units(units)
        logger.info("user prompts are tokenised as whole texts from here: %s", self.reason)
        self._core = None
        return None

    # ---- segments and their checks --------------------------------------------------------------

    def _make_core(self) -> Any | None:
        builder = self.builder
        try:
            self._extension = importlib.import_module("r2ec_fast._packing")
        except ModuleNotFoundError:
            self.reason = "the C++ extension r2ec_fast._packing was not built"
            return None
        instruction = builder._user_instruction
        self._head_text = f"{builder._before}{instruction}\n"
        bare = builder._encode(instruction)
        head = [*builder._plain_bos, *self._tokenize([self._head_text])[0]]
        pieces = [[self._head_text, start] for start in ("[x]\n", *_AGES)]
        self._require(pieces, "the instruction and the first line")
        if self.reason is not None:
            return None
        config = builder.config
        return self._extension.Assembler(
            head, bare, self.suffix.tolist(), len(self._titles), config.window,
            config.max_user_tokens, MAX_DAYS,
        )  # fmt: skip

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return self.builder.tokenizer(list(texts), add_special_tokens=False).input_ids

    def _clean(self, pieces: Sequence[Sequence[str]]) -> list[bool]:
        """For each row of pieces: whether its text's ids are those of the pieces, in a row."""
        distinct = list(dict.fromkeys(piece for row in pieces for piece in row))
        ids = dict(zip(distinct, self._tokenize(distinct), strict=True))
        wholes = self._tokenize(["".join(row) for row in pieces])
        return [
            whole == [token for piece in row for token in ids[piece]]
            for whole, row in zip(wholes, pieces, strict=True)
        ]

    def _require(self, pieces: Sequence[Sequence[str]], boundary: str) -> None:
        clean = self._clean(pieces)
        if self.reason is None and not all(clean):
            text = "".join(pieces[clean.index(False)])
            self.reason = f"the tokenizer merges between {boundary}, as in {text[-60:]!r}"

    def _table(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        values, offsets = to_rows(self._tokenize(texts))
        return offsets, values.astype(np.int32)

    def _add_ages(self) -> None:
        rests, numbers = _age_texts()
        pieces = [
            [_LINES[1], *unit, text, " [x]\n"]
            for text in rests
            for unit in ([["23h"], ["3d"]] if text.startswith(" ") else [[]])
        ]
        self._require(pieces, "an age and its neighbours")
        self._core.set_ages(*self._table(rests), *numbers)
        self._has_ages = True

    def _add_units(self, needed: int) -> None:
        size = HOURS + min(MAX_DAYS, max(64, 2 * needed))
        texts = [f"{n}h" if n < HOURS else f"{n - HOURS}d" for n in range(size)]
        new = texts[self._units :]
        pieces = [[before, text, " 4.2h ago:"] for text in new for before in _LINES]
        self._require(pieces, "the days or hours of an age and the rest")
        self._core.set_units(*self._table(texts))
        self._units = size

    def _add_ratings(self, values: Sequence[float]) -> None:
        self._ratings |= dict.fromkeys(values)
        ratings = sorted(self._ratings)
        tables = []
        for ending in ("\n", self._closing):
            texts = [f" ({round(float(np.float32(r)), 2)}){ending}" for r in ratings]
            after = ("[x]\n", *_AGES) if ending == "\n" else ("",)
            pieces = [["[x]", text, *filter(None, [end])] for text in texts for end in after]
            self._require(pieces, "a rating and its neighbours")
            tables += self._table(texts)
        self._core.set_ratings(ratings, *tables)

    def _add_items(self, has_age: bool, ending: int) -> None:
        lead = " " if has_age else ""
        end = ("", "\n", self._closing)[ending]
        texts = [f"{lead}{self._titles[i]}{end}" for i in self._items]
        before = _AGES[-1] if has_age else _LINES[0]
        line = _AGES[0] if has_age else _LINES[0]
        after = {RATING: " (4.5)\n", NEWLINE: line, CLOSING: ""}[ending]
        left, right = self._tokenize([before])[0], self._tokenize([after])[0] if after else []
        own = self._tokenize(texts)
        around = self._tokenize([f"{before}{text}{after}" for text in texts])
        rows: list[list[int]] = [[]] * len(self._titles)
        whole_text = [True] * len(self._titles)
        for i, row, whole in zip(self._items, own, around, strict=True):
            rows[i], whole_text[i] = row, whole != left + row + right
        unclean = sum(whole_text) - len(self._titles) + len(self._items)
        if unclean:
            logger.info(
                "%d of %d item texts do not assemble; their prompts are tokenised as whole texts",
                unclean,
                len(self._items),
            )
        values, offsets = to_rows(rows)
        self._core.set_items(has_age, ending, offsets, values.astype(np.int32), whole_text)

    def _check_sample(self, count: int) -> None:
        """Compare random prompts, timed and not, rated, unrated and mixed, with the whole texts."""
        from r2ec_fast.data import History

        rng = np.random.default_rng(0)
        everything = self._items
        self._items = sorted(set(rng.integers(0, len(self._titles), count).tolist()))
        histories = []
        for i in range(count):
            n = int(rng.integers(1, 2 * self.builder.config.window))
            items = rng.choice(self._items, n)
            ages = np.sort(rng.integers(0, SECONDS_PER_DAY * 10 ** rng.integers(0, 4), n))[::-1]
            ratings = rng.integers(2, 11, n).astype(np.float32) / 2
            ratings[rng.random(n) < (0, 0.5, 1)[i % 3]] = np.nan
            timed = i % 4 != 3
            histories.append(
                History(
                    items=items,
                    timestamps=10**9 - ages if timed else None,
                    ratings=ratings,
                    target_time=10**9 if timed else None,
                )
            )
        values, offsets = self.history_rows(histories)
        for x, history in enumerate(histories):
            whole = [*self.builder.user_ids(history), *self.suffix]
            if self.reason is None and values[offsets[x] : offsets[x + 1]].tolist() != whole:
                text = self.builder.user_text(history)
                self.reason = f"a sampled prompt differs from its whole text: {text[-120:]!r}"
                self._core = None
        self._items = everything
        if self._core is not None:
            self._core.clear_items()


@functools.cache
def _age_texts() -> tuple[list[str], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What follows the unit of an age, each text once; and for every second of a day: the hours of
    an age below one day (-1: none), the text after them, and the text after a number of days."""
    numbers: dict[str, int] = {}
    hours, within, after_days = (np.zeros(SECONDS_PER_DAY, np.int64) for _ in range(3))
    for second in range(SECONDS_PER_DAY):
        unit, rest = _split_age(f"{format_age(second)} ago:")
        hours[second] = int(unit[:-1]) if unit else -1
        within[second] = numbers.setdefault(rest, len(numbers))
        _, rest = _split_age(f"{format_age(SECONDS_PER_DAY + second)} ago:")
        after_days[second] = numbers.setdefault(rest, len(numbers))
    return list(numbers), (hours, within, after_days)


def _split_age(age: str) -> tuple[str, str]:
    """("3d", " 4.2h ago:") of "3d 4.2h ago:"; ("", age) where there is one unit only."""
    unit, _, rest = age.removesuffix(" ago:").partition(" ")
    return (unit, f" {rest} ago:") if rest else ("", age)


def _concatenate(parts: Sequence[Any], dtype: type) -> np.ndarray:
    if not parts:
        return np.zeros(0, dtype)
    return np.concatenate([np.asarray(part, dtype) for part in parts])
