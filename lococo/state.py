"""What a patched model carries: its config, its heads, and what puts it back."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lococo.compression.base import Compressor
from lococo.config import LoCoCoConfig
from lococo.models import attention_layers

HEAD = "lococo_head"


class _Thread(threading.local):
    """What holds for the calls of one thread, by name and patch: a server's threads read with the same model."""

    def __init__(self) -> None:
        self.noted: dict[tuple[str, int], Any] = {}


_THREAD = _Thread()


@dataclasses.dataclass
class Patch:
    """What ``unpatch_model`` needs to put a decoder back; kept on it as ``lococo_patch``.

    Attributes
    ----------
    layers : dict
        Attention layers by index.
    configs : list
        Modules whose config is seen through a view, with the config and the view.
    attentions : list
        Configs whose attention reads otherwise through their view, with the view and what it was before.
    """

    config: LoCoCoConfig
    layers: dict[int, Any]
    is_suspended: bool = False
    can_record: bool = True  # until a recorded step has failed
    said: set[str] = dataclasses.field(default_factory=set)
    hooks: list[RemovableHandle] = dataclasses.field(default_factory=list)
    attributes: list[tuple[nn.Module, str, bool, Any]] = dataclasses.field(default_factory=list)
    configs: list[tuple[Any, Any, Any]] = dataclasses.field(default_factory=list)
    attentions: list[tuple[Any, Any, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.request = self.last_position = self.open_call = None  # nothing of a patch that lay here before

    @property
    def request(self) -> Any:
        """A ``lococo.forward.Request`` for this thread's next calls, or None."""
        return _THREAD.noted.get(("request", id(self)))

    @request.setter
    def request(self, request: Any) -> None:
        self._note("request", request)

    @property
    def last_position(self) -> torch.Tensor | None:
        """Of the text that this thread is reading in pieces, see ``lococo.whole_text``."""
        return _THREAD.noted.get(("last_position", id(self)))

    @last_position.setter
    def last_position(self, position: torch.Tensor | None) -> None:
        self._note("last_position", position)

    @property
    def open_call(self) -> Any:
        """The ``lococo.attention.Call`` that this thread's forward reads, or None."""
        return _THREAD.noted.get(("open_call", id(self)))

    @open_call.setter
    def open_call(self, call: Any) -> None:
        self._note("open_call", call)

    def close_call(self) -> None:
        """Put back what this thread's call has opened, if one is open."""
        call, self.open_call = self.open_call, None
        if call is None:
            return
        if call.cache is not None:
            call.cache.is_open = False
        if call.ends_text:
            self.last_position = None

    def _note(self, name: str, value: Any) -> None:
        if value is None:
            _THREAD.noted.pop((name, id(self)), None)
        else:
            _THREAD.noted[name, id(self)] = value

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute and remember whether the instance had one of its own."""
        self.attributes.append((module, name, name in vars(module), vars(module).get(name)))
        setattr(module, name, value)

    def view_config(self, module: Any, view: Any) -> None:
        """Let a module see its config through a view."""
        self.configs.append((module, module.config, view))
        if view._attn_implementation != module.config._attn_implementation:
            self.attentions.append((module.config, view, module.config._attn_implementation))
        module.config = view

    def show_configs(self, through_views: bool) -> None:
        """Let modules see their configs through their views, or as they are."""
        for module, config, view in self.configs:
            module.config = view if through_views else config

    def say_once(self, text: str) -> None:
        """Warn, the first time."""
        if text not in self.said:
            self.said.add(text)
            warnings.warn(text, stacklevel=2)

    def undo(self, decoder: Any) -> None:
        """Take hooks, attributes, views and heads out."""
        self.close_call()
        for hook in self.hooks:
            hook.remove()
        for module, name, had_own, value in reversed(self.attributes):
            if had_own:
                setattr(module, name, value)
            else:
                delattr(module, name)
        self.show_configs(through_views=False)
        for config, view, attention in self.attentions:
            if config._attn_implementation == view._attn_implementation:  # read from the view, and set again
                config._attn_implementation = attention
        for layer in self.layers.values():
            if hasattr(layer, HEAD):
                delattr(layer, HEAD)
        del decoder.lococo_patch


def is_patched(model: nn.Module) -> bool:
    """Whether ``patch_model`` is in force on a model or a part of it."""
    return any(hasattr(module, "lococo_patch") for module in model.modules())


def lococo_config(model: nn.Module) -> LoCoCoConfig:
    """The config a model was patched with.

    Raises
    ------
    ValueError
        If the model is not patched.
    """
    return patched_decoder(model).lococo_patch.config


def head_modules(model: nn.Module) -> dict[int, Compressor]:
    """Fusion heads of a patched model by layer index; empty if its preset fuses nothing.

    Raises
    ------
    ValueError
        If the model is not patched.
    """
    layers = attention_layers(patched_decoder(model))
    return {index: getattr(layer, HEAD) for index, layer in layers.items() if hasattr(layer, HEAD)}


def patched_decoder(model: nn.Module) -> Any:
    """The decoder inside a model that ``patch_model`` has changed.

    Raises
    ------
    ValueError
        If there is none.
    """
    for module in model.modules():
        if "lococo_patch" in vars(module):
            return module
    raise ValueError(f"{type(model).__name__} is not patched: call lococo.patch_model first")
