"""From ragged token rows to padding-free batches."""

from r2ec_fast.packing.packer import PackedBatch, pack_histories, to_rows

__all__ = ["PackedBatch", "pack_histories", "to_rows"]
