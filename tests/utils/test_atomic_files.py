"""A file is written whole or not at all."""

import pytest

from r2ec_fast.utils.atomic_files import write_whole


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "notes.txt"
    write_whole(path, "é\n")
    write_whole(path, "ü\n")
    assert path.read_bytes() == "ü\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_what_was_there_stays_where_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "notes.txt"
    write_whole(path, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match=r"output_file: cannot write to .*notes.txt"):
        write_whole(path, "new", "output_file")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
