"""Centroids: what is evicted goes on in means that weigh like all of their tokens."""

import dataclasses

import pytest
import torch
from tiny import patched_llama, tiny_ids, tiny_llama

import lococo
from lococo import LoCoCoConfig
from lococo.compression.centroids import CentroidCompressor, closest_centroid
from lococo.compression.entries import Choice, Entries
from lococo.compression.select import choose, compress, mixing
from lococo.state import patch_of

CONFIG = LoCoCoConfig(12, block_size=8, num_sinks=2, num_heavy=5, num_recent=2, compressor="centroids")
FIRST = slice(CONFIG.num_sinks, CONFIG.num_sinks + CONFIG.num_fused)
DIM = 4


def entries_of(count, seed=0, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, 3, count, DIM, generator=generator, dtype=dtype) for _ in range(2))
    scores = torch.rand(batch, 3, count, generator=generator, dtype=dtype)
    position = torch.arange(count, dtype=dtype).expand(batch, 3, count).clone()
    return Entries(keys, values, scores, position, torch.zeros(batch, 3, count, dtype=dtype))


def head(config=CONFIG):
    return CentroidCompressor(config, DIM, dtype=torch.float64)


def read_all(tokens, config=CONFIG, step=8):
    """The slots after all of these entries were read, a block after the other."""
    held, length = None, len(tokens)
    for stop in range(step, length + 1, step):
        block = tokens.map(lambda each, stop=stop: each[:, :, stop - step : stop])
        held = block if held is None else held.combine(block, lambda old, new: torch.cat([old, new], dim=2))
        if len(held) > config.num_slots:
            held = compress(held, stop, config, head(config))
    return held


def test_every_token_is_in_one_slot_and_weighs_one():
    tokens = entries_of(80)
    held = read_all(tokens)
    mass = held.log_mass.exp()
    assert torch.equal(held.log_mass[:, :, : FIRST.start], torch.zeros(2, 3, FIRST.start, dtype=torch.float64))
    assert torch.equal(held.log_mass[:, :, FIRST.stop :].count_nonzero(), torch.tensor(0))
    torch.testing.assert_close(mass.sum(-1), torch.full((2, 3), 80.0).double())
    assert (mass[:, :, FIRST] > 1).any(-1).all()
    for name in ("keys", "values"):  # sums of all tokens are kept, whichever slot they went to
        total = (getattr(held, name) * mass[..., None]).sum(2)
        torch.testing.assert_close(total, getattr(tokens, name).sum(2))
    torch.testing.assert_close((held.position * mass).sum(-1), tokens.position.sum(-1))


def test_tokens_join_the_closest_and_the_first_ones_begin():
    keys = torch.tensor([[0.0, 0], [9, 9], [1, 0], [-1, 0], [0, 5], [2, 0], [-3, 0], [1, 1], [7, 7]]).double()
    entries = Entries(keys[None, None], keys[None, None] * 10, log_mass=torch.zeros(1, 1, 9).double())
    config = LoCoCoConfig(5, block_size=4, num_sinks=2, num_heavy=0, num_recent=1, compressor="centroids")
    slots = compress(entries, 9, config, CentroidCompressor(config, 2, dtype=torch.float64))
    expected = [[0.0, 0], [9, 9], [4 / 3, 1 / 3], [-2, 0], [7, 7]]  # the entry at 4 is the second of three heavy ones
    expected = torch.tensor(expected).double()
    # [0, 5] is closest to [1, 0] and [-1, 0] alike: the first of them takes it.
    expected[2] = (keys[2] + keys[4] + keys[5] + keys[7]) / 4
    torch.testing.assert_close(slots.keys[0, 0], expected)
    torch.testing.assert_close(slots.values[0, 0], 10 * expected)
    torch.testing.assert_close(slots.log_mass[0, 0].exp(), torch.tensor([1.0, 1, 4, 2, 1]).double())


