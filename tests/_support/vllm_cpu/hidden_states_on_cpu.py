"""vLLM's ExampleHiddenStatesConnector for its CPU build, which has none of the CUDA streams that
the original copies with. Loaded by the vLLM process (`kv_connector_module_path`)."""

import fcntl
import os

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)


class _Copied:
    """An event that has happened."""

    def query(self) -> bool:
        return True


class HiddenStatesOnCPU(ExampleHiddenStatesConnector):
    def _submit_async_write(self, pending: PendingSave) -> None:
        assert self._kv_cache is not None
        offsets = torch.arange(self._block_size)
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)
        slots = (blocks[:, None] * self._block_size + offsets).flatten()
        states = extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids))
        os.makedirs(os.path.dirname(pending.filename), exist_ok=True)
        lock = self._lock_fds.pop(pending.req_id, None)
        if lock is None:
            lock = os.open(pending.filename + ".lock", os.O_CREAT | os.O_WRONLY, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            save_file(
                {"hidden_states": states.contiguous(), "token_ids": pending.token_ids.clone()},
                pending.filename,
            )
        finally:
            os.close(lock)
        self._req_copy_events[pending.req_id] = _Copied()
