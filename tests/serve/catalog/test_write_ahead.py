"""The log of item changes: what it keeps when processes die and disks are full."""

from __future__ import annotations

import errno
import os

import pytest

from r2ec_fast.serve.catalog.write_ahead import WriteAheadLog

HEADER = {"table": "abc", "format": 1}
RECORDS = [{"put": [{"id": i, "title": f"tï{i}\n"}]} for i in range(5)]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "items.log"
    log = WriteAheadLog(file, HEADER)
    for record in RECORDS:
        log.append(record)
    log.close()
    return file


def read(path, header=HEADER) -> list:
    log = WriteAheadLog(path, header)
    try:
        return list(log)
    finally:
        log.close()


def test_records_come_back(path):
    assert read(path) == RECORDS
    assert path.read_bytes().count(b"\n") == 6


def test_a_line_by_hand(tmp_path):
    (tmp_path / "log").write_bytes(b'561bacaf {"a":1}\n')
    assert read(tmp_path / "log", {"a": 1}) == []


def test_every_cut_loses_unfinished_records_only(path, tmp_path):
    """A process killed at any byte."""
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for size in range(len(whole)):
        cut = tmp_path / "cut"
        cut.write_bytes(whole[:size])
        count = max(0, sum(end <= size for end in ends) - 1)
        assert read(cut) == RECORDS[:count]
        log = WriteAheadLog(cut, HEADER)
        log.append({"new": True})
        log.close()
        assert read(cut) == [*RECORDS[:count], {"new": True}]


def test_an_unfinished_header_is_written_again(path, tmp_path):
    """Only zeros, as some file systems leave a file that was extended and not written."""
    file = tmp_path / "zeros"
    file.write_bytes(b"\0" * 100)
    assert read(file) == []


def test_damage_in_the_middle_is_refused(path):
    data = bytearray(path.read_bytes())
    data[data.index(b"\n") + 20] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="record 1 is damaged and others follow"):
        read(path)
    assert path.read_bytes() == bytes(data)


@pytest.mark.parametrize("data", [b"item_id,title\n1,a\n2,b\n", b"hello"])
def test_another_file_is_refused_and_left(tmp_path, data):
    file = tmp_path / "items.csv"
    file.write_bytes(data)
    with pytest.raises(ValueError, match="no log of item changes"):
        read(file)
    assert file.read_bytes() == data


def test_the_log_of_another_table_is_refused(path):
    with pytest.raises(ValueError, match=r"another table \(table differ\)"):
        read(path, HEADER | {"table": "other"})
    assert read(path) == RECORDS


def test_one_process_at_a_time(path):
    log = WriteAheadLog(path, HEADER)
    with pytest.raises(OSError, match="another process has it open"):
        WriteAheadLog(path, HEADER)
    log.close()


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_full_disk_leaves_the_log_as_it_was(path, monkeypatch, call):
    log = WriteAheadLog(path, HEADER)
    before = path.read_bytes()
    real, calls = getattr(os, call), []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            if call == "pwrite":
                real(arguments[0], arguments[1][:7], arguments[2])  # a part of the line
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError, match=r"cannot write .*items\.log: No space left") as caught:
        log.append({"lost": True})
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    log.append({"kept": True})
    assert list(log) == [*RECORDS, {"kept": True}]
    log.close()


def test_an_append_that_could_not_be_done_is_taken_back(path):
    log = WriteAheadLog(path, HEADER)
    log.append({"a": 1})
    log.drop_last()
    assert list(log) == RECORDS
    with pytest.raises(RuntimeError, match="no appended record"):
        log.drop_last()
    log.close()
