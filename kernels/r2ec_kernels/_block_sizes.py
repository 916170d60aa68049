"""Other block sizes for a while: a small table then has many blocks, and a short list overflows."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def block_sizes(implementation: ModuleType, **sizes: object) -> Iterator[None]:
    """Run an implementation with other values of the constants that its ``BLOCK_SIZES`` names.

    For tests; not for calls in several threads at once. Results stay within the same error bounds.

    Raises:
        ValueError: the implementation has no such block size.
    """
    if unknown := sizes.keys() - set(implementation.BLOCK_SIZES):
        raise ValueError(
            f"{implementation.__name__}: expected {', '.join(implementation.BLOCK_SIZES)}, "
            f"got {', '.join(sorted(unknown))}"
        )
    before = {name: getattr(implementation, name) for name in sizes}
    vars(implementation).update(sizes)
    try:
        yield
    finally:
        vars(implementation).update(before)
