"""Item tables: which columns are taken, how text is cleaned, which of several rows stays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from r2ec_fast.data.blocks import ReadStats
from r2ec_fast.data.columns import drop_nested_ids, json_lists, our_columns
from r2ec_fast.data.formats import TextFormat
from r2ec_fast.data.parse import parse_ids, parse_numbers
from r2ec_fast.data.reader import add_read_lines, column_names, read_blocks
from r2ec_fast.data.report import LoadReport
from r2ec_fast.data.text import MAX_TEXT_CHARS, MAX_TITLE_CHARS, clean_column

# The first name found in a file is taken; a configured name goes before all of them.
ITEM_ALIASES: dict[str, tuple[str, ...]] = {
    "item_id": ("item_id", "itemId", "item", "iid", "movieId", "movie_id", "parent_asin", "asin"),
    "title": ("title", "item_title", "movie_title", "name", "item_name"),
    "description": ("description", "desc", "summary"),
    "average_rating": ("average_rating",),
    "rating_number": ("rating_number",),
    "genres": ("genres", "genre"),
    "brand": ("brand",),
    "price": ("price",),
    "categories": ("categories",),
}
REQUIRED = ("item_id", "title")
NUMBERS = ("average_rating", "rating_number", "price")


def resolve_columns(
    found: list[str],
    aliases: Mapping[str, tuple[str, ...]],
    configured: Mapping[str, str] | None,
    required: tuple[str, ...],
    name: str,
    where: str | Path,
    *,
    extra: bool = False,
) -> dict[str, str]:
    """Map our column names to a file's.

    Args:
        found: the file's columns.
        aliases: our name -> names tried in order.
        configured: our name -> the file's name, as the caller says.
        required: our names that must be found.
        name: the argument to blame in messages.
        where: the file.
        extra: whether `configured` may name columns that `aliases` does not have.

    Raises:
        ValueError: an unknown key, a configured or required column that the file lacks.
    """
    configured = configured or {}
    unknown = sorted(set(configured) - set(aliases))
    if unknown and not extra:
        raise ValueError(f"{name}: unknown names {unknown}; expected some of {sorted(aliases)}")
    out = {}
    for ours, theirs in configured.items():
        if theirs not in found:
            raise ValueError(
                f"{name}: {where} has no column {theirs!r} (for {ours!r}); its columns: {found}"
            )
        out[ours] = theirs
    for ours, names in aliases.items():
        match = next((n for n in names if n in found), None)
        if ours not in out and match is not None:
            out[ours] = match
    for ours in required:
        if ours not in out:
            raise ValueError(
                f"{name}: {where} has no column for {ours!r} (tried {list(aliases[ours])}); "
                f"its columns: {found}. Name it: {name}={{{ours!r}: '...'}}"
            )
    return out


def load_items(
    path: str | Path,
    form: TextFormat,
    report: LoadReport,
    *,
    item_columns: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    truncated: str = "refuse",
) -> pl.DataFrame:
    """Read an item table: item_id, title (null where blank) and the optional columns.

    Args:
        path, form: the file.
        report: gets the counts.
        item_columns: our name -> the file's name; names we do not know become text columns.
        names: file's column -> plain name, where the header carries types (RecBole).
        truncated: see `read_blocks`.
    """
    header = column_names(path, form)
    plain = [names.get(h, h) if names else h for h in header]
    columns = resolve_columns(
        plain, ITEM_ALIASES, item_columns, REQUIRED, "item_columns", path, extra=True
    )
    theirs = {ours: header[plain.index(column)] for ours, column in columns.items()}
    stats = ReadStats(id_columns=(theirs["item_id"],))
    wanted = list(dict.fromkeys(theirs.values()))
    blocks = [
        our_columns(block, theirs, Path(path))
        for block in read_blocks(path, wanted, form, stats, truncated=truncated)
    ]
    if not blocks:
        raise ValueError(f"items: {path} has no rows")
    add_read_lines(stats, report)
    rows = pl.concat(blocks)
    if form.kind == "jsonl":
        rows = drop_nested_ids(rows, "item row", report)
        rows = rows.with_columns(
            json_lists(rows[name]) for name in rows.columns if name not in ("item_id", *NUMBERS)
        )
    return unique_items(clean_items(rows, report), report)


def clean_items(raw: pl.DataFrame, report: LoadReport, *, strip_tags: bool = False) -> pl.DataFrame:
    """Clean ids, text and numbers of a raw item table; rows without an id are dropped."""
    columns = [parse_ids(raw["item_id"]).alias("item_id")]
    for name in raw.columns:
        if name == "item_id":
            continue
        if name in NUMBERS:
            number = parse_numbers(raw[name]).alias(name)
            columns.append(
                number.cast(pl.Int64, strict=False) if name == "rating_number" else number
            )
            continue
        limit = MAX_TITLE_CHARS if name == "title" else MAX_TEXT_CHARS
        column = raw[name]
        if name == "genres":
            column = _genres(column)
        columns.append(clean_column(column, report, max_chars=limit, strip_tags=strip_tags))
    table = pl.DataFrame(columns)
    missing = table["item_id"].null_count()
    report.add("item row without id", missing, "dropped", "the row cannot be used")
    return table.filter(pl.col("item_id").is_not_null()) if missing else table


def unique_items(table: pl.DataFrame, report: LoadReport) -> pl.DataFrame:
    """One row per id: a row with a title wins, then the first in text order of all its fields."""
    rest = [name for name in table.columns if name != "item_id"]
    table = table.sort(["item_id", *rest], nulls_last=True)
    copies = table.filter(pl.col("item_id").is_duplicated())
    differing = (
        copies.group_by("item_id")
        .agg(pl.col("title").n_unique().alias("n"))
        .filter(pl.col("n") > 1)
    )
    rule = "with a title, then the first in text order stays"
    extra = copies.height - copies["item_id"].n_unique()
    report.add("item row with a repeated id", extra, "dropped", rule)
    report.add("item id with different titles", differing.height, "noted", rule)
    return table.unique("item_id", keep="first", maintain_order=True)


def _genres(column: pl.Series) -> pl.Series:
    if isinstance(column.dtype, pl.List):
        column = column.list.eval(pl.element().drop_nulls()).list.join(", ")
    text = column.cast(pl.String).str.replace_all("|", ", ", literal=True)
    return text.set(text == "(no genres listed)", None)
