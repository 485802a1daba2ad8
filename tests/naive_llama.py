"""Gradients of a tiny patched model by the naive reference, token by token and in float64."""

import dataclasses

import torch
from reference import naive_head, naive_lococo, naive_network

from lococo.state import patch_of


def naive_logits(model, ids, cuts=()):
    """(rows, tokens, vocabulary) logits of a patched Llama without its patch: a loop over layers and rows.

    Parameters
    ----------
    cuts : collection of int
        As in ``reference.naive_lococo``.
    """
    patch = patch_of(model)
    decoder, config, layers = patch.decoder, patch.config, patch.layers

    def rotate(vectors, positions):
        cos, sin = decoder.rotary_emb(vectors, positions[None])  # angles in float32
        first, second = vectors.chunk(2, dim=-1)
        return vectors * cos[0] + torch.cat([-second, first], dim=-1) * sin[0]

    places = torch.arange(ids.shape[1])
    hidden = decoder.embed_tokens(ids)
    for index, block in enumerate(decoder.layers):
        attention = layers[index]
        normed = block.input_layernorm(hidden)
        projected = [getattr(attention, f"{name}_proj")(normed) for name in "qkv"]
        query, key, value = (
            part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in projected
        )  # (rows, heads, tokens, head_dim)
        if config.positions == "absolute":
            query, key = rotate(query, places), rotate(key, places)
        head, network = naive_head(patch.heads.get(index)), naive_network(patch.networks.get(index))
        of_layer, outputs = config, []
        if config.slots_per_head is not None:
            of_layer = dataclasses.replace(config, slots_per_head=config.slots_per_head[index : index + 1])
        for row in range(len(ids)):
            parts = query[row], key[row], value[row]
            outputs.append(naive_lococo(*parts, of_layer, head, rotate, cuts=cuts, network=network)[0])
        output = torch.stack(outputs).transpose(1, 2).flatten(2)  # (rows, tokens, heads * head_dim)
        hidden = hidden + attention.o_proj(output)
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return model.get_output_embeddings()(decoder.norm(hidden))


def naive_gradients(model, ids, cuts=(), targets=None):
    """Gradients of the mean loss by parameter name; of the divergence from log-probabilities if ``targets`` are."""
    said = naive_logits(model, ids, cuts)[:, :-1].log_softmax(dim=-1)
    losses = -said.gather(-1, ids[:, 1:, None]) if targets is None else targets.exp() * (targets - said)
    (losses.sum() / ids[:, 1:].numel()).backward()
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
    found = {name: parameter.grad.clone() for name, parameter in learned.items()}
    model.zero_grad()
    return found
