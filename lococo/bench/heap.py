"""The heap of the C library, where tensors on a CPU lie."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

KIB, MIB = 2**10, 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h
_SETTLED = 32 * MIB  # glibc's own threshold rises to this while large blocks are freed


@contextlib.contextmanager
def freed_blocks_returned() -> Iterator[None]:
    """Blocks of 64 KiB or more go back to the system when they are freed inside a ``with`` block.

    What the process holds is then, but for what had room in the heap, what is in use, and not what lies unused between
    smaller blocks. It takes time: the system clears every block anew. On glibc; elsewhere nothing happens.
    """
    _mallopt(_M_MMAP_THRESHOLD, 64 * KIB)
    try:
        yield
    finally:
        _mallopt(_M_MMAP_THRESHOLD, _SETTLED)
        _mallopt(_M_TRIM_THRESHOLD, 2 * _SETTLED)


def trim_heap() -> None:
    """Give what is free in the heap back to the system."""
    with contextlib.suppress(AttributeError):  # the C library is another than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt(parameter: int, value: int) -> None:
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(parameter, value)
