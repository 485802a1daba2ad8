"""The handle of a patched model: its config, its family, its heads, the forwards under way, and what undoes it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lococo.cache.cache import LoCoCoCache
from lococo.compression.base import Compressor
from lococo.config import LoCoCoConfig
from lococo.context import ForwardContext, ForwardRequest
from lococo.models import Family
from lococo.models.changes import Changes
from lococo.models.rotary import Rotary

HEAD, NETWORK = "lococo_head", "lococo_score"
PATCH = "lococo_patch"


class ThreadState(threading.local):
    """What holds for the forwards of one thread: a server's threads read with the same model.

    Attributes
    ----------
    request : ForwardRequest, optional
        For the next forwards.
    context : ForwardContext, optional
        Of the forward under way.
    last_position : torch.Tensor, optional
        Of the text that is being read in pieces, see ``lococo.whole_text``.
    """

    request: ForwardRequest | None = None
    context: ForwardContext | None = None
    last_position: torch.Tensor | None = None

    def __reduce__(self) -> tuple:
        return ThreadState, ()  # with a copy of a model nothing is under way


@dataclasses.dataclass(eq=False)
class Patch:
    """A patched model's handle, kept on its decoder as ``lococo_patch`` and found by ``patch_of``.

    Attributes
    ----------
    config : LoCoCoConfig
        What is computed.
    family : Family
        Knows the decoder and how to call it.
    attention : str
        Attention kernel, by its name.
    prefill_chunk_size : int, optional
        Tokens that go through the model at once when a long prompt is read. None: by the free memory.
    rotary_tables : dict
        By layer index, where keys must be rotated: with ``positions="slot"`` or a learned score; None for layers
        without positions.
    changes : Changes
        All that was put into the model, but for the heads.
    is_suspended : bool
        The model reads with its full cache.
    can_record : bool
        No recorded step has failed.
    """

    config: LoCoCoConfig
    family: Family
    attention: str = "auto"
    prefill_chunk_size: int | None = None
    rotary_tables: dict[int, Rotary | None] = dataclasses.field(default_factory=dict)
    changes: Changes = dataclasses.field(default_factory=Changes)
    thread: ThreadState = dataclasses.field(default_factory=ThreadState)
    is_suspended: bool = False
    can_record: bool = True
    said: set[str] = dataclasses.field(default_factory=set)

    @property
    def is_in_force(self) -> bool:
        """Whether it has not been taken out, nor another put in its place."""
        return vars(self.decoder).get(PATCH) is self

    @property
    def decoder(self) -> Any:
        """The innermost model that holds the attention layers."""
        return self.family.decoder

    @property
    def layers(self) -> dict[int, Any]:
        """Attention layers by index."""
        return self.family.layers

    @property
    def heads(self) -> dict[int, Compressor]:
        """Fusion heads by layer index; empty if nothing is fused."""
        return {index: getattr(layer, HEAD) for index, layer in self.layers.items() if hasattr(layer, HEAD)}

    @property
    def networks(self) -> dict[int, nn.Module]:
        """Networks of a learned score by layer index; empty for other scores."""
        return {index: getattr(layer, NETWORK) for index, layer in self.layers.items() if hasattr(layer, NETWORK)}

    def new_cache(self) -> LoCoCoCache:
        """An empty cache."""
        return LoCoCoCache(self.config, len(self.layers))

    @contextlib.contextmanager
    def asking(self, request: ForwardRequest) -> Iterator[None]:
        """Forwards of this thread inside a ``with`` block come with a request."""
        before, self.thread.request = self.thread.request, request
        try:
            yield
        finally:
            self.thread.request = before

    def open(self, context: ForwardContext) -> None:
        """Note that a forward begins to read."""
        if context.cache is not None:
            context.cache.is_open = True
        self.thread.context = context

    def close(self) -> ForwardContext | None:
        """Put back what this thread's forward has opened, and return its context; None if none is open."""
        context, self.thread.context = self.thread.context, None
        self.family.finish()
        if context is None:
            return None
        if context.cache is not None:
            context.cache.is_open = False
        if context.ends_text:
            self.thread.last_position = None
        return context

    def say_once(self, text: str) -> None:
        """Warn, the first time."""
        if text not in self.said:
            self.said.add(text)
            warnings.warn(text, stacklevel=2)

    def undo(self) -> None:
        """Take changes, heads and the handle itself out of the model."""
        self.close()
        self.changes.undo()
        for layer in self.layers.values():
            for name in (HEAD, NETWORK):
                if hasattr(layer, name):
                    delattr(layer, name)
        delattr(self.decoder, PATCH)


def is_ours(name: str) -> bool:
    """Whether a module or parameter of a patched model, by its name, is none of the model's own."""
    return not {HEAD, NETWORK}.isdisjoint(name.split("."))


def patch_of(model: nn.Module, remedy: str = "call lococo.patch_model first") -> Patch:
    """The handle of a patched model, or of one inside a wrapper.

    Parameters
    ----------
    remedy : str
        What the error tells to do.

    Raises
    ------
    ValueError
        If the model is not patched.
    """
    patch = find_patch(model)
    if patch is None:
        raise ValueError(f"{type(model).__name__} is not patched: {remedy}")
    return patch


def check_model(model: Any) -> None:
    """Refuse what is no model, the name of one for instance.

    Raises
    ------
    TypeError
        Says what it is.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a loaded model (a torch.nn.Module), got {model!r}; load it first, with "
            "transformers.AutoModelForCausalLM.from_pretrained for instance"
        )


def find_patch(model: nn.Module) -> Patch | None:
    """The handle of a patched model, or of one inside a wrapper; None if it is not patched.

    Raises
    ------
    TypeError
        If it is no model.
    """
    check_model(model)
    return next((vars(module)[PATCH] for module in model.modules() if PATCH in vars(module)), None)


def is_patched(model: nn.Module) -> bool:
    """Whether a model or a part of it is patched by ``patch_model``."""
    return find_patch(model) is not None
