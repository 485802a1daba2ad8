"""Networks of learned scores learn, resume bit for bit, in bounded memory; slots per head are measured with them."""

import copy
import dataclasses
import itertools
import math
import sys
import weakref
from pathlib import Path

import pytest
import torch
from families import build
from tiny import tiny_ids, tiny_llama

import lococo
from lococo import LoCoCoConfig
from lococo.results.deadline import Deadline, OutOfTime
from lococo.results.journal import Journal
from lococo.state import patch_of
from lococo.training import evictions, scores
from lococo.training.evictions import eviction_errors, layer_errors
from lococo.training.lookups import Lookups, record_lookups
from lococo.training.recipes import ScoreConfig
from lococo.training.record import record
from lococo.training.scores import ScoreNetworks, lookup_loss, lost_shares, train_scores

CONFIG = LoCoCoConfig(16, block_size=8, score="learned", num_sinks=1, num_heavy=11, num_recent=4)
TEXTS = tiny_ids(5, 48, seed=2).int()
SHORT = ScoreConfig(texts=5, texts_at_once=2, texts_per_step=2, repeats=2)
STORIES = Path(__file__).parents[3] / "shared/data/weights/stories260K"


def new_networks(model, config=CONFIG):
    torch.manual_seed(0)
    return ScoreNetworks.of(model, config)


def trained(model, path, windows=TEXTS, settings=SHORT, config=CONFIG, **options):
    """Networks and rows."""
    networks = new_networks(model, config)
    return networks, train_scores(model, networks, windows, settings, path, **options)


def assert_same(networks, expected):
    theirs = expected.named_tensors()
    assert networks.named_tensors().keys() == theirs.keys()
    for name, tensor in networks.named_tensors().items():
        assert torch.equal(tensor, theirs[name]), name


# Learning


def on_new_texts(model, networks, windows):
    """Mean loss, and lost shares by a new network, this one and the oracle, on texts."""
    config, losses, lost = networks.config, [], []
    for ids in windows:
        for index, lookups in record_lookups(model, ids[None].long(), config, networks.rotary).items():
            network = networks.by_layer[index]
            with torch.no_grad():
                losses.append(lookup_loss(network, lookups, config).item())
                features = network(lookups.keys, lookups.values)
            lost.append(lost_shares(lookups, config, features))
    return sum(losses) / len(losses), torch.tensor(lost).mean(0).tolist()


def of_layers(rows):
    return [row for row in rows if "layer" in row]


def test_the_loss_falls_and_part_of_the_way_to_the_oracle_is_gone_on_new_texts(tmp_path):
    model, told = tiny_llama(), []
    settings = ScoreConfig(texts_at_once=4, texts_per_step=4, repeats=8, learning_rate=1e-2)
    texts, others = tiny_ids(40, 96, seed=5), tiny_ids(6, 96, seed=6)
    before, (distant, new, _) = on_new_texts(model, new_networks(model), others)
    networks, rows = trained(model, tmp_path / "state", texts, settings, tell=lambda **row: told.append(row))
    after, (still, learned, oracle) = on_new_texts(model, networks, others)
    assert after < before - 0.1 and distant == new == still
    assert learned < distant - 0.2 * (distant - oracle)
    assert [row["step"] for row in told] == list(range(1, 11)) and {row["steps"] for row in told} == {10}
    assert told[0]["closed"] == 0 and told[-1]["closed"] > 0.1 and told[-1]["loss"] < told[0]["loss"]
    curve = rows[:10]
    assert [row["texts"] for row in curve] == list(range(0, 40, 4)), "learned from before them"
    assert curve[0]["lost"] == curve[0]["lost_before"] and curve[-1]["lost"] < curve[-1]["lost_before"]
    assert [row["layer"] for row in rows[10:]] == [0, 1]
    assert all(row["lost_oracle"] < row["lost"] < row["lost_before"] for row in rows[10:])
    # Of a layer: over the last 32 texts, of which as many are read at once.
    for name in ("lost_before", "lost", "lost_oracle"):
        told_of_layers = sum(row[name] for row in rows[10:]) / 2
        assert told_of_layers == pytest.approx(sum(row[name] for row in curve[2:]) / 8)


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/data/weights/stories260K")
def test_a_real_model_learns_what_is_looked_up_in_its_stories(tmp_path):
    sys.path.insert(0, str(STORIES.parents[3]))
    from experiments.stories260k import load_llama2c, tell

    model = load_llama2c(STORIES / "stories260K.bin")
    stories = tell(model, 48, seed=0)
    config = LoCoCoConfig(32, block_size=32, score="learned", num_sinks=2, num_heavy=22, num_recent=8)
    networks, _ = trained(model, tmp_path / "state", stories[:40], ScoreConfig(), config)
    (before, _), (after, lost) = (
        on_new_texts(model, each, stories[40:]) for each in (new_networks(model, config), networks)
    )
    distant, learned, oracle = lost
    assert after < before and learned < distant - 0.1 * (distant - oracle)


