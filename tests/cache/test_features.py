"""Features of tokens, and keys that are not rotated: right for every entry, whatever has happened to a cache."""

import copy
import dataclasses
import functools

import pytest
import torch
from configs import CONFIGS, FORESEEN, opened
from families import pad_left
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import naive_features, naive_network
from tiny import patched_llama, tiny_ids

from lococo import LoCoCoCache
from lococo.state import patch_of

TEXTS = [tiny_ids(1, 400, seed=row)[0] for row in range(3)]
STARTS = (19, 4, 11)  # tokens of each text in the first call
TOLERANCE = dict(rtol=0, atol=1e-5)


def read(model, ids, cache=None, **arguments):
    return model(ids, past_key_values=cache, use_cache=True, **arguments)


class Reader:
    """Texts in the rows of a batch, and what has been read of them."""

    def __init__(self, config, folder, is_padded):
        self.model, self.folder = patched_llama(config), folder
        self.rows = list(range(3)) if is_padded else [0, 0, 0]
        starts = STARTS if is_padded else STARTS[:1] * 3
        self.texts = [TEXTS[row][:start] for row, start in zip(self.rows, starts, strict=True)]
        ids, mask = pad_left(self.texts)
        self.cache = read(self.model, ids, attention_mask=mask if is_padded else None).past_key_values
        self.logits = None

    def read(self, count):
        """The next tokens of every row."""
        new = torch.stack([TEXTS[row][len(text) :][:count] for row, text in zip(self.rows, self.texts, strict=True)])
        self.texts = [torch.cat(pair) for pair in zip(self.texts, new, strict=True)]
        self.logits = read(self.model, new, self.cache).logits

    def steps(self, count):
        for _ in range(count):
            self.read(1)

    def read_with_gradients(self, count):
        with torch.enable_grad():
            self.read(count)
        self.cache.detach()

    def steps_in_inference_mode(self, count):
        with torch.inference_mode():
            self.steps(count)

    def fail(self, count):
        """A call that is refused before anything is read."""
        with pytest.raises(ValueError, match="expected"):
            read(
                self.model,
                torch.ones(len(self.rows), count, dtype=torch.long),
                self.cache,
                position_ids=torch.zeros(1, 99, dtype=torch.long),
            )

    def pick(self, rows):
        self.rows, self.texts = [self.rows[row] for row in rows], [self.texts[row] for row in rows]

    def reorder(self, count):
        rows = [(row + count) % len(self.rows) for row in range(len(self.rows))]
        self.cache.reorder_cache(torch.tensor(rows))
        self.pick(rows)

    def repeat(self, count):
        if len(self.rows) < 4:
            self.cache.batch_repeat_interleave(2)
            self.pick([row for row in range(len(self.rows)) for _ in range(2)])

    def select(self, count):
        rows = sorted({count % len(self.rows), 0})
        self.cache.batch_select_indices(torch.tensor(rows))
        self.pick(rows)

    def copy(self, count):
        self.cache = copy.deepcopy(self.cache)

    def file(self, count):
        self.cache = LoCoCoCache.load(self.cache.save(self.folder / "cache.safetensors"))


DEEDS = ("read", "steps", "read_with_gradients", "steps_in_inference_mode", "fail", "reorder", "repeat", "select")
DEEDS += ("copy", "file")


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("name", ["learned", "learned-slot", "learned-per-head", "open-slot"])
@given(deeds=st.lists(st.tuples(st.sampled_from(DEEDS), st.integers(1, 11)), min_size=2, max_size=12))
@settings(max_examples=6)
@torch.no_grad()
def test_rows_go_on_as_if_each_had_been_read_alone(name, is_padded, deeds, tmp_path_factory):
    # Divided by their sum, weights that are nearly all zero would make much of rounding.
    config = dataclasses.replace(CONFIGS[name], normalization="softmax")
    reader = Reader(config, tmp_path_factory.mktemp("cache"), is_padded)
    for deed, count in deeds:
        getattr(reader, deed)(count)
    reader.read(17)
    for logits, text in zip(reader.logits, reader.texts, strict=True):
        torch.testing.assert_close(logits, reader.model(text[None]).logits[0, -17:], **TOLERANCE)


