"""What a forward of a patched decoder is asked for, and what its layers share while they read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from lococo.cache.cache import LoCoCoCache
from lococo.cache.layer import LayerCache
from lococo.cache.plan import Plan, RowState, plan_call
from lococo.config import LoCoCoConfig
from lococo.models.rotary import Rotary


@dataclasses.dataclass
class ForwardContext:
    """One forward of a patched decoder, shared by its layers.

    Attributes
    ----------
    plan : Plan
        For ``config.num_slots``.
    cache : LoCoCoCache, optional
        None where nothing is remembered after the forward.
    rotary_tables : dict
        ``Rotary`` (or None) by layer index.
    rows, real
        What the plan was made from, as in ``plan_call``, for heads with another number of slots.
    is_piece
        As in ``plan_call``.
    attention : str
        Name of the attention kernel.
    earlier : list of torch.Tensor
        Last hidden states of the chunks read before this one.
    plans : dict
        Plans by number of slots and device, for models spread over several.
    is_recorded : bool
        Whoever made the context replays the forward, and keeps the books: no layer asks the plan for places.
    hands_out : bool
        Whoever called the model wants the cache.
    ends_text : bool
        It is the last piece of a text that is read in pieces.
    read : set of int
        Layers that have read it.
    """

    config: LoCoCoConfig
    plan: Plan
    cache: LoCoCoCache | None
    rotary_tables: dict[int, Rotary | None]
    rows: Sequence[RowState] = (RowState(),)
    real: Sequence[Sequence[bool]] | None = None
    is_piece: bool = False
    attention: str = "auto"
    earlier: list[torch.Tensor] = dataclasses.field(default_factory=list)
    plans: dict[tuple[int, torch.device], Plan] = dataclasses.field(default_factory=dict)
    is_recorded: bool = False
    hands_out: bool = False
    ends_text: bool = False
    read: set[int] = dataclasses.field(default_factory=set)

    def plan_for(self, config: LoCoCoConfig, device: torch.device) -> Plan:
        """The plan for heads with a config, on a device."""
        key = (config.num_slots, device)
        if key not in self.plans:
            if config.num_slots == self.config.num_slots or self.is_recorded:
                self.plans[key] = self.plan.to(device)
            else:
                num_tokens = self.plan.positions.shape[1]
                self.plans[key] = plan_call(self.rows, num_tokens, config, self.real, device, self.is_piece)
        return self.plans[key]

    def layer(self, layer_idx: int, window: int | None) -> LayerCache:
        """What the layer remembers, about to read: in the cache, or until this forward ends."""
        self.read.add(layer_idx)
        if self.cache is None:
            layer = LayerCache(self.config, layer_idx)
        else:
            self.cache.is_reading = not self.is_recorded
            layer = self.cache.layers[layer_idx]
        layer.set_window(window)
        return layer


@dataclasses.dataclass(frozen=True)
class ForwardRequest:
    """What a caller inside the library asks of the decoder's next forward.

    Attributes
    ----------
    cache : LoCoCoCache, optional
        Cache to read into, without the model handing it out.
    keep : int, optional
        Hidden states needed at the end of the text. None: all.
    context : ForwardContext, optional
        Made already, for arguments that need no more preparation.
    is_chunk : bool
        Read at once, whatever the length.
    """

    cache: LoCoCoCache | None = None
    keep: int | None = None
    context: ForwardContext | None = None
    is_chunk: bool = False
