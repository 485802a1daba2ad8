"""kvpress's presses at exactly M entries per layer and KV head, for ``kvpress_side_by_side.py``.

Only ``press_rows`` and ``make_kvzip`` need kvpress. Three ways to fill the same M entries:

- ``DENSE``: one forward holds the whole text with full attention, then every layer is compressed once.
- ``BLOCK``: kvpress's BlockPress. The forward is the same, whole and dense; only the selection goes block by block.
- ``READING``: kvpress's DecodingPress, compressing after every block that the model is given: no more than M + B
  entries are ever held. This is how LoCoCo reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel

from lococo.compat import OUTPUT_CACHE, with_cache

DENSE, BLOCK, READING = "dense, then compressed", "dense, selected by blocks", "in blocks"


@dataclasses.dataclass(frozen=True)
class PressRow:
    """One of kvpress's methods.

    Attributes
    ----------
    press : object
        With kvpress's ``compress(module, hidden_states, keys, values, attentions, kwargs)`` or, for ``READING``, a
        context manager of the model.
    needs_attentions : bool
        Whether it looks at the attention matrix.
    """

    name: str
    reads: str
    press: Any
    needs_attentions: bool = False


def ratio_keeping(kept: int, entries: int) -> float:
    """``compression_ratio`` with which ``int(entries * (1 - ratio))`` is ``kept``, whatever the rounding."""
    return 1 - (kept + 0.5) / entries


def press_rows(num_slots: int, block_size: int, prompt: int) -> list[PressRow]:
    """Every method but KVzip, with kvpress's own defaults, for prompts of so many tokens."""
    from kvpress import (
        BlockPress,
        DecodingPress,
        ExpectedAttentionPress,
        KeyDiffPress,
        ObservedAttentionPress,
        SnapKVPress,
        StreamingLLMPress,
        TOVAPress,
    )

    ratio = ratio_keeping(num_slots, prompt)
    scorers: dict[str, Callable[..., Any]] = {
        "streaming": StreamingLLMPress,
        "snapkv": SnapKVPress,
        "tova": TOVAPress,
        "keydiff": KeyDiffPress,
        "expected": ExpectedAttentionPress,
    }
    rows = [PressRow("kvpress-h2o", DENSE, ObservedAttentionPress(ratio), needs_attentions=True)]
    for name, scorer in scorers.items():
        rows += [
            PressRow(f"kvpress-{name}", DENSE, scorer(ratio)),
            PressRow(f"kvpress-{name}-block", BLOCK, BlockPress(scorer(ratio), block_size)),
        ]
        # What is kept is not in the order of the text: at the next block StreamingLLM would find its sinks no more.
        if scorer is not StreamingLLMPress:
            press = DecodingPress(scorer(), compression_interval=1, target_size=num_slots)
            rows.append(PressRow(f"kvpress-{name}-reading", READING, press))
    return rows


def make_kvzip(model: PreTrainedModel, tokenizer: Any, num_slots: int, prompt: int, folder: str) -> Any:
    """KVzip that keeps M entries on average over layers and KV heads; its tokenizer is read from ``folder``.

    The texts are no chats: without a chat template it takes no first tokens for a template's and adds none.
    """
    from kvpress import KVzipPress

    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(folder)
    tokenizer.chat_template = template
    model.config._name_or_path = folder
    heads = model.config.num_hidden_layers * model.config.num_key_value_heads
    pruned = heads * (prompt - num_slots)
    return KVzipPress((pruned + 0.5) / (heads * prompt))


@contextlib.contextmanager
def compressing(model: PreTrainedModel, rows: Sequence[PressRow]) -> Iterator[dict[str, DynamicCache]]:
    """While a prompt is read in one forward, compress every layer by every press; the model's cache stays whole.

    A press compresses a layer after its attention, and the layer's output does not depend on that. So the caches are
    those that a forward for each press alone would leave.
    """
    caches = {row.name: DynamicCache() for row in rows}

    def compress(module: Any, args: tuple, kwargs: dict[str, Any], output: tuple) -> None:
        layer = kwargs[OUTPUT_CACHE].layers[module.layer_idx]
        for row in rows:
            attentions = output[1] if row.needs_attentions else None
            pair = row.press.compress(module, kwargs["hidden_states"], layer.keys, layer.values, attentions, kwargs)
            caches[row.name].update(*pair, module.layer_idx)

    decoder = model.model
    hooks = [layer.self_attn.register_forward_hook(compress, with_kwargs=True) for layer in decoder.layers]
    for layer in decoder.layers:
        layer.self_attn.rotary_emb = decoder.rotary_emb  # as kvpress does: ExpectedAttention looks for it there
    for row in rows:
        if hasattr(row.press, "post_init_from_model"):
            row.press.post_init_from_model(model)
    try:
        yield caches
    finally:
        for hook in hooks:
            hook.remove()
        for layer in decoder.layers:
            del layer.self_attn.rotary_emb


