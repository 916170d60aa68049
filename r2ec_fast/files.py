"""Files that are either whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise type(error)(
            error.errno, f"{argument}: cannot write to {target}: {error.strerror}"
        ) from error
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
