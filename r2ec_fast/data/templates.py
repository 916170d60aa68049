"""Reasonings by templates: sentences filled with what the training split says of an example.

A field of a template is `{source.name}`, where `name` is an attribute of items or a column of the
catalog, and `source` says of which items:

    shared   the value that at least half of the latest events have, and at least two of them
    last     the first value of the latest item
    next     the value that came most often right after the latest item in the training events, at
             least twice, the example's own step not counted
    target   the first value of the target: what is known in hindsight, of training targets only

Nothing else enters: a text does not depend on any validation or test event.
"""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from r2ec_fast.data.reasonings import Reasonings
from r2ec_fast.data.splits import training_events

if TYPE_CHECKING:
    from r2ec_fast.data.dataset import RecDataset
    from r2ec_fast.data.types import Catalog

log = logging.getLogger(__name__)

SOURCES = ("shared", "last", "next", "target")
ORDERS = ("first", "random")
_WORD = re.compile(r"[^\W_]+")
LEAST = 2  # events behind a value that is "shared" or "next"

# values of each item of the catalog
Values = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Attribute:
    """Values of items, found in the text of a catalog column.

    Args:
        column: of the catalog, e.g. "title".
        pattern: regular expression; every match is a value (its first group, where it has one), so
            that an item may have several; none = the whole text is the value.
    """

    column: str
    pattern: str | None = None

    def values(self, catalog: Catalog) -> Values:
        """Of each item, the distinct values in the order of the text; empty where it has none."""
        return [self._found(text) for text in catalog.fields[self.column].to_list()]

    def _found(self, text: Any) -> list[str]:
        if text is None or text != text:  # NaN
            return []
        found = [str(text)] if self.pattern is None else self._matches(str(text))
        return [value for value in dict.fromkeys(" ".join(v.split()) for v in found) if value]

    def _matches(self, text: str) -> list[str]:
        assert self.pattern is not None
        matches = list(re.finditer(self.pattern, text))
        return [m[1] or "" if m.re.groups else m[0] for m in matches]


