"""Triton's interpreter under every pair of triton and numpy that the packages admit.

    python -m _support.old_triton SCRIPT ARGUMENTS...     runs a script with TRITON_INTERPRET=1

A loop over ``range`` asks a scalar of a kernel for its ``__index__``. Triton 3.6 answers with
``int`` of an array of shape [1], which numpy refuses from 2.4 on; Triton 3.7 and newer squeeze the
array first. ``mend`` gives Triton 3.6 that answer. The interpreter sets the method anew at every
launch, so what sets it is wrapped.
"""

from __future__ import annotations

import os
import runpy
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def mend() -> None:
    """To be called before a kernel runs, in a process with TRITON_INTERPRET=1."""
    if tuple(map(int, version("triton").split(".")[:2])) >= (3, 7):
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    mend()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as if the script had been named to Python
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
