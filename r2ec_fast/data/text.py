"""Item text: entities, tags, whitespace, length. What was changed is counted."""

from __future__ import annotations

import html

import polars as pl

from r2ec_fast.data.report import LoadReport

MAX_TITLE_CHARS = 1_000
MAX_TEXT_CHARS = 10_000


def clean_column(
    column: pl.Series, report: LoadReport, *, max_chars: int, strip_tags: bool = False
) -> pl.Series:
    """Readable one-line text; blank -> null.

    HTML entities become characters, control characters and runs of whitespace one space; text
    above `max_chars` characters is cut.

    Args:
        column: text, or lists of text (joined by spaces).
        report: gets the counts, under the column's name.
        max_chars: limit of the result.
        strip_tags: also remove <...>, as the reference does for Amazon's fields.
    """
    name = column.name
    if isinstance(column.dtype, pl.List):
        column = column.list.eval(pl.element().cast(pl.String).drop_nulls()).list.join(" ")
    text = column.cast(pl.String)
    entity = text.str.contains(r"&(#\d+|#[xX][0-9a-fA-F]+|\w+);").fill_null(False)
    if entity.any():
        found = [html.unescape(value) for value in text.filter(entity)]
        text = text.scatter(entity.arg_true(), pl.Series(found, dtype=pl.String))
    report.add(f"{name}: HTML entity", entity.sum(), "changed", "entities -> characters")
    if strip_tags:
        tags = text.str.contains(r"<[^>]+>").fill_null(False)
        text = text.str.replace_all(r"<[^>]+>", "")
        report.add(f"{name}: HTML tag", tags.sum(), "changed", "tags removed")
    text = text.str.replace_all(r"[\s\p{Cc}]+", " ").str.strip_chars()
    long = (text.str.len_chars() > max_chars).fill_null(False)
    rule = f"cut to {max_chars:,} characters"
    report.add(f"{name}: too long", long.sum(), "changed", rule)
    if long.any():
        text = text.str.slice(0, max_chars).str.strip_chars_end()
    return text.set(text == "", None).alias(name)
