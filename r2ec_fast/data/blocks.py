"""A file as blocks of whole lines: decompressed and hashed on the way, in bounded memory."""

from __future__ import annotations

import codecs
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from r2ec_fast.data.detect import (
    GZIP,
    SAMPLE_BYTES,
    content_of,
    only_carriage_returns,
    refuse_packed,
    text_encoding,
)
from r2ec_fast.data.formats import TextFormat

BLOCK_BYTES = 16 << 20
MAX_LINE_BYTES = 64 << 20
_OPEN_QUOTE = "a quote that never closes; pass quote=None if quotes are ordinary characters there"


@dataclass
class ReadStats:
    r"""What one pass over a file met.

    Args:
        rows: rows handed on.
        broken_lines: lines that are no record (half a JSON line, too many fields), skipped.
        blank_lines: empty lines, skipped.
        replaced_lines: lines with bytes that are not UTF-8, replaced by U+FFFD.
        lone_surrogates: JSON lines with half a character ("\ud800"), replaced by U+FFFD.
        truncated: the gzip stream ends before its end mark.
        bytes_read, sha256: of the file as it lies on disk (Parquet is not hashed on the way).
        id_columns: columns of ids, two of which must not become one where bytes are replaced.
        marks: whether what is no text is marked until ids are compared (see `records`).
        noted: what was recognised by the file's content and not by its name: what -> rule.
        replaced: id with U+FFFD -> the same with what stood there.
    """

    path: str = ""
    rows: int = 0
    broken_lines: int = 0
    blank_lines: int = 0
    replaced_lines: int = 0
    lone_surrogates: int = 0
    truncated: bool = False
    bytes_read: int = 0
    sha256: str = ""
    id_columns: tuple[str, ...] = ()
    marks: bool = True
    noted: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)


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
            text = text.removeprefix(codecs.BOM_UTF8)
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
        text = text.removeprefix(codecs.BOM_UTF8)
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
    """The file's text in pieces: decompressed, UTF-16 as UTF-8, lines ending in a line feed.

    Which of these it needs is told by its first bytes, not by its name.
    """
    pieces = _file_pieces(path, stats, piece_bytes)
    begin: list[bytes] = []
    for piece in pieces:
        begin.append(piece)
        if sum(map(len, begin)) >= SAMPLE_BYTES:
            break
    first = b"".join(begin)[:SAMPLE_BYTES]
    encoding = text_encoding(first)
    pieces = chain(begin, pieces)
    if encoding == "utf8":
        packed = content_of(_head(path)) == GZIP
        refuse_packed(first, path, inside=GZIP if packed else "")
        sample = first
    else:
        stats.noted[f"text in {encoding.upper()}"] = "read as such"
        decode = codecs.getincrementaldecoder(encoding)("replace").decode
        sample = decode(first).encode()
        pieces = _utf8_pieces(pieces, encoding)
    if only_carriage_returns(sample):
        stats.noted["lines that end in a carriage return"] = "read as lines"
        pieces = (p.replace(b"\r\n", b"\n").replace(b"\r", b"\n") for p in pieces)
    yield from pieces


def _utf8_pieces(pieces: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    for piece in pieces:
        yield decoder.decode(piece).encode()
    yield decoder.decode(b"", True).encode()


def file_text(path: Path) -> bytes:
    """The first bytes of a file's text, as `line_blocks` reads them; b"" where it has none."""
    text = b""
    for piece in _pieces(path, ReadStats(), SAMPLE_BYTES):
        text += piece
        if len(text) >= SAMPLE_BYTES:
            break
    return text.removeprefix(codecs.BOM_UTF8)


def is_utf8(path: Path) -> bool:
    """Whether the whole file is valid UTF-8; reads it."""
    decoder = codecs.getincrementaldecoder("utf8")()
    try:
        for piece in _pieces(path, ReadStats(), 1 << 20):
            decoder.decode(piece)
        decoder.decode(b"", True)
    except UnicodeDecodeError:
        return False
    return True


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(SAMPLE_BYTES)


def _file_pieces(path: Path, stats: ReadStats, piece_bytes: int) -> Iterator[bytes]:
    """Decompressed bytes in pieces of at most `piece_bytes`; hashes what lies on disk."""
    digest = hashlib.sha256()
    packed = content_of(_head(path)) == GZIP
    if path.suffix.lower() == ".gz" and not packed:
        raise ValueError(f"path: {path} is damaged gzip near byte 0: it does not begin as gzip")
    if packed and path.suffix.lower() != ".gz":
        stats.noted["gzip"] = "unpacked"
    inflate = zlib.decompressobj(31) if packed else None
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
