"""What differs between families of models: where their attention layers are, how they are called and rotated.

A new family with attention code of its own is one file: a subclass of ``Family`` with ``@register_family`` on it.
"""

from __future__ import annotations

import abc
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from lococo.compat import HAS_ATTENTION_INTERFACE, OLDEST, OUTPUT_CACHE
from lococo.models.changes import Changes

# How a layer's queries and keys are rotated: (query, key, cos, sin) to both, shapes as in Transformers.
ApplyRotary = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Attending(threading.local):
    """By what the layers attend in this thread's forward: a server's threads read with the same model."""

    attend: functools.partial | None = None

    def __reduce__(self) -> tuple:
        return Attending, ()  # a copy of a model is in no forward


class Family(abc.ABC):
    """A family of models; an instance knows one decoder of it.

    Parameters
    ----------
    decoder : transformers.PreTrainedModel
        The innermost model that holds the attention layers.

    Attributes
    ----------
    instead : str, optional
        What to do where only Transformers' own classes will do. None: the decoder is of one.
    tokens_dim : int
        Dimension of a hidden state that counts tokens.
    takes_cache : bool
        Whether the models' own code hands a cache on to its layers and its output.
    is_general : bool
        Asked after all others, and for the sizes of models that no other family knows.
    """

    instead: ClassVar[str | None] = None
    tokens_dim: ClassVar[int] = 1
    takes_cache: ClassVar[bool] = True
    is_general: ClassVar[bool] = False

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self.attending = Attending()

    @staticmethod
    @abc.abstractmethod
    def matches(module: PreTrainedModel) -> bool:
        """Whether a model is, or holds, a decoder of this family."""

    @abc.abstractmethod
    def check(self, model: nn.Module) -> None:
        """Refuse a decoder that cannot be patched, with the model around it.

        Raises
        ------
        ValueError
            Names the model and the reason.
        """

    @staticmethod
    @abc.abstractmethod
    def shape_of(config: Any) -> dict[str, int]:
        """``num_layers``, ``num_kv_heads`` and ``head_dim`` of a model with a config, as in ``base_shape``."""

    @property
    @abc.abstractmethod
    def layers(self) -> dict[int, Any]:
        """Attention modules by layer index."""

    @abc.abstractmethod
    def head_dim(self, layer: Any) -> int:
        """Size of a key in an attention layer."""

    @abc.abstractmethod
    def rotary(self, layer: Any, like: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of a layer's rotary embedding at some positions, as its ``apply_rotary`` takes them.

        Parameters
        ----------
        like : torch.Tensor
            Gives the dtype.
        positions : torch.Tensor
            (1 or batch, tokens).

        Returns
        -------
        tuple of torch.Tensor
            Each (1 or batch, tokens, rotary_dim or half of it), on the embedding's device.

        Raises
        ------
        ValueError
            If a key's angle depends on the length of the text; says so after "keys must be moved, ".
        """

    @abc.abstractmethod
    def apply_rotary(self, layer: Any) -> ApplyRotary:
        """The function by which a layer's code rotates queries and keys."""

    @abc.abstractmethod
    def install(self, changes: Changes, model: nn.Module, attention: str) -> None:
        """Let the layers attend by what ``arguments`` is given.

        Parameters
        ----------
        changes : Changes
            Everything is put into the model through it.
        model : torch.nn.Module
            The model around the decoder.
        attention : str
            Name under which the function is registered in Transformers' ``AttentionInterface``.
        """

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Tokens that a query of each layer sees, in order; None: all that came before it."""
        return (None,) * len(self.layers)

    @functools.cached_property
    def shape(self) -> dict[str, int]:
        """Sizes of the decoder, as in ``base_shape``."""
        return self.shape_of(self.decoder.config)

    @property
    def config(self) -> Any:
        """The config that has the sizes of the decoder."""
        return self.decoder.config

    @property
    def mlp_size(self) -> int:
        """Width of the MLP between its matrices."""
        return getattr(self.config, "intermediate_size", None) or 4 * self.config.hidden_size

    @property
    def max_positions(self) -> int | None:
        """Positions that there are angles for, where the model's own code has a table of a fixed length."""
        return None

    @property
    def readers_of_configs(self) -> Sequence[Any]:
        """Modules that find their attention function in their config."""
        return ()

    def uses_rotary(self, layer: Any) -> bool:
        """Whether a layer rotates its keys.

        Raises
        ------
        ValueError
            If that cannot be known, or a key cannot be rotated any more.
        """
        return True

    def arguments(self, kwargs: dict[str, Any], attend: functools.partial) -> dict[str, Any]:
        """Keyword arguments of the decoder for a forward.

        Parameters
        ----------
        kwargs : dict
            What the caller gave, by name.
        attend : functools.partial
            The attention function by which the layers shall attend, with the keywords that no model knows of. Layers
            in code of their own find it as ``self.attending.attend`` until ``finish``.

        Raises
        ------
        ValueError
            For what the decoder's own code can do and ours cannot.
        """
        self.attending.attend = attend
        return kwargs

    def finish(self) -> None:
        """Let the layers attend by themselves again; also after a forward that failed."""
        self.attending.attend = None

    def hand_out(self, output: Any, cache: Any) -> Any:
        """The decoder's output with a cache in it, where its own code has not put it there."""
        if getattr(output, OUTPUT_CACHE, cache) is None:  # let go of, in training with gradient checkpointing
            setattr(output, OUTPUT_CACHE, cache)
        return output


FAMILIES: list[type[Family]] = []

FamilyClass = TypeVar("FamilyClass", bound=type[Family])


def register_family(family: FamilyClass) -> FamilyClass:
    """Class decorator: ``patch_model`` finds models of this family. Those registered last are asked first."""

    def name(each: type[Family]) -> tuple[str, str]:
        return each.__module__, each.__qualname__

    # A module that is read again, in a notebook for one, registers its own again.
    FAMILIES[:] = [*(each for each in FAMILIES if name(each) != name(family)), family]
    return family


def _in_order() -> list[type[Family]]:
    """All families, those to be asked first in front."""
    return sorted(reversed(FAMILIES), key=lambda family: family.is_general)


def find_family(model: nn.Module) -> Family:
    """The family of the decoder inside a model, which knows this decoder.

    Raises
    ------
    ValueError
        If there is no decoder of any family, more than one, or one that cannot be patched; names the model and the
        reason.
    """
    name = type(model).__name__
    for family in _in_order():
        holders = _holders(model, family)
        if holders:
            found = family(_innermost(model, holders))
            found.check(model)
            return found
    if not HAS_ATTENTION_INTERFACE:
        raise ValueError(
            f"{name} needs transformers >= {OLDEST}, {transformers.__version__} is installed; with it only ChatGLM2 "
            "and ChatGLM3 in their own code can be patched"
        )
    raise ValueError(
        f"{name} is not supported: it has no Transformers decoder whose attention layers go through the attention "
        "interface (layer_idx, is_causal, num_key_value_groups)"
    )


def _holders(model: nn.Module, family: type[Family]) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel) and family.matches(module)]