def naive(model, ids):
    """(layers, kv_heads, tokens, 3) features of a text's tokens, from what the projections give to the rotation."""
    patch, found, hooks = patch_of(model), {}, []
    for index, layer in patch.layers.items():
        for name in ("k_proj", "v_proj"):
            keep = functools.partial(found.__setitem__, (index, name))
            hooks.append(getattr(layer, name).register_forward_hook(lambda *call, keep=keep: keep(call[2])))
    model(ids[None])
    for hook in hooks:
        hook.remove()
    features = []
    for index, layer in patch.layers.items():
        key, value = (
            found[index, name][0].unflatten(-1, (-1, layer.head_dim)).transpose(0, 1) for name in ("k_proj", "v_proj")
        )
        features.append(naive_features(key, value, naive_network(patch.networks[index])))
    return torch.tensor(features)


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"positions": "slot"}, {"slots_per_head": ((14, 9), (7, 16))}, {"decode_block_size": 3}], ids=str
)
@torch.no_grad()
def test_entries_have_the_features_of_their_tokens(changes, is_padded, tmp_path):
    """Entries that are copies say by their place in the text which tokens they are."""
    reader = Reader(dataclasses.replace(CONFIGS["learned-selection"], **changes), tmp_path, is_padded)
    for deed, count in (("steps", 7), ("reorder", 1), ("steps", 2), ("file", 1), ("steps", 1), ("read", 9)):
        getattr(reader, deed)(count)
    # Where blocks are shorter in steps, what later layers are given depends on how the text came.
    layers = reader.cache.layers[:1] if "decode_block_size" in changes else reader.cache.layers
    for row, text in enumerate(reader.texts):
        expected, held = naive(reader.model, text), reader.cache.rows[row if is_padded else 0]
        for index, layer in enumerate(layers):
            for view in layer.views():
                entries, used = view.entries, held.num_entries(view.config.num_slots)
                for at, head in enumerate(view.group.heads):
                    tokens = entries.position[row, at, :used].long()
                    assert tokens.tolist() == sorted(set(tokens.tolist())) and tokens[-1] == len(text) - 1
                    torch.testing.assert_close(
                        entries.features[row, at, :used].float(), expected[index, head, tokens], rtol=2e-3, atol=1e-3
                    )
    assert expected.std() > 0.3


@pytest.mark.parametrize("name", ["learned", "learned-slot"])
@torch.no_grad()
def test_after_a_step_that_failed_a_cache_begins_anew(name, tmp_path):
    reader = Reader(CONFIGS[name], tmp_path, is_padded=False)
    reader.steps(3)
    hook = reader.model.model.layers[1].mlp.register_forward_hook(lambda *call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reader.read(1)
    hook.remove()
    with pytest.raises(ValueError, match="did not finish: call cache.reset"):
        reader.read(1)
    reader.cache.reset()
    ids = TEXTS[1][None].expand(3, -1)
    logits = [read(reader.model, part, reader.cache).logits for part in ids[:, :37].split([20, *[1] * 7, 10], dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1)[:1], reader.model(ids[:1, :37]).logits, **TOLERANCE)


@torch.no_grad()
def test_steps_write_no_features_before_their_block_ends(tmp_path):
    """Which is what makes them as cheap as those of other scores; they are made for all of its tokens at once."""
    reader, calls = Reader(opened(score=FORESEEN, block_size=12), tmp_path, is_padded=False), []
    for network in patch_of(reader.model).networks.values():
        network.register_forward_hook(lambda module, args, output: calls.append(output.shape[2]))
    reader.steps(24 - STARTS[0])
    assert not calls and {layer.finished_columns for layer in reader.cache.layers} == {STARTS[0]}
    reader.steps(12)
    assert calls == [5, 5] and {layer.finished_columns for layer in reader.cache.layers} == {24}
    reader.read(2)
    assert calls == [5, 5, 12, 2, 12, 2] and {layer.finished_columns for layer in reader.cache.layers} == {None}
