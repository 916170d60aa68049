"""From ragged token rows to padding-free batches."""

from r2ec_fast.packing.packer import PackedBatch, pack_histories
from r2ec_fast.packing.ragged import Ragged

__all__ = ["PackedBatch", "Ragged", "pack_histories"]
