"""Models whose parameters lie in parts on several processes (FSDP2, PyTorch's ``fully_shard``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import transformers
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer, TrainingArguments

from lococo.state import is_ours

# Every process has the whole model in the memory of its CPU at first; a checkpoint is written in parts.
FSDP_CONFIG = {"version": 2, "cpu_ram_efficient_loading": False, "state_dict_type": "SHARDED_STATE_DICT"}


def sharded_arguments() -> dict[str, Any]:
    """What ``transformers.TrainingArguments`` are told so that a trainer shards its model."""
    return {"fsdp": True, "fsdp_config": dict(FSDP_CONFIG)}


def keep_precision(args: TrainingArguments) -> None:
    """Leave it to autocast what is computed in half precision: sharding would round the losses, too.

    Raises
    ------
    ValueError
        If Transformers is too old to be told.
    """
    if not args.fsdp:
        return
    if not hasattr(args, "fsdp_plugin_args"):
        raise ValueError(f"FSDP needs Transformers 5, {transformers.__version__} is installed")
    plugin: Any = args.fsdp_plugin_args
    plugin["mixed_precision_policy"] = MixedPrecisionPolicy()


def check_sharding(trainer: Trainer) -> None:
    """Refuse kinds of FSDP that a trainer of windows does not support.

    Raises
    ------
    ValueError
        For FSDP1, for weights that only the first process has, and if accelerate was told instead of the trainer.
    """
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if not trainer.args.fsdp:
        raise ValueError("accelerate was told to use FSDP: tell TrainingArguments (sharded_arguments()) instead")
    if plugin.fsdp_version != 2:
        raise ValueError(f"FSDP{plugin.fsdp_version} is not supported: use FSDP2, fsdp_config={FSDP_CONFIG}")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError("cpu_ram_efficient_loading=True is not supported: heads are made on every process")


@contextlib.contextmanager
def gathered(model: nn.Module, *, write_back: bool = False) -> Iterator[None]:
    """Have what learns, and what a patch added, whole in a model inside a ``with`` block, in the place of its parts.

    All processes have to take part. Nothing happens to a model that is not sharded.

    Parameters
    ----------
    write_back : bool
        Whether the sharded ones take over at the end what is in the whole ones.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    whole: dict[nn.Parameter, nn.Parameter] = {}  # a tied one only once
    sharded: list[tuple[nn.Module, str, Any]] = []  # and the sharded parameter, which is a DTensor
    parameter: Any
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            is_part = isinstance(parameter, DTensor)
            if is_part and (parameter.requires_grad or is_ours(path)):
                if parameter not in whole:
                    whole[parameter] = nn.Parameter(parameter.detach().full_tensor(), parameter.requires_grad)
                module._parameters[name] = whole[parameter]
                sharded.append((module, name, parameter))
    try:
        yield
        for module, name, parameter in sharded if write_back else []:
            current: Any = module._parameters[name]
            values = distribute_tensor(current.detach(), parameter.device_mesh, parameter.placements)
            parameter.detach().copy_(values)
    finally:
        for module, name, parameter in sharded:
            module._parameters[name] = parameter
