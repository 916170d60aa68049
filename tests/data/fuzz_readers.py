"""Mutated files of every format through `r2ec-fast prepare`: read, or refused in one line.

    python tests/data/fuzz_readers.py --files 2000 --seed 0

Prints a table of formats and outcomes; exit status 1 where anything but an error in one line came.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from itertools import count
from pathlib import Path
from unittest import mock

import polars as pl

READ, REFUSED, FAILED = "read", "refused", "TRACEBACK"
USERS, ITEMS, EVENTS = 6, 8, 60


# ---- the files before they are mutated ----------------------------------------------------------


def _rows(rng: random.Random) -> list[tuple[str, str, float, int]]:
    return [
        (
            rng.choice(["u{}", "{}", "ü{}"]).format(rng.randrange(USERS)),
            str(rng.randrange(ITEMS)),
            rng.choice([1, 2.5, 3, 4, 5]),
            1_600_000_000 + 3600 * n,
        )
        for n in range(EVENTS)
    ]


def _table(rng: random.Random) -> pl.DataFrame:
    return pl.DataFrame(
        _rows(rng), schema=["user_id", "item_id", "rating", "timestamp"], orient="row"
    )


def _csv(rng: random.Random) -> dict[str, bytes]:
    return {"log.csv": _table(rng).write_csv().encode(), "items.csv": _items_csv()}


def _items_csv() -> bytes:
    lines = [f'{i},"Title, the ""{i}""th",Comedy|War,{i}.5' for i in range(ITEMS)]
    return "\n".join(["item_id,title,genres,price", *lines]).encode()


def _tsv(rng: random.Random) -> dict[str, bytes]:
    return {"log.tsv": _table(rng).write_csv(separator="\t").encode()}


def _jsonl(rng: random.Random) -> dict[str, bytes]:
    items = [
        json.dumps({"item_id": i, "title": f"T {i}", "genres": ["a", i]}) for i in range(ITEMS)
    ]
    return {
        "log.jsonl": _table(rng).write_ndjson().encode(),
        "items.jsonl": "\n".join(items).encode(),
    }


def _typed(rng: random.Random) -> dict[str, bytes]:
    """Parquet whose columns have types drawn at random, fitting and not."""
    table = _table(rng)
    times = [datetime.fromtimestamp(t, UTC) for t in table["timestamp"]]
    strings = {"user_id": table["user_id"], "item_id": table["item_id"]}
    n = table.height
    numbers = pl.int_range(n, eager=True)
    odd: list[pl.Series] = [
        numbers,
        numbers.cast(pl.Float64) * 1e16,
        numbers.cast(pl.Decimal(20, 2)),
        numbers.cast(pl.UInt8),
        numbers.cast(pl.String).cast(pl.Categorical),
        numbers.cast(pl.String).cast(pl.Binary),
        pl.Series([b"\xff\x00"] * n),
        numbers % 2 == 0,
        pl.Series([None] * n, dtype=pl.Null),
        pl.Series([1e300] * n),
        pl.Series(times),
        pl.Series(times).dt.convert_time_zone("Asia/Tokyo"),
        pl.Series(times).dt.date(),
        pl.Series(times).dt.time(),
        numbers.cast(pl.Duration("us")),
        pl.Series([[1, 2]] * n),
        pl.Series([[[1], ["x"]]] * n, dtype=pl.List(pl.List(pl.String)), strict=False),
        pl.Series([{"a": 1}] * n),
        pl.Series([[1.0, 2.0]] * n, dtype=pl.Array(pl.Float64, 2)),
        pl.Series([float("nan")] * n),
        pl.Series(["20230701"] * n),
    ]
    columns = {**strings, "rating": table["rating"], "timestamp": table["timestamp"]}
    for name in rng.sample(list(columns), rng.randint(0, 2)):
        columns[name] = rng.choice(odd)
    items = {"item_id": [str(i) for i in range(ITEMS)], "title": [f"T{i}" for i in range(ITEMS)]}
    catalog = pl.DataFrame(items)
    for name in rng.sample(["title", "genres", "price", "description", "rating_number"], 2):
        catalog = catalog.with_columns(rng.choice(odd).head(ITEMS).alias(name))
    out = {}
    for name, frame in (("log.parquet", pl.DataFrame(columns)), ("items.parquet", catalog)):
        file = io.BytesIO()
        frame.write_parquet(file)
        out[name] = file.getvalue()
    return out


def _recbole(rng: random.Random) -> dict[str, bytes]:
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    rows = "".join("\t".join(map(str, row)) + "\n" for row in _rows(rng))
    items = "".join(f"{i}\tTitle {i}\tA|B\n" for i in range(ITEMS))
    return {
        "log.inter": (header + rows).encode(),
        "log.item": ("item_id:token\tmovie_title:token_seq\tgenre:token_seq\n" + items).encode(),
    }


def _movielens(rng: random.Random) -> dict[str, bytes]:
    kind = rng.choice(["1m", "100k", "csv"])
    rows = [(u.lstrip("uü"), i, r, t) for u, i, r, t in _rows(rng)]
    if kind == "csv":
        lines = ["userId,movieId,rating,timestamp", *(",".join(map(str, r)) for r in rows)]
        movies = ["movieId,title,genres", *(f'{i},"Amélie, {i}",A|B' for i in range(ITEMS))]
        return {"ratings.csv": "\n".join(lines).encode(), "movies.csv": "\n".join(movies).encode()}
    mark = "::" if kind == "1m" else "\t"
    ratings = "".join(mark.join(map(str, r)) + "\n" for r in rows).encode()
    encoding = rng.choice(["latin-1", "utf8"])
    if kind == "1m":
        movies = "".join(f"{i}::Amélie {i}::A|B\n" for i in range(ITEMS))
        return {"ratings.dat": ratings, "movies.dat": movies.encode(encoding)}
    flags = "|".join("01"[k % 2] for k in range(19))
    movies = "".join(f"{i}|Amélie {i}|01-Jan-1995||http://x|{flags}\n" for i in range(ITEMS))
    return {"u.data": ratings, "u.item": movies.encode(encoding)}


def _sequences(rng: random.Random) -> dict[str, bytes]:
    lines = [
        " ".join([f"u{u}", *(str(rng.randrange(ITEMS)) for _ in range(rng.randint(1, 9)))])
        for u in range(USERS)
    ]
    return {"log.txt": "\n".join(lines).encode()}


def _amazon(rng: random.Random) -> dict[str, bytes]:
    reviews = [
        json.dumps(
            {"user_id": u, "parent_asin": f"B{int(i):09d}", "rating": r, "timestamp": t * 1000}
        )
        for u, i, r, t in _rows(rng)
    ]
    items = [
        json.dumps(
            {
                "parent_asin": f"B{i:09d}",
                "title": f"Title {i}",
                "price": rng.choice([i, f"${i}.00", None]),
                "average_rating": 4.5,
                "rating_number": i,
                "description": [f"Text {i}"],
            }
        )
        for i in range(ITEMS)
    ]
    return {"log.jsonl": "\n".join(reviews).encode(), "meta.jsonl": "\n".join(items).encode()}


FORMATS: dict[str, Callable[[random.Random], dict[str, bytes]]] = {
    "csv": _csv,
    "tsv": _tsv,
    "jsonl": _jsonl,
    "parquet": _typed,
    "recbole": _recbole,
    "movielens": _movielens,
    "sequences": _sequences,
    "amazon": _amazon,
}


# ---- mutations -----------------------------------------------------------------------------------

ODD_VALUES = (
    b"", b"null", b"NaN", b"1e300", b"1e400", b"-1", b"20230701", b"2023-07-01 12:00:00+00",
    b"24:00", b"\xff", b"caf\xe9", b"\xef\xbf\xbd", b"\x00", b'"', b"'", b",", b"\t", b"::",
    b"\r", b"\n", b"\r\n", b"{", b"[", b"}", b"]", b"\\ud800", b"true", b"0345337700", b"9" * 400,
    b"=1+1", b" ", b"\xe2\x80\xa8", b'{"a": [1]}', b"12345678901234567890.0", b"user_id,item_id",
    b"99999999", b"x" * 5000,
)  # fmt: skip


def _flip(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if out:
            out[rng.randrange(len(out))] = rng.randrange(256)
    return bytes(out)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _drop_start(data: bytes, rng: random.Random) -> bytes:
    return data[rng.randrange(min(len(data), 200) + 1) :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice(ODD_VALUES) + data[at:]
    return data


def _replace_values(data: bytes, rng: random.Random) -> bytes:
    words = [w for w in set(data.replace(b"\n", b",").split(b",")) if w]
    if not words:
        return data
    return data.replace(rng.choice(sorted(words)), rng.choice(ODD_VALUES), rng.randint(1, 9))


def _shuffle_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    rng.shuffle(lines)
    return b"\n".join(lines)


def _repeat(data: bytes, rng: random.Random) -> bytes:
    return data * rng.randint(2, 3)


def _line_ends(data: bytes, rng: random.Random) -> bytes:
    return data.replace(b"\n", rng.choice([b"\r", b"\r\n", b"\n\n", b"\x0b", b"\xc2\x85"]))


def _separator(data: bytes, rng: random.Random) -> bytes:
    marks = [b",", b"\t", b"::", b";", b"|", b" "]
    return data.replace(rng.choice(marks), rng.choice(marks))


def _encoding(data: bytes, rng: random.Random) -> bytes:
    text = data.decode("utf8", "replace")
    kind = rng.choice(
        ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "cp1252", "utf-7"]
    )
    return text.encode(kind, "replace")


def _pack(data: bytes, rng: random.Random) -> bytes:
    import bz2
    import lzma
    import zipfile
    import zlib

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("x", data)
    kinds = [gzip.compress(data), gzip.compress(data), bz2.compress(data), lzma.compress(data)]
    out = rng.choice([*kinds, packed.getvalue(), zlib.compress(data)])
    return rng.choice([_cut, _flip])(out, rng) if rng.random() < 0.4 else out


def _json_array(data: bytes, rng: random.Random) -> bytes:
    return b"[" + b",\n".join(data.split(b"\n")) + b"]"


def _garbage(data: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(3000))


def _empty(data: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"", b"\n", b" \n\n", b"\xef\xbb\xbf", b"\x00" * 20, b"\xff\xfe"])


def _no_header(data: bytes, rng: random.Random) -> bytes:
    return data.split(b"\n", 1)[-1]


def _header_only(data: bytes, rng: random.Random) -> bytes:
    return data.split(b"\n", 1)[0]


def _same(data: bytes, rng: random.Random) -> bytes:
    return data


MUTATIONS = (
    _flip, _cut, _drop_start, _insert, _insert, _replace_values, _replace_values, _shuffle_lines,
    _repeat, _line_ends, _separator, _encoding, _pack, _json_array, _garbage, _empty, _no_header,
    _header_only, _same,
)  # fmt: skip
ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet", ".txt", ".inter", ".csv.gz", ".CSV.GZ", ".json")


# ---- one file ------------------------------------------------------------------------------------


def write_case(kind: str, place: Path, rng: random.Random) -> list[str]:
    """Write mutated files of a format into `place`; returns the arguments of `r2ec-fast`."""
    files = FORMATS[kind](rng)
    mutate = kind != "parquet" or rng.random() < 0.35  # of Parquet the types are the subject
    for name in rng.sample(list(files), rng.randint(1, len(files))):
        for _ in range(rng.choice([1, 1, 2]) if mutate else 0):
            files[name] = rng.choice(MUTATIONS)(files[name], rng)
    paths = {}
    for name, content in files.items():
        path = place / name
        if kind not in ("movielens", "recbole") and rng.random() < 0.15:
            path = path.with_suffix(rng.choice(ENDINGS))
        path.write_bytes(content)
        paths[name] = path
    if rng.random() < 0.02:
        chosen = rng.choice(list(paths.values()))
        chosen.unlink()
        chosen.mkdir()
    log = next(iter(paths.values()))
    common = ["--output_dir", str(place / "out")]
    if kind == "movielens":
        return ["prepare", "movielens", "--path", str(place), *common]
    if kind == "amazon":
        small = ["--min_items", "0", "--history_k_core", "0", "--start", "2020-01-01"]
        paths_given = ["--reviews", str(log), "--metadata", str(paths["meta.jsonl"])]
        return ["prepare", "amazon", *paths_given, *small, "--progress", "false", *common]
    items = next((p for n, p in paths.items() if n.startswith("items")), None)
    given = [] if items is None else ["--items", str(items)]
    return ["prepare", "generic", "--path", str(log), *given, *common]


def run_case(arguments: list[str]) -> tuple[str, str]:
    """The outcome of one command, and what it wrote to stderr."""
    from r2ec_fast.cli import main

    errors = io.StringIO()
    with tempfile.TemporaryFile() as kept, contextlib.redirect_stdout(io.StringIO()):
        import os

        stderr = os.dup(2)  # what native code writes counts too
        os.dup2(kept.fileno(), 2)
        try:
            with contextlib.redirect_stderr(errors):
                status = main(arguments)
        except BaseException:
            return FAILED, traceback.format_exc()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        kept.seek(0)
        text = errors.getvalue() + kept.read().decode("utf8", "replace")
    lines = text.splitlines()
    if status == 0 and not lines:
        return READ, ""
    if status == 2 and len(lines) == 1 and lines[0].startswith("r2ec-fast: error: "):
        return REFUSED, text
    return FAILED, text


def fuzz(
    files: int, seed: int, keep: Path | None = None
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Outcomes by format, and a description of every failure."""
    counts: Counter[tuple[str, str]] = Counter()
    failures: list[str] = []
    with _quick():
        return _fuzz(files, seed, keep, counts, failures)


