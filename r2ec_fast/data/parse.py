"""Text columns -> ids, times, ratings, prices. Every rule here is stated in docs/guides/data.md."""

from __future__ import annotations

import datetime as dt
import re
from decimal import Decimal
from math import isfinite

import numpy as np
import polars as pl

LATEST_SECOND = 4_102_444_800  # 2100-01-01
# A number is in seconds below 1e11, milliseconds below 1e14, microseconds below 1e17, else ns.
_UNITS = ((1e11, 1000.0), (1e14, 1.0), (1e17, 1e-3), (float("inf"), 1e-6))
_ISO = (
    r"^(\d{4})[-/](\d{1,2})[-/](\d{1,2})"
    r"(?:[Tt ]+(\d{1,2})(?::(\d{2})(?::(\d{2})(?:[.,](\d+))?)?)?)?"
    r"\s*(Z|[+-]\d{2}(?::?\d{2})?)?$"
)
_DATE_DIGITS = (8, 10, 12, 14)
DATE_MIX = (
    "holds both dates of digits alone, as 20230701, and numbers that are none: they may be dates "
    "or unix times. Write all of them one way, best as ISO 8601 (2023-07-01T12:00:00Z)"
)


def decimal_text(number: float, shortest: str | None = None) -> str | None:
    """A number as decimal digits without exponent: 1e16 is 10000000000000000; not finite: None."""
    if not isfinite(number):
        return None
    return format(Decimal(shortest or repr(number)), "f").removesuffix(".0")


def parse_ids(column: pl.Series) -> pl.Series:
    """Ids as text: trimmed, blank -> null; a whole number is written without ".0"."""
    if column.dtype.is_float():
        whole = column.is_finite() & (column == column.floor()) & (column.abs() < 2**63)
        text = column.cast(pl.Int64, strict=False).cast(pl.String).set(~whole, None)
        other = column.filter(~whole).drop_nulls().unique()
        if len(other):  # shortest digits of a Float32 are fewer than those of the same Float64
            kind = np.float32 if column.dtype == pl.Float32 else np.float64
            spelled = [decimal_text(x, str(kind(x))) for x in other.to_list()]
            text = text.fill_null(
                column.replace_strict(other, spelled, default=None, return_dtype=pl.String)
            )
        return text
    text = column.cast(pl.String).str.strip_chars()
    if column.dtype.is_decimal():
        text = text.str.replace(r"(\.\d*?)0+$", "$1").str.strip_suffix(".")
    text = text.str.replace(r"^(-?\d+)\.0+$", "$1")
    minus = (text == "-0").fill_null(False)
    return (text.set(minus, "0") if minus.any() else text).set(text == "", None)


def parse_times(column: pl.Series) -> pl.Series:
    """Times as Int64 milliseconds since 1970, null where unreadable or outside 1970..2099.

    Numbers are seconds, milliseconds, microseconds or nanoseconds by their size, row by row, and
    where all are dates of digits alone (20230701, 202307011200) such dates; text may also be ISO
    8601 (no offset: UTC). Fractions below a millisecond are cut off.

    Raises:
        ValueError: some numbers are dates of eight or twelve digits, and some are not.
    """
    return read_times(column)[0]


def read_times(column: pl.Series) -> tuple[pl.Series, bool | None]:
    """`parse_times`, and whether its numbers were dates of digits alone (None: it has none)."""
    if column.dtype == pl.Date or isinstance(column.dtype, pl.Datetime):
        return _in_range(column.dt.timestamp("ms")), None
    if column.dtype.is_numeric():
        return _numbers_or_dates(column.cast(pl.Float64))
    text = column.cast(pl.String).str.strip_chars()
    numbers = text.cast(pl.Float64, strict=False)
    out, dates = _numbers_or_dates(numbers)
    other = numbers.is_null() & text.is_not_null() & (text != "")
    if other.any():
        out = out.set(other, None).scatter(other.arg_true(), _iso_ms(text.filter(other)))
    return _in_range(out), dates


def _numbers_or_dates(numbers: pl.Series) -> tuple[pl.Series, bool | None]:
    """Numbers as milliseconds. Eight digits may be a date or a second of August 1970, twelve a date
    or a millisecond of 1976: all are dates, or none is, else ValueError."""
    dates = _digit_dates(numbers)
    out = _in_range(_scale(numbers))
    # Missing times are often written as 0 or 99999999; a number of eight digits is no other unit.
    eight = (numbers >= 1e7) & (numbers < 1e8)
    plain = (numbers > 0) & ~eight & (numbers < 1e13) & dates.is_null()
    found, others = dates.is_not_null(), int(plain.sum())
    if not found.any():
        # what has eight digits and the year of a date, alone in its column, is a date gone wrong
        wrong = ((numbers >= 1.97e7) & (numbers < 2.1e7)).fill_null(False)
        return (out if others else out.set(wrong, None)), False if others else None
    ten = found & (numbers >= 1e9) & (numbers < 1e10)
    sure = found & (numbers >= 1e13)  # as milliseconds after 2286
    unsure = found & ~ten & ~sure
    if unsure.any() and (others or bool((out.is_not_null() & (numbers >= 1e13) & ~found).any())):
        raise ValueError(f"timestamp: the column {DATE_MIX}")
    if not unsure.any() and (others or not (found & ~sure).any()):
        return out.set(sure, None).fill_null(dates.set(~sure, None)), False if others else None
    return _in_range(dates), True