@contextlib.contextmanager
def attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """The model with another attention inside the block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def check_kept(name: str, cache: DynamicCache, wanted: int) -> None:
    """Make sure that every layer holds exactly so many entries per KV head.

    Raises
    ------
    RuntimeError
        If one does not.
    """
    found = {layer.keys.shape[2] for layer in cache.layers} | {layer.values.shape[2] for layer in cache.layers}
    if found != {wanted}:
        raise RuntimeError(f"{name} holds {sorted(found)} entries per layer and KV head, expected {wanted}")


@contextlib.contextmanager
def hiding_masked(name: str, model: PreTrainedModel, entries: int, wanted: int, block_size: int) -> Iterator[None]:
    """Hide from the next block what kvpress has marked in ``masked_key_indices``, of every layer's first entries.

    kvpress itself puts a fake key there to which all queries are opposed. There is one for the few queries of a
    decoded token, but not for those of a block, so this is a mask, with the same effect: no attention.

    Raises
    ------
    RuntimeError
        If not exactly ``wanted`` entries are left, on average over layers and KV heads.
    """
    masks, kv_heads = [], model.config.num_key_value_heads
    for layer in model.model.layers:
        rows, heads, places = layer.self_attn.masked_key_indices
        visible = (
            torch.ones(block_size, entries + block_size, dtype=torch.bool).tril(entries).repeat(1, kv_heads, 1, 1)
        )
        visible[rows, heads, :, places] = False
        masks.append(visible.repeat_interleave(layer.self_attn.num_key_value_groups, dim=1))
        layer.self_attn.masked_key_indices = None
    kept = sum(int(mask[0, :: mask.shape[1] // kv_heads, 0, :entries].sum()) for mask in masks)
    if kept != wanted * kv_heads * len(masks):
        raise RuntimeError(f"{name} keeps {kept} entries in all, expected {wanted} times {kv_heads * len(masks)}")

    def hide(mask: torch.Tensor, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": mask}

    hooks = [
        layer.self_attn.register_forward_pre_hook(functools.partial(hide, mask), with_kwargs=True)
        for layer, mask in zip(model.model.layers, masks, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def next_block_nlls(
    model: PreTrainedModel, caches: Sequence[DynamicCache], ids: torch.Tensor, start: int
) -> torch.Tensor:
    """Negative log-likelihoods of the tokens after ``start``, every cache as a row of one forward.

    Parameters
    ----------
    caches : sequence of DynamicCache
        Of one row each, all with as many entries.
    ids : torch.Tensor
        (1, tokens), the whole window: those from ``start`` on go into the model at their places in the text.

    Returns
    -------
    torch.Tensor
        (caches, tokens - start - 1) in nats.
    """
    together = DynamicCache()
    for index in range(len(caches[0].layers)):
        layers = [cache.layers[index] for cache in caches]
        together.update(torch.cat([each.keys for each in layers]), torch.cat([each.values for each in layers]), index)
    places = torch.arange(start, ids.shape[1] - 1, device=ids.device)[None]
    block = ids[:, start:-1].expand(len(caches), -1)
    logits = model(block, position_ids=places.expand_as(block), **with_cache(model, together)).logits
    wanted = ids[:, start + 1 :].expand(len(caches), -1)
    return F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)


@torch.no_grad()
def nlls_after_prefill(
    model: PreTrainedModel, rows: Sequence[PressRow], kvzip: Any, ids: torch.Tensor, start: int, num_slots: int
) -> dict[str, torch.Tensor]:
    """Negative log-likelihoods of the tokens after ``start`` once those before are compressed, by method.

    One forward serves all of them, KVzip included, which then replays the text against its own cache.

    Parameters
    ----------
    kvzip : context manager, optional
        None: leave it out.
    """
    prompt, cache = ids[:, :start], DynamicCache()
    with kvzip(model) if kvzip else contextlib.nullcontext():
        eager = any(row.needs_attentions for row in rows)
        with attention(model, "eager" if eager else "sdpa"), compressing(model, rows) as caches:
            model.model(input_ids=prompt, **with_cache(model, cache))
    nlls = {}
    if kvzip:
        check_kept("kvpress-kvzip", cache, start)
        with hiding_masked("kvpress-kvzip", model, start, num_slots, ids.shape[1] - 1 - start):
            nlls["kvpress-kvzip"] = next_block_nlls(model, [cache], ids, start)[0]
    for name, each in caches.items():
        check_kept(name, each, num_slots)
    if caches:
        nlls |= zip(caches, next_block_nlls(model, list(caches.values()), ids, start), strict=True)
    return nlls


@torch.no_grad()
def nlls_while_reading(
    model: PreTrainedModel, row: PressRow, ids: torch.Tensor, block_size: int, num_slots: int
) -> torch.Tensor:
    """Negative log-likelihoods of all tokens after the first, read in blocks that are compressed one by one.

    Returns
    -------
    torch.Tensor
        (tokens - 1,) in nats.
    """
    cache, nlls = DynamicCache(), []
    with row.press(model):
        for start in range(0, ids.shape[1] - 1, block_size):
            stop = min(start + block_size, ids.shape[1] - 1)
            places = torch.arange(start, stop, device=ids.device)[None]
            logits = model(ids[:, start:stop], position_ids=places, **with_cache(model, cache)).logits
            nlls.append(F.cross_entropy(logits[0].float(), ids[0, start + 1 : stop + 1], reduction="none"))
            check_kept(row.name, cache, min(stop, num_slots))
    return torch.cat(nlls)
