"""A log of changes, each of them durable before it counts.

A text file, a line a record: eight hexadecimal digits of its CRC-32, a space, the record as JSON.
The first record is the header, which says what the changes belong to. A record is written whole and
synced to the disk before `append` returns. A process that dies while it writes leaves an unfinished
last line, which the next one cuts off: nobody was told that it counts.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)

Record = dict[str, Any]


class ChangeLog(Protocol):
    """Where changes are kept before they count."""

    def __iter__(self) -> Iterator[Record]: ...

    def append(self, record: Record) -> Sequence[Record]:
        """Keep a record, and return those that others have appended since this process looked last:
        they come before it. Raises OSError where it cannot be kept."""

    def news(self) -> Sequence[Record]:
        """The records that others have appended since this process looked last."""

    def drop_last(self) -> None:
        """Take back the record that was appended last: what it says could not be done."""

    def close(self) -> None: ...


class WriteAheadLog:
    """An open log. One process at a time may have it open.

    Args:
        path: the file; made if it does not exist.
        header: what the records belong to.

    Raises:
        ValueError: the file is another kind of file, is damaged, or its header is another.
        OSError: it cannot be read or written, or another process has it open.
    """

    def __init__(self, path: str | os.PathLike[str], header: Record) -> None:
        self.path = Path(path)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._lock()
            self._end = self._whole_end(_line(header))
            self._previous_end: int | None = None
            if self._end == 0:
                self._write(header)
                _sync_directory(self.path.parent)
            self._check_header(header)
        except BaseException:
            os.close(self._file)
            raise

    def close(self) -> None:
        os.close(self._file)

    def __iter__(self) -> Iterator[Record]:
        """The records in their order, without the header."""
        return (record for record, end in self._records() if end > self._first_end)

    def append(self, record: Record) -> Sequence[Record]:
        """Write a record; it is on the disk when this returns. Where it raises OSError (a full
        disk), the log is as it was. Returns what others wrote before it: nothing, there is one
        writer."""
        before = self._end
        self._write(record)
        self._previous_end = before
        return self.news()

    def news(self) -> Sequence[Record]:
        """None: there is one writer."""
        return ()

    def drop_last(self) -> None:
        """Take back the record that was appended last: what it says could not be done."""
        if self._previous_end is None:
            raise RuntimeError("there is no appended record to drop")
        self._cut(self._previous_end)
        self._previous_end = None

    # ---- lines ----------------------------------------------------------------------------------

    def _write(self, record: Record) -> None:
        line = _line(record)
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._end + written)
            os.fsync(self._file)
        except OSError as error:
            self._cut(self._end)
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}") from error
        self._end += len(line)

    def _cut(self, end: int) -> None:
        os.ftruncate(self._file, end)
        os.fsync(self._file)
        self._end = end

    def _records(self) -> Iterator[tuple[Record, int]]:
        """Each whole record, and where its line ends."""
        end = 0
        with open(self.path, "rb") as file:
            for line in file:
                record = _parsed(line)
                if record is None:
                    return
                end += len(line)
                yield record, end

    def _whole_end(self, header: bytes) -> int:
        """Where the last whole record ends; an unfinished one behind it is cut off."""
        ends = [0, *(end for _, end in self._records())]
        end, number = ends[-1], len(ends) - 1
        size = os.fstat(self._file).st_size
        if end < size:
            with open(self.path, "rb") as file:
                file.seek(end)
                rest = file.read()
            rest = rest.rstrip(b"\0")
            foreign = number == 0 and not header.startswith(rest)
            if foreign or b"\n" in rest[:-1]:
                raise ValueError(
                    f"{self.path}: record {number} is damaged and others follow it; the file is no "
                    "log of item changes, or the disk lost a part of it. Restore it, or put it "
                    "aside to go on without its changes"
                )
            log.warning("%s: cut off an unfinished record of %d bytes", self.path, size - end)
            self._cut(end)
        return end

    def _check_header(self, header: Record) -> None:
        first, self._first_end = next(self._records())
        if first != json.loads(json.dumps(header)):
            differing = sorted(
                k for k in header.keys() | first.keys() if header.get(k) != first.get(k)
            )
            raise ValueError(
                f"{self.path}: its changes were made to another table ({', '.join(differing)} "
                "differ): the model or the catalog has been replaced. Put the file aside to serve "
                "the new table without them"
            )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OSError(
                error.errno, f"{self.path}: another process has it open (one server, one log)"
            ) from error


def _line(record: Record) -> bytes:
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parsed(line: bytes) -> Record | None:
    """The record of a line; None where it is not a whole one."""
    text = line[9:-1]
    if line[-1:] != b"\n" or line[8:9] != b" " or b"%08x" % zlib.crc32(text) != line[:8]:
        return None
    return json.loads(text)


def _sync_directory(directory: Path) -> None:
    """A new file's name is durable only when its directory is."""
    number = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
