"""What is recorded for learned scores, and what they lose, beside naive computations in float64."""

import dataclasses
import math

import pytest
import torch
from families import WINDOW, anatomy, build
from reference import delay_and_fade
from tiny import tiny_ids, tiny_llama
from torch.func import functional_call

import lococo
from lococo import LoCoCoConfig
from lococo.kernels.scoring import is_autocast
from lococo.registry import SCORES
from lococo.training.lookups import fast_products, record_lookups
from lococo.training.record import record, recording
from lococo.training.scores import ScoreNetworks, lookup_loss, lost_shares

LENGTH, BLOCK = 45, 8  # five blocks and a part of one
IDS = tiny_ids(1, LENGTH)
CONFIG = LoCoCoConfig(16, block_size=BLOCK, score="learned", num_sinks=2, num_heavy=7, num_recent=4)
SPLIT = dataclasses.replace(CONFIG, slots_per_head=((24, 8), (6, 26)))
# Grouped queries; a softcap and a window in one layer; no positions in one layer; keys normed before they are rotated.
FAMILIES = ["Llama", "Gemma2", "SmolLM3", "Qwen3"]
every_family = pytest.mark.parametrize("family", FAMILIES)


def networks_of(model, config=CONFIG, seed=0):
    """Networks whose features are not zero."""
    torch.manual_seed(seed)
    networks = ScoreNetworks.of(model, config)
    for network in networks.by_layer.values():
        torch.nn.init.normal_(network.output.weight, std=0.3)
        torch.nn.init.normal_(network.output.bias, std=0.3)
    return networks


def recorded(model, config=CONFIG, ids=IDS):
    """Lookups by layer."""
    networks = networks_of(model, config)
    return record_lookups(model, ids, networks.config, networks.rotary)


def naive_lookups(entry, config, head):
    """(ends, tokens) scores, later and is_candidate of one KV head, query by query and token by token."""
    tokens, groups = entry.key.shape[2], entry.query.shape[1] // entry.key.shape[1]
    ends = tokens // BLOCK - 1
    scores, later = (torch.zeros(ends, tokens, dtype=torch.float64) for _ in range(2))
    is_candidate = torch.zeros(ends, tokens, dtype=torch.bool)
    for query in range((ends + 1) * BLOCK):
        block = query // BLOCK
        for vector in entry.query[0, head * groups : (head + 1) * groups, query].double():
            logits = entry.key[0, head, : query + 1].double() @ vector * entry.scale
            if entry.softcap is not None:
                logits = entry.softcap * torch.tanh(logits / entry.softcap)
            for token, probability in enumerate(logits.softmax(0).tolist()):
                for end in range(ends):
                    if end >= block and query - token >= delay_and_fade(config)[0]:
                        scores[end, token] += probability**2 * delay_and_fade(config)[1] ** ((end - block) * BLOCK)
                    if end < block:
                        later[end, token] += probability**2 * 0.6 ** (block - end - 1)
    for end in range(ends):
        is_candidate[end, config.num_sinks : (end + 1) * BLOCK - config.num_recent] = True
    return scores, later, is_candidate


@every_family
@pytest.mark.parametrize("config", [CONFIG, SPLIT], ids=["even", "split"])
def test_lookups_equal_the_naive_ones(family, config):
    """Which are the same for all heads, whatever their slots."""
    model = build(family).double()
    actual = recorded(model, config)
    entries = record(model, IDS)
    assert list(actual) == [index for index, entry in entries.items() if entry.window is None]
    for index, lookups in actual.items():
        for head in range(2):
            expected = naive_lookups(entries[index], config, head)
            for name, tensor in zip(("scores", "later", "is_candidate"), expected, strict=True):
                of_head = getattr(lookups, name).expand_as(lookups.scores)[:, head].to(tensor.dtype)
                torch.testing.assert_close(of_head, tensor, rtol=1e-4, atol=1e-6, msg=f"{name} of {index}, {head}")
        assert lookups.scores.max() > 0.1 and lookups.block_size == BLOCK
        assert lookups.seen.flatten().tolist() == [8, 16, 24, 32]


