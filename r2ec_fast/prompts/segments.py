"""User prompts from token segments: every item's text is tokenised once, not once a prompt.

A prompt is the concatenation of

    head     chat frame, instruction and a new line
    a line   [age] [item] [rating], for each event; the newest ends with the closing chat frame

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
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from r2ec_fast.packing.ragged import Ragged
from r2ec_fast.prompts.builder import format_age

if TYPE_CHECKING:
    from r2ec_fast.data import Examples, History, RecDataset
    from r2ec_fast.prompts.builder import PromptBuilder

logger = logging.getLogger(__name__)

NO_TIME = np.iinfo(np.int64).min
SECONDS_PER_DAY = 86_400
HOURS = 24
MAX_DAYS = 20_000  # events older than 54 years are bad data: not worth a table
CHECK_COST = 40_000  # of checking the segments, in lines of a prompt tokenised as whole text
ITEM_COST = 4  # of tokenising one item of the catalog, in the same
RATING, NEWLINE, CLOSING = range(3)  # what follows an item on its line
_AGES = ("7.5min ago:", "5h 12.0min ago:", "3d 4.2h ago:")
_LINES = ("[x]\n", "(4.5)\n")  # how a line may begin, and end


class _Events(NamedTuple):
    """Histories as slices of event arrays: prompt x shows events first[x] .. last[x] - 1."""

    item: np.ndarray  # int64 [E]
    timestamp: np.ndarray | None  # int64 [E]
    rating: np.ndarray | None  # float32 [E], NaN: none
    first: np.ndarray  # int64 [R]
    last: np.ndarray  # int64 [R]
    target_time: np.ndarray | None  # int64 [R], NO_TIME: none


class PromptAssembler:
    """Writes the user prompts of many histories at once, equal to `PromptBuilder.user_ids`.

    Args:
        builder: wording, limits, tokenizer and catalog.
        threads: C++ threads.
        sample: random histories compared with the whole-text path before segments are used.
        ahead: check the segments now, and tokenise the whole catalog for the first prompts, as
            pays off for many. False: only in a call that is large enough to pay for it by itself;
            smaller calls take the whole-text path, so that no single request waits.

    `reason` says why every prompt takes the whole-text path; None where segments can be used.
    """

    def __init__(
        self,
        builder: "PromptBuilder",
        *,
        threads: int = 1,
        sample: int = 64,
        ahead: bool = True,
    ) -> None:
        self.builder = builder
        self.threads, self.sample, self.ahead = threads, sample, ahead
        self.reason: str | None = None
        self._units = 0
        self._items: Sequence[int] = range(len(builder.titles))
        self._ratings: dict[float, None] = {}
        self._has_ages = self._checked = False
        self._frame = builder.user_frame()
        self._titles = [f"[{title}]" for title in builder.titles]
        self._core: Any = self._make_core()  # of the C++ extension; None: whole texts only
        if self._core is None:
            logger.info("user prompts are tokenised as whole texts: %s", self.reason)
        elif ahead:
            self._check()

    def history_rows(self, histories: Sequence["History"]) -> Ragged:
        """Prompts of R `histories`: R rows, int64.

        Raises ValueError for an empty history, an unknown item or an event after its target's time.
        """
        return self._rows(_events_of(histories), lambda x: histories[x])

    def example_rows(self, dataset: "RecDataset", examples: "Examples") -> Ragged:
        """Prompts of R `examples`, read from the dataset's event arrays without a copy: R rows,
        int64."""
        data, window = dataset.data, self.builder.config.window
        start = data.offsets[examples.user]
        last = start + examples.position
        first = np.maximum(start, last - window)
        target_time = None if data.timestamp is None else data.timestamp[last]
        events = _Events(data.item, data.timestamp, data.rating, first, last, target_time)
        return self._rows(
            events,
            lambda x: dataset.history(int(examples.user[x]), int(examples.position[x]), window),
        )

    # ---- assembling -----------------------------------------------------------------------------

    def _rows(self, events: _Events, history_of: Callable[[int], "History"]) -> Ragged:
        shown = np.minimum(events.last - events.first, self.builder.config.window)
        cost = CHECK_COST + ITEM_COST * len(self._titles)
        building = self.ahead or shown.sum() >= cost
        if building and not self._checked and self._core is not None:
            self._check()
        return self._assemble(events, history_of, building)

    def _assemble(
        self, events: _Events, history_of: Callable[[int], "History"], building: bool
    ) -> Ragged:
        """The prompts; missing ages and items are tokenised only where `building`."""
        size = len(events.first)
        measured = self._measure(events, building) if self._core is not None and size else None
        if measured is None:
            return Ragged.of([self.builder.user_ids(history_of(x)) for x in range(size)])
        histories, length, lines = measured
        by_text = np.flatnonzero(lines < 0).tolist()
        whole = {x: self.builder.user_ids(history_of(x)) for x in by_text}
        for x, ids in whole.items():
            length[x] = len(ids)
        offsets = np.zeros(size + 1, np.int64)
        np.cumsum(length, out=offsets[1:])
        values = np.empty(offsets[-1], np.int64)
        self._core.write(histories, lines, offsets, values, self.threads)
        for x, ids in whole.items():
            values[offsets[x] : offsets[x + 1]] = ids
        return Ragged(values, offsets)

    def _measure(
        self, events: _Events, building: bool
    ) -> tuple[Any, np.ndarray, np.ndarray] | None:
        """(histories, tokens, lines of each prompt; lines -1: by its whole text); None: all are."""
        if building and events.target_time is not None and not self._has_ages:
            self._add_ages()
        histories = self._extension.Histories(
            item=_contiguous(events.item, np.int64),
            timestamp=_contiguous(events.timestamp, np.int64),
            rating=_contiguous(events.rating, np.float32),
            first=_contiguous(events.first, np.int64),
            last=_contiguous(events.last, np.int64),
            target_time=_contiguous(events.target_time, np.int64),
        )
        while self.reason is None:
            length, lines, tables, ratings, units = self._core.measure(histories, self.threads)
            if not (tables or ratings or units):
                return histories, length, lines
            if tables and not building:
                return None
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
        try:
            self._extension = importlib.import_module("r2ec_fast._packing")
        except ModuleNotFoundError:
            self.reason = "the C++ extension r2ec_fast._packing was not built"
            return None
        frame = self._frame
        head = [*frame.bos, *self._tokenize([frame.head])[0]]
        pieces = [[frame.head, start] for start in ("[x]\n", *_AGES)]
        self._require(pieces, "the instruction and the first line")
        if self.reason is not None:
            return None
        config = self.builder.config
        return self._extension.Assembler(
            head=head,
            bare=frame.bare,
            suffix=[],
            num_items=len(self._titles),
            window=config.window,
            max_tokens=config.max_user_tokens,
            max_days=MAX_DAYS,
        )

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
        rows = Ragged.of(self._tokenize(texts))
        return rows.offsets, rows.values.astype(np.int32)

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
        tables: list[np.ndarray] = []
        for ending in ("\n", self._frame.closing):
            texts = [f" ({round(float(np.float32(r)), 2)}){ending}" for r in ratings]
            after = ("[x]\n", *_AGES) if ending == "\n" else ("",)
            pieces = [["[x]", text, *filter(None, [end])] for text in texts for end in after]
            self._require(pieces, "a rating and its neighbours")
            tables += self._table(texts)
        self._core.set_ratings(ratings, *tables)

    def _add_items(self, has_age: bool, ending: int) -> None:
        lead = " " if has_age else ""
        end = ("", "\n", self._frame.closing)[ending]
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
        table = Ragged.of(rows)
        values = table.values.astype(np.int32)
        self._core.set_items(has_age, ending, table.offsets, values, whole_text)

    def _check(self) -> None:
        self._checked = True
        self._check_sample(self.sample)
        if self.reason is None:
            logger.info("user prompts are assembled from token segments")
        else:
            logger.info("user prompts are tokenised as whole texts: %s", self.reason)

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
        rows = self._assemble(_events_of(histories), lambda x: histories[x], building=True)
        for history, row in zip(histories, rows, strict=True):
            if self.reason is None and row.tolist() != self.builder.user_ids(history):
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


def _events_of(histories: Sequence["History"]) -> _Events:
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
            [np.full(len(h.items), np.nan) if h.ratings is None else h.ratings for h in histories],
            np.float32,
        )
    return _Events(item, timestamp, rating, bounds[:-1], bounds[1:], target_time)


def _contiguous(array: np.ndarray | None, dtype: type) -> np.ndarray | None:
    return None if array is None else np.ascontiguousarray(array, dtype)


def _concatenate(parts: Sequence[Any], dtype: type) -> np.ndarray:
    if not parts:
        return np.zeros(0, dtype)
    return np.concatenate([np.asarray(part, dtype) for part in parts])