def test_slots_with_the_same_key_go_on_as_themselves():
    entries = entries_of(20)
    entries.keys[:, :, FIRST] = entries.keys[:, :, FIRST.start : FIRST.start + 1]
    slots = compress(entries, 20, CONFIG, head())
    torch.testing.assert_close(slots.log_mass.exp().sum(-1), torch.full((2, 3), 20.0).double())
    values = (slots.values * slots.log_mass.exp()[..., None]).sum(2)
    torch.testing.assert_close(values, entries.values.sum(2))
    assert (slots.log_mass[:, :, FIRST][..., 1:] == 0).all(), "the first of them takes all others"
    assert torch.equal(slots.values[:, :, FIRST][:, :, 1:], entries.values[:, :, FIRST][:, :, 1:])


def test_slots_that_nothing_joins_stay_as_they_are_to_the_bit():
    entries = entries_of(16, dtype=torch.bfloat16)
    entries.log_mass = torch.zeros(2, 3, 16)
    entries.log_mass[:, :, FIRST] = torch.tensor([3.3, 0.0, 7.1])
    entries.keys[:, :, FIRST.start + 1 : FIRST.stop] = 100.0 * torch.arange(1.0, 3.0)[:, None]
    slots = compress(entries, 500, CONFIG, CentroidCompressor(CONFIG, DIM))
    for name in ("keys", "values", "log_mass"):
        far = slice(FIRST.start + 1, FIRST.stop)
        assert torch.equal(getattr(slots, name)[:, :, far], getattr(entries, name)[:, :, far])
    assert slots.keys.dtype == slots.values.dtype == torch.bfloat16


def test_a_few_tokens_still_count_among_thousands_in_half_precision():
    """Weights in the dtype of the keys would sum up to less or more than 1, and pull a mean to or from zero."""
    ones = entries_of(16, batch=1).map(lambda tensor: torch.ones_like(tensor, dtype=torch.float32))
    ones.keys, ones.values, ones.log_mass = ones.keys.bfloat16(), ones.values.bfloat16(), 0 * ones.log_mass
    ones.log_mass[:, :, FIRST] = torch.tensor([5000.0, 333.0, 77.0]).log()
    for _ in range(50):
        slots = compress(ones, 10**5, CONFIG, CentroidCompressor(CONFIG, DIM))
        assert torch.equal(slots.keys, torch.ones_like(slots.keys))
        new = ones.map(lambda tensor: tensor[:, :, :4])
        new.log_mass = torch.zeros_like(new.log_mass)
        ones = slots.combine(new, lambda old, new: torch.cat([old, new], dim=2))
    assert ones.log_mass[0, 0, FIRST.start].exp() > 5100


@pytest.mark.parametrize("fused", [1, 3, 5])
def test_the_mixing_of_all_entries_is_that_of_those_that_are_taken(fused):
    config = dataclasses.replace(CONFIG, num_heavy=8 - fused)
    entries = read_all(entries_of(16, seed=fused), config)
    entries = entries.combine(entries_of(8, seed=9), lambda old, new: torch.cat([old, new], dim=2))
    slots = compress(entries, 24, config, head(config))
    _, weights = mixing(entries, 24, config, head(config))
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    torch.testing.assert_close(slots.keys, weights.to(entries.keys.dtype) @ entries.keys)


def test_what_is_chosen_beside_them_does_not_depend_on_their_rank():
    entries = entries_of(20)
    ranking = entries.scores.clone()
    budget = lococo.compression.select.Budget.of(CONFIG)
    chosen = choose(ranking, 20, budget, entries.keys, is_running=True)
    ranking[:, :, FIRST] = 100 * torch.rand(2, 3, CONFIG.num_fused) - 50
    again = choose(ranking, 20, budget, entries.keys, is_running=True)
    assert all(map(torch.equal, chosen, again))
    every = torch.cat([chosen.anchors, chosen.evicted], dim=-1).sort(dim=-1).values
    assert torch.equal(every, torch.arange(20).expand(2, 3, 20))
    assert torch.equal(chosen.fused, torch.arange(FIRST.start, FIRST.stop).expand(2, 3, -1))


