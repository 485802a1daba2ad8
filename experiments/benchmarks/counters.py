"""What is counted beside time: operations dispatched, bytes of tensors, and what autograd keeps."""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def _mallopt(parameter: int, value: int) -> None:
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(parameter, value)


class HeldBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside a ``with`` block.

    Attributes
    ----------
    held : int
        Bytes of those that still exist.
    peak : int
        Most bytes held at once.
    largest : int
        Bytes of the largest tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = self.largest = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address not in given and address not in self._sizes:
                self._sizes[address] = storage.nbytes()
                self.held += storage.nbytes()
                self.peak, self.largest = max(self.peak, self.held), max(self.largest, storage.nbytes())
                weakref.finalize(storage, self._let_go, address)
        return result

    def _let_go(self, address: int) -> None:
        self.held -= self._sizes.pop(address)


class Operations(TorchDispatchMode):
    """Counts the operations dispatched inside a ``with`` block.

    Attributes
    ----------
    count : int
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class SavedBytes:
    """Bytes of the tensors that autograd keeps: now, and at the most."""

    def __init__(self, most: int | None = 0) -> None:
        self.now, self.most = 0, most

    def keep(self, tensor: torch.Tensor) -> _Kept:
        """Count a tensor until nobody keeps it any more."""
        kept = _Kept(tensor.detach())  # with its graph, it would hold the node that holds it
        self._add(tensor.nbytes)
        weakref.finalize(kept, self._add, -tensor.nbytes)
        return kept

    def _add(self, count: int) -> None:
        self.now += count
        self.most = max(self.most or 0, self.now)


class _Kept:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@contextlib.contextmanager
def saved_bytes() -> Iterator[SavedBytes]:
    """Count what autograd keeps inside a ``with`` block."""
    saved = SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda kept: kept.tensor):
        yield saved