def _innermost(model: nn.Module, holders: list[PreTrainedModel]) -> PreTrainedModel:
    """The innermost of some models inside a model, if it is one."""
    innermost = [
        each for each in holders if not any(child in holders for child in each.modules() if child is not each)
    ]
    if len(innermost) > 1:
        names = {module: name for name, module in model.named_modules()}
        raise ValueError(
            f"{type(model).__name__} is not supported: it holds several decoders "
            f"({', '.join(names[each] for each in innermost)}); patch the one that is meant"
        )
    return innermost[0]


def base_shape(model: nn.Module) -> dict[str, int]:
    """What heads must agree on with their base model: ``num_layers``, ``num_kv_heads`` and ``head_dim``.

    Parameters
    ----------
    model : torch.nn.Module
        A Transformers model, patched or not, also inside PEFT or DDP.

    Returns
    -------
    dict
        The three sizes by name.

    Raises
    ------
    ValueError
        If there is no Transformers model in it.
    """
    family = next(each for each in _in_order() if each.is_general or _holders(model, each))
    return family.shape_of(base_config(model))


def base_config(model: nn.Module) -> Any:
    """Config of the outermost Transformers model in a module.

    Raises
    ------
    ValueError
        If there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module.config
    raise ValueError(f"{type(model).__name__} must be, or hold, a Transformers model")


def models_around(model: nn.Module, decoder: nn.Module) -> list[PreTrainedModel]:
    """The Transformers models inside a model that hold a decoder, outermost first, and the decoder."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [module for module in models if any(child is decoder for child in module.modules())]


def execution_device(layer: nn.Module) -> torch.device:
    """Where a layer computes: accelerate keeps weights it offloads on the meta device between calls."""
    for module in layer.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    weights = [*layer.parameters(), *layer.buffers()]
    # Quantised layers keep their weights elsewhere than in parameters; what they compute on then is what there is.
    return weights[0].device if weights else torch.device("cpu")
