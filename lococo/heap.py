"""The heap of the C library, where tensors on a CPU lie."""

from __future__ import annotations

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3  # of mallopt, in glibc's malloc.h
OWN_PAGES_FROM = 64 * 1024  # bytes; smaller than what a layer computes of a few hundred tokens


def return_freed_blocks() -> None:
    """Have blocks of ``OWN_PAGES_FROM`` bytes or more go back to the system when they are freed, from now on.

    Training frees and takes blocks of many sizes in changing order: the longer it runs, the more of the heap lies
    between them unused. For the whole process, on glibc; elsewhere nothing happens.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, OWN_PAGES_FROM)


def trim_heap() -> None:
    """Give what is free in the heap back to the system."""
    with contextlib.suppress(AttributeError):  # the C library is another than glibc
        ctypes.CDLL(None).malloc_trim(0)
