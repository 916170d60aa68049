"""The front of the C++ extension (kernels/csrc)."""
