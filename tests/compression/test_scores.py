"""Scores of one's own: one class each, obeyed by reading, decoding, recorded steps, budgets per head and padding."""

import dataclasses

import pytest
import torch
from recorded import assert_recorded_as_launched
from reference import foreseen
from tiny import patched_llama, tiny_ids, tiny_llama

import lococo
from lococo import LoCoCoConfig, Score, register_score
from lococo.compression import scores
from lococo.compression.entries import Entries
from lococo.state import patch_of

IDS = tiny_ids(2, 61)
SHARES = dict(num_sinks=2, num_heavy=6, num_recent=4)  # and four fused


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Those of the library; what a test registers is gone after it."""
    own = {name: scores.SCORES[name] for name in scores.SCORES if scores.SCORES[name].__module__ == scores.__name__}
    monkeypatch.setattr(scores.SCORES, "_items", own)
    with torch.no_grad():
        yield


def key_norm():
    @register_score("key-norm")
    class KeyNorm(Score):
        needs = frozenset({"keys"})

        def rank(self, entries, age, config):
            return -entries.keys.norm(dim=-1)


def youngest():
    @register_score("youngest")
    class Youngest(Score):
        needs = frozenset({"position"})

        def rank(self, entries, age, config):
            return -age


def attention_by_age():
    @register_score("attention-by-age")
    class AttentionByAge(Score):
        """The mean score, written by somebody else."""

        needs = frozenset({"attention", "position"})

        def rank(self, entries, age, config):
            return entries.scores.log() - age.log()


def squares():
    @register_score("squares")
    class Squares(Score):
        power = 2

        def delay(self, config):
            return 3

        def fade(self, config):
            return 0.9

        def rank(self, entries, age, config):
            return entries.scores


class KeyNorms(torch.nn.Module):
    num_features = 1

    def forward(self, keys, values):
        return keys.norm(dim=-1, keepdim=True)


def noted_key_norm():
    @register_score("noted-key-norm")
    class NotedKeyNorm(Score):
        """Looks at keys once, when they are read."""

        needs = frozenset({"features"})

        def network(self, num_kv_heads, head_dim, **factory):
            return KeyNorms()

        def rank(self, entries, age, config):
            return -entries.features[..., 0]


OWN = {
    "key-norm": key_norm,
    "youngest": youngest,
    "attention-by-age": attention_by_age,
    "squares": squares,
    "noted-key-norm": noted_key_norm,
}


def read(config, ids=IDS, **arguments):
    return patched_llama(config)(ids, **arguments).logits


def own_config(name, **changes):
    OWN[name]()
    return LoCoCoConfig(16, block_size=8, gate_init=0.4, score=name, **{**SHARES, **changes})


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("changes", [{}, {"positions": "slot"}, {"slots_per_head": ((24, 8), (6, 26))}], ids=str)
def test_laws_hold(name, changes):
    config = own_config(name, **changes)
    whole = read(config)
    assert (whole - read(dataclasses.replace(config, score="distant"))).abs().max() > 1e-2
    cache, parts, model = None, [], patched_llama(config)
    for part in IDS.split([1, 7, 20, *[1] * 20, 13], dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[:, :9] = 0
    padded = read(config, torch.nn.functional.pad(IDS, (9, 0)), attention_mask=mask)
    torch.testing.assert_close(padded[:, 9:], whole, rtol=0, atol=1e-5)
    with torch.enable_grad():
        torch.testing.assert_close(read(config), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", OWN)
def test_recorded_steps_are_launched_ones(name):
    assert_recorded_as_launched(patched_llama(own_config(name)), IDS)


def test_the_same_score_by_another_name_gives_the_same():
    config = own_config("attention-by-age")
    torch.testing.assert_close(read(config), read(dataclasses.replace(config, score="mean")), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "has_scores", "has_places"),
    [
        ("key-norm", False, False),
        ("youngest", False, True),
        ("squares", True, False),
        ("attention-by-age", True, True),
        ("noted-key-norm", False, False),
    ],
)
def test_nothing_is_kept_that_a_score_does_not_need(name, has_scores, has_places):
    cache = patched_llama(own_config(name))(IDS, use_cache=True).past_key_values
    entries = cache.layers[0].entries
    assert (entries.scores is not None, entries.position is not None) == (has_scores, has_places)
    assert (entries.features is not None) == (name == "noted-key-norm")


def test_the_entries_that_stay_are_those_that_the_score_says():
    """With every heavy hitter chosen by key norm, the smallest keys are still there."""
    config = own_config("key-norm", num_sinks=0, num_heavy=12, num_recent=4)
    model = patched_llama(config)
    full = patched_llama(LoCoCoConfig(100, block_size=8))
    cache, everything = (each(IDS[:, :25], use_cache=True).past_key_values for each in (model, full))
    held = cache.layers[0].views()[0].keys[:, :, :12].norm(dim=-1)
    norms = everything.layers[0].views()[0].keys[:, :, :20].norm(dim=-1)
    smallest = norms.sort(dim=-1).values[..., :12]
    torch.testing.assert_close(held.sort(dim=-1).values, smallest, rtol=0, atol=1e-5)


def test_what_is_no_score_is_refused():
    with pytest.raises(ValueError, match="score must be one of distant, learned, mean, sum, last, got 'newest'"):
        LoCoCoConfig(16, score="newest")
    with pytest.raises(TypeError, match="must be a class derived from lococo.Score"):
        register_score("function")(lambda entries: entries)
    with pytest.raises(ValueError, match="Wants.needs must be of .*; got hidden"):

        @register_score("wants")
        class Wants(Score):
            needs = frozenset({"hidden"})

            def rank(self, entries, age, config):
                """Nothing."""

    with pytest.raises(ValueError, match="Cubes.power must be 1 or 2, got 3"):

        @register_score("cubes")
        class Cubes(Score):
            power = 3

            def rank(self, entries, age, config):
                """Nothing."""

    with pytest.raises(ValueError, match="score 'mean' is registered already: MeanScore"):

        @register_score("mean")
        class Mine(Score):
            def rank(self, entries, age, config):
                """Nothing."""

    namesake = type("MeanScore", (scores.MeanScore,), {"__module__": "__main__"})
    with pytest.raises(ValueError, match="score 'mean' is registered already: MeanScore"):
        register_score("mean")(namesake)

    assert list(scores.SCORES) == ["distant", "learned", "mean", "sum", "last"]
    key_norm()
    key_norm()  # a cell of a notebook, run again


def test_features_that_nothing_makes_are_refused():
    @register_score("no-network")
    class NoNetwork(Score):
        needs = frozenset({"features"})

        def rank(self, entries, age, config):
            """Nothing."""

    model = tiny_llama()
    with pytest.raises(ValueError, match="score='no-network' needs features, but NoNetwork.network gives nothing"):
        lococo.patch_model(model, LoCoCoConfig(16, block_size=8, score="no-network"))
    assert not lococo.is_patched(model) and list(model.state_dict()) == list(tiny_llama().state_dict())


@pytest.mark.parametrize("preset", [LoCoCoConfig.paper, LoCoCoConfig.streaming_llm])
def test_where_nothing_is_chosen_by_score_there_is_no_network(preset):
    config = preset(16, block_size=8, score="learned")
    model = patched_llama(config)
    assert not config.has_features and not patch_of(model).networks
    assert model(IDS, use_cache=True).past_key_values.layers[0].entries.features is None


# With as many slots and recents the distant score has the delay and the fade of the learned one.
ALIKE = LoCoCoConfig(128, block_size=128, num_recent=32, score="learned")


@pytest.mark.parametrize(
    "features", [(0.0, 0.0, 0.0), (0.7, 0.0, 0.0), (0.0, -0.6, 0.0), (0.0, 0.0, 1.3), (-2.0, 0.5, -0.4)]
)
def test_the_learned_score_ranks_by_its_formula(features):
    config = ALIKE
    statistic, age = torch.rand(1, 2, 40, dtype=torch.float64) ** 9, torch.arange(40.0, 0.0, -1.0).double()
    entries = Entries(torch.zeros(1, 2, 40, 4), torch.zeros(1, 2, 40, 4), statistic)
    distant = scores.DistantScore().rank(entries, age.expand(1, 2, 40), config)
    learned = scores.LearnedScore()
    assert torch.equal(learned.rank(entries, age.expand(1, 2, 40), config), distant)  # without features
    entries.features = torch.tensor(features).half().expand(1, 2, 40, 3)
    got = learned.rank(entries, age.expand(1, 2, 40), config)
    if not any(features):
        assert torch.equal(got, distant)
    rounded = entries.features[0, 0, 0].tolist()
    expected = [
        [foreseen(s, a, rounded) for s, a in zip(row, age.tolist(), strict=True)] for row in distant[0].tolist()
    ]
    torch.testing.assert_close(got + 1e-5, torch.tensor([expected], dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_extreme_features_give_finite_ranks_in_order(which, dtype):
    """The largest numbers of float16 are no more than the largest change; a token that was never looked at counts."""
    config, learned = ALIKE, scores.LearnedScore()
    size = torch.tensor([-65504.0, -3000, -100, -30, -3, 0, 3, 30, 100, 3000, 65504]).to(dtype)
    tokens = len(size)
    # Received attention and ages that make the logarithms, as they are centred, positive.
    age, statistic = torch.full((1, 1, tokens), 4000.0, dtype=dtype), torch.full((1, 1, tokens), 60.0, dtype=dtype)
    for received in (statistic, torch.zeros_like(statistic)):
        entries = Entries(torch.zeros(1, 1, tokens, 4), torch.zeros(1, 1, tokens, 4), received)
        entries.features = torch.zeros(1, 1, tokens, 3, dtype=torch.float16)
        entries.features[..., which] = size.half()
        ranks = learned.rank(entries, age, config)
        assert ranks.isfinite().all() and ranks.dtype == dtype
        falls = received.max() == 0 and which == 1  # nothing received: its logarithm is negative
        steps = ranks.diff(dim=-1) * (-1 if falls else 1)
        assert (steps >= 0).all() and (steps[..., 4:6] > 0).all()
        assert torch.equal(ranks[..., -1], ranks[..., -2]) and torch.equal(ranks[..., 0], ranks[..., 1])
    distant = scores.DistantScore().rank(entries, age, config)
    assert torch.equal(ranks[..., 5], distant[..., 5])


@pytest.mark.parametrize("own", [8, 16, 24])
def test_a_learned_score_counts_alike_in_every_head_and_the_distant_one_by_its_slots(own):
    for block_size, delay in ((3, 0), (8, 2), (128, 32), (512, 32)):
        whole = LoCoCoConfig(16, block_size=block_size, score="learned", slots_per_head=((own, 32 - own),))
        head = whole.with_slots(own)
        assert (head.score_delay, head.score_fade) == (delay, 0.8 ** (1 / 128))
    distant = dataclasses.replace(whole, score="distant").with_slots(own)
    assert distant.score_delay == distant.num_recent == whole.num_recent * own // 16
    assert distant.score_fade == 0.8 ** (1 / own)


def test_heads_of_a_score_that_is_not_here_say_so(tmp_path):
    config = own_config("key-norm")
    lococo.save_heads(patched_llama(config), tmp_path / "heads")
    del scores.SCORES._items["key-norm"]
    with pytest.raises(ValueError, match="score must be one of .*, got 'key-norm'"):
        lococo.patch_model(tiny_llama(), heads=tmp_path / "heads")
    key_norm()
    lococo.patch_model(tiny_llama(), heads=tmp_path / "heads")
