"""What runs inside a ``with`` block: its operations, and the memory of their results."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
