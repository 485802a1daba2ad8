"""Extension with shifted sparse attention, short groups of tokens, the way of training of LongLoRA (Chen et al. 2023).

``python -m experiments.longlora --model MODEL --factor 8 ...``: ``lococo extend`` with ``--method longlora``. The
model reads with its full cache afterwards.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lococo.cli.extend import extend
from lococo.cli.main import run
from lococo.cli.parsing import add_command, command_group
from lococo.compat import AttentionInterface, AttentionMaskInterface
from lococo.extension.extend import FULL_CACHE
from lococo.models import find_family

NAME = "lococo_longlora"
GROUPS = 4

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def shifted_sparse_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, group: int, dropout: float = 0.0
) -> torch.Tensor:
    """Causal attention within groups of tokens; for the second half of the heads they begin half a group later.

    Nothing wraps around: the first and the last half group of the shifted heads stand alone, so that no token sees
    one after it.

    Parameters
    ----------
    query, key, value : torch.Tensor
        (batch, heads, tokens, head_dim).
    group : int
        Tokens of a group.

    Returns
    -------
    torch.Tensor
        (batch, heads, tokens, head_dim).
    """
    half = query.shape[1] // 2
    straight: Heads = (query[:, :half], key[:, :half], value[:, :half])
    shifted: Heads = (query[:, half:], key[:, half:], value[:, half:])
    outputs = [
        _in_groups(heads, scale, group, first, dropout) for heads, first in ((straight, 0), (shifted, group // 2))
    ]
    return torch.cat(outputs, dim=1)


def _in_groups(heads: Heads, scale: float, group: int, first: int, dropout: float) -> torch.Tensor:
    """Causal attention in groups, before them one of the ``first`` tokens, after them one of what is left."""
    tokens = heads[0].shape[2]
    first = min(first, tokens)
    last = first + (tokens - first) // group * group
    parts = []
    for start, stop, size in ((0, first, first), (first, last, group), (last, tokens, tokens - last)):
        if stop > start:
            # All groups of one size as rows of one batch: (batch * groups, heads, size, head_dim).
            query, key, value = (
                each[:, :, start:stop].unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1) for each in heads
            )
            output = F.scaled_dot_product_attention(query, key, value, None, dropout, is_causal=True, scale=scale)
            parts.append(output.unflatten(0, (len(heads[0]), -1)).transpose(1, 2).flatten(2, 3))
    return torch.cat(parts, dim=2)


def longlora_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention function of models in training as LongLoRA, in groups of a quarter of the text.

    Parameters
    ----------
    query : torch.Tensor
        (batch, heads, tokens, head_dim), rotated.
    key, value : torch.Tensor
        (batch, kv_heads, tokens, head_dim), keys rotated.

    Returns
    -------
    tuple
        (batch, tokens, heads, head_dim), and None for the attention matrix that is never made.

    Raises
    ------
    ValueError
        For a cache that holds tokens, a soft cap or a sliding window.
    """
    if softcap is not None or sliding_window is not None or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{type(module).__name__} cannot be trained with shifted sparse attention: it needs whole texts, without "
            f"a soft cap (got {softcap}) and a sliding window (got {sliding_window})"
        )
    repeats = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    group = max(math.ceil(query.shape[2] / GROUPS), 2)
    output = shifted_sparse_attention(query, key, value, scale, group, dropout)
    return output.transpose(1, 2).contiguous(), None


def no_mask(*args, attention_mask: torch.Tensor | None = None, **kwargs) -> None:
    """Mask function of models in training as LongLoRA: groups need none.

    Raises
    ------
    ValueError
        If there is padding.
    """
    if attention_mask is not None and not attention_mask.bool().all():
        raise ValueError("shifted sparse attention takes no padding, got an attention_mask with zeros")


@contextlib.contextmanager
def shifted_sparse(model: nn.Module) -> Iterator[nn.Module]:
    """A model inside a ``with`` block, with shifted sparse attention in the place of its own.

    Raises
    ------
    ValueError
        If the model's attention cannot be replaced.
    """
    config: Any = find_family(model).decoder.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield model
    finally:
        config._attn_implementation = before


AttentionInterface.register(NAME, longlora_attention)
AttentionMaskInterface.register(NAME, no_mask)
FULL_CACHE["longlora"] = shifted_sparse


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Bad input ends with one line on stderr and status 2."""
    app = command_group("")
    add_command(app, "longlora", extend)
    words = sys.argv[1:] if arguments is None else arguments
    return run(app, "python -m experiments.longlora", ["--method", "longlora", *words])


if __name__ == "__main__":
    sys.exit(main())
