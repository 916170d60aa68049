"""Files that are either whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replaced_directory(
    directory: str | os.PathLike[str], argument: str = "directory"
) -> Iterator[Path]:
    """Yield a temporary directory that takes the place of ``directory`` when the block succeeds.

    Raises OSError, naming ``directory`` and the caller's ``argument``, where its parent cannot be
    written.
    """
    target = Path(directory)
    with _named_errors(target, argument):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        old = None
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, old / "old")
        os.replace(temporary, target)
        if old is not None:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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
        _write_into(Path(directory))


def _write_into(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=directory).close()


@contextmanager
def _named_errors(target: Path, argument: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise type(error)(
            error.errno, f"{argument}: cannot write to {target}: {error.strerror}"
        ) from error
