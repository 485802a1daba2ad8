"""What a model's own mask asks for beyond causality, padding and windows, which a compressed cache cannot honour."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lococo.compat import masking_utils

FAR_POSITIONS = 32


class NoTensorError(ValueError, AttributeError):
    """The mask of a patched model was used as a tensor."""

    def __init__(self, use: str) -> None:
        super().__init__(
            f"the mask of a patched model was used as a tensor ({use}): an attention layer was replaced after "
            "lococo.patch_model; call lococo.unpatch_model first, and patch again"
        )


@dataclasses.dataclass(frozen=True)
class PaddingMask:
    """What a patched decoder hands its layers in the place of a mask.

    Attributes
    ----------
    tokens : torch.Tensor, optional
        (batch, tokens), 0 for padding, as the model was given it.
    window : int, optional
        Tokens that a query sees, where the mask limits them.
    """

    tokens: torch.Tensor | None
    window: int | None

    @classmethod
    def __torch_function__(cls, function: Any, *args, **kwargs) -> Any:
        """Refuse to be used as a tensor, by an attention layer that is not read by ours."""
        raise NoTensorError(getattr(function, "__name__", str(function)))

    def __getattr__(self, name: str) -> Any:
        raise NoTensorError(name)

    def __getitem__(self, index: Any) -> Any:
        raise NoTensorError("an index")


@torch.compiler.disable
def padding_mask(
    *args, attention_mask: torch.Tensor | None = None, mask_function: Callable | None = None, **kwargs
) -> PaddingMask:
    """Mask function of patched models, registered as ``"lococo"``: nothing of (tokens x tokens) is ever made.

    Raises
    ------
    ValueError
        If the model wants anything but what is causal, in a window, and no padding.
    """
    parts = list(_parts(mask_function))
    windows = [inspect.getclosurevars(part).nonlocals["sliding_window"] for part in parts if _is_window(part)]
    window = min(windows, default=None)
    strange = sorted({_name(part) for part in parts if getattr(part, "__code__", None) not in _known_codes()})
    if strange and not _is_causal(mask_function, window, kwargs):  # images that are not there, for one
        raise ValueError(
            f"the model masks its attention by {', '.join(strange)}: a patched model reads causally, with padding and "
            "sliding windows, but not in two directions (images, prefixes) nor in chunks; unpatch it for this input"
        )
    return PaddingMask(attention_mask, window)


def window_of(mask: Any, window: int | None, name: str) -> int | None:
    """Tokens that a query of an attention layer sees, None if all.

    Parameters
    ----------
    mask : PaddingMask or tensor, optional
        As the layer got it. Where the model made it, it is what counts: some layers ask for a window that their mask
        does not have, or the other way round.
    window : int, optional
        What the layer asks for.
    name : str
        Of the layer's class.

    Raises
    ------
    ValueError
        If the mask is a matrix.
    """
    if isinstance(mask, torch.Tensor) and mask.dim() > 2:
        raise ValueError(
            f"{name} was given a mask of shape {tuple(mask.shape)}: a patched model takes 2-D masks (batch, tokens)"
        )
    return mask.window if isinstance(mask, PaddingMask) else window


def _parts(function: Any) -> Iterator[Any]:
    """A composed mask function and all that it is composed of."""
    if function is None:
        return
    yield function
    for cell in getattr(function, "__closure__", None) or ():
        held = cell.cell_contents
        for part in held if isinstance(held, tuple) else (held,):
            if callable(part):
                yield from _parts(part)


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", repr(function)).split(".")[0]


def _is_window(function: Any) -> bool:
    return getattr(function, "__code__", None) is masking_utils.sliding_window_overlay(1).__code__


@functools.cache
def _known_codes() -> set[Any]:
    """Code of the functions that Transformers makes causal masks, windows and padding of."""
    nothing = torch.zeros(1, 1, dtype=torch.long)
    causal = masking_utils.causal_mask_function
    makers: dict[str, tuple] = {
        "and_masks": (causal,),
        "sliding_window_overlay": (1,),
        "padding_mask_function": (nothing,),
        "packed_sequence_mask_function": (nothing,),  # packed sequences are refused where they are given
        "remap_positions_for_packed_sequence": (causal, nothing),
        "add_offsets_to_mask_function": (causal, 0, 0),
    }
    known = [getattr(masking_utils, name)(*given) for name, given in makers.items() if hasattr(masking_utils, name)]
    return {function.__code__ for function in (causal, *known)}


def _is_causal(function: Any, window: int | None, call: dict[str, Any]) -> bool:
    """Whether a mask function shows every query what comes in its window before it, and nothing else.

    Looked at where masks differ, around a query and the beginning of its window, and at positions in between.
    """
    queries, length = call.get("cache_position"), call["kv_length"]
    if queries is None:
        queries = torch.arange(call["q_length"], device=call.get("device")) + call.get("q_offset", 0)
    rows = torch.arange(call["batch_size"], device=queries.device)[:, None]
    first = torch.zeros_like(queries) if window is None else queries - window + 1
    near = [first - 1, first, *(queries + step for step in (-1, 0, 1, 2))]
    far = [torch.full_like(queries, length * part // FAR_POSITIONS) for part in range(FAR_POSITIONS)]
    for entry in (*near, *far):
        is_there = (entry >= 0) & (entry < length)
        try:
            seen = function(rows, torch.zeros_like(rows), queries[None], entry.clamp(0, length - 1)[None])
        except Exception:  # a function for single numbers
            return False
        if ((seen != ((entry >= first) & (entry <= queries))) & is_there).any():
            return False
    return True