def _digit_dates(numbers: pl.Series) -> pl.Series:
    """Milliseconds of numbers as 20230701 that are days of 1970..2099, with hours or without."""
    out = pl.Series([None], dtype=pl.Int64).new_from_index(0, len(numbers))
    whole = pl.repeat(False, len(numbers), eager=True)
    for length in _DATE_DIGITS:
        unit = 10 ** (length - 8)
        whole |= ((numbers >= 1.97e7 * unit) & (numbers < 2.1e7 * unit)).fill_null(False)
    if whole.any():
        whole &= (numbers == numbers.floor()).fill_null(False)
    if not whole.any():
        return out
    digits = numbers.filter(whole).cast(pl.Int64).cast(pl.String)
    found = pl.Series([None], dtype=pl.Int64).new_from_index(0, len(digits))
    for length in _DATE_DIGITS:
        rows = digits.str.len_chars() == length
        if rows.any():
            part = digits.set(~rows, None).str.pad_end(14, "0")
            part = part.str.to_datetime("%Y%m%d%H%M%S", time_unit="ms", strict=False)
            found = found.fill_null(_in_range(part.cast(pl.Int64)))
    return out.scatter(whole.arg_true(), found)


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
    plain = _basic_to_extended(text)
    part = pl.DataFrame({"t": plain}).select(pl.col("t").str.extract_groups(_ISO).alias("g"))
    part = part.unnest("g")
    y, m, d, hour, minute, second, fraction, offset = (pl.col(str(i)) for i in range(1, 9))
    day = pl.concat_str([y, m.str.zfill(2), d.str.zfill(2)], separator="-")
    midnight = day.str.to_datetime("%Y-%m-%d", time_unit="ms", strict=False).cast(pl.Int64)
    h, mi, s = (x.fill_null("0").cast(pl.Int64) for x in (hour, minute, second))
    ms = fraction.fill_null("0").str.pad_end(3, "0").str.slice(0, 3).cast(pl.Int64, strict=False)
    clock = ((h * 60 + mi) * 60 + s) * 1000 + ms
    # 24:00 is the end of the day, 23:59:60 a leap second
    good = (h < 24) & (mi < 60) & ((s < 60) | ((s == 60) & (mi == 59)))
    good = good | (clock == 86_400_000)
    zone = offset.fill_null("Z").str.replace("Z", "+0000").str.replace(":", "", literal=True)
    zone = zone.str.pad_end(5, "0")
    away, rest = zone.str.slice(1, 2).cast(pl.Int64), zone.str.slice(3, 2).cast(pl.Int64)
    minutes = pl.when(zone.str.starts_with("-")).then(-away * 60 - rest).otherwise(away * 60 + rest)
    good = good & (away < 16) & (rest < 60)
    return part.select(pl.when(good).then(midnight + clock - minutes * 60_000)).to_series()


def _basic_to_extended(text: pl.Series) -> pl.Series:
    """20230701T120000Z, 2023-W26-6, 2023-182 and zone names of UTC as _ISO reads them."""
    out = (
        text.str.replace("\u2212", "-", literal=True)
        .str.replace(r"(?i)(Z|[+-]00(?::?00)?)?\s*\[(?:UTC|GMT|Etc/UTC|Z)\]$", "Z")
        .str.replace(r"(?i)\s*(?:UTC|GMT|Z)$", "Z")
        .str.replace(r"(?i)\s*(?:UTC|GMT)\s*([+-])(\d)$", "${1}0$2")
        .str.replace(r"(?i)\s*(?:UTC|GMT)\s*([+-]\d{2}(?::?\d{2})?)$", "$1")
        .str.replace(r"^(\d{4})(\d{2})(\d{2})([Tt ].*)$", "$1-$2-$3$4")
    )
    odd = out.str.contains(r"^\d{4}-?[Ww]\d{2}|^\d{4}-\d{3}(?:[Tt ]|$)|^\d{7}[Tt ]").fill_null(
        False
    )
    if odd.any():
        out = out.scatter(odd.arg_true(), [_calendar_day(x) for x in out.filter(odd)])
    out = out.str.replace(r"^(\S{10}[Tt ]+\d{2})(\d{2})(\d{2})", "$1:$2:$3")
    return out.str.replace(r"^(\S{10}[Tt ]+\d{2})(\d{2})([^\d]|$)", "$1:$2$3")


def _calendar_day(text: str) -> str | None:
    """A week date (2023-W26-6; without a day: Monday) or an ordinal date (2023-182) as a day."""
    week = re.match(r"(\d{4})-?[Ww](\d{2})(?:-?([1-7]))?(?=[Tt ]|$)", text)
    day = re.match(r"(\d{4})-?(\d{3})(?=[Tt ]|$)", text)
    try:
        if week is not None:
            year, number, weekday = week.groups("1")
            found = dt.date.fromisocalendar(int(year), int(number), int(weekday))
            return f"{found}{text[week.end() :]}"
        if day is not None:
            found = dt.datetime.strptime(f"{day[1]} {day[2]}", "%Y %j").date()
            return f"{found}{text[day.end() :]}" if found.year == int(day[1]) else None
    except ValueError:
        pass
    return None