@contextlib.contextmanager
def _quick():
    """One parser for all commands, and the report's picture for one in ten alone: both take longer
    than reading the files, and neither depends on them much."""
    from r2ec_fast import cli
    from r2ec_fast.data import prepare

    picture, drawn = prepare.summary_png, count()

    def sometimes(dataset):
        return picture(dataset) if next(drawn) % 10 == 0 else b""

    with (
        mock.patch.object(cli, "build_parser", cache(cli.build_parser)),
        mock.patch.object(prepare, "summary_png", sometimes),
    ):
        yield


def _fuzz(files, seed, keep, counts, failures):
    kinds = list(FORMATS)
    for number in range(files):
        kind = kinds[number % len(kinds)]
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            arguments = write_case(kind, place, random.Random(f"{seed}-{number}"))
            outcome, text = run_case(arguments)
            if outcome == FAILED:
                failures.append(f"file {number} ({kind}): {' '.join(arguments)}\n{text[-1500:]}")
                if keep is not None:
                    shutil.copytree(place, keep / str(number), dirs_exist_ok=True)
        counts[kind, outcome] += 1
    return counts, failures


def table(counts: Counter[tuple[str, str]]) -> str:
    """Formats down, outcomes across."""
    lines = [f"{'format':<12}{READ:>10}{REFUSED:>10}{FAILED:>12}{'all':>8}"]
    rows = [
        (kind, [counts[kind, outcome] for outcome in (READ, REFUSED, FAILED)]) for kind in FORMATS
    ]
    rows.append(("all", [sum(column) for column in zip(*(r for _, r in rows), strict=True)]))
    for kind, (read, refused, failed) in rows:
        total = read + refused + failed
        lines.append(f"{kind:<12}{read:>10,}{refused:>10,}{failed:>12,}{total:>8,}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="copy the files of failures here")
    chosen = parser.parse_args()
    counts, failures = fuzz(chosen.files, chosen.seed, chosen.keep)
    for failure in failures:
        sys.stdout.write(failure + "\n\n")
    sys.stdout.write(table(counts) + "\n")
    sys.exit(1 if failures else 0)
