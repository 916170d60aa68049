"""Text columns -> ids, times, ratings, prices. Every rule here is stated in docs/guides/data.md."""

from __future__ import annotations

import polars as pl

LATEST_SECOND = 4_102_444_800  # 2100-01-01
# A number is in seconds below 1e11, milliseconds below 1e14, microseconds below 1e17, else ns.
_UNITS = ((1e11, 1000.0), (1e14, 1.0), (1e17, 1e-3), (float("inf"), 1e-6))
_ISO = (
    r"^(\d{4})[-/](\d{1,2})[-/](\d{1,2})"
    r"(?:[T ]+(\d{1,2}):(\d{2})(?::(\d{2})(?:[.,](\d{1,9}))?)?\s*(Z|z|[+-]\d{2}:?\d{2})?)?$"
)


def parse_ids(column: pl.Series) -> pl.Series:
    """Ids as text: trimmed, blank -> null; a whole number is written without ".0"."""
    if column.dtype.is_float():
        whole = column.is_finite() & (column == column.floor()) & (column.abs() < 2**63)
        text = column.cast(pl.Int64, strict=False).cast(pl.String)
        other = column.set(~column.is_finite(), None).cast(pl.String)
        return pl.select(pl.when(whole).then(text).otherwise(other)).to_series()
    text = column.cast(pl.String).str.strip_chars()
    text = text.str.replace(r"^(-?\d+)\.0+$", "$1")
    return text.set(text == "", None)


def parse_times(column: pl.Series) -> pl.Series:
    """Times as Int64 milliseconds since 1970, null where unreadable or outside 1970..2099.

    Numbers are seconds, milliseconds, microseconds or nanoseconds by their size, row by row; text
    may also be ISO 8601 (no offset: UTC). Fractions below a millisecond are cut off.
    """
    if column.dtype == pl.Date or isinstance(column.dtype, pl.Datetime):
        return _in_range(column.cast(pl.Datetime("ms")).cast(pl.Int64))
    if column.dtype.is_integer():
        return _in_range(_scale(column.cast(pl.Float64)))
    if column.dtype.is_float():
        return _in_range(_scale(column))
    text = column.cast(pl.String).str.strip_chars()
    numbers = text.cast(pl.Float64, strict=False)
    out = _scale(numbers)
    other = out.is_null() & text.is_not_null() & (text != "")
    if other.any():
        out = out.set(other, None).scatter(other.arg_true(), _iso_ms(text.filter(other)))
    return _in_range(out)


def parse_time(value: int | str, name: str) -> int:
    """One setting as unix seconds: a number or ISO text; ValueError names the setting."""
    dtype = pl.String if isinstance(value, str) else pl.Int64
    ms = parse_times(pl.Series([value], dtype=dtype))[0]
    if ms is None:
        raise ValueError(
            f"{name}: expected unix seconds or ISO text as '2023-07-01', got {value!r}"
        )
    return ms // 1000


def parse_numbers(column: pl.Series) -> pl.Series:
    """Numbers as Float64, null where unreadable or not finite."""
    if column.dtype.is_numeric():
        out = column.cast(pl.Float64)
    else:
        out = column.cast(pl.String).str.strip_chars().cast(pl.Float64, strict=False)
    return out.set(~out.is_finite(), None)


def parse_prices(column: pl.Series) -> pl.Series:
    """Prices as Float64: a number, also with a currency sign and thousands commas ("$1,299.00").

    Anything else ("—", "from 8.99", a range, blank, negative) is null.
    """
    if column.dtype.is_numeric():
        out = parse_numbers(column)
    else:
        text = column.cast(pl.String).str.strip_chars().str.replace(r"^(?:US)?\s*[$€£]\s*", "")
        grouped = text.str.contains(r"^\d{1,3}(,\d{3})+(\.\d*)?$")
        plain = pl.select(
            pl.when(grouped).then(text.str.replace_all(",", "", literal=True)).otherwise(text)
        ).to_series()
        out = parse_numbers(plain)
    return out.set(out < 0, None)


def _scale(numbers: pl.Series) -> pl.Series:
    size = numbers.abs()
    factor = pl.lit(_UNITS[-1][1])
    for bound, scale in reversed(_UNITS[:-1]):
        factor = pl.when(size < bound).then(scale).otherwise(factor)
    scaled = pl.select(factor * numbers).to_series()
    return scaled.set(~scaled.is_finite(), None).floor().cast(pl.Int64, strict=False)


def _in_range(ms: pl.Series) -> pl.Series:
    return ms.set((ms < 0) | (ms >= LATEST_SECOND * 1000), None)


def _iso_ms(text: pl.Series) -> pl.Series:
    part = pl.DataFrame({"t": text}).select(pl.col("t").str.extract_groups(_ISO).alias("g"))
    part = part.unnest("g")
    y, m, d, hour, minute, second, fraction, offset = (pl.col(str(i)) for i in range(1, 9))
    stamp = pl.concat_str(
        [
            pl.concat_str([y, m.str.zfill(2), d.str.zfill(2)], separator="-"),
            pl.concat_str(
                [
                    hour.fill_null("0").str.zfill(2),
                    minute.fill_null("00"),
                    second.fill_null("00"),
                ],
                separator=":",
            ),
        ],
        separator=" ",
    )
    whole = stamp.str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="ms", strict=False)
    ms = fraction.fill_null("0").str.pad_end(9, "0").str.slice(0, 3).cast(pl.Int64, strict=False)
    zone = offset.fill_null("Z").str.replace("[Zz]", "+0000").str.replace(":", "", literal=True)
    minutes = zone.str.slice(1, 2).cast(pl.Int64) * 60 + zone.str.slice(3, 2).cast(pl.Int64)
    minutes = pl.when(zone.str.starts_with("-")).then(-minutes).otherwise(minutes)
    return part.select(whole.cast(pl.Int64) + ms - minutes * 60_000).to_series()
