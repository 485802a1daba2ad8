"""Slots per KV head: what a layer's output means to the loss, who gets how many slots, and models that have them."""

import copy
import dataclasses
import itertools
import math
import pickle
from functools import partial
from unittest import mock

import pytest
import torch
from families import (
    KEPT,
    UNSUPPORTED,
    WINDOW,
    anatomy,
    assert_close,
    build,
    fitting,
    gap,
    greedy,
    pad_left,
    patch,
    read,
)
from generating import NEW_TOKENS, ROWS, answer, beam_search
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import DIM, random_head
from one_layer import read as read_one_layer
from reference import (
    delay_and_fade,
    foreseen,
    naive_features,
    naive_full,
    naive_head,
    naive_lococo,
    naive_network,
    rope_rotate,
)
from tiny import tiny_ids, tiny_llama
from torch.utils.checkpoint import checkpoint

import lococo
from lococo import LoCoCoConfig
from lococo.results.journal import Journal
from lococo.state import patch_of
from lococo.training import budgets, evictions
from lococo.training.budgets import allocate, allocate_with_scales, slot_levels
from lococo.training.evictions import eviction_errors
from lococo.training.record import record
from lococo.training.scores import ScoreNetworks

LENGTH = 41
IDS = tiny_ids(2, LENGTH)
# Grouped queries; windows, a softcap and scales of their own, all in one of them.
FAMILIES = ["Llama", "Mistral-window", "Gemma2", "Gemma3"]
every_family = pytest.mark.parametrize("family", FAMILIES)


# Recording


@every_family
def test_the_model_computes_what_is_recorded(family):
    model, logits = build(family), []
    with torch.no_grad():
        model.register_forward_hook(lambda module, args, output: logits.append(output.logits))
        model(IDS)
        records = record(model, IDS)
    assert_close(*logits)
    config = model.config.to_dict()
    layer_types = config.get("layer_types") or ["sliding_attention" if family == "Mistral-window" else ""] * 2
    scale = (config.get("query_pre_attn_scalar") or config.get("head_dim") or 8) ** -0.5
    assert list(records) == [0, 1]
    for kind, entry in zip(layer_types, records.values(), strict=True):
        assert entry.window == (WINDOW if kind == "sliding_attention" else None)
        assert (entry.softcap, entry.scale) == (config.get("attn_logit_softcapping"), pytest.approx(scale))
        assert entry.key.shape == entry.value.shape == (2, 2, LENGTH, 8) and entry.gradient is None
        assert_close(entry.output.double(), naive_full(entry))


@every_family
def test_gradients_are_those_of_the_loss_at_the_attention_outputs(family):
    model = build(family).double()
    records = record(model, IDS, gradients=True)
    changes = [torch.zeros(2, LENGTH, 32, dtype=torch.float64, requires_grad=True) for _ in records]
    for layer, change in zip(model.model.layers, changes, strict=True):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args, change=change: (args[0] + change,))
    predicted = model(IDS).logits[:, :-1].double().log_softmax(-1)
    loss = -predicted.gather(-1, IDS[:, 1:, None]).sum()
    for entry, gradient in zip(records.values(), torch.autograd.grad(loss, changes), strict=True):
        assert gradient.abs().max() > 1e-2 and not entry.gradient.requires_grad
        torch.testing.assert_close(entry.gradient.transpose(1, 2).flatten(2), gradient, rtol=1e-4, atol=1e-5)


