import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lococo.compression.base import log_mass
from lococo.compression.entries import Entries
from lococo.compression.fusion import FusionHead
from lococo.compression.select import Budget, choose, compress, rank
from lococo.config import LoCoCoConfig


@st.composite
def rankings(draw):
    sinks, heavy, recent, fused = (draw(st.integers(0, 4)) for _ in range(4))
    slots = max(1, sinks + heavy + recent + fused)
    fused = slots - sinks - heavy - recent
    entries = draw(st.integers(slots + 1, slots + 6))
    values = draw(st.lists(st.integers(0, 5), min_size=entries, max_size=entries))
    return Budget(sinks, heavy, recent, fused), torch.tensor(values, dtype=torch.float32)[None, None]


@given(rankings())
@settings(max_examples=200)
def test_choice_is_sinks_recents_and_the_best_of_the_others(case):
    budget, ranking = case
    sinks, heavy, recent, fused = budget
    entries = ranking.shape[-1]
    choice = choose(ranking, entries, budget, ranking)

    others = sorted(range(sinks, entries - recent), key=lambda index: (-ranking[0, 0, index].item(), index))
    expected = [*range(sinks), *others[: heavy + fused], *range(entries - recent, entries)]
    assert choice.anchors.flatten().tolist() == sorted(expected)
    blended = {choice.anchors.flatten().tolist()[place] for place in choice.fused.flatten().tolist()}
    assert blended == set(others[heavy : heavy + fused])
    assert choice.fused.flatten().tolist() == sorted(choice.fused.flatten().tolist())


def random_entries(config, count, seed=0, dim=4):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(2, 3, count, *shape, generator=generator)

    position = torch.arange(count).float().expand(2, 3, count)
    return Entries(random(dim), random(dim), random(), position, random() if config.has_mass else None)


def test_copies_are_bit_identical():
    config = LoCoCoConfig(12, num_sinks=2, num_recent=3, num_heavy=7)
    entries = random_entries(config, 20)
    slots = compress(entries, 20, config, None)
    index = slots.position.long()
    for kept, all_entries in zip(slots.tensors(), entries.tensors(), strict=True):
        if kept is not None:
            wide = index if kept.dim() == 3 else index[..., None].expand_as(kept)
            assert torch.equal(kept, all_entries.gather(2, wide))
    assert (index.diff(dim=-1) > 0).all(), "slots are not in time order"


def test_entries_out_of_the_window_go_first():
    config = LoCoCoConfig(12, num_sinks=2, num_recent=3, num_heavy=4)
    slots = compress(random_entries(config, 20), 20, config, None, window=12)
    assert (20 - slots.position < 12).sum(-1).eq(11).all(), "11 entries are in sight of the next token"


def test_score_of_a_blend_is_the_average_of_what_it_blends():
    config = LoCoCoConfig.paper(6, residual="slot", gate_init=0.5)
    entries = random_entries(config, 11)
    slots = compress(entries, 11, config, FusionHead(config, 4))
    assert slots.scores.min() >= entries.scores.min() and slots.scores.max() <= entries.scores.max()


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_even_blend_of_n_tokens_has_mass_n(count):
    weights = torch.zeros(1, 1, 1, 16)
    weights[..., :count] = 1 / count
    mass = log_mass(weights, torch.zeros(1, 1, 16))
    torch.testing.assert_close(mass.exp().item(), float(count), rtol=1e-5, atol=0)


def test_mass_is_inherited():
    weights = torch.tensor([[[[0.5, 0.5, 0.0]]]])
    carried = torch.tensor([[[3.0, 3.0, 9.0]]]).log()
    torch.testing.assert_close(log_mass(weights, carried).exp().item(), 6.0)


def test_mean_score_counts_the_queries_that_could_see():
    config = LoCoCoConfig(4, num_sinks=0, num_heavy=2, score="mean")
    entries = Entries(
        keys=torch.zeros(1, 1, 3, 1),
        values=torch.zeros(1, 1, 3, 1),
        scores=torch.tensor([[[6.0, 4.0, 2.0]]]),
        position=torch.tensor([[[0.0, 2.0, 5.0]]]),
    )
    torch.testing.assert_close(rank(entries, 6, config), torch.tensor([[[1.0, 1.0, 2.0]]]))


def test_distant_score_credits_new_tokens_with_silent_queries():
    config = LoCoCoConfig(8, num_sinks=1, num_recent=2, num_heavy=5)
    entries = Entries(
        keys=torch.zeros(1, 1, 3, 1),
        values=torch.zeros(1, 1, 3, 1),
        scores=torch.tensor([[[24.0, 9.0, 0.0]]]),
        position=torch.tensor([[[0.0, 15.0, 17.0]]]),
    )
    # 18 read: 16, 1 and 0 of the queries were 2 or more entries later, older ones count less; 8 silent ones are added.
    fade = 0.8 ** (1 / 8)
    expected = [24 / (sum(fade**age for age in range(16)) + 8), 9 / (1 + 8), 0.0]
    torch.testing.assert_close(rank(entries, 18, config), torch.tensor([[expected]]))