def test_only_networks_change(tmp_path):
    model = build("Gemma2").train()
    model.model.layers[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    facts = [(each.requires_grad, each.grad) for each in model.parameters()]
    modes = [module.training for module in model.modules()]
    numbers = torch.get_rng_state()
    networks = ScoreNetworks.of(model, CONFIG)
    expected = torch.get_rng_state()
    train_scores(model, networks, TEXTS, SHORT, tmp_path / "state")
    assert torch.equal(torch.get_rng_state(), expected) and not torch.equal(numbers, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [(each.requires_grad, each.grad) for each in model.parameters()] == facts
    assert [module.training for module in model.modules()] == modes and not lococo.is_patched(model)


def test_where_a_window_decides_nothing_is_learned(tmp_path):
    model, told = build("Gemma2"), []
    networks, rows = trained(model, tmp_path / "state", tell=lambda **row: told.append(row))
    unchanged = new_networks(model)
    changed = {
        name
        for name, tensor in networks.named_tensors().items()
        if not torch.equal(tensor, unchanged.named_tensors()[name])
    }
    assert changed == {name for name in unchanged.named_tensors() if name.startswith("1.")}
    (of_layer,) = of_layers(rows)
    assert of_layer["layer"] == 1 and 0 < of_layer["lost_oracle"] < of_layer["lost"] < 1
    assert [row["texts"] for row in rows[:-1]] == [0, 2, 4]
    assert all(math.isfinite(value) for row in told + rows for value in row.values())
    told.clear()
    _, rows = trained(build("Mistral-window"), tmp_path / "nothing", tell=lambda **row: told.append(row))
    assert rows == [] and [row["closed"] for row in told] == [0, 0, 0]


def test_the_learning_rate_falls_linearly_and_matrices_decay(tmp_path, monkeypatch):
    seen, step = [], torch.optim.AdamW.step

    def noted(optimizer, *arguments):
        seen.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])
        dims = [{parameter.dim() for parameter in group["params"]} for group in optimizer.param_groups]
        assert dims == [{2}, {1}]
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    settings = dataclasses.replace(SHORT, learning_rate=0.5, weight_decay=0.3)
    trained(tiny_llama(), tmp_path / "state", settings=settings)
    rates = [0.5 * (1 - done / 6) for done in range(6)]  # three steps on texts, two of the optimizer on each
    assert seen == [[(pytest.approx(rate), 0.3), (pytest.approx(rate), 0.0)] for rate in rates]
    seen.clear()
    trained(tiny_llama(), tmp_path / "more", settings=dataclasses.replace(settings, texts_at_once=4))
    # Four texts at once, in two steps that take turns, then one.
    rates = [
        0.5 * (1 - (batch + done) / 2) for batch, steps in enumerate((4, 2)) for done in torch.arange(steps) / steps
    ]
    assert seen == [[(pytest.approx(float(rate)), 0.3), (pytest.approx(float(rate)), 0.0)] for rate in rates]