@every_family
def test_keys_and_values_are_those_before_the_rotation(family):
    model, projected = build(family).double(), {}
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for name in ("keys", "values"):
            last = attention.v_proj if name == "values" else getattr(attention, "k_norm", attention.k_proj)
            last.register_forward_hook(
                lambda module, args, output, key=(index, name): projected.__setitem__(key, output.detach())
            )
    for index, lookups in recorded(model).items():
        for name in ("keys", "values"):
            expected = projected[index, name].view(1, LENGTH, 2, 8).transpose(1, 2)
            torch.testing.assert_close(getattr(lookups, name), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("slots", [None, ((48, 64), (80, 56))])
def test_scores_are_those_that_a_cache_holds_in_which_nothing_is_evicted(slots, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)  # no bfloat16
    config = dataclasses.replace(CONFIG, num_slots=62, num_heavy=56, slots_per_head=slots)
    lookups = recorded(tiny_llama(), config)
    model = lococo.patch_model(tiny_llama(), config)
    for end in range(LENGTH // BLOCK - 1):
        tokens = (end + 1) * BLOCK
        cache = model(IDS[:, :tokens], use_cache=True).past_key_values
        for index, layer in enumerate(cache.layers):
            for view in layer.views():
                held = view.entries.scores[0, :, :tokens]
                expected = lookups[index].scores[end, list(view.group.heads), :tokens]
                torch.testing.assert_close(held, expected, rtol=0, atol=1e-6)
                assert expected.max() > 0.1


@pytest.mark.parametrize(("capabilities", "error"), [({}, 2e-3), ({"avx512_bf16": True}, 3e-2)])
def test_a_model_in_float32_is_close_to_one_in_float64(capabilities, error, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    exact = recorded(tiny_llama().double())
    for index, lookups in recorded(tiny_llama()).items():
        assert (lookups.keys.dtype, lookups.scores.dtype) == (torch.float16, torch.float32)
        for name in ("keys", "values", "scores", "later"):
            expected = getattr(exact[index], name).double()
            difference = (getattr(lookups, name).double() - expected).norm() / expected.norm()
            assert difference < error, name
            if capabilities:
                assert difference > 1e-4, "nothing was computed in bfloat16"


@torch.no_grad()
def test_what_tokens_receive_is_exact_where_a_model_computes_in_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    model, entries = tiny_llama(), {}
    with recording(model, entries.__setitem__), fast_products(model):
        model(IDS)
    for index, lookups in recorded(model).items():
        scores, later, _ = naive_lookups(entries[index], CONFIG, 0)
        torch.testing.assert_close(lookups.scores[:, 0].double(), scores, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(lookups.later[:, 0].double(), later, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_keeps_its_own(dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    lookups = recorded(tiny_llama().to(dtype))[0]
    assert (lookups.keys.dtype, lookups.values.dtype, lookups.scores.dtype) == (dtype, dtype, torch.float32)


def test_layers_with_a_window_are_left_out_and_none_may_be_left():
    assert recorded(build("Mistral-window")) == {} and WINDOW < LENGTH


def state(model):
    flags = [(parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()]
    return anatomy(model), flags, [module.training for module in model.modules()], torch.get_rng_state().tolist()


@pytest.mark.parametrize("training", [True, False])
def test_recording_leaves_the_model_as_it_was_also_when_it_fails(training):
    model = build("Gemma2").train(training)
    model.model.layers[0].requires_grad_(False)
    recorded(model)  # makes networks, which draw numbers
    weights, before = [parameter.clone() for parameter in model.parameters()], None
    networks = networks_of(model)
    before = state(model)
    for ids, is_wrong in ((IDS, False), (IDS + 64, True)):
        try:
            record_lookups(model, ids, networks.config, networks.rotary)
        except IndexError:
            assert is_wrong
        assert state(model) == before and not is_autocast("cpu")
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), weights, strict=True))


# The loss, and what is lost


def naive_logits(scores, features, end, config):
    """Logits of all tokens of one KV head at the end of a block, one after the other."""
    (delay, fade), logits = delay_and_fade(config), []
    for token, (bias, trust, decay) in enumerate(features.double().tolist()):
        age = (end + 1) * BLOCK - token
        queries = max(age - delay, 0)
        statistic = scores[token].item() / (sum(fade**query for query in range(queries)) + 8)
        log = math.log(statistic + 1e-5)
        logits.append(log + bias + trust * (log + 8) / 4 + decay * (math.log(max(age, 1)) - 6) / 1.5)
    return torch.tensor(logits, dtype=torch.float64)


def naive_terms(lookups, features, config):
    """(end, logits, later) of the candidates of every KV head at every end."""
    for head in range(2):
        for end, chosen in enumerate(lookups.is_candidate[:, 0]):
            logits = naive_logits(lookups.scores[end, head], features[0, head], end, config)
            yield end, logits[chosen], lookups.later[end, head][chosen].double()


@pytest.mark.parametrize("config", [CONFIG, SPLIT], ids=["even", "split"])
def test_the_loss_equals_the_naive_one(config):
    model = tiny_llama()
    networks = networks_of(model, config)
    for index, lookups in recorded(model, config).items():
        network = networks.by_layer[index]
        losses = [
            -(later / later.sum() * (logits - logits.logsumexp(0))).sum().item()
            for _, logits, later in naive_terms(lookups, network(lookups.keys, lookups.values), config)
        ]
        loss = lookup_loss(network, lookups, networks.config)
        assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def in_float64(lookups):
    return dataclasses.replace(
        lookups, **{name: getattr(lookups, name).double() for name in ("keys", "values", "scores", "later")}
    )


def test_gradients_of_the_loss_are_its_differences():
    model = tiny_llama()
    network, lookups = networks_of(model).by_layer[1].double(), in_float64(recorded(model)[1])
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    torch.manual_seed(0)
    directions = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}

    def loss(*steps):
        moved = {
            name: value + step * directions[name]
            for (name, value), step in zip(parameters.items(), steps, strict=True)
        }
        return lookup_loss(lambda *states: functional_call(network, moved, states), lookups, CONFIG)

    steps = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in parameters]
    assert torch.autograd.gradcheck(loss, steps)
    assert all(slope.abs() > 1e-4 for slope in torch.autograd.grad(loss(*steps), steps))


def naive_lost(rankings, laters, kept):
    """Mean share of later attention to all but the best by a ranking, the earlier of equals."""
    shares = []
    for ranking, later in zip(rankings, laters, strict=True):
        best = sorted(range(len(ranking)), key=lambda token: (-ranking[token], token))[:kept]
        shares.append(1 - later[best].sum() / later.sum())
    return torch.stack(shares).mean().item()


def test_shares_that_are_lost_equal_the_naive_ones_and_count_where_something_is_chosen():
    model = tiny_llama()
    networks = networks_of(model)
    for index, lookups in recorded(model).items():
        features = networks.by_layer[index](lookups.keys, lookups.values)
        kinds = {"new": torch.zeros_like(features), "now": features}
        ranked = {
            name: [term for term in naive_terms(lookups, each, CONFIG) if term[0] >= 2]  # 16 tokens fit
            for name, each in kinds.items()
        }
        laters = [later for _, _, later in ranked["new"]]
        kept = CONFIG.num_heavy + CONFIG.num_fused
        expected = [naive_lost([logits for _, logits, _ in ranked[name]], laters, kept) for name in ("new", "now")]
        expected.append(naive_lost(laters, laters, kept))
        assert lost_shares(lookups, CONFIG, features) == pytest.approx(expected, abs=1e-6)
        assert 0 < expected[2] < min(expected[:2]) and expected[0] != pytest.approx(expected[1], abs=1e-3)


def test_a_perfect_network_loses_what_the_oracle_does_and_a_new_one_what_the_distant_score_does():
    found = recorded(tiny_llama())
    # At one end of a block a feature can say what is looked up after it.
    last = {name: getattr(found[0], name)[-1:] for name in ("scores", "later", "is_candidate")}
    last = dataclasses.replace(found[0], **last, block_size=4 * BLOCK)
    features = torch.zeros(1, 2, LENGTH, 3)
    before, new, oracle = lost_shares(last, CONFIG, features)
    assert new == before > oracle + 0.05
    statistic = SCORES["learned"]().rank(*last.entries(None), CONFIG)
    features[..., 0] = (last.later + 1e-9).log() - (statistic + 1e-5).log()
    assert lost_shares(last, CONFIG, features) == pytest.approx([before, oracle, oracle], abs=1e-5)


def test_where_everything_fits_nothing_is_lost():
    config = dataclasses.replace(CONFIG, num_slots=LENGTH, num_heavy=LENGTH - 6)
    found = recorded(tiny_llama(), config)
    assert lost_shares(found[0], config, torch.zeros(1, 2, LENGTH, 3)) == [0.0, 0.0, 0.0]