def state(model):
    flags = [(parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()]
    return anatomy(model), flags, [module.training for module in model.modules()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_recording_leaves_the_model_as_it_was(training, gradients):
    model = build("Gemma2").train(training)
    model.model.layers[0].requires_grad_(False)
    model.model.layers[1].eval()
    before = state(model)
    assert {flag for flag, _ in before[1]} == {True, False}
    record(model, IDS, gradients=gradients)
    assert state(model) == before
    with pytest.raises(IndexError):
        record(model, IDS + 64, gradients=gradients)
    assert state(model) == before


def test_dropout_and_checkpoints_of_training_have_no_part_in_a_record():
    model = build("Phi3", resid_pdrop=0.5, attention_dropout=0.5).train()
    model._set_gradient_checkpointing(gradient_checkpointing_func=partial(checkpoint, use_reentrant=False))
    expected = record(build("Phi3"), IDS, gradients=True)
    for index, entry in record(model, IDS, gradients=True).items():
        assert torch.equal(entry.output, expected[index].output)
        assert torch.equal(entry.gradient, expected[index].gradient)


def test_models_that_cannot_be_recorded_are_refused():
    with pytest.raises(ValueError, match="LlamaForCausalLM is patched: .* call unpatch_model first"):
        record(lococo.patch_model(tiny_llama()), IDS)
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not supported"):
        record(UNSUPPORTED["not-rotary"](), IDS)


# Errors of fewer slots

CONFIGS = {
    "default": LoCoCoConfig(16, block_size=6),
    "h2o": LoCoCoConfig.h2o(16, block_size=7),
    "learned": LoCoCoConfig(17, block_size=7, num_sinks=1, num_heavy=11, num_recent=5, score="learned"),
    "slots-per-head": LoCoCoConfig(16, block_size=6, slots_per_head=((8, 24), (8, 24))),
    "centroids": LoCoCoConfig(16, block_size=6, num_sinks=2, num_heavy=7, num_recent=4, compressor="centroids"),
    "learned-centroids": LoCoCoConfig(*(16, 7, 1, 8, 3), score="learned", compressor="centroids", scaling="count"),
}


def remember_nothing(key, function):
    return function()


def networks_of(model, config):
    """Whose features are not zero; None for a score that has none."""
    if not config.has_features:
        return None
    torch.manual_seed(0)
    networks = ScoreNetworks.of(model, config)
    for network in networks.by_layer.values():
        torch.nn.init.normal_(network.output.bias)
        torch.nn.init.normal_(network.output.weight)
    return networks


def naive_errors(model, ids, config, levels, networks=None):
    """(scales, levels, layers, kv_heads) of one text, head by head."""
    scales = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5] if config.compressor == "centroids" else [0.0]
    errors, rotate = torch.zeros(len(scales), len(levels), 2, 2, dtype=torch.float64), rope_rotate(8)
    for layer, entry in record(model, ids[None], gradients=True).items():
        full, gradient = naive_full(entry)[0], entry.gradient[0]
        features = None
        if networks is not None:
            keys = rotate(entry.key[0], -torch.arange(len(ids)))
            features = naive_features(keys, entry.value[0], naive_network(networks.by_layer[layer]))
        for (place, slots), head in itertools.product(enumerate(levels), range(2)):
            group = slice(2 * head, 2 * head + 2)
            states = entry.query[0, group] * entry.scale, entry.key[0, head], entry.value[0, head]
            own = config.with_slots(slots)
            for index, scale in enumerate(scales):
                output = naive_evicted(*states, own, None if features is None else features[head], scale)
                change = ((output - full[group]) * gradient[group]).sum(-1)
                errors[index, place, layer, head] = change.square().sum()
    return errors


def naive_evicted(query, key, value, config, features, scale):
    """(groups, tokens, head_dim) output over the tokens that are kept, chosen by the full cache's attention.

    What is evicted is gone, or goes on in centroids of more than one token that weigh ``e ** scale`` times it.
    """
    tokens, size = len(key), config.block_size
    runs = config.compressor == "centroids" and config.num_fused > 0
    first = list(range(config.num_sinks, config.num_sinks + config.num_fused)) if runs else []
    members = {token: [] for token in first}
    distant = config.score in ("distant", "learned")
    delay, fade = delay_and_fade(config)
    kept, score, outputs = [], [0.0] * tokens, []
    for start in range(0, tokens, size):
        block = list(range(start, min(start + size, tokens)))
        outputs.append(torch.zeros(len(query), len(block), key.shape[1], dtype=key.dtype))
        for group, now in itertools.product(range(len(query)), block):
            held = [token for token in kept + block if token <= now]
            logits, values = [query[group, now] @ key[token] for token in held], list(value[held])
            for joined in members.values():
                if joined:
                    weight = math.log(len(joined)) + (scale if len(joined) > 1 else 0)
                    logits.append(query[group, now] @ key[joined].mean(0) + weight)
                    values.append(value[joined].mean(0))
            outputs[-1][group, now - start] = torch.stack(logits).softmax(0) @ torch.stack(values)
            full = torch.stack([query[group, now] @ key[token] for token in range(now + 1)]).softmax(0)
            for token in range(now + 1):
                if now - token >= (delay if distant else 0):
                    score[token] += float(full[token]) ** (2 if distant else 1)
        kept, seen = kept + block, block[-1] + 1
        running = len([token for token in first if token not in kept])  # centroids that there are
        if len(kept) + running > config.num_slots:
            fixed = [token for token in kept if token < config.num_sinks or token >= seen - config.num_recent]
            others = [token for token in kept if token not in fixed + first]

            def rank(token, seen=seen, score=score):
                if not distant:
                    return score[token]
                queries = max(seen - token - delay, 0)
                statistic = score[token] / (sum(fade**number for number in range(queries)) + 8)
                return statistic if features is None else foreseen(statistic, seen - token, features[token])

            before, room = kept, config.num_slots - len(fixed) - len(first)
            kept = sorted(fixed + sorted(others, key=rank, reverse=True)[:room])
            centres = {token: key[joined or [token]].mean(0) for token, joined in members.items()}
            for token in sorted(set(before) - set(kept)) if runs else ():
                closest = min(first, key=lambda own, token=token: (key[token] - centres[own]).norm())
                members[token if token in first else closest].append(token)
        if distant:
            score = [each * fade**size for each in score]
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_errors_equal_the_naive_ones_on_average(name):
    model, levels = tiny_llama().double(), (3, 9, 20, LENGTH)
    networks = networks_of(model, CONFIGS[name])
    errors = eviction_errors(model, IDS, CONFIGS[name], levels, remember_nothing, networks)
    expected = torch.stack([naive_errors(model, ids, CONFIGS[name], levels, networks) for ids in IDS])
    expected /= expected[:, 0, 2].sum((1, 2))[:, None, None, None, None]  # texts count alike, by errors at 20 slots
    assert errors.dtype == torch.float64 and errors[:, :-1].min() > 1e-3
    assert gap(expected[0], expected[1]) > 1e-2
    torch.testing.assert_close(errors, expected.mean(0), rtol=1e-6, atol=1e-12)
    again = eviction_errors(model, IDS.flip(0), CONFIGS[name], levels, remember_nothing, networks)
    torch.testing.assert_close(errors, again)


@every_family
def test_enough_slots_make_no_error_and_in_a_window_few_are_enough(family):
    model, levels = build(family).double(), (WINDOW - 3, WINDOW - 1, LENGTH, LENGTH + 9)
    config = dataclasses.replace(CONFIGS["default"], compress_windows=True)
    ((few, seen, *enough),) = eviction_errors(model, IDS, config, levels, remember_nothing)
    windows = [entry.window for entry in record(model, IDS).values()]
    assert few.min() > 1e-6 and torch.stack(enough).max() < 1e-12
    assert [error.max() < 1e-12 for error in seen] == [window is not None for window in windows]


@pytest.mark.parametrize("family", KEPT)
def test_layers_that_keep_their_window_are_not_measured_and_get_no_slots(family, monkeypatch):
    model, levels, measured = build(family).double(), (4, 8, 16, 32), []
    kept, other = KEPT[family], 1 - KEPT[family]
    both = dataclasses.replace(CONFIGS["default"], compress_windows=True)
    every = eviction_errors(model, IDS, both, levels, remember_nothing)
    layer_errors = evictions.layer_errors

    def noted(entry, *arguments):
        measured.append(entry.window)
        return layer_errors(entry, *arguments)

    monkeypatch.setattr(evictions, "layer_errors", noted)
    keeping = dataclasses.replace(CONFIGS["default"], compress_windows=False)
    errors = eviction_errors(model, IDS, keeping, levels, remember_nothing)
    assert measured == [None] * len(IDS)
    assert errors.shape == every.shape and errors[:, :, kept].isnan().all()
    ratio = every[:, :-1, other] / errors[:, :-1, other]  # errors of a text are relative to their sum
    assert errors[:, :, other].isfinite().all() and ratio.min() > 0 and ratio.max() <= 1
    slots, scales = allocate_with_scales(errors, levels, 12)
    alone, _ = allocate_with_scales(errors[:, :, [other]], levels, 12)
    assert slots[kept] is None and (slots[other],) == alone and len(scales) == 2
    lococo.patch_model(model, LoCoCoConfig(12, slots_per_head=slots, compress_windows=False))


def test_where_every_layer_keeps_its_window_there_is_nothing_to_measure():
    model, config = build("Mistral-window"), dataclasses.replace(CONFIGS["default"], compress_windows=False)
    with pytest.raises(ValueError, match=r"every layer of MistralForCausalLM keeps its sliding window .*nothing to"):
        eviction_errors(model, IDS, config, (4, 8), remember_nothing)


def test_a_killed_run_goes_on_at_the_text_where_it_stopped(tmp_path, monkeypatch):
    model, texts, levels = tiny_llama(), tiny_ids(3, 24), (4, 9, 12)
    recorded, whole = [], eviction_errors(model, texts, CONFIGS["default"], levels, remember_nothing)

    def noted(model, ids, **options):
        recorded.append(ids[0].tolist())
        return record(model, ids, **options)

    def killed(key, function):
        if len(recorded) == 2:
            raise KeyboardInterrupt
        return Journal(tmp_path / "journal").measure(key, function)

    monkeypatch.setattr(evictions, "record", noted)
    with pytest.raises(KeyboardInterrupt):
        eviction_errors(model, texts, CONFIGS["default"], levels, killed)
    del recorded[:]
    for expected in (texts[2:].tolist(), []):
        errors = eviction_errors(model, texts, CONFIGS["default"], levels, Journal(tmp_path / "journal").measure)
        assert torch.equal(errors, whole) and recorded == expected
        del recorded[:]
    eviction_errors(model, texts[:1], CONFIGS["h2o"], levels, Journal(tmp_path / "journal").measure)
    assert recorded == texts[:1].tolist(), "errors of another config were taken"


# Sharing out

LAYERS, KV_HEADS = 2, 3
curves = st.lists(st.lists(st.integers(0, 60), min_size=4, max_size=4), min_size=6, max_size=6)
# Multiples of the number of heads, so that any sum of them is a budget.
rising_levels = st.lists(st.integers(1, 12), min_size=4, max_size=4, unique=True).map(
    lambda levels: [6 * level for level in sorted(levels)]
)


def shared_out(by_head, levels, num_slots):
    """Allocation of (heads, levels) errors among these levels alone, flat, and its error."""
    errors = torch.tensor(by_head, dtype=torch.float64).T.reshape(len(levels), LAYERS, KV_HEADS)
    with mock.patch.object(budgets, "STEPS_BETWEEN", 0):
        layers = allocate(errors, levels, num_slots)
    assert [len(layer) for layer in layers] == [KV_HEADS] * LAYERS
    slots = list(itertools.chain(*layers))
    assert sum(slots) <= num_slots * len(slots)
    return slots, sum(falling(curve)[levels.index(count)] for curve, count in zip(by_head, slots, strict=True))


def falling(curve):
    return list(itertools.accumulate(curve, min))


def smallest_error(by_head, levels, num_slots):
    choices = itertools.product(range(len(levels)), repeat=len(by_head))
    return min(
        sum(curve[place] for curve, place in zip(by_head, places, strict=True))
        for places in choices
        if sum(levels[place] for place in places) <= num_slots * len(by_head)
    )


def corners(curve, levels):
    """Places on the lower convex hull of a falling curve."""

    def below(left, place, right):
        share = (levels[place] - levels[left]) / (levels[right] - levels[left])
        return curve[place] < curve[left] + share * (curve[right] - curve[left]) - 1e-9

    last = len(levels) - 1
    return [
        place
        for place in range(len(levels))
        if all(below(left, place, right) for left in range(place) for right in range(place + 1, last + 1))
    ]


@settings(max_examples=60)
@given(curves, rising_levels, st.data())
def test_allocation_is_at_most_one_step_worse_than_the_best_of_all(by_head, levels, data):
    num_slots = data.draw(st.integers(levels[0], levels[-1] + 2))
    slots, error = shared_out(by_head, levels, num_slots)
    best = smallest_error(by_head, levels, num_slots)
    steps, left = [], num_slots * len(slots) - sum(slots)
    for curve, count in zip(map(falling, by_head), slots, strict=True):
        hull = corners(curve, levels)
        steps += [curve[here] - curve[there] for here, there in itertools.pairwise(hull)]
        assert all(levels[place] - count > left for place in hull if levels[place] > count), "slots are left for it"
    assert best <= error <= best + max(steps) + 1e-9


@settings(max_examples=60)
@given(curves, rising_levels, st.floats(0.01, 15))
def test_allocation_is_the_best_of_all_where_the_budget_ends_with_a_step(by_head, levels, price):
    chosen = [
        min((error + price * count, count, error) for error, count in zip(curve, levels, strict=True))
        for curve in by_head
    ]
    num_slots, rest = divmod(sum(count for _, count, _ in chosen), len(by_head))
    assert rest == 0
    _, error = shared_out(by_head, levels, num_slots)
    assert error == sum(error for *_, error in chosen) == smallest_error(by_head, levels, num_slots)


@pytest.mark.parametrize("num_slots", range(2, 34))
def test_larger_errors_get_more_slots_and_equal_ones_the_same_but_for_a_step(num_slots):
    levels = [2, 4, 8, 16, 32]
    curve = [100 / count for count in levels]
    slots, _ = shared_out([curve] * 6, levels, num_slots)
    places = sorted(map(levels.index, slots))
    assert places[-1] - places[0] <= 1
    if places[0] < 4:
        assert sum(slots) + levels[places[0] + 1] - levels[places[0]] > 6 * num_slots, "another step could be paid"
    slots, _ = shared_out(
        [[share * error for error in curve] for share in (1, 4, 16, 64, 256, 1024)], levels, num_slots
    )
    assert slots == sorted(slots) and (slots[-1] > slots[0] or not 4 <= num_slots < 32)


@pytest.mark.parametrize("num_slots", [4, 7, 16, 25])
def test_between_levels_an_error_falls_as_a_power_of_the_slots(num_slots):
    coarse, fine = (torch.tensor([4, 64]), torch.tensor([4, 8, 16, 32, 64]))
    assert budgets.STEPS_BETWEEN == 3
    scale, power = torch.tensor([[1, 5, 25], [70, 3, 2]]), torch.tensor([[0.3, 1, 2], [0.5, 3, 1.5]]).double()
    errors = [scale * levels[:, None, None] ** -power for levels in (coarse, fine)]
    with mock.patch.object(budgets, "STEPS_BETWEEN", 0):
        expected = allocate(errors[1], fine.tolist(), num_slots)
    assert allocate(errors[0], coarse.tolist(), num_slots) == expected
    assert num_slots == 4 or len(set(itertools.chain(*expected))) > 2


def test_slots_and_the_weight_of_centroids_are_found_together():
    """Layers whose errors are smallest at a scale of their own, where they have few slots and where they have many."""
    levels, scales = (8, 16, 32), torch.tensor(budgets.LOG_SCALES)
    best = torch.tensor([[1.0, 1.0, 1.0], [3.0, 3.0, 0.5]])  # by layer and level
    sizes = torch.tensor([[4.0, 2, 1], [400, 200, 100]])
    errors = sizes.T[None, :, :, None] * (1 + (scales[:, None, None, None] - best.T[..., None]) ** 2)
    slots, found = budgets.allocate_with_scales(errors.expand(-1, -1, -1, 2).double(), levels, 20)
    assert found == (1.0, 0.5) and slots == ((8, 8), (32, 32))
    # With one scale they are the slots of its errors.
    one = torch.tensor([[9.0, 3, 1], [90, 30, 10]]).T[None, :, :, None].expand(-1, -1, -1, 2).double()
    slots, found = budgets.allocate_with_scales(one, levels, 16)
    assert found == (0.0, 0.0) and slots == tuple(map(budgets._evened, allocate(one[0], levels, 16)))


@pytest.mark.parametrize(
    ("slots", "even"),
    [
        ((8, 8, 8), (8, 8, 8)),
        ((8, 12), (10, 10)),
        ((8, 13), (8, 13)),
        ((30, 9, 40, 12, 31), (33, 10, 33, 10, 33)),
        ((16, 24, 36), (20, 20, 36)),  # not one after the other to the end
        ((7,), (7,)),
    ],
)
def test_similar_heads_of_a_layer_get_as_many_slots(slots, even):
    assert budgets._evened(slots) == even
    assert sum(even) <= sum(slots)


def test_budgets_below_the_lowest_level_are_refused():
    with pytest.raises(ValueError, match="levels must begin at num_slots=7 or below, got 8"):
        allocate(torch.zeros(2, 1, 1), (8, 16), 7)


@pytest.mark.parametrize("num_slots", [1, 2, 16, 100, 512])
def test_levels_reach_from_a_sixteenth_to_sixteen_times_the_average(num_slots):
    levels = slot_levels(num_slots)
    assert list(levels) == sorted(set(levels)) and num_slots in levels
    assert (levels[0], levels[-1]) == (max(1, round(num_slots / 16)), 16 * num_slots)
    LoCoCoConfig(num_slots, slots_per_head=allocate(torch.rand(len(levels), 2, 2), levels, num_slots))


# Models with slots per head

SLOTS = ((20, 4), (7, 17))
CONFIG = LoCoCoConfig(12, block_size=6, kernel_size=5, gate_init=0.5, slots_per_head=SLOTS)


@pytest.mark.parametrize(
    ("slots", "named"),
    [
        (((12, 12),), "1 layers with 2 KV heads"),
        (((12,), (12,)), "2 layers with 1 KV heads"),
        (((12, 12), (12, 12, 12)), "2 layers with 2, 3 KV heads"),
    ],
)
def test_slots_for_another_shape_are_refused(slots, named):
    model = tiny_llama()
    before = anatomy(model)
    with pytest.raises(ValueError, match=f"slots_per_head is for {named}, the model has 2 layers with 2"):
        lococo.patch_model(model, LoCoCoConfig(12, slots_per_head=slots))
    assert anatomy(model) == before and not lococo.is_patched(model)


def test_heads_of_other_groups_are_read_in_the_order_of_the_model():
    config = LoCoCoConfig(16, 8, gate_init=0.4, slots_per_head=((24, 8, 24, 8),))
    q, k, v = (torch.randn(heads, LENGTH, DIM, dtype=torch.float64) for heads in (8, 4, 4))
    head = random_head(config)
    expected, _ = naive_lococo(q, k, v, config, naive_head(head))
    torch.testing.assert_close(read_one_layer(config, q, k, v, head), expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_saved_heads_keep_their_budgets_also_where_a_layer_fuses_nothing(tmp_path):
    config = LoCoCoConfig(16, block_size=8, gate_init=0.4, slots_per_head=((48, 11), (3, 2)))
    model = patch(tiny_llama(), config)
    assert list(patch_of(model).heads) == [0]
    assert patch_of(model).heads[0].gate.shape == (config.with_slots(48).num_fused,)
    folder = lococo.save_heads(model, tmp_path / "heads")
    loaded = lococo.patch_model(tiny_llama(), heads=folder)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert gap(model(IDS).logits, tiny_llama()(IDS).logits) > 1e-2
    for slots in (None, SLOTS, ((11, 2), (3, 48))):
        other = lococo.patch_model(tiny_llama(), LoCoCoConfig(16, block_size=8, gate_init=0.4, slots_per_head=slots))
        with pytest.raises(ValueError, match=r"layers\.\d"):
            lococo.load_heads(other, folder)


@torch.no_grad()
def test_padded_rows_are_answered_as_if_alone_also_by_beams():
    model, (ids, mask) = patch(tiny_llama(), CONFIG), pad_left(ROWS)
    together = answer(model, ids, attention_mask=mask)
    beams = answer(model, ids, attention_mask=mask, num_beams=2, num_return_sequences=2)
    for index, row in enumerate(ROWS):
        width = len(row) + NEW_TOKENS
        assert torch.equal(together[index, -width:], greedy(model, row[None], NEW_TOKENS)[0])
        assert torch.equal(beams[2 * index : 2 * index + 2, -width:], beam_search(model, row[None], num_beams=2)[0])


@torch.no_grad()
@every_family
def test_every_family_can_be_split_and_with_enough_slots_is_full(family):
    model = build(family)
    full = read(model, IDS)
    config = LoCoCoConfig(70, block_size=6, slots_per_head=((LENGTH, 70), (50, LENGTH)))
    with lococo.patched(model, fitting(family, config)):
        assert_close(read(model, IDS), full)
    patch(model, fitting(family, CONFIG))
    whole = read(model, IDS)
    assert gap(whole, full) > 1e-2
    for split in ([1] * LENGTH, [7] * 5 + [6], [1, 7, 8, 25]):
        assert_close(read(model, IDS, split), whole)


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copied_cache_goes_on_by_itself(copied, padding):
    model, mask = patch(tiny_llama(), CONFIG), torch.ones_like(IDS)
    mask[1, :padding] = 0
    cache = model(IDS[:, :29], attention_mask=mask[:, :29], use_cache=True).past_key_values
    duplicate, other = copied(cache), copied(cache)
    assert [group.heads for group in duplicate.layers[0].groups] == [(0,), (1,)]
    changed, goes_on, again = (
        read_on(model, each, ids, mask) for each, ids in ((other, IDS.flip(0)), (cache, IDS), (duplicate, IDS))
    )
    assert_close(goes_on, model(IDS, attention_mask=mask).logits[:, 29:])
    assert torch.equal(again, goes_on) and gap(changed, goes_on) > 1e-2


def read_on(model, cache, ids, mask):
    """Logits of the rest, in calls of 7 and 5 tokens."""
    parts = [(29, 36), (36, 41)]
    return torch.cat(
        [model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits for a, b in parts], dim=1
    )