def test_texts_held_at_once_are_learned_from_in_turn(tmp_path, monkeypatch):
    read, learned = [], []

    def noted(model, ids, *arguments):
        found = record_lookups(model, ids, *arguments)
        read.append(ids[0].tolist())
        found[0].keys.text = len(read)
        return found

    def noted_loss(network, lookups, config):
        if hasattr(lookups.keys, "text"):
            learned.append(lookups.keys.text)
        return lookup_loss(network, lookups, config)

    monkeypatch.setattr(scores, "record_lookups", noted)
    monkeypatch.setattr(scores, "lookup_loss", noted_loss)
    trained(tiny_llama(), tmp_path / "state", settings=dataclasses.replace(SHORT, texts_at_once=3, repeats=3))
    assert read == TEXTS.tolist()
    assert learned == [1, 2, 3] * 3 + [4, 5] * 3


def test_the_loss_must_be_finite(tmp_path):
    model = tiny_llama()
    model.model.layers[1].self_attn.v_proj.weight.data[:] = torch.inf
    with pytest.raises(FloatingPointError, match="scores, step 1 of 3: the loss is nan"):
        trained(model, tmp_path / "state")


# Resuming, and memory


class Killed(BaseException):
    """What no handler of the library takes for an error."""


def killing(function, when):
    calls = itertools.count()

    def killed(*arguments, **options):
        if next(calls) == when:
            raise Killed
        return function(*arguments, **options)

    return killed


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@pytest.mark.parametrize(("name", "calls"), [("record_lookups", 5), ("lookup_loss", 20), ("write_whole", 3)])
def test_killed_anywhere_and_resumed_equals_uninterrupted(family, name, calls, tmp_path, monkeypatch):
    model = build(family)
    expected, rows = trained(model, tmp_path / "whole")
    for when in range(0, calls, 4 if name == "lookup_loss" else 1):
        path = tmp_path / str(when)
        with monkeypatch.context() as patched:
            patched.setattr(scores, name, killing(getattr(scores, name), when))
            try:
                trained(model, path)
            except Killed:
                pass
            else:
                assert family == "Gemma2" and when >= 10, "of its layers one learns"
        networks, resumed = trained(model, path)
        assert_same(networks, expected)
        assert resumed == rows


def test_a_finished_training_is_read_and_not_done_again(tmp_path, monkeypatch):
    expected, rows = trained(tiny_llama(), tmp_path / "state")
    monkeypatch.setattr(scores, "record_lookups", lambda *arguments: pytest.fail("a text was read"))
    networks, again = trained(tiny_llama(), tmp_path / "state")
    assert_same(networks, expected)
    assert again == rows


def test_no_text_is_read_after_the_deadline(tmp_path, monkeypatch):
    read = []
    deadline = Deadline(1000)
    monkeypatch.setattr(Deadline, "is_over", property(lambda self: self is deadline and len(read) == 2))
    noted = record_lookups
    monkeypatch.setattr(scores, "record_lookups", lambda *arguments: read.append(1) or noted(*arguments))
    with pytest.raises(OutOfTime):
        trained(tiny_llama(), tmp_path / "state", deadline=deadline)
    assert len(read) == 2 and (tmp_path / "state").is_file()


