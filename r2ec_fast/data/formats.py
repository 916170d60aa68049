"""How the lines of a file become columns, and what its name says about that."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

KINDS = ("csv", "tsv", "jsonl", "parquet", "lines")


@dataclass(frozen=True)
class TextFormat:
    """How lines become columns.

    Args:
        kind: one of "csv", "tsv", "jsonl", "parquet", "lines" (one text column named "line").
        separator: one character, or "::" (MovieLens 1M).
        quote: '"' or None where quotes are ordinary characters.
        encoding: "utf8" or "latin-1".
        names: column names of a file without header line; None reads the header.
        list_columns: columns of JSON records that hold lists of text.
    """

    kind: str
    separator: str = ","
    quote: str | None = '"'
    encoding: str = "utf8"
    names: tuple[str, ...] | None = None
    list_columns: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {KINDS}, got {self.kind!r}")

    @property
    def delimiter(self) -> str:
        """The separator as one character: parsers take no "::", it is read as a tab."""
        return "\t" if self.separator == "::" else self.separator

    @property
    def quote_mark(self) -> bytes | None:
        """The byte between two of which a line break does not end a record; None: there is none."""
        if self.quote is None or self.kind in ("jsonl", "lines"):
            return None
        return self.quote.encode()


def guess_format(path: str | Path) -> TextFormat:
    """The format that a file's name says; raises ValueError for an unknown ending."""
    name = Path(path).name.lower().removesuffix(".gz")
    if name.endswith(".csv"):
        return TextFormat("csv")
    if name.endswith(".tsv"):
        return TextFormat("tsv", separator="\t", quote=None)
    if name.endswith((".inter", ".item")):
        return TextFormat("tsv", separator="\t", quote=None)
    if name.endswith((".jsonl", ".ndjson", ".json")):
        return TextFormat("jsonl")
    if name.endswith((".parquet", ".pq")):
        return TextFormat("parquet")
    if name.endswith(".txt"):
        return TextFormat("lines", quote=None)
    raise ValueError(
        f"path: cannot tell the format of {Path(path).name!r} from its name; expected "
        ".csv, .tsv, .jsonl, .parquet, .inter, .item or .txt, each also with .gz"
    )
