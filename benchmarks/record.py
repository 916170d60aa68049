"""Rows in a file, one JSON object a line, written as they come.

The first line says whose rows they are. A line that was cut off, by a kill or a full disk, is
dropped when the file is opened again: its row was not finished.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

from rows import Row


class Record:
    """The rows done so far, by key, and the file that they are appended to.

    Args:
        path: made by the first row, if it is not there.
        identity: what rows of one file share, such as the machine and the commit.

    Raises:
        ValueError: the file is of another identity, or not such a file.
    """

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        self.path, self.identity = path, dict(identity)
        self.done: dict[str, Row] = {}
        self._file: IO[str] | None = None
        lines = _whole_lines(path)
        if not lines:
            return
        try:
            stored, *rows = map(json.loads, lines)
            theirs = stored["identity"]
            self.done = {row.key: row for row in (Row(**fields) for fields in rows)}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a file of rows ({error})") from error
        for name, value in self.identity.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"{path}: its rows are of {name} {theirs.get(name)!r}, this run is of "
                    f"{value!r}; give --resume another file"
                )

    def add(self, rows: Iterable[Row]) -> None:
        """Keep rows and append them to the file, flushed one by one."""
        for row in rows:
            self.done[row.key] = row
            self._write(row.as_dict())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, content: Mapping[str, object]) -> None:
        if self._file is None:
            begins = not self.path.exists() or not self.path.stat().st_size
            self._file = self.path.open("a")
            if begins:
                self._write({"identity": self.identity})
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a file; what follows the last line end is cut off, in the file too."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return content[:whole].splitlines()