@dataclass(frozen=True)
class ReasoningTemplates:
    """How reasonings are made for training examples.

    A template applies to an example for which all its fields have a value, unless its text would
    hold the target's title without asking for it by {target.title}.

    Args:
        templates: texts with fields {shared.NAME}, {last.NAME}, {next.NAME}, {target.NAME}.
        attributes: NAME -> where items have it; a column of the catalog needs no entry.
        window: latest events that "shared" looks at.
        value_words: a value is cut after so many words.
        order: "first", the first templates that apply to an example, or "random", any of them.
        per_example: texts of an example, at most, each by another template.
    """

    templates: list[str]
    attributes: dict[str, Attribute] = field(default_factory=dict)
    window: int = 5
    value_words: int = 6
    order: str = "first"
    per_example: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.templates, str) or not self.templates:
            raise ValueError(f"templates: expected a list of texts, got {self.templates!r}")
        for name, least in (("window", LEAST), ("value_words", 1), ("per_example", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.order not in ORDERS:
            raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {self.order!r}")
        found = {n: Attribute(**a) if isinstance(a, Mapping) else a
                 for n, a in self.attributes.items()}  # fmt: skip
        object.__setattr__(self, "attributes", found)
        for name, attribute in found.items():
            try:
                re.compile(attribute.pattern or "")
            except re.error as error:
                raise ValueError(
                    f"attributes: {name}: {attribute.pattern!r} is no regular expression ({error})"
                ) from None
        for template in self.templates:
            fields_of(template)

    def fill(self, data: RecDataset, seed: int) -> Reasonings:
        """The texts of the training examples, those of one example together; ``seed`` is that of
        the order "random".

        Raises ValueError for a field that the catalog does not have, and where no template applies
        to any example.
        """
        filler = _Filler(self, data)
        records: list[int] = []
        texts: list[str] = []
        counts: Counter[int] = Counter()
        for i, target in enumerate(data.target(data.train).tolist()):
            user, position = int(data.train.user[i]), int(data.train.position[i])
            recent = data.history(user, position, self.window).items.tolist()
            order = np.arange(len(self.templates))
            if self.order == "random":
                order = np.random.default_rng([seed, user, position]).permutation(order)
            found = filler.texts(recent, target, order.tolist())
            records += [i] * len(found)
            texts += found.values()
            counts.update(found.keys())
        for number, template in enumerate(self.templates):
            log.info("%6d texts by %r", counts[number], template)
        without = len(data.train) - len(set(records))
        log.info("%d of %d training examples have no text", without, len(data.train))
        if not texts:
            raise ValueError(
                f"templates: none applies to any of the {len(data.train):,} training examples"
            )
        return Reasonings.of(data, data.train[np.array(records)], texts)


def fields_of(template: str) -> list[tuple[str, str]]:
    """(source, name) of each field of a template; ValueError for any other braces."""
    found = []
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"templates: {template!r}: {error}") from None
    for _, key, spec, conversion in parts:
        if key is None:
            continue
        source, dot, name = key.partition(".")
        if source not in SOURCES or not name or spec or conversion:
            raise ValueError(
                f"templates: {template!r} has the field {{{key}}}; expected {{source.name}} with a "
                f"source of {', '.join(SOURCES)}"
            )
        found.append((source, name))
    return found


class _Filler:
    """Texts of single examples by the templates of ``settings``."""

    def __init__(self, settings: ReasoningTemplates, data: RecDataset) -> None:
        self._settings = settings
        self._parts = [list(string.Formatter().parse(t)) for t in settings.templates]
        self._fields = [fields_of(template) for template in settings.templates]
        self._titles = [_words(self._cut(title)) for title in data.data.catalog.titles]
        self._values = {
            name: self._attribute(name, template, data.data.catalog).values(data.data.catalog)
            for template, fields in zip(settings.templates, self._fields, strict=True)
            for _, name in fields
        }
        counted = {name for own in self._fields for source, name in own if source == "next"}
        self._after = {name: _followers(data, self._values[name]) for name in sorted(counted)}

    def _attribute(self, name: str, template: str, catalog: Catalog) -> Attribute:
        attribute = self._settings.attributes.get(name, Attribute(name))
        if attribute.column not in catalog.fields.columns:
            raise ValueError(
                f"attributes: {template!r} needs {name!r}, and the catalog has no column "
                f"{attribute.column!r}; its columns: {', '.join(catalog.fields.columns)}; "
                f"attributes: {', '.join(self._settings.attributes) or 'none'}"
            )
        return attribute

    def texts(self, recent: Sequence[int], target: int, order: Sequence[int]) -> dict[int, str]:
        """Text by number of its template, of the first templates in ``order`` that apply."""
        found: dict[int, str] = {}
        for number in order:
            if len(found) == self._settings.per_example:
                break
            text = self._text(number, recent, target)
            if text is not None and text not in found.values():
                found[number] = text
        return found

    def _text(self, number: int, recent: Sequence[int], target: int) -> str | None:
        values = {}
        for source, name in self._fields[number]:
            value = self._value(source, name, recent, target)
            if value is None:
                return None
            values[f"{source}.{name}"] = self._cut(value)
        text = "".join(
            literal + ("" if key is None else values[key])
            for literal, key, *_ in self._parts[number]
        )
        asked = ("target", "title") in self._fields[number]
        return text if asked or self._titles[target] not in _words(text) else None

    def _value(self, source: str, name: str, recent: Sequence[int], target: int) -> str | None:
        values = self._values[name]
        if source == "shared":
            return _shared(values, recent)
        if source == "next":
            return _next(self._after[name].get(recent[-1], {}), values[target])
        return next(iter(values[target if source == "target" else recent[-1]]), None)

    def _cut(self, value: str) -> str:
        return " ".join(value.split()[: self._settings.value_words])


def _words(text: str) -> str:
    """The words of a text, so that one text is in another as words, not as part of a word."""
    return f" {' '.join(_WORD.findall(text.casefold()))} "


def _shared(values: Values, recent: Sequence[int]) -> str | None:
    """Of the most frequent values the newest."""
    counts = Counter(value for item in recent for value in values[item])
    most = max(counts.values(), default=0)
    if most < max(LEAST, len(recent) / 2):
        return None
    return next(v for item in reversed(recent) for v in values[item] if counts[v] == most)


def _next(counts: Mapping[str, int], own: Sequence[str]) -> str | None:
    """Of the most frequent values the first in text order; ``own``: those of the example's step."""
    others = {value: count - (value in own) for value, count in counts.items()}
    most = max(others.values(), default=0)
    return min(v for v, count in others.items() if count == most) if most >= LEAST else None


def _followers(data: RecDataset, values: Values) -> dict[int, Counter[str]]:
    """How often each value came right after each item in the training events."""
    users, items, _ = training_events(data)
    counts: dict[int, Counter[str]] = {}
    steps = np.flatnonzero(users[1:] == users[:-1])
    for before, after in zip(items[steps].tolist(), items[steps + 1].tolist(), strict=True):
        counts.setdefault(before, Counter()).update(values[after])
    return counts
