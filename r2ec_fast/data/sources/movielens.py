"""MovieLens' directory layouts: 100k, 1m, 25m and latest-small."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from r2ec_fast.data.blocks import ReadStats, is_utf8
from r2ec_fast.data.formats import TextFormat
from r2ec_fast.data.reader import add_read_lines, column_names, read_blocks
from r2ec_fast.data.report import LoadReport

GENRES_100K = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
_ITEM_100K = ("movieId", "title", "released", "video", "url", *GENRES_100K)
_EVENTS = ("userId", "movieId", "rating", "timestamp")


@dataclass(frozen=True)
class MovieLensLayout:
    """Files and formats of one MovieLens directory."""

    name: str
    events: Path
    event_form: TextFormat
    items: Path
    item_form: TextFormat

    def read_items(self, report: LoadReport) -> pl.DataFrame:
        """Raw item table: item_id, title, genres."""
        stats = ReadStats(id_columns=("movieId",))
        columns = list(_ITEM_100K) if self.name == "100k" else ["movieId", "title", "genres"]
        if self.name == "csv" and "genres" not in column_names(self.items, self.item_form):
            columns.remove("genres")
        blocks = list(read_blocks(self.items, columns, self.item_form, stats))
        if not blocks:
            raise ValueError(f"path: {self.items} has no rows")
        raw = pl.concat(blocks)
        add_read_lines(stats, report)
        if self.name == "100k":
            flags = [
                pl.when(pl.col(genre) == "1").then(pl.lit(genre)).alias(genre)
                for genre in GENRES_100K
            ]
            genres = pl.concat_str(flags, separator="|", ignore_nulls=True)
            raw = raw.select("movieId", "title", genres.alias("genres"))
        return raw.rename({"movieId": "item_id"}).select("item_id", *raw.columns[1:])


def find_movielens(directory: str | Path) -> MovieLensLayout:
    """Recognise a MovieLens directory; raises ValueError listing what was looked for."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"path: expected a MovieLens directory, got the file {directory}")
    layouts = [
        MovieLensLayout(
            "csv",
            directory / "ratings.csv",
            TextFormat("csv"),
            directory / "movies.csv",
            TextFormat("csv"),
        ),
        MovieLensLayout(
            "1m",
            directory / "ratings.dat",
            TextFormat("tsv", "::", None, "utf8", _EVENTS),
            directory / "movies.dat",
            TextFormat("tsv", "::", None, "utf8", ("movieId", "title", "genres")),
        ),
        MovieLensLayout(
            "100k",
            directory / "u.data",
            TextFormat("tsv", "\t", None, "utf8", _EVENTS),
            directory / "u.item",
            TextFormat("tsv", "|", None, "utf8", _ITEM_100K),
        ),
    ]
    for layout in layouts:
        if layout.events.exists() and layout.items.exists():
            return replace(
                layout,
                event_form=_with_encoding(layout.events, layout.event_form),
                item_form=_with_encoding(layout.items, layout.item_form),
            )
    pairs = ", ".join(f"{x.events.name} + {x.items.name}" for x in layouts)
    raise ValueError(
        f"path: {directory} is no MovieLens directory; expected one of: {pairs}; "
        f"found {sorted(p.name for p in directory.iterdir())[:20]}"
    )


def _with_encoding(path: Path, form: TextFormat) -> TextFormat:
    """The files of 1998 and 2003 are Latin-1; those of 2009 and re-saved ones are UTF-8."""
    if form.names is None or not path.is_file() or is_utf8(path):
        return form
    return replace(form, encoding="latin-1")
