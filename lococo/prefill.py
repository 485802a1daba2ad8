"""A long prompt read in chunks: how many tokens go through the model at once, and all but the last of them."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from lococo.cache.cache import LoCoCoCache
from lococo.context import ForwardRequest
from lococo.models import Family
from lococo.state import Patch

# Share of the free memory that the counted activations may take: kernels, and an allocator's gaps, need theirs.
FREE_SHARE = 0.25
# Of all rows together. More is no faster: a GPU's matrix products are as fast as they get, the CPU's caches overflow.
MOST_TOKENS = {"cuda": 4096, "cpu": 512}

PER_TOKEN_ARGUMENTS = ("input_ids", "inputs_embeds", "position_ids", "cache_position")


def chunk_for(patch: Patch, kwargs: dict[str, Any], tokens: torch.Tensor) -> int | None:
    """Tokens of a row to read at once, by the decoder's arguments; None: all."""
    size = patch.prefill_chunk_size
    if tokens.shape[1] <= (size or patch.config.block_size):  # a step of decoding, for one
        return None
    # Outputs of every layer, hidden states or a router's logits, are wanted of the whole text.
    config = patch.decoder.config
    outputs = {name for name in (*vars(config), *kwargs) if name.startswith("output_")}
    wanted = {name: kwargs.get(name) for name in outputs}
    wanted = {name: getattr(config, name, False) if value is None else value for name, value in wanted.items()}
    if torch.is_grad_enabled() or any(wanted.values()):
        return None
    return chunk_by_memory(patch.family, patch.config.block_size, tokens) if size is None else size


def chunk_by_memory(family: Family, block_size: int, tokens: torch.Tensor) -> int:
    """Tokens of a row that a decoder reads at once, by the memory that is free now where tokens and layers are.

    Processes that read together read in equal chunks, whatever memory each of them has: the parts of a sharded model
    are called equally often.
    """
    batch, parameters = tokens.shape[0], family.decoder.parameters()
    devices = {tokens.device, *(parameter.device for parameter in parameters)} - {torch.device("meta")}
    most = min((MOST_TOKENS.get(device.type, MOST_TOKENS["cpu"]) for device in devices), default=MOST_TOKENS["cpu"])
    free = [] if _is_distributed() else [found for found in map(free_memory, devices) if found is not None]
    return chunk_size(min(free, default=None), batch * decoder_token_bytes(family), block_size, most // batch)


def chunk_size(free_bytes: int | None, bytes_per_token: int, block_size: int, most: int) -> int:
    """Tokens of a chunk: whole blocks, at least one, at most ``most`` tokens if a block is no more than that.

    Parameters
    ----------
    free_bytes : int, optional
        Free memory of the device. None: it cannot be told, or must not count.
    bytes_per_token : int
        Activations of a token in every row.
    """
    tokens = most if free_bytes is None else min(most, int(FREE_SHARE * free_bytes) // bytes_per_token)
    return max(tokens // block_size, 1) * block_size


def token_bytes(hidden_size: int, intermediate_size: int, query_size: int, kv_size: int, element_size: int) -> int:
    """Bytes of a token's activations where a gated layer is widest.

    Embeddings, the layer's input and its normed input are there all the time. To them come, in the attention, queries,
    keys and values with three more of the queries while they are rotated, then with the rotated queries and three more
    of the keys; in the MLP the state between the two and three products.
    """
    rotating = max(4 * query_size + 2 * kv_size, 2 * query_size + 5 * kv_size)
    return element_size * (3 * hidden_size + max(rotating, hidden_size + 3 * intermediate_size))


def free_memory(device: torch.device) -> int | None:
    """Bytes that tensors could take on a device now; None where nobody can tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu" and importlib.util.find_spec("psutil"):
        import psutil  # comes with accelerate

        return psutil.virtual_memory().available
    return None


def decoder_token_bytes(family: Family) -> int:
    """Bytes of a token's activations in a decoder, see ``token_bytes``."""
    config, shape = family.config, family.shape
    queries, keys = (heads * shape["head_dim"] for heads in (config.num_attention_heads, shape["num_kv_heads"]))
    return token_bytes(config.hidden_size, family.mlp_size, queries, keys, family.decoder.dtype.itemsize)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def read_but_last_chunk(
    patch: Patch, cache: LoCoCoCache, kwargs: dict[str, Any], tokens: torch.Tensor, chunk: int, keep: int | None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Read all chunks but the last into a cache.

    Parameters
    ----------
    kwargs : dict
        Arguments of the decoder; left with those of the last chunk.
    tokens : torch.Tensor
        (batch, tokens) ids or (batch, tokens, hidden_size) embeddings.
    keep : int, optional
        Hidden states needed at the end of the text, so many that the last chunk has them. None: all.

    Returns
    -------
    tuple
        Hidden states of the chunks, none where they are not needed, and the tokens of the last chunk.
    """
    num_tokens = tokens.shape[1]
    last = min(num_tokens, max(keep or 0, num_tokens % chunk or chunk))
    stop, seen, hidden = num_tokens - last, cache.seen_tokens, []
    mask = kwargs.get("attention_mask")
    has_past = mask is not None and mask.shape[1] == seen + num_tokens  # it may leave out what has been read
    try:
        for start in range(0, stop, chunk):
            end = min(start + chunk, stop)
            part = {**kwargs, **columns(kwargs, slice(start, end)), "return_dict": True}
            if mask is not None:
                part["attention_mask"] = mask[:, : seen + end] if has_past else mask[:, start:end]
            with patch.asking(ForwardRequest(cache, is_chunk=True)):
                output = patch.decoder(**part)
            if keep is None:
                hidden.append(output.last_hidden_state)
    finally:
        cache.is_reading = cache.is_reading or cache.seen_tokens > seen  # until the last chunk has been read
    kwargs.update(columns(kwargs, slice(stop, num_tokens)))
    if mask is not None and not has_past:
        kwargs["attention_mask"] = mask[:, stop:]
    return hidden, tokens[:, stop:]


def columns(kwargs: dict[str, Any], part: slice) -> dict[str, Any]:
    """Those of a decoder's arguments that come token by token, for a part of the tokens."""
    parts = {}
    for name in PER_TOKEN_ARGUMENTS:
        tensor = kwargs.get(name)
        if tensor is not None:
            parts[name] = tensor[part] if tensor.dim() == 1 else tensor[:, part]
    return parts
