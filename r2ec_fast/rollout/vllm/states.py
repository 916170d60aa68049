"""States that a vLLM server extracts: a file a request, in a folder that both sides see.

The server runs the speculative method ``extract_hidden_states`` for the layer ``num_hidden_layers``
with ``ExampleHiddenStatesConnector``: docs/guides/rollout.md. It writes the states of ALL prompt
tokens of every request, also of those whose states nobody wants.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open


def states_path(answer: Mapping[str, Any]) -> str | None:
    """The file that an answer of ``/v1/completions`` names; None: the server extracts none."""
    found = (answer.get("kv_transfer_params") or {}).get("hidden_states_path")
    return None if found is None else str(found)


class StateFiles:
    """Reads these files and removes them.

    A stream does not name its file, nor does a request that is given up, so requests are sent with
    ids of `new_id`, which the names of files hold.
    """

    RETRY = 2.0  # seconds after which files are looked for again

    def __init__(self) -> None:
        self._folder: str | None = None
        self._left: list[tuple[float, str]] = []
        self._lock = threading.Lock()

    def new_id(self) -> str:
        return f"r2ec-{uuid.uuid4().hex}"

    def read(self, answer: Mapping[str, Any], tokens: int) -> torch.Tensor:
        """The last layer's state, before the final norm, of the last of so many prompt tokens, [d].

        Raises OSError where the file cannot be read here, ValueError where it is another's.
        """
        path = states_path(answer)
        if path is None:
            raise ValueError("the vLLM server shows no states")
        self._folder = os.path.dirname(path)
        try:
            # the server holds this lock until the file is whole; it may be told to make none
            with contextlib.suppress(FileNotFoundError), open(path + ".lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH)
            with safe_open(path, "pt") as file:
                states = file.get_slice("hidden_states")
                shape = states.get_shape()
                if len(shape) != 3 or shape[0] != tokens:
                    raise ValueError(
                        f"{path}: expected states of {tokens} tokens, got shape {shape}"
                    )
                return states[tokens - 1 :][0, -1].clone()
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from error
        finally:
            _remove(path)

    def discard(self, id_: str, answer: Mapping[str, Any] | None = None) -> None:
        """Remove the files of a request, now and those that come later. They are in the folder
        that its answer names, or one before."""
        if answer is not None and (path := states_path(answer)) is not None:
            self._folder = os.path.dirname(path)
        now = time.monotonic()
        with self._lock:
            due = [old for at, old in self._left if now - at > self.RETRY]
            self._left = [(at, old) for at, old in self._left if now - at <= self.RETRY]
            self._left.append((now, id_))
            self._sweep([id_, *due])

    def close(self) -> None:
        """Remove what is left."""
        with self._lock:
            self._sweep([id_ for _, id_ in self._left])
            self._left = []

    def _sweep(self, ids: list[str]) -> None:
        if self._folder is None or not ids:
            return
        with contextlib.suppress(OSError):
            for name in os.listdir(self._folder):
                if any(id_ in name for id_ in ids):
                    _remove(os.path.join(self._folder, name))


def _remove(path: str) -> None:
    for one in (path, path + ".lock"):
        with contextlib.suppress(OSError):
            os.remove(one)
