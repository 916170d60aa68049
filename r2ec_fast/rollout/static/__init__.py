"""Decoding whose steps have fixed shapes and no host in them: a CUDA graph replays them."""
