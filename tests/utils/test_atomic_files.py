"""Nothing of a user's is lost where this program writes into a directory."""

from __future__ import annotations

import os
import stat

import pytest
from _support.toy import toy_dataset, toy_model

from r2ec_fast.data import RecDataset
from r2ec_fast.model import R2ecModel
from r2ec_fast.utils.atomic_files import (
    COMMITTED,
    check_directory,
    finish_interrupted,
    updated_directory,
    write_whole,
)


def owned(name: str) -> bool:
    return name.startswith("our")


def tree(directory) -> dict[str, str]:
    """Relative path -> text of every file below a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_text()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_new_directory_appears_whole(tmp_path):
    with updated_directory(tmp_path / "a" / "new", owned=owned) as temporary:
        (temporary / "our.txt").write_text("1")
        assert not (tmp_path / "a" / "new").exists()
    assert tree(tmp_path) == {"a/new/our.txt": "1"}
    assert stat.S_IMODE((tmp_path / "a" / "new").stat().st_mode) == 0o755


def test_only_the_programs_own_files_are_replaced(tmp_path):
    for name in ("our.txt", "our-old.txt", "README.md", "LICENSE", "weights.gguf", "our"):
        if name != "our":
            (tmp_path / name).write_text("before")
    for name in (".git", "photos", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "LICENSE")
    with updated_directory(tmp_path, owned=owned, kept="README.md".__eq__) as temporary:
        for name in ("our.txt", "our-new.txt", "README.md"):
            (temporary / name).write_text("after")
        (temporary / "ourfolder").mkdir()
        (temporary / "ourfolder" / "file").write_text("after")
    assert tree(tmp_path) == {
        "our.txt": "after",
        "our-new.txt": "after",
        "ourfolder/file": "after",
        "README.md": "before",
        "LICENSE": "before",
        "weights.gguf": "before",
        ".git/file": "before",
        "photos/file": "before",
        ".hidden/file": "before",
        "link": "before",
    }
    assert (tmp_path / "link").is_symlink()


def test_a_failing_block_changes_nothing(tmp_path):
    (tmp_path / "our.txt").write_text("before")
    with pytest.raises(KeyboardInterrupt), updated_directory(tmp_path, owned=owned) as temporary:
        (temporary / "our.txt").write_text("after")
        raise KeyboardInterrupt
    assert tree(tmp_path) == {"our.txt": "before"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("steps", range(6))
def test_a_process_killed_among_its_renames_is_finished_later(tmp_path, monkeypatch, steps):
    for name in ("our1", "our2", "our-old", "theirs"):
        (tmp_path / name).write_text("before")
    done = 0
    replace = os.replace

    def stops(source, target):
        nonlocal done
        if done == steps:
            raise KeyboardInterrupt  # as far as a killed process came
        done += 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", stops)
    monkeypatch.setattr("shutil.rmtree", lambda *given, **options: None)  # it tidies nothing
    try:
        with updated_directory(tmp_path, owned=owned) as temporary:
            for name in ("our1", "our2", "our3"):
                (temporary / name).write_text("after")
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    finish_interrupted(tmp_path)
    found = {name: text for name, text in tree(tmp_path).items() if "partial" not in name}
    if steps == 0:
        assert found == dict.fromkeys(("our1", "our2", "our-old", "theirs"), "before")
    else:
        assert found == {**dict.fromkeys(("our1", "our2", "our3"), "after"), "theirs": "before"}
    assert not (tmp_path / COMMITTED).exists()


def test_a_mount_point_is_written_inside(tmp_path, monkeypatch):
    (tmp_path / "mounted").mkdir()
    target, replace = tmp_path / "mounted", os.replace

    def busy(source, to):
        if target in (source, to):
            raise OSError(16, "Device or resource busy")
        replace(source, to)

    monkeypatch.setattr(os, "replace", busy)
    with updated_directory(target, owned=owned) as temporary:
        (temporary / "our.txt").write_text("1")
    assert tree(tmp_path) == {"mounted/our.txt": "1"}


@pytest.mark.parametrize("write", ["model", "dataset", "updated", "checked"])
def test_a_file_is_refused_and_stays(tmp_path, write):
    place = tmp_path / "place"
    place.write_text("a user's")
    with pytest.raises((OSError, ValueError), match=r"place.*file|file.*place"):
        if write == "model":
            toy_model().save_pretrained(place)
        elif write == "dataset":
            toy_dataset().save(place)
        elif write == "checked":
            check_directory(place, "output_dir")
        else:
            with updated_directory(place, owned=owned):
                pass
    assert tree(tmp_path) == {"place": "a user's"}


def test_a_model_comes_into_a_clone_without_a_loss(tmp_path):
    clone = tmp_path / "clone"
    model = toy_model()
    model.save_pretrained(clone)
    for name in ("README.md", "LICENSE", "model.gguf", "pytorch_model.bin", "notes.txt"):
        (clone / name).write_text("a user's")
    (clone / ".git").mkdir()
    (clone / ".git" / "HEAD").write_text("ref")
    (clone / "model-00001-of-00002.safetensors").write_text("of the model that is replaced")
    toy_model(seed=1).save_pretrained(clone)
    found = tree_names(clone)
    assert {"README.md", "LICENSE", "model.gguf", "pytorch_model.bin", "notes.txt"} <= found
    assert ".git/HEAD" in found and "model-00001-of-00002.safetensors" not in found
    assert (clone / "README.md").read_text() == "a user's"
    again = R2ecModel.from_pretrained(clone)
    assert again.lm_head_weight.shape == model.lm_head_weight.shape


def test_a_data_set_is_replaced_among_other_files(tmp_path):
    toy_dataset().save(tmp_path / "set")
    (tmp_path / "set" / "notes.txt").write_text("a user's")
    toy_dataset(users=9).save(tmp_path / "set")
    assert (tmp_path / "set" / "notes.txt").read_text() == "a user's"
    assert RecDataset.load(tmp_path / "set").data.num_users == 9


def tree_names(directory) -> set[str]:
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


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
