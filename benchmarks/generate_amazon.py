"""Generated files in the raw schema of Amazon Reviews 2023, clean or with the faults of real ones.

    python benchmarks/generate_amazon.py DIRECTORY --reviews 1000000

writes Generated.jsonl.gz (reviews) and meta_Generated.jsonl.gz (metadata). Nothing in them is real.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

KINDS = ("Guitar", "Violin", "Drum", "Flute", "Keyboard", "Cello", "Horn", "Ukulele", "Amplifier")
ADJECTIVES = ("Acoustic", "Electric", "Compact", "Studio", "Vintage", "Concert", "Travel", "Silent")
TEXT = (
    "the sound is warm and full it arrived on time and my daughter plays it every day strings "
    "were fine tuning holds well for the price I would buy it again but the case feels thin"
)
WORDS = TEXT.split()
FIRST_MS, LAST_MS = 1_388_534_400_000, 1_696_118_400_000  # 2014-01-01 .. 2023-10-01
LETTERS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"))
CHUNK = 100_000


def generate(
    directory: str | Path,
    *,
    reviews: int = 1_000_000,
    seed: int = 0,
    faults: bool = True,
    kind: str = "jsonl",
    level: int = 1,
) -> tuple[Path, Path]:
    """Write a review file and a metadata file.

    Args:
        directory: created.
        reviews: review rows; there are about reviews/10 users and reviews/40 items.
        seed: everything follows from it.
        faults: mix in what real files have: missing, long and blank titles, entities, odd prices,
            repeated ids, duplicate reviews, odd times and ratings, broken lines and bytes.
        kind: "jsonl" (raw reviews) or "csv" (rating_only; not 5-core).
        level: gzip level.

    Returns:
        Paths of the reviews and of the metadata.
    """
    if kind not in ("jsonl", "csv"):
        raise ValueError(f"kind: expected 'jsonl' or 'csv', got {kind!r}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    items = max(20, reviews // 40)
    asins = _asins(rng, items)
    users = _user_ids(rng, max(5, reviews // 10))
    review_path = directory / f"Generated.{kind}.gz"
    metadata_path = directory / "meta_Generated.jsonl.gz"
    with gzip.open(metadata_path, "wb", compresslevel=level) as file:
        for block in _metadata(rng, asins, faults):
            file.write(block)
    with gzip.open(review_path, "wb", compresslevel=level) as file:
        if kind == "csv":
            file.write(b"user_id,parent_asin,rating,timestamp\n")
        for block in _reviews(rng, users, asins, reviews, faults, kind):
            file.write(block)
    return review_path, metadata_path


def _asins(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct ids of ten characters; one in fifty is all digits, as ISBNs are."""
    numbers = rng.permutation(count)
    return [f"{n:010d}" if n % 50 == 0 else f"B0{n:08X}" for n in numbers.tolist()]


def _user_ids(rng: np.random.Generator, count: int) -> list[str]:
    letters = LETTERS[rng.integers(0, 32, (count, 20))]
    return [f"AE{n:06X}" + "".join(row) for n, row in enumerate(letters.tolist())]


def _metadata(rng: np.random.Generator, asins: list[str], faults: bool) -> Iterator[bytes]:
    lines: list[bytes] = []
    for n, asin in enumerate(asins):
        lines.append(_item(rng, asin, n, faults))
        if faults and n % 211 == 7:  # a second row of the same id with another title
            lines.append(_item(rng, asin, n + 1, faults))
        if faults and n % 5003 == 11:
            lines.append(b'{"main_category": "Musical Instruments", "title": "Half a li\n')
        if len(lines) >= CHUNK:
            yield b"".join(lines)
            lines.clear()
    yield b"".join(lines)