def test_evicted_entries_are_those_that_no_slot_begins_with():
    for is_running in (False, True):
        for ranking in (None, entries_of(20).scores):
            chosen = choose(ranking, 20, lococo.compression.select.Budget.of(CONFIG), torch.zeros(2, 3), is_running)
            every = torch.cat([chosen.anchors, chosen.evicted], dim=-1).sort(dim=-1).values
            assert torch.equal(every, torch.arange(20).expand(2, 3, 20))


def test_weights_of_a_bias_of_one_token_and_of_several():
    compressor = head()
    with torch.no_grad():
        compressor.log_scale.fill_(1.7)
    log_mass = torch.tensor([0.0, 2.0, 0.5]).double()
    torch.testing.assert_close(compressor.mass_bias(log_mass), torch.tensor([0.0, 3.7, 2.2]).double())
    assert not list(CentroidCompressor(dataclasses.replace(CONFIG, mass_bias=False), DIM).parameters())


def test_closest_is_by_distance():
    keys, centroids = torch.randn(2, 3, 40, DIM).double(), torch.randn(2, 3, 5, DIM).double()
    expected = torch.cdist(keys, centroids).argmin(-1)
    assert torch.equal(closest_centroid(keys, centroids), expected)


@torch.no_grad()
def test_they_come_closer_to_the_full_cache_where_attention_is_even():
    """With queries of zero everything gets the same attention: with a scale of 0 nothing at all is lost."""
    model, ids = tiny_llama(), tiny_ids(1, 61)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.zero_()
    full = model(ids).logits
    lost = {}
    for compressor in ("centroids", "conv"):
        with lococo.patched(model, dataclasses.replace(CONFIG, compressor=compressor, gate_init=0.0)):
            for each in patch_of(model).heads.values() if compressor == "centroids" else ():
                each.log_scale.zero_()
            lost[compressor] = (model(ids).logits - full).abs().max().item()
    assert lost["centroids"] < 1e-5 and lost["conv"] > 1e-2


@torch.no_grad()
def test_heads_of_centroids_are_saved_and_loaded(tmp_path):
    model, ids = patched_llama(CONFIG), tiny_ids(1, 61)
    for layer, each in patch_of(model).heads.items():
        each.log_scale.fill_(0.25 * layer)
    folder = lococo.save_heads(model, tmp_path / "heads")
    loaded = lococo.patch_model(tiny_llama(), heads=folder)
    assert [each.log_scale.item() for each in patch_of(loaded).heads.values()] == [0.0, 0.25]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    other = lococo.patch_model(tiny_llama(), dataclasses.replace(CONFIG, compressor="conv"))
    with pytest.raises(ValueError, match="trained with compressor='centroids', but .* compressor='conv'"):
        lococo.load_heads(other, folder)


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 7, 12, 40])
def test_counts_go_to_heads_of_all_sizes_up_to_a_quarter(slots):
    config = dataclasses.replace(CONFIG, scaling="count").with_slots(slots)
    parts = (config.num_sinks, config.num_heavy, config.num_recent, config.num_fused)
    assert sum(parts) == config.num_slots == slots and min(parts) >= 0
    most = max(slots // 4, 1)
    assert config.num_sinks == min(2, most) and config.num_recent <= min(2, most) and config.num_fused <= min(3, most)
    if slots >= 12:
        assert parts == (2, slots - 7, 2, 3)


def test_choice_of_ones_own_needs_no_evicted_entries():
    anchors = torch.tensor([[[0, 3, 5]]])
    own, rest = Choice(anchors, torch.tensor([[[1]]])).blendable(6)
    assert own.tolist() == [[[3]]] and rest.tolist() == [[[False, True, True, True, True, False]]]
