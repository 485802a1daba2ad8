"""What a user asks of LoCoCo in a server, and what layers compute with, from a small model of the same shape."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import transformers

from lococo.cache.buffers import LayerModules
from lococo.config import LoCoCoConfig
from lococo.cuda_graphs import layer_modules
from lococo.heads import read_heads_config
from lococo.patch import patch_model
from lococo.state import patch_of

# Sizes that do not matter to what a layer remembers.
SMALL = {"vocab_size": 8, "intermediate_size": 8, "moe_intermediate_size": 8, "num_experts": 1, "num_local_experts": 1}


@dataclasses.dataclass(frozen=True)
class Settings:
    """A choice of slots, or of trained heads.

    Attributes
    ----------
    config : LoCoCoConfig
    heads : str, optional
        Folder or Hub id.
    """

    config: LoCoCoConfig
    heads: str | None

    @classmethod
    def of(cls, options: Any) -> Settings:
        """Settings from ``{"heads": ...}`` or fields of ``LoCoCoConfig``; of heads only ``slot_bits`` may be changed.

        Raises
        ------
        ValueError
            If there are none, a name or a value is wrong, or a server cannot do it.
        """
        if not isinstance(options, dict) or all(value is None for value in options.values()):
            raise ValueError(
                'LoCoCo needs to know its slots: --additional-config \'{"lococo": {"num_slots": 512}}\', or {"heads": '
                f"folder or Hub id}}, got {options!r}"
            )
        options = dict(options)
        heads = options.pop("heads", None)
        names = {"slot_bits"} if heads else {field.name for field in dataclasses.fields(LoCoCoConfig)}
        if unknown := sorted(options.keys() - names):
            raise ValueError(
                f"additional_config['lococo'] has {', '.join(unknown)}: "
                + (
                    "beside heads there may be slot_bits alone"
                    if heads
                    else f"known are heads, {', '.join(sorted(names))}"
                )
            )
        for name in ("slot_bits", "slots_per_head"):
            options[name] = _tuples(options[name]) if name in options else None
        options = {name: value for name, value in options.items() if value is not None}
        config = dataclasses.replace(read_heads_config(heads), **options) if heads else LoCoCoConfig(**options)
        if config.positions != "absolute":
            raise ValueError(
                f"positions must be 'absolute' in vLLM, which rotates keys itself, got {config.positions!r}"
            )
        if config.decode_block_size is not None:
            raise ValueError(
                f"decode_block_size={config.decode_block_size} must be left out in vLLM: how far a request was read "
                "follows from its tokens alone"
            )
        return cls(config, heads)

    def modules(self, hf_config: Any, dtype: torch.dtype) -> dict[int, LayerModules]:
        """What every layer computes its memory with, for all of its KV heads, on torch's default device.

        Parameters
        ----------
        hf_config : transformers.PretrainedConfig
            Of the language model.

        Raises
        ------
        ValueError
            If LoCoCo does not support the model, or heads are of another.
        """
        model = skeleton(hf_config, dtype)
        patch_model(model, self.config, heads=self.heads)
        patch = patch_of(model)
        modules = dict(zip(patch.layers, layer_modules(patch), strict=True))
        return {
            index: each._replace(head=_frozen(each.head), network=_frozen(each.network))
            for index, each in modules.items()
        }


def skeleton(hf_config: Any, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A model with as many layers and heads of the same size, and hardly anything else: its weights are noise."""
    config = copy.deepcopy(hf_config)
    heads = config.num_attention_heads
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    config.hidden_size = 2 * heads
    for name, size in SMALL.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, size)
    if getattr(config, "num_experts_per_tok", None) is not None:
        config.num_experts_per_tok = 1
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    with torch.random.fork_rng(devices=[]):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _frozen(module: Any) -> Any:
    return None if module is None else module.requires_grad_(False)
