"""Views of a layer's buffers: the entries of KV heads with the same budget, during a call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from lococo.cache.plan import Compression, Plan, Segment
from lococo.compression.base import Compressor
from lococo.compression.codes import Codec
from lococo.compression.entries import Entries, by_group
from lococo.compression.select import Budget, compress
from lococo.config import LoCoCoConfig
from lococo.models.rotary import Rotary
from lococo.registry import COMPRESSORS, SCORES

Observer = Callable[["KVBuffer", Entries, "int | torch.Tensor", "Compressor | None"], None]


class HeadGroup(NamedTuple):
    """KV heads of a layer with the same budget, and where their entries lie in its buffers, one head after another."""

    config: LoCoCoConfig
    heads: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        """Where the entries of the last head end."""
        return self.start + len(self.heads) * self.config.capacity


def group_heads(configs: Sequence[LoCoCoConfig]) -> tuple[HeadGroup, ...]:
    """KV heads with these configs, those with the same together, in the order in which they lie in the buffers."""
    by_config: dict[LoCoCoConfig, list[int]] = {}
    for head, config in enumerate(configs):
        by_config.setdefault(config, []).append(head)
    groups: list[HeadGroup] = []
    for config, heads in by_config.items():
        groups.append(HeadGroup(config, tuple(heads), groups[-1].stop if groups else 0))
    return tuple(groups)


def make_entries(
    groups: Sequence[HeadGroup],
    window: int | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    network: Any | None = None,
) -> tuple[Entries, Codec | None]:
    """Everything that KV heads will ever hold, zero, and how it is coded, if it is.

    Parameters
    ----------
    groups : sequence of HeadGroup
    window : int, optional
        Tokens a query of the layer sees.
    query : torch.Tensor
        (batch, heads, tokens, head_dim), for sizes, type and device alone, as are
    key, value : torch.Tensor
        (batch, kv_heads, tokens, head_dim).
    network : callable, optional
        Of a learned score.

    Returns
    -------
    tuple
        (batch, entries of all KV heads, ...) numbers with ranges for what will be codes; a codec or None.
    """
    config, budgets = groups[0].config, [Budget.of(group.config, window) for group in groups]
    shape = (key.shape[0], groups[-1].stop)
    wide = torch.promote_types(key.dtype, torch.float32)

    def numbers(wanted: bool) -> torch.Tensor | None:
        return torch.zeros(shape, dtype=wide, device=key.device) if wanted else None

    is_ranked = any(budget.is_ranked(config) for budget in budgets)
    is_blended = any(budget.fused > 0 for budget in budgets)
    needs = SCORES[config.score].needs if is_ranked else frozenset()
    keys = key.new_zeros(*shape, key.shape[-1])
    entries = Entries(
        keys=keys,
        values=value.new_zeros(*shape, value.shape[-1]),
        scores=numbers("attention" in needs),
        position=numbers(window is not None or "position" in needs),
        log_mass=numbers(config.mass_bias and is_blended),
        rotated=torch.zeros_like(keys) if config.positions == "slot" else None,
    )
    if network is not None and "features" in needs:
        entries.features = torch.zeros(*shape, network.num_features, dtype=torch.float16, device=key.device)
    if is_blended and COMPRESSORS[config.compressor].needs_queries:
        entries.queries = keys.new_zeros(*shape, query.shape[1] // key.shape[1] * query.shape[3])
    if config.bits == (16, 16):
        return entries, None
    codec = Codec(config.bits, (key.shape[-1], value.shape[-1]), (key.dtype, value.dtype))
    return codec.with_ranges(entries), codec


class TokenStates(NamedTuple):
    """What some KV heads make of a call's tokens.

    Attributes
    ----------
    key, value : torch.Tensor
        (batch, kv_heads, tokens, head_dim), keys as the model rotated them.
    unrotated : torch.Tensor
        The keys before that, with ``positions="slot"``; else the same as ``key``.
    features : torch.Tensor, optional
        (batch, kv_heads, tokens, num_features), for a learned score.
    key_range, value_range, unrotated_range : torch.Tensor, optional
        Where entries are held as codes, those of keys and values, which are rounded to what codes stand for.
    """

    key: torch.Tensor
    value: torch.Tensor
    unrotated: torch.Tensor
    features: torch.Tensor | None = None
    key_range: torch.Tensor | None = None
    value_range: torch.Tensor | None = None
    unrotated_range: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TokenStates:
        """The same function on every tensor."""
        changed = TokenStates(*(None if each is None else function(each) for each in self))  # type: ignore[arg-type]
        return changed._replace(unrotated=changed.key) if self.unrotated is self.key else changed


class LayerModules(NamedTuple):
    """What a layer computes its memory with.

    Attributes
    ----------
    head : Compressor, optional
        None where nothing is fused.
    network : callable, optional
        Makes the features of a learned score, see ``Score.network``.
    rotary : Rotary, optional
        Takes the rotation off keys and moves them to their places in the cache; None where nobody asks for it, or keys
        are not rotated.
    """

    head: Compressor | None = None
    network: Any | None = None
    rotary: Rotary | None = None


class KVBuffer:
    """Entries of the KV heads of one group during a call: a view of what their layer owns.

    Without gradients everything is written in place. With gradients every write makes a new tensor, so that
    back-propagation reaches the tokens of earlier segments; the layer takes them over when the call has been read.

    Attributes
    ----------
    entries : Entries
        (batch, kv_heads of the group, ``num_slots + block_size``, ...), used from the first on.
    """

    def __init__(
        self,
        group: HeadGroup,
        window: int | None,
        entries: Entries,
        in_place: bool = True,
        observer: Observer | None = None,
        codec: Codec | None = None,
    ) -> None:
        self.group, self.config, self.window, self.codec = group, group.config, window, codec
        self.entries = entries
        self.in_place = in_place
        self.observer = observer

    @property
    def keys(self) -> torch.Tensor:
        """(batch, kv_heads, capacity, head_dim), the keys that attention reads."""
        return self.entries.rotated_keys

    @property
    def values(self) -> torch.Tensor:
        """(batch, kv_heads, capacity, head_dim)."""
        return self.entries.values

    def tokens(self, query: torch.Tensor, states: TokenStates, plan: Plan) -> Entries:
        """The tokens of a call as entries.

        Parameters
        ----------
        query : torch.Tensor
            (batch, heads, tokens, head_dim), rotated.
        states : TokenStates
            Of the KV heads of the group.
        """
        key, nothing = states.key, states.key.new_zeros(())
        shape = (*key.shape[:2], plan.positions.shape[1])
        return Entries(
            keys=key if self.entries.rotated is None else states.unrotated,
            values=states.value,
            scores=nothing.expand(shape),
            position=plan.positions[:, None].expand(shape),
            log_mass=nothing.expand(shape),
            rotated=key,
            keys_range=states.key_range if self.entries.rotated is None else states.unrotated_range,
            values_range=states.value_range,
            rotated_range=states.key_range,
            queries=None if self.entries.queries is None else by_group(query, key.shape[1]),
            features=states.features,
        )

    def write(self, segment: Segment, tokens: Entries) -> None:
        """Put a segment of the call's tokens into its entries."""
        self.entries = self.entries.combine(tokens, lambda buffer, new: segment.write(buffer, new, self.in_place))

    def close_block(self, segment: Segment, modules: LayerModules) -> None:
        """Compress what is full before a segment is written; attention of the past counts less from then on."""
        for compression in segment.compressions:
            self.compress(compression, modules)
        scores, per_token = self.entries.scores, self.config.score_fade
        if scores is not None and per_token < 1 and segment.closes_block:
            factor = segment.fading(per_token)
            self.entries.scores = scores.mul_(factor) if self.in_place else scores * factor

    def compress(self, compression: Compression, modules: LayerModules) -> None:
        """Replace the first entries of some rows by their M slots."""
        rows, num_slots, (head, _, rotary) = compression.rows, self.config.num_slots, modules
        before = dataclasses.replace(self.entries, rotated=None, rotated_range=None).map(
            lambda tensor: (tensor if rows is None else tensor[rows])[:, :, : compression.num_entries]
        )
        if self.observer is not None:
            self.observer(self, before, compression.seen, head)
        slots = compress(before, compression.seen, self.config, head, self.window, self.codec)
        if self.entries.rotated is not None:
            positions = torch.arange(num_slots, device=slots.keys.device)[None]
            slots.rotated = slots.keys if rotary is None else rotary.rotate(slots.keys, positions)
            if self.codec is not None:
                slots.rotated, slots.rotated_range = self.codec.rounded_keys(slots.rotated)

        def replace(buffer: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            if self.in_place:
                buffer[slice(None) if rows is None else rows, :, :num_slots] = new
                return buffer
            whole = torch.slice_scatter(buffer if rows is None else buffer[rows], new, dim=2, end=num_slots)
            return whole if rows is None else buffer.index_copy(0, rows, whole)

        self.entries = self.entries.combine(slots, replace)

    def mass_bias(self, head: Compressor | None, stop: int | None = None) -> torch.Tensor | None:
        """(batch, kv_heads, entries up to ``stop``) bias on the logits by what entries stand for; None: no bias."""
        # The head is asked in any case: on a GPU its first answer is waited for, and steps must not wait.
        if head is None or head.is_closed or self.entries.log_mass is None:
            return None
        return head.mass_bias(self.entries.log_mass[:, :, :stop])


def is_locked(tensor: torch.Tensor) -> bool:
    """Whether it was made in inference mode and may not be written to any more."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()
