"""Reasonings that are given: what a model learns to write for training examples, as JSON Lines.

A line is one record, and an example may have several:

    {"user": "u17", "position": 4, "text": "Likes Starbucks, so coffee again.", "item": "i3"}

`position` is the index of the target in the user's events, as in `Examples`; `item`, which is read
out after the text, may be left out: it is then the target.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from r2ec_fast.data.types import Examples, IdMap, UnknownIdError
from r2ec_fast.utils.atomic_files import write_whole

if TYPE_CHECKING:
    from r2ec_fast.data.dataset import RecDataset

# field of a record -> its types, and whether it must be there
_FIELDS: dict[str, tuple[tuple[type, ...], bool]] = {
    "user": ((str, int), True),
    "position": ((int,), True),
    "text": ((str,), True),
    "item": ((str, int), False),
}


@dataclass(frozen=True, eq=False)
class Reasonings:
    """n records: a text that a model learns to write for a training example, and the item that it
    then reads out. :meth:`of` makes them, :meth:`read` and :meth:`write` keep them in a file.

    Args:
        examples: [n], all of the training split; an example may be there several times.
        texts: [n], what stands between prompt and marker, without the marker; none is blank.
        items: [n] int64 internal ids of the items to read out.
    """

    examples: Examples
    texts: tuple[str, ...]
    items: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def of(
        cls,
        data: RecDataset,
        examples: Examples,
        texts: Sequence[str],
        items: np.ndarray | Sequence[int] | None = None,
    ) -> Reasonings:
        """Records of ``examples``; ``items`` (internal ids) default to the examples' targets.

        Raises ValueError, naming the record, for numbers that differ, a blank text, an item that
        is not in the catalog and an example that is not in the training split.
        """
        given = len(examples if items is None else items)
        if not len(texts) == given == len(examples):
            raise ValueError(
                "examples, texts, items: expected as many of each, got "
                f"{len(examples)}, {len(texts)} and {given}"
            )
        _check(data, examples, texts, lambda i, field: f"record {i}: {field}")
        chosen = data.target(examples) if items is None else np.asarray(items, np.int64)
        for i in np.flatnonzero((chosen < 0) | (chosen >= data.data.num_items))[:1]:
            raise ValueError(
                f"record {i}: item: expected 0..{data.data.num_items - 1}, got {chosen[i]}"
            )
        return cls(examples, tuple(texts), chosen)

    @classmethod
    def read(cls, path: str | Path, data: RecDataset, argument: str = "path") -> Reasonings:
        """The records of a JSONL file, in its order; `argument` is what the caller calls it.

        Raises:
            FileNotFoundError: no such file.
            ValueError: naming file, line and field: a line that is no such record, an unknown user
                or item, a position outside the user's events or the training split; an empty file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{argument}: no file {path}")
        lines, users, positions, texts, items = [], [], [], [], []
        for line, record in _records(path, argument):
            where = f"{argument}: {path}, line {line}"
            lines.append(line)
            users.append(_internal(data.data.users, record, "user", where))
            positions.append(record["position"])
            texts.append(record["text"])
            item = "item" in record
            items.append(_internal(data.data.catalog.ids, record, "item", where) if item else -1)
        if not texts:
            raise ValueError(f"{argument}: {path} holds no record")
        examples = Examples(np.array(users, np.int64), np.array(positions, np.int64))
        name = f"{argument}: {path}"
        _check(data, examples, texts, lambda i, field: f"{name}, line {lines[i]}: {field}")
        chosen = np.array(items, np.int64)
        return cls(examples, tuple(texts), np.where(chosen < 0, data.target(examples), chosen))

    def write(self, path: str | Path, data: RecDataset, argument: str = "path") -> None:
        """Write the records as JSONL, whole or not at all; `item` only where it is not the target.

        Raises OSError, naming ``path`` and ``argument``, where it cannot be written.
        """
        users = data.data.users.decode(self.examples.user)
        items = data.data.catalog.ids.decode(self.items)
        own = data.target(self.examples) == self.items
        lines = []
        for i, text in enumerate(self.texts):
            record = {"user": users[i], "position": int(self.examples.position[i]), "text": text}
            record |= {} if own[i] else {"item": items[i]}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        write_whole(path, "".join(lines), argument)


def _records(path: Path, argument: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and fields of each line that is not blank; the fields have their types."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{argument}: {path}, line {number}"
            try:
                text = raw.decode("utf-8-sig")
                if not text.strip():
                    continue
                record = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{where}: expected JSON in UTF-8 ({error})") from None
            _check_fields(record, where)
            yield number, record


def _check_fields(record: Any, where: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {json.dumps(record)[:80]}")
    for name in record:
        if name not in _FIELDS:
            raise ValueError(f"{where}: unknown field {name!r}; expected {', '.join(_FIELDS)}")
    for name, (types, required) in _FIELDS.items():
        value = record.get(name)
        if name not in record and not required:
            continue
        if not isinstance(value, types) or isinstance(value, bool) or _is_huge(value):
            got = json.dumps(value)[:80] if name in record else "nothing"
            expected = " or ".join({str: "text", int: "a whole number"}[t] for t in types)
            raise ValueError(f"{where}: {name}: expected {expected}, got {got}")


def _is_huge(value: object) -> bool:
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def _internal(ids: IdMap, record: dict[str, Any], field: str, where: str) -> int:
    try:
        return int(ids.encode([record[field]])[0])
    except UnknownIdError as error:
        raise ValueError(f"{where}: {field}: {error}") from None


def _check(
    data: RecDataset,
    examples: Examples,
    texts: Sequence[str],
    named: Callable[[int, str], str],
) -> None:
    """Raise ValueError for the first record whose example does not train or whose text cannot be
    written; ``named`` (record, field) says where it is."""
    trains = np.isin(_events(data, examples), _events(data, data.train))
    for i in np.flatnonzero(~trains)[:1]:
        problem = _outside(data, int(examples.user[i]), int(examples.position[i]))
        raise ValueError(f"{named(int(i), 'position')}: {problem}")
    for i, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f"{named(i, 'text')}: expected text, got a blank")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{named(i, 'text')}: no UTF-8 can write it ({error})") from None


def _events(data: RecDataset, examples: Examples) -> np.ndarray:
    """[X] int64, the event that each example predicts; -1 where there is no such event."""
    inside = (examples.user >= 0) & (examples.user < data.data.num_users)
    first = data.data.offsets[:-1][np.where(inside, examples.user, 0)]
    length = np.diff(data.data.offsets)[np.where(inside, examples.user, 0)]
    inside &= (examples.position >= 1) & (examples.position < length)
    return np.where(inside, first + examples.position, -1)


def _outside(data: RecDataset, user: int, position: int) -> str:
    """Why an example that does not train cannot have a reasoning."""
    if not 0 <= user < data.data.num_users:
        return f"expected one of a user in 0..{data.data.num_users - 1}, got user {user}"
    events = int(data.data.offsets[user + 1] - data.data.offsets[user])
    name = data.data.users.ids[user]
    if not 1 <= position < events:
        return (
            f"expected 1..{events - 1}, because user {name!r} has {events} events; got {position}"
        )
    return f"{position} of user {name!r} is not in the training split: a reasoning would leak it"
