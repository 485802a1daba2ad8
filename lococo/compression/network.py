"""What is learned of a score: numbers that tell of a token, as it is read, how much it will be looked up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN_SIZE = 64


class Affine(nn.Module):
    """A weight and a bias of a network. No ``nn.Linear``: what adapts or quantizes those of a model is not for it."""

    def __init__(self, *shape: int, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, **factory))
        self.bias = nn.Parameter(torch.zeros(shape[0], **factory))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Their product, or for a weight of one dimension their norm, scaled by it; in the dtype of the inputs."""
        weight, bias = self.weight.to(inputs.dtype), self.bias.to(inputs.dtype)
        if weight.dim() == 1:
            return F.layer_norm(inputs, inputs.shape[-1:], weight, bias)
        return F.linear(inputs, weight, bias)


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
        factory, inputs = {"device": device, "dtype": dtype}, 2 * num_kv_heads * head_dim
        self.num_features = num_features
        self.normed = Affine(inputs, **factory)
        self.hidden = Affine(HIDDEN_SIZE, inputs, **factory)
        self.output = Affine(num_kv_heads * num_features, HIDDEN_SIZE, **factory)
        nn.init.ones_(self.normed.weight)
        for parameter in self.hidden.parameters():
            nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5)

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
        tokens = self.output(F.silu(self.hidden(self.normed(tokens))))
        return tokens.unflatten(-1, (keys.shape[1], self.num_features)).transpose(1, 2)