def _item(rng: np.random.Generator, asin: str, n: int, faults: bool) -> bytes:
    draw = rng.random(6)
    brand = f"Maker{n % 97}"
    title: str | None = (
        f"{brand} {ADJECTIVES[n % 8]} {KINDS[n % 9]} {'with Case ' if draw[0] < 0.3 else ''}{n}"
    )
    price: object = round(5 + 400 * draw[1] ** 3, 2)
    parent: object = asin
    if faults:
        fault = int(draw[2] * 100)
        titles = {
            0: None,
            1: "  ",
            2: '<span id="productTitle">',
            3: f"{title} &amp; Strings &quot;Set&quot;",
            4: f"{title} " + "very " * 25 + "long",
            5: f"{title} for beginners" + "  and more" * 12,
            6: f"{title} <b>new</b>",
        }
        title = titles.get(fault, title)
        if draw[3] < 0.3:
            odd = (None, None, None, None, "—", "from 8.99", "$1,299.00", "12.50", "")
            price = odd[int(draw[4] * len(odd))]
        if fault == 7 and asin.isdigit():
            parent = int(asin)
    record = {
        "main_category": "Musical Instruments",
        "title": title,
        "average_rating": round(1 + 4 * draw[5], 1),
        "rating_number": int(10 ** (4 * draw[1])),
        "features": ["Full size", "Ready to play"],
        "description": [f"A {ADJECTIVES[n % 8].lower()} instrument by {brand}.", "Made to last."]
        if draw[4] < 0.7
        else [],
        "price": price,
        "images": [{"thumb": "", "large": "", "variant": "MAIN", "hi_res": None}],
        "videos": [],
        "store": brand,
        "categories": ["Musical Instruments", KINDS[n % 9]],
        "details": {"Item Weight": f"{n % 40} pounds", "Brand": brand},
        "parent_asin": parent,
        "bought_together": None,
    }
    line = json.dumps(record).encode() + b"\n"
    if faults and n % 1009 == 5:
        line = line.replace(b"Made to last.", b"Caf\xe9 style.")
    return line


def _reviews(
    rng: np.random.Generator,
    users: list[str],
    asins: list[str],
    total: int,
    faults: bool,
    kind: str,
) -> Iterator[bytes]:
    texts = [" ".join(rng.choice(WORDS, int(n))) for n in rng.integers(5, 120, 500)]
    heads = [" ".join(rng.choice(WORDS, 4)).capitalize() for _ in range(200)]
    done = 0
    while done < total:
        size = min(CHUNK, total - done)
        # Active users and popular items: the square (cube) root of a uniform draw is dense near 1.
        user = (len(users) * rng.random(size) ** 1.6).astype(np.int64).tolist()
        item = (len(asins) * rng.random(size) ** 2.2).astype(np.int64).tolist()
        share = rng.random(size) ** 0.6  # more reviews in later years
        stamp = (FIRST_MS + (LAST_MS - FIRST_MS) * share).astype(np.int64).tolist()
        stars = np.minimum(5, 1 + (rng.random(size) ** 0.5 * 5).astype(np.int64)).tolist()
        text = rng.integers(0, len(texts), size).tolist()
        lines = []
        for i, (u, v, t, s, x) in enumerate(zip(user, item, stamp, stars, text, strict=True)):
            row = (users[u], asins[v], float(s), t)
            make = _csv_line if kind == "csv" else _json_line
            lines.append(make(*row, heads[x % 200], texts[x]))
            if faults and i % 997 == 0:
                lines.extend(_faulty(done + i, row, make, heads[0], texts[0]))
        yield "".join(lines).encode("utf8", errors="surrogateescape")
        done += size


def _faulty(n: int, row: tuple, make, head: str, text: str) -> list[str]:
    """Further rows beside a good one: the faults that files have."""
    user, asin, stars, stamp = row
    kinds = [
        lambda: make(user, asin, stars, stamp, head, text),  # exact duplicate
        lambda: make(user, asin, stars, stamp + 86_400_000, head, text),  # reviewed again
        lambda: make(user, asin, -1.0, stamp, head, text),
        lambda: make("", asin, stars, stamp, head, text),
        lambda: make(user, asin, stars, "soon", head, text),
        lambda: make(user, "B0UNKNOWN0", stars, stamp, head, text),
        lambda: make(user, asin, stars, "2021-03-04T05:06:07Z", head, text),
        lambda: make(user, asin, stars, stamp // 1000 + 1, head, text),
        lambda: '{"rating": 5.0, "title": "Half\n' if make is _json_line else "a,b,c,d,e,f\n",
        lambda: make(user, asin, stars, stamp + 1, head, "caf\udce9 " + text),
    ]
    return [kinds[(n // 997) % len(kinds)]()]


def _json_line(user, asin, stars, stamp, head, text) -> str:
    stamp = stamp if isinstance(stamp, int) else f'"{stamp}"'
    return (
        f'{{"rating": {stars}, "title": "{head}", "text": "{text}", "images": [], '
        f'"asin": "{asin}", "parent_asin": "{asin}", "user_id": "{user}", "timestamp": {stamp}, '
        '"helpful_vote": 0, "verified_purchase": true}\n'
    )


def _csv_line(user, asin, stars, stamp, head, text) -> str:
    return f"{user},{asin},{stars},{stamp}\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--reviews", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=("jsonl", "csv"), default="jsonl")
    parser.add_argument("--clean", action="store_true", help="no faults")
    args = parser.parse_args()
    begin = time.perf_counter()
    paths = generate(
        args.directory,
        reviews=args.reviews,
        seed=args.seed,
        faults=not args.clean,
        kind=args.kind,
    )
    for path in paths:
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    print(f"{time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