@pytest.mark.parametrize(("texts_at_once", "texts_per_step"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_no_more_texts_are_held_at_once_than_is_said(texts_at_once, texts_per_step, tmp_path, monkeypatch):
    alive, most = weakref.WeakSet(), []
    monkeypatch.setattr(Lookups, "__hash__", object.__hash__)

    def noted(*arguments):
        found = record_lookups(*arguments)
        alive.update(found.values())
        most.append(len(alive))
        return found

    monkeypatch.setattr(scores, "record_lookups", noted)
    settings = dataclasses.replace(SHORT, texts_at_once=texts_at_once, texts_per_step=texts_per_step)
    trained(tiny_llama(), tmp_path / "state", settings=settings)
    assert len(most) == 5 and max(most) == 2 * texts_at_once, "a text has two layers"


# Slots per head


def random_networks(model, config=CONFIG, scale=1.0):
    networks = new_networks(model, config)
    for network in networks.by_layer.values():
        torch.nn.init.normal_(network.output.bias, std=scale)
        torch.nn.init.normal_(network.output.weight, std=scale)
    return networks


def remember_nothing(key, function):
    return function()


@torch.no_grad()
@pytest.mark.parametrize(("slots", "length"), [(5, 16), (12, 24)])
def test_errors_with_networks_are_those_of_a_patched_model_that_has_them(slots, length):
    """In the first layer, whose queries, keys and values do not depend on what is kept, after one compression."""
    model, texts = tiny_llama().double(), tiny_ids(2, length)
    networks = random_networks(model)
    for ids in texts:
        with torch.enable_grad():
            errors = eviction_errors(model, ids[None], CONFIG, (slots,), remember_nothing, networks)
            entry = record(model, ids[None], gradients=True)[0]
        outputs, patched = [], lococo.patch_model(copy.deepcopy(model), CONFIG.with_slots(slots))
        networks.put_into(patch_of(patched))
        patched.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
            lambda module, args, outputs=outputs: outputs.append(args[0])
        )
        patched(ids[None])
        output = outputs[0].view(1, length, 4, 8).transpose(1, 2)
        error = ((output - entry.output) * entry.gradient).sum(-1).square().sum(-1)
        expected = error[0].view(2, 2).sum(-1)
        features = networks.features(0, entry.key, entry.value)
        ((found,),) = layer_errors(entry, [CONFIG.with_slots(slots)], features)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-9)
        assert errors.sum() == pytest.approx(1)  # what a text's errors are relative to
        torch.testing.assert_close(errors[0, 0, 0] / errors[0, 0, 0].sum(), found / found.sum())


def test_errors_of_networks_are_not_taken_for_those_of_others(tmp_path, monkeypatch):
    model, texts, levels = tiny_llama(), tiny_ids(2, 41), (5, 12)
    calls, noted = [], record
    monkeypatch.setattr(
        evictions, "record", lambda *arguments, **options: calls.append(1) or noted(*arguments, **options)
    )
    every = {
        "none": None,
        "new": new_networks(model),
        "some": random_networks(model),
        "others": random_networks(model, scale=2.0),
    }
    measured = {
        name: eviction_errors(model, texts, CONFIG, levels, Journal(tmp_path / "journal").measure, networks)
        for name, networks in every.items()
    }
    assert len(calls) == 2 * len(every)
    assert torch.equal(measured["none"], measured["new"])
    for one, other in itertools.combinations(("new", "some", "others"), 2):
        assert (measured[one] - measured[other]).abs().max() > 1e-3
    for name, networks in every.items():
        again = eviction_errors(model, texts, CONFIG, levels, Journal(tmp_path / "journal").measure, networks)
        assert torch.equal(again, measured[name]) and len(calls) == 2 * len(every)


def test_a_killed_measurement_with_networks_goes_on_at_its_text(tmp_path, monkeypatch):
    model, texts = tiny_llama(), tiny_ids(3, 41)
    networks = random_networks(model)
    whole = eviction_errors(model, texts, CONFIG, (5, 12), remember_nothing, networks)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(evictions, "record", killing(record, 1))
        eviction_errors(model, texts, CONFIG, (5, 12), Journal(tmp_path / "journal").measure, networks)
    monkeypatch.setattr(evictions, "record", killing(record, 2))  # the first text is not read again
    errors = eviction_errors(model, texts, CONFIG, (5, 12), Journal(tmp_path / "journal").measure, networks)
    assert torch.equal(errors, whole)
