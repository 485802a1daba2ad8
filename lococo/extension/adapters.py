"""What extension trains of a model besides heads: LoRA on its attention, its embeddings and its norms."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from lococo.models import base_config, find_family
from lococo.patch import unpatch_model
from lococo.state import find_patch, is_patched
from lococo.training.frozen import modes_kept

# What PEFT and checkpointing note on modules that are there already.
NOTES = (
    "peft_config",
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_require_grads_hook",
    "_require_grads_hooks",
)


def adapter_config(model: nn.Module, rank: int = 8, alpha: int = 16) -> Any:
    """LoRA on every linear layer of the attention, and whole copies of input embeddings and norms (Cai et al. 2024).

    Parameters
    ----------
    model : torch.nn.Module
        A Transformers causal language model without adapters.
    rank, alpha : int
        LoRA's r, and the numerator of its scale ``alpha / r``.

    Returns
    -------
    peft.LoraConfig

    Raises
    ------
    ImportError
        If ``peft`` is missing, or too old for tied embeddings where the model has some.
    ValueError
        If a number is out of range or the attention has no linear layers.
    """
    for name, value in {"rank": rank, "alpha": alpha}.items():
        if value < 1:
            raise ValueError(f"LoRA's {name} must be at least 1, got {value}")
    peft = _peft()
    family = find_family(model)
    decoder = family.decoder
    linear = {
        name
        for layer in family.layers.values()
        for name, module in layer.named_children()
        if isinstance(module, nn.Linear)
    }
    if not linear:
        raise ValueError(f"{type(model).__name__} cannot be extended with LoRA: its attention has no linear layers")
    norms = {name for _, name, module in _children(decoder) if _is_norm(module)}
    embeddings: Any = decoder.get_input_embeddings()
    embedded = {name for _, name, module in _children(decoder) if module is embeddings}
    tied = {"ensure_weight_tying": True} if base_config(model).get_text_config().tie_word_embeddings else {}
    if tied and "ensure_weight_tying" not in inspect.signature(peft.LoraConfig).parameters:
        raise ImportError(f"tied embeddings need peft >= 0.18, {peft.__version__} is installed")
    return peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=sorted(linear),
        modules_to_save=sorted(embedded | norms),
        task_type="CAUSAL_LM",
        **tied,
    )


def adapted(model: nn.Module, config: Any) -> Any:
    """The model inside a ``peft.PeftModel`` with new adapters in it."""
    return _peft().get_peft_model(model, config)


def unfreeze(learner: Any) -> Any:
    """Let heads learn too, if there are any, and all that learns be in float32 or wider. Returns the model."""
    patch = find_patch(learner)
    for head in patch.heads.values() if patch else []:
        head.requires_grad_(True)
    for parameter in learner.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return learner


def load_adapter(model: nn.Module, folder: Path) -> Any:
    """The model inside a ``peft.PeftModel`` with saved adapters in it.

    Raises
    ------
    ValueError
        If the file of their weights cannot be read.
    """
    try:
        return _peft().PeftModel.from_pretrained(model, folder)
    except SafetensorError as error:
        raise ValueError(f"the weights in {folder} cannot be read: {error}") from error


def checkpoint_layers(model: Any) -> None:
    """Let a model compute its layers again in the backward, so that only their inputs are kept."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


@contextlib.contextmanager
def restored(model: nn.Module, *, after_errors_only: bool = False) -> Iterator[None]:
    """Undo at the end of a ``with`` block what an extension puts into a model.

    A patch is taken out; adapters and rotary embeddings leave for the modules that they took the place of; modes,
    ``requires_grad``, gradients, hooks, what is noted on modules and the fields of configs are what they were. PEFT's
    own ``unload`` would leave trained copies of embeddings and norms in the model. Weights must not have been written
    to.

    Parameters
    ----------
    after_errors_only : bool
        Leave what was put in where the block ends without an error.
    """
    was_patched = is_patched(model)
    children = [(parent, name, child) for parent in model.modules() for name, child in parent._modules.items()]
    notes = [(vars(module), name, vars(module).get(name)) for module in model.modules() for name in NOTES]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    hooks = [(module._forward_hooks, dict(module._forward_hooks)) for module in model.modules()]
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    # Of configs inside configs the objects themselves: layers read theirs.
    fields = [(vars(config), copy.deepcopy(vars(config), dict(configs))) for config in configs.values()]

    def undo() -> None:
        if is_patched(model) and not was_patched:
            unpatch_model(model)
        for parent, name, child in children:
            setattr(parent, name, child)
        for attributes, name, before in notes:
            if attributes.get(name) is not before:
                attributes.pop(name, None)
                attributes.update({} if before is None else {name: before})
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for current, kept in [*hooks, *fields]:
            current.clear()
            current.update(kept)

    with contextlib.ExitStack() as at_the_end:
        at_the_end.enter_context(modes_kept(model))
        at_the_end.callback(undo)
        yield
        if after_errors_only:
            at_the_end.pop_all()


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, module in parent.named_children():
            yield parent, name, module


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm") and getattr(module, "weight", None) is not None


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ImportError("extension needs the package peft: pip install lococo[train]") from error
