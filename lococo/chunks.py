"""How many tokens of a long prompt go through the model at once."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from lococo.models import base_shape
from lococo.models.chatglm.family import is_remote_chatglm

# Share of the free memory that the counted activations may take: kernels, and an allocator's gaps, need theirs.
FREE_SHARE = 0.25
# Of all rows together. More is no faster: a GPU's matrix products are as fast as they get, the CPU's caches overflow.
MOST_TOKENS = {"cuda": 4096, "cpu": 512}

PER_TOKEN_ARGUMENTS = ("input_ids", "inputs_embeds", "position_ids", "cache_position")


def prefill_chunk(decoder: Any, block_size: int, tokens: torch.Tensor) -> int:
    """Tokens of a row that a decoder reads at once, by the memory that is free now where tokens and layers are.

    Processes that read together read in equal chunks, whatever memory each of them has: the parts of a sharded model
    are called equally often.
    """
    batch = tokens.shape[0]
    devices = {tokens.device, *(parameter.device for parameter in decoder.parameters())} - {torch.device("meta")}
    most = min((MOST_TOKENS.get(device.type, MOST_TOKENS["cpu"]) for device in devices), default=MOST_TOKENS["cpu"])
    free = [] if _is_distributed() else [found for found in map(free_memory, devices) if found is not None]
    return chunk_size(min(free, default=None), batch * _decoder_token_bytes(decoder), block_size, most // batch)


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


def columns(kwargs: dict[str, Any], part: slice) -> dict[str, Any]:
    """Those of a decoder's arguments that come token by token, for a part of the tokens."""
    parts = {}
    for name in PER_TOKEN_ARGUMENTS:
        tensor = kwargs.get(name)
        if tensor is not None:
            parts[name] = tensor[part] if tensor.dim() == 1 else tensor[:, part]
    return parts


def _decoder_token_bytes(decoder: Any) -> int:
    shape, config = base_shape(decoder), decoder.config
    config = config if is_remote_chatglm(decoder) else config.get_text_config()
    wide = getattr(config, "intermediate_size", None) or getattr(config, "ffn_hidden_size", 4 * config.hidden_size)
    queries, keys = (heads * shape["head_dim"] for heads in (config.num_attention_heads, shape["num_kv_heads"]))
    return token_bytes(config.hidden_size, wide, queries, keys, decoder.dtype.itemsize)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
