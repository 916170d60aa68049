"""Files that are either whole or absent: written under a temporary name, then renamed.

A directory that is new appears by one rename. One that exists may hold what others put there, so
nothing in it is touched but the files of this program: the new ones are written to a folder inside
it, that folder is renamed to COMMITTED once they are whole, and then each file is renamed into its
place. A process killed before the first rename has changed nothing; one killed later has left
COMMITTED behind, and :func:`finish_interrupted` ends its work. The next writer removes the
unfinished files of processes that are gone.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import platform
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".r2ec-partial-"  # how a folder of unfinished files begins; host and process follow
COMMITTED = ".r2ec-committed"  # the folder of files that are whole and on their way
_OBSOLETE = ".obsolete.json"  # in it: the names that go


@contextmanager
def updated_directory(
    directory: str | os.PathLike[str],
    argument: str = "directory",
    *,
    owned: Callable[[str], bool],
    kept: Callable[[str], bool] = lambda name: False,
) -> Iterator[Path]:
    """Yield a temporary directory whose files come into ``directory`` when the block succeeds.

    Args:
        directory: made if it does not exist.
        argument: what the caller calls it, for messages.
        owned: whether a name is one that the program writes here. Files of such names that are not
            written anew are removed; every other file, folder or link stays.
        kept: names that stay as they are where they exist, even if they are written anew.

    Raises:
        NotADirectoryError: ``directory`` is a file.
        OSError: it cannot be written; both name ``directory`` and ``argument``.
    """
    target = Path(directory)
    with _named_errors(target, argument):
        _refuse_file(target)
        new = not target.exists()
        finish_interrupted(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.parent if new else target
        prefix = f"{PARTIAL}{_host()}-{os.getpid()}-" + (f"{target.name}-" if new else "")
        _remove_abandoned(beside)
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=beside))
    try:
        yield temporary
        if new and not target.exists():
            temporary.chmod(0o755)
            os.replace(temporary, target)
            return
        written = {path.name for path in temporary.iterdir()}
        for name in filter(kept, written & _names(target)):
            _remove(temporary / name)
        obsolete = sorted(name for name in _names(target) - written if owned(name))
        (temporary / _OBSOLETE).write_text(json.dumps(obsolete))
        with _named_errors(target, argument):
            os.replace(temporary, target / COMMITTED)
            finish_interrupted(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def finish_interrupted(directory: str | os.PathLike[str]) -> None:
    """Bring into place what a process that was killed had written whole; drop what it had not."""
    target = Path(directory)
    committed = target / COMMITTED
    if committed.is_dir():
        if (committed / _OBSOLETE).is_file():
            for name in json.loads((committed / _OBSOLETE).read_text()):
                _remove(target / name)
            (committed / _OBSOLETE).unlink()
        for path in sorted(committed.iterdir()):
            place = target / path.name
            if place.is_dir() and not place.is_symlink():
                _remove(place)  # a folder is no target of a rename
            os.replace(path, place)
        committed.rmdir()


def remove_partial(directory: str | os.PathLike[str]) -> None:
    """Remove what killed processes left unfinished in ``directory`` and its subfolders."""
    for path in [*Path(directory).glob(f"{PARTIAL}*"), *Path(directory).glob(f"*/{PARTIAL}*")]:
        shutil.rmtree(path, ignore_errors=True)


def _remove_abandoned(directory: Path) -> None:
    for path in directory.glob(f"{PARTIAL}*"):
        host, number, *_ = [*path.name.removeprefix(PARTIAL).split("-"), ""]
        if host == _host() and number.isdigit() and not _is_running(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _host() -> str:
    """This machine, in eight digits: a file system may have writers on several."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def remove_owned(directory: str | os.PathLike[str], owned: Callable[[str], bool]) -> bool:
    """Remove the program's own files of a directory, and it too if nothing else was in it; returns
    whether it is gone."""
    target = Path(directory)
    for name in filter(owned, _names(target)):
        _remove(target / name)
    with suppress(OSError):
        target.rmdir()
    return not target.exists()


def put_aside(path: str | os.PathLike[str]) -> Path:
    """Rename a file or directory to the first free ``aside-N-NAME`` beside it; returns that."""
    path = Path(path)
    names = (f"aside-{number}-{path.name}" for number in itertools.count(1))
    target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    return path.rename(target)


@contextmanager
def replaced_file(path: str | os.PathLike[str], argument: str = "path") -> Iterator[Path]:
    """Yield a temporary path whose file takes the place of ``path`` when the block succeeds.

    Raises OSError, naming ``path`` and the caller's ``argument``, where it cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with _named_errors(target, argument):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], text: str, argument: str = "path") -> None:
    """Write ``text`` as UTF-8, whole or not at all; raises as :func:`replaced_file` does."""
    with replaced_file(path, argument) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_writable(path: str | os.PathLike[str] | None, argument: str = "path") -> None:
    """Raise before long work the OSError that :func:`replaced_file` would raise after it."""
    if path is None:
        return
    target = Path(path)
    with _named_errors(target, argument):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _write_into(target.parent)


def check_directory(directory: str | os.PathLike[str], argument: str = "directory") -> None:
    """Make a directory that can be written to, or raise OSError that names it and ``argument``."""
    with _named_errors(Path(directory), argument):
        _refuse_file(Path(directory))
        _write_into(Path(directory))


def _write_into(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=directory).close()


def _refuse_file(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "it is a file, expected a directory")


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {COMMITTED}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _named_errors(target: Path, argument: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise type(error)(
            error.errno, f"{argument}: cannot write to {target}: {error.strerror}"
        ) from error
