"""A text that is read in pieces: rotary tables that depend on its length, and what is a step of generation.

"longrope" rotates texts beyond the original window with other factors, "dynamic" with a base that grows with the
longest position. Transformers looks at the positions of a call; a call that is read in pieces is shown its last one
every time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lococo.models import length_dependent_rotaries
from lococo.state import Patch, is_patched, patch_of


def add_hooks(patch: Patch) -> None:
    """Make a decoder's rotary embeddings look at the last position, where their tables depend on it."""
    for rotary in length_dependent_rotaries(patch.decoder):
        show, hide = functools.partial(_show_last_position, patch), functools.partial(_hide_last_position, patch)
        patch.changes.hooks.append(rotary.register_forward_pre_hook(show, with_kwargs=True))
        patch.changes.hooks.append(rotary.register_forward_hook(hide))


@contextlib.contextmanager
def reading_pieces(model: nn.Module, last_position: int) -> Iterator[None]:
    """Forwards of a patched model inside a ``with`` block are pieces of one text whose last token is at a position.

    Raises
    ------
    ValueError
        If the model is not patched.
    """
    thread = patch_of(model).thread
    before, thread.last_position = thread.last_position, torch.tensor(last_position)
    try:
        yield
    finally:
        thread.last_position = before


def pieces(
    model: nn.Module, tokens: int, size: int, length: int
) -> tuple[contextlib.AbstractContextManager[None], int]:
    """How some tokens of a text are read in pieces, by a patched model or another.

    Parameters
    ----------
    tokens : int
        To be read.
    size : int
        Tokens at a time, if the model has a choice.
    length : int
        Tokens of the whole text.

    Returns
    -------
    tuple
        A context for the forwards, and the tokens at a time: all of them where nobody tells an unpatched model's
        rotary tables of the length.
    """
    if is_patched(model):
        return reading_pieces(model, length - 1), size
    return contextlib.nullcontext(), max(tokens, 1) if length_dependent_rotaries(model) else size


def is_in_pieces(patch: Patch) -> bool:
    """Whether forwards are pieces of a longer text, so that a single token is not one that was generated."""
    return patch.thread.last_position is not None


def note_last_position(patch: Patch, position_ids: torch.Tensor | None, length: int) -> bool:
    """Note the last position of a call before it is read in pieces; False if one is noted, of a longer text.

    Parameters
    ----------
    position_ids : torch.Tensor, optional
        (1 or batch, tokens) of the whole call. None: the tokens follow one another.
    length : int
        Tokens of the longest row after the call.
    """
    if is_in_pieces(patch):
        return False
    patch.thread.last_position = torch.tensor(length - 1) if position_ids is None else position_ids.amax()
    return True


@contextlib.contextmanager
def forgotten_on_failure(patch: Patch) -> Iterator[None]:
    """A position that is noted inside a ``with`` block is forgotten if the block fails."""
    before = patch.thread.last_position
    try:
        yield
    except BaseException:
        patch.thread.last_position = before
        raise


def _show_last_position(patch: Patch, rotary: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    last = patch.thread.last_position
    if last is None:
        return None
    is_named = "position_ids" in kwargs
    positions = kwargs["position_ids"] if is_named else args[1]
    longer = torch.cat([positions, last.to(positions).expand(positions.shape[0], 1)], dim=1)
    return (args, {**kwargs, "position_ids": longer}) if is_named else ((args[0], longer, *args[2:]), kwargs)


def _hide_last_position(patch: Patch, rotary: nn.Module, args: tuple, output: tuple) -> Any:
    return None if patch.thread.last_position is None else tuple(table[:, :-1] for table in output)
