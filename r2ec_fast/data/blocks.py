"""A file as blocks of whole lines: decompressed and hashed on the way, in bounded memory."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from r2ec_fast.data.formats import TextFormat

BLOCK_BYTES = 16 << 20
MAX_LINE_BYTES = 64 << 20
_OPEN_QUOTE = "a quote that never closes; pass quote=None if quotes are ordinary characters there"


@dataclass
class ReadStats:
    """What one pass over a file met.

    Args:
        rows: rows handed on.
        broken_lines: lines that are no record (half a JSON line, too many fields), skipped.
        blank_lines: empty lines, skipped.
        replaced_lines: lines with bytes that are not UTF-8, replaced by U+FFFD.
        truncated: the gzip stream ends before its end mark.
        bytes_read, sha256: of the file as it lies on disk (Parquet is not hashed on the way).
    """

    path: str = ""
    rows: int = 0
    broken_lines: int = 0
    blank_lines: int = 0
    replaced_lines: int = 0
    truncated: bool = False
    bytes_read: int = 0
    sha256: str = ""


def line_blocks(
    path: Path, form: TextFormat, stats: ReadStats, block_bytes: int = BLOCK_BYTES
) -> Iterator[bytes]:
    """Blocks of whole lines; a line break inside a quoted field does not end a block."""
    pieces: list[bytes] = []
    size = 0
    first = True
    wanted = block_bytes
    for piece in _pieces(path, stats, min(block_bytes, 1 << 20)):
        pieces.append(piece)
        size += len(piece)
        if size < wanted:
            continue
        text = b"".join(pieces)
        if first:
            text = text.removeprefix(b"\xef\xbb\xbf")
        cut = whole_lines(text, form)
        if cut == 0:
            if len(text) > MAX_LINE_BYTES:
                what = f"a record longer than {MAX_LINE_BYTES:,} bytes"
                raise ValueError(f"path: {path} has {_OPEN_QUOTE if form.quote else what}")
            wanted = 2 * len(text)  # a long line is not scanned again and again
            pieces, size = [text], len(text)
            continue
        first, wanted = False, block_bytes
        yield text[:cut]
        pieces, size = [text[cut:]], len(text) - cut
    text = b"".join(pieces)
    if first:
        text = text.removeprefix(b"\xef\xbb\xbf")
    if text:
        yield _closed(text, path, form, stats)


def _closed(text: bytes, path: Path, form: TextFormat, stats: ReadStats) -> bytes:
    """The file's last block. An open quote may have swallowed one half-written line, not more."""
    mark = form.quote_mark
    if mark is None or text.count(mark) % 2 == 0:
        return text
    cut = whole_lines(text, form)
    if b"\n" in text[cut:].rstrip(b"\r\n"):
        raise ValueError(f"path: {path} has {_OPEN_QUOTE}")
    stats.broken_lines += 1
    return text[:cut]


def whole_lines(text: bytes, form: TextFormat) -> int:
    """How many bytes of `text` are whole records; a line break between quotes ends none."""
    cut = text.rfind(b"\n") + 1
    mark = form.quote_mark
    if mark is None:
        return cut
    odd = text.count(mark, 0, cut) % 2
    while cut and odd:
        before = text.rfind(b"\n", 0, cut - 1) + 1
        odd ^= text.count(mark, before, cut) % 2
        cut = before
    return cut


def _pieces(path: Path, stats: ReadStats, piece_bytes: int) -> Iterator[bytes]:
    """Decompressed bytes in pieces of at most `piece_bytes`; hashes what lies on disk."""
    digest = hashlib.sha256()
    inflate = zlib.decompressobj(31) if path.suffix == ".gz" else None
    with open(path, "rb") as file:
        while piece := file.read(piece_bytes):
            digest.update(piece)
            stats.bytes_read += len(piece)
            if inflate is None:
                yield piece
                continue
            while piece:
                if inflate.eof:  # a further gzip member, or zero padding
                    piece = piece.lstrip(b"\0")
                    if not piece:
                        break
                    inflate = zlib.decompressobj(31)
                try:
                    out = inflate.decompress(piece, piece_bytes)
                except zlib.error as error:
                    raise ValueError(
                        f"path: {path} is damaged gzip near byte {stats.bytes_read:,}: {error}"
                    ) from error
                if out:
                    yield out
                piece = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
    stats.sha256 = digest.hexdigest()
    if inflate is not None:
        stats.truncated = not inflate.eof
