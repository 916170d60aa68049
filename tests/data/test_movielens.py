"""MovieLens as published and as re-saved: encodings, line ends, files without usable rows."""

from __future__ import annotations

import pytest

from r2ec_fast.cli import main
from r2ec_fast.data import load_interactions

FLAGS = "|".join(["0"] * 5 + ["1"] + ["0"] * 13)
FILES = {
    "1m": ("ratings.dat", "1::2::4::20\n1::10::3::10\n", "movies.dat",
           "2::Amélie (2001)::Comedy\n10::Être::Drama\n"),
    "10m": ("ratings.dat", "1::2::4.5::20\n1::10::3.5::10\n", "movies.dat",
            "2::Amélie (2001)::Comedy\n10::Être::(no genres listed)\n"),
    "100k": ("u.data", "1\t2\t4\t20\n1\t10\t3\t10\n", "u.item",
             f"2|Amélie (2001)|01-Jan-2001||http://x|{FLAGS}\n10|Être|||http://y|{FLAGS}\n"),
    "25m": ("ratings.csv", "userId,movieId,rating,timestamp\n1,2,4,20\n1,10,3,10\n", "movies.csv",
            'movieId,title,genres\n2,Amélie (2001),Comedy\n10,"Être",Drama\n'),
}  # fmt: skip


def write_set(write, layout, encoding="utf8", end="\n", change=None):
    ratings, events, movies, items = FILES[layout]
    for name, text in ((ratings, events), (movies, items)):
        text = change(name, text) if change else text
        path = write(f"ml/{name}", text.replace("\n", end).encode(encoding))
    return path.parent


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("layout", "encoding"),
    [
        (layout, encoding)
        for layout in FILES
        for encoding in ("utf8", "utf-8-sig", "latin-1", "utf-16")
        if (layout, encoding) != ("25m", "latin-1")  # those CSV files are UTF-8
    ],
)
def test_titles_in_either_encoding(write, layout, encoding, end):
    data = load_interactions(write_set(write, layout, encoding, end))
    titles = dict(zip(data.catalog.ids.ids, data.catalog.titles, strict=True))
    assert titles == {"2": "Amélie (2001)", "10": "Être"}
    assert data.num_events == 2 and data.timestamp.tolist() == [10, 20]


def test_one_wrong_byte_late_in_the_file_makes_it_latin_1(write):
    many = "".join(f"{i}::Title {i}::Drama\n" for i in range(100, 9_000))
    place = write_set(write, "1m", "latin-1", change=lambda n, t: many + t if n[0] == "m" else t)
    assert "Amélie (2001)" in load_interactions(place).catalog.titles


@pytest.mark.parametrize("layout", FILES)
@pytest.mark.parametrize("content", ["", "\n \n", "header only", "not a movie\n", "::::\n"])
def test_movies_without_usable_rows_are_refused_by_name(write, capsys, tmp_path, layout, content):
    movies = FILES[layout][2]
    if content == "header only":
        content = FILES[layout][3].split("\n")[0] + "\n" if layout == "25m" else "# movies\n"
    place = write_set(write, layout, change=lambda n, t: content if n == movies else t)
    status = main(
        ["prepare", "movielens", "--path", str(place), "--output_dir", str(tmp_path / "o")]
    )
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(lines) == 1
    assert movies in lines[0] or "items: no event's item is in the item table" in lines[0], lines


@pytest.mark.parametrize("gone", ["title", "movieId"])
def test_a_movies_table_without_a_column(write, gone):
    place = write_set(write, "25m", change=lambda n, t: t.replace(gone, "x") if n[0] == "m" else t)
    with pytest.raises(ValueError, match=f"movies.csv has no column '{gone}'"):
        load_interactions(place)


def test_genres_may_be_missing(write):
    place = write_set(write, "25m", change=lambda n, t: t.replace("genres", "tags"))
    assert load_interactions(place).catalog.titles == ["Être", "Amélie (2001)"]


@pytest.mark.parametrize("mark", [",", " ", ";"])
def test_ratings_with_another_separator_are_no_items(write, mark):
    place = write_set(write, "1m", change=lambda n, t: t.replace("::", mark) if n[0] == "r" else t)
    with pytest.raises(ValueError, match="no usable event among 2 rows"):
        load_interactions(place)


def test_a_header_in_a_file_that_has_none_is_dropped_and_counted(write):
    header = "UserID::MovieID::Rating::Timestamp\n"
    place = write_set(write, "1m", change=lambda n, t: header + t if n[0] == "r" else t)
    data = load_interactions(place)
    assert data.num_events == 2 and data.report.count("event without readable time") == 1
