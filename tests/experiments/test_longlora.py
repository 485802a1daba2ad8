"""Shifted sparse attention against a naive one, and that it never looks ahead."""

import json

import pytest
import torch
from extended import write_documents
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_ids, tiny_llama
from transformers import AutoModelForCausalLM

import lococo
from experiments.longlora import main, shifted_sparse, shifted_sparse_attention

RECORD = "training.json"


def naive(query, key, value, scale, group):
    """Row by row: a token sees those of its own group up to itself. Shifted groups begin half a group later."""
    heads, tokens = query.shape[1:3]
    output = torch.zeros_like(query)
    for head in range(heads):
        half = group // 2
        group_of = [token // group if head < heads // 2 else (token - half) // group for token in range(tokens)]
        for token in range(tokens):
            seen = [other for other in range(token + 1) if group_of[other] == group_of[token]]
            attention = (key[:, head, seen] @ query[:, head, token, :, None] * scale).softmax(dim=1)
            output[:, head, token] = (attention * value[:, head, seen]).sum(dim=1)
    return output


@settings(max_examples=40)
@given(tokens=st.integers(1, 30), group=st.integers(2, 12), heads=st.integers(1, 5))
def test_equals_the_naive_attention(tokens, group, heads):
    generator = torch.Generator().manual_seed(tokens)
    query, key, value = torch.randn(3, 2, heads, tokens, 4, dtype=torch.float64, generator=generator)
    found = shifted_sparse_attention(query, key, value, 0.7, group)
    torch.testing.assert_close(found, naive(query, key, value, 0.7, group))


@torch.no_grad()
@pytest.mark.parametrize("length", [7, 32, 45, 64])
def test_a_model_never_sees_what_comes_later(length):
    ids = tiny_ids(1, length)
    with shifted_sparse(tiny_llama()) as model:
        before = model(ids).logits
        for changed in {length - 1, length // 2, length - length // 8 - 1}:
            other = ids.clone()
            other[0, changed] = ids[0, changed] % 60 + 2
            after = model(other).logits
            assert torch.equal(before[:, :changed], after[:, :changed])
            assert not torch.equal(before[:, changed], after[:, changed])


@torch.no_grad()
def test_a_model_reads_a_quarter_at_a_time_and_grouped_queries_share_keys():
    ids, model = tiny_ids(1, 64), tiny_llama(num_hidden_layers=1)
    full = model(ids).logits
    with shifted_sparse(model):
        sparse = model(ids).logits
    torch.testing.assert_close(sparse[:, :8], full[:, :8])  # straight and shifted heads see all of it
    assert (sparse[:, 16:] - full[:, 16:]).abs().amax(dim=-1).min() > 1e-3
    assert torch.equal(model(ids).logits, full)


def test_gradients_reach_every_token_of_a_group_through_checkpointing():
    found = []
    for checkpointing in (False, True):
        model = tiny_llama().double().train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        with shifted_sparse(model):
            model(tiny_ids(2, 40), labels=tiny_ids(2, 40), use_cache=False).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient.abs().max() > 0 for gradient in found[0].values())
    torch.testing.assert_close(found[0], found[1])


@torch.no_grad()
def test_padding_and_caches_are_refused():
    ids = tiny_ids(1, 16)
    with shifted_sparse(tiny_llama()) as model:
        mask = torch.ones_like(ids)
        assert torch.equal(model(ids, attention_mask=mask).logits, model(ids).logits)
        mask[0, :3] = 0
        with pytest.raises(ValueError, match="padding"):
            model(ids, attention_mask=mask)
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="whole texts"):
            model(ids[:, :4], past_key_values=cache)


def test_its_command_trains_a_model_that_reads_with_the_full_cache(checkpoint, tmp_path, capsys):
    text = write_documents(tmp_path / "text.jsonl", tiny_ids(4, 96, seed=1).tolist())
    given = ["--model", checkpoint, "--dataset", text, "--output", tmp_path / "out", "--cache-dir", tmp_path]
    given += ["--factor", 4, "--original-length", 16, "--steps", 2, "--windows-per-step", 1, "--device", "cpu"]
    assert main(list(map(str, given))) == 0
    extension, record = (json.loads((tmp_path / "out" / name).read_text()) for name in ("extension.json", RECORD))
    assert extension["extension"]["method"] == record["recipe"]["method"] == "longlora"
    assert record["command"].startswith("python -m experiments.longlora --method longlora --model ")
    model, plain = lococo.load_extended(checkpoint, tmp_path / "out"), AutoModelForCausalLM.from_pretrained(checkpoint)
    assert not lococo.is_patched(model) and model.config._attn_implementation == plain.config._attn_implementation
    assert not torch.equal(model(tiny_ids()).logits, plain(tiny_ids()).logits)
