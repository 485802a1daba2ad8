"""What extension trains of a model besides heads: LoRA on its attention, its embeddings and its norms."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from lococo.models import base_config, find_family
from lococo.state import head_modules, is_patched


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


def let_learn(learner: Any) -> Any:
    """Heads learn too, if there are any, and all that learns is in float32 or wider. Returns the model."""
    for head in head_modules(learner).values() if is_patched(learner) else []:
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


@contextmanager
def as_it_was(model: nn.Module, *, after_errors_only: bool = False) -> Iterator[None]:
    """Undo at the end of a ``with`` block what was put into a model: adapters, rotary embeddings, flags, its config.

    Its weights must not have been written to.
    """
    modules = [(vars(module), _copied(vars(module))) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    configs = [(vars(config), copy.deepcopy(vars(config))) for config in _configs(model)]

    def undo() -> None:
        for current, before in modules:
            for name, value in before.items():
                if isinstance(value, dict):  # of parameters, modules, hooks: others may hold it, too
                    current[name].clear()
                    current[name].update(value)
                    before[name] = current[name]
            current.clear()
            current.update(before)
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        for current, before in configs:
            current.clear()
            current.update(before)

    try:
        yield
    except BaseException:
        undo()
        raise
    if not after_errors_only:
        undo()


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, module in parent.named_children():
            yield parent, name, module


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: copy.copy(value) if isinstance(value, dict) else value for name, value in attributes.items()}


def _configs(model: nn.Module) -> list[Any]:
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            found[id(config)] = config
    return list(found.values())


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm") and getattr(module, "weight", None) is not None


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ImportError("extension needs the package peft: pip install lococo[train]") from error
