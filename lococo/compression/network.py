"""What is learned of a score: numbers that tell of a token, as it is read, how much it will be looked up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lococo.compression.offloading import onloaded

HIDDEN_SIZE = 64


class ScoreNetwork(nn.Module):
    """A layer's features of tokens for a score, from the keys and values of all of its KV heads.

    A token's features are made once and kept beside its key and value in every KV head: layer norm, a hidden layer
    with SiLU, and a linear layer that begins with zeros, so that all features do.

    Parameters
    ----------
    num_kv_heads : int
    head_dim : int
        d, size of a key and of a value.
    num_features : int
        Numbers per token and KV head.
    """

    def __init__(self, num_kv_heads: int, head_dim: int, num_features: int, device=None, dtype=None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.num_features = num_features
        self.norm = nn.LayerNorm(2 * num_kv_heads * head_dim, **factory)
        self.hidden = nn.Linear(2 * num_kv_heads * head_dim, HIDDEN_SIZE, **factory)
        self.output = nn.Linear(HIDDEN_SIZE, num_kv_heads * num_features, **factory)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Features of tokens.

        Parameters
        ----------
        keys, values : torch.Tensor
            (batch, kv_heads, tokens, head_dim), of all KV heads of the layer, keys not rotated.

        Returns
        -------
        torch.Tensor
            (batch, kv_heads, tokens, num_features), in float32 or wider: near ties must not depend on how many tokens
            come at once.
        """
        wide = torch.promote_types(keys.dtype, torch.float32)
        tokens = torch.cat([keys, values.to(keys.dtype)], dim=1).transpose(1, 2).flatten(2).to(wide)
        with onloaded(self.norm):
            tokens = F.layer_norm(tokens, tokens.shape[-1:], self.norm.weight.to(wide), self.norm.bias.to(wide))
        tokens = _linear(self.output, F.silu(_linear(self.hidden, tokens)))
        return tokens.unflatten(-1, (keys.shape[1], self.num_features)).transpose(1, 2)


def _linear(layer: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """A layer in the dtype of its inputs."""
    with onloaded(layer):
        return F.linear(inputs, layer.weight.to(inputs.dtype), layer.bias.to(inputs.dtype))
