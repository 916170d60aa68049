"""What a file holds, by its first bytes: compression, encoding, line ends, binary formats."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

SAMPLE_BYTES = 64 << 10
GZIP = "gzip"
PARQUET = "Parquet"
# first bytes -> what they begin; gzip and Parquet are read, the others refused by name
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (rb"\x1f\x8b\x08", GZIP),
    (rb"PAR1[\x00-\x1f]", PARQUET),
    (rb"PARE[\x00-\x1f]", "encrypted Parquet"),
    (rb"\x28\xb5\x2f\xfd", "Zstandard"),
    (rb"BZh[1-9]1AY&SY", "bzip2"),
    (rb"\xfd7zXZ\x00", "xz"),
    (rb"\x04\x22\x4d\x18", "LZ4"),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (rb"Rar!\x1a", "a RAR archive"),
    (rb"(?s:.){257}ustar", "a tar archive"),
    (rb"ARROW1\x00", "Arrow IPC (Feather)"),
    (rb"FEA1", "Feather"),
    (rb"ORC[\x00-\x1f]", "ORC"),
    (rb"Obj\x01", "Avro"),
    (rb"\x89HDF", "HDF5"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"SQLite format 3\x00", "an SQLite database"),
    (rb"\xd0\xcf\x11\xe0", "an old Excel or Word file"),
    (rb"\x80[\x02-\x05][\x00-\xff]*\.\Z", "a Python pickle"),
    (rb"\x80[\x04\x05]\x95", "a Python pickle"),
    (rb"%PDF-", "PDF"),
)
_ENCODINGS = (  # UTF-32 first: its mark begins as that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CONTROL = bytes(b for b in range(32) if b not in b"\t\n\v\f\r\x1b") + b"\x7f"


def content_of(head: bytes) -> str | None:
    """The binary format that a file's first bytes begin; None: none that is known."""
    return next((name for begin, name in _MAGIC if re.match(begin, head)), None)


def text_encoding(head: bytes) -> str:
    """ "utf8" (or any superset of ASCII), or the UTF-16 or UTF-32 that the first bytes are in."""
    for mark, name in _ENCODINGS:
        if head.startswith(mark):
            return name
    # Without a mark: most text here is ASCII, so every other byte is zero.
    pairs = len(head) // 2
    if pairs >= 4:
        even, odd = head[: 2 * pairs : 2].count(0), head[1 : 2 * pairs : 2].count(0)
        if odd > 0.6 * pairs and even < 0.05 * pairs:
            return "utf-16-le"
        if even > 0.6 * pairs and odd < 0.05 * pairs:
            return "utf-16-be"
    return "utf8"


def only_carriage_returns(text: bytes) -> bool:
    """Whether lines end in a carriage return alone (classic Mac OS, Excel's "CSV (Macintosh)")."""
    return b"\r" in text and b"\n" not in text


def refuse_packed(head: bytes, path: Path, *, inside: str = "") -> None:
    """ValueError for a binary format that is not read; `inside`: of what `head` was taken."""
    found = content_of(head)
    if found is not None:
        inside = f" inside {inside}" if inside else ""
        raise ValueError(
            f"path: {path} holds {found}{inside}; expected text (CSV, TSV, JSON Lines), plain or "
            "gzip, or a Parquet file: unpack or convert it first"
        )


def refuse_binary(text: bytes, path: Path) -> None:
    """ValueError where the first bytes of a text are none: control characters that text lacks."""
    if len(text.translate(None, _CONTROL)) < 0.98 * len(text) and not _is_text(text):
        raise ValueError(
            f"path: {path} holds bytes that are no text (it begins with {text[:8]!r}); "
            "expected CSV, TSV, JSON Lines (each also gzip) or Parquet"
        )


def _is_text(text: bytes) -> bool:
    """UTF-8 without NUL, whatever else it holds; a character cut at the end is none's fault."""
    try:
        codecs.getincrementaldecoder("utf8")().decode(text)
    except UnicodeDecodeError:
        return False
    return b"\0" not in text
