"""Only the heads learn: what is around them is frozen, and checked to be the same afterwards."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from lococo.state import Patch, is_ours, patch_of

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put the training modes of modules and ``requires_grad`` of parameters back at the end of a ``with`` block."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Put the random states of Python, NumPy, torch and the model's GPUs back at the end of a ``with`` block."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


@contextlib.contextmanager
def only_heads_learn(model: nn.Module, patch: Patch | None = None) -> Iterator[nn.Module]:
    """A patched model inside a ``with`` block: heads trainable in float32 or wider, the rest frozen, no dropout.

    Afterwards modes, flags and the heads' dtype are what they were.

    Parameters
    ----------
    patch : Patch, optional
        The model's handle. None: looked up.
    """
    patch = patch or patch_of(model)
    heads = [(head, next(head.parameters()).dtype) for head in patch.heads.values()]
    with modes_kept(model):
        model.eval().requires_grad_(False)
        for head, dtype in heads:
            head.requires_grad_(True).to(torch.promote_types(dtype, torch.float32))
        try:
            yield model
        finally:
            for head, dtype in heads:
                head.to(dtype)


@contextlib.contextmanager
def base_unchanged(model: nn.Module) -> Iterator[nn.Module]:
    """A patched model inside a ``with`` block, of which only the heads may change.

    Raises
    ------
    RuntimeError
        At the end of the block, if another parameter has changed by a single bit; names all of them.
    """
    before = checksums(model)
    yield model
    after = checksums(model)
    changed = [name for name, value in before.items() if after.get(name) != value]
    if changed:
        raise RuntimeError(f"training the heads has changed the base model: {', '.join(changed)}")


def checksums(model: nn.Module) -> dict[str, int]:
    """64 bits for every parameter of the base model that is in memory.

    Computed where the parameter lies. Any other number in one place gives others, and so, nearly always, do the same
    numbers in other places.
    """
    return {
        name: _checksum(parameter)
        for name, parameter in model.named_parameters()
        if not is_ours(name) and not parameter.is_meta
    }


def _checksum(tensor: torch.Tensor, piece: int = 2**22) -> int:
    bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in bits.split(piece):
        # Odd factors lose no bit of an entry; integers wrap around.
        factors = torch.arange(1, 2 * len(part), 2, device=tensor.device)
        total = 31 * total + (part.long() * factors).sum()
    return int(total)
