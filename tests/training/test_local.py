"""Layer-local training: recordings come back, what is learned holds on other texts, a killed run goes on."""

import dataclasses
import weakref
from pathlib import Path

import pytest
import torch
from configs import CONFIGS
from families import WINDOW, build
from reference import naive_features, naive_full, naive_head, naive_lococo, naive_network, rope_rotate
from safetensors.torch import load_file, save_file
from tiny import tiny_ids, tiny_llama

import lococo
from lococo import LoCoCoConfig
from lococo.state import patch_of
from lococo.training import local
from lococo.training.local import LocalConfig, Recordings, train_locally
from lococo.training.record import compressed_output, record

CONFIG = LoCoCoConfig(16, block_size=8, kernel_size=5, head_rank=4, gate_init=0.2)
SHORT = LocalConfig(steps=3, num_checked=1)
TEXTS = tiny_ids(4, 48).int()


def cyclic_texts(count, length=80, period=24):
    """Texts that repeat themselves after more tokens than there are slots."""
    return tiny_ids(count, period).repeat(1, length // period + 1)[:, :length].int()


def recorded(folder, model, texts=TEXTS):
    recordings = Recordings(folder)
    recordings.add(model, texts)
    return recordings


def patch(model, config=CONFIG):
    """Patch with the same heads every time."""
    torch.manual_seed(5)
    return lococo.patch_model(model, config)


def heads(model):
    return {
        f"{index}.{name}": parameter.detach().clone()
        for index, head in patch_of(model).heads.items()
        for name, parameter in head.named_parameters()
    }


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture
def calls(monkeypatch):
    """Arguments of every call that records a text."""
    made = []

    def noted(model, ids, **options):
        made.append(ids)
        return record(model, ids, **options)

    monkeypatch.setattr(local, "record", noted)
    return made


# Recordings


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_recordings_come_back_in_half_precision(family, tmp_path):
    model = build(family)
    recordings = recorded(tmp_path / "new" / "folder", model, TEXTS[:2])
    for text, ids in enumerate(TEXTS[:2]):
        for index, expected in record(model, ids[None].long(), gradients=True).items():
            entry = recordings.layer(index, text, torch.device("cpu"))
            for name, digits in dict(query=11, key=11, value=11, output=11, gradient=8).items():
                actual, whole = getattr(entry, name), getattr(expected, name)
                assert actual.dtype == torch.float32 and whole.abs().max() > 1e-3
                torch.testing.assert_close(actual, whole, rtol=2.0**-digits, atol=1e-7, msg=name)
            for name in ("scale", "window", "softcap"):
                assert getattr(entry, name) == getattr(expected, name)


@pytest.mark.parametrize("name", ["learned", "learned-per-head"])
@torch.no_grad()
def test_a_recorded_layer_is_read_with_features_as_the_model_reads_it(name):
    config, ids = CONFIGS[name], tiny_ids(1, 61)
    entry, outputs = record(tiny_llama(), ids)[0], {}
    for score in (config.score, "learned"):
        model = patch(tiny_llama(), dataclasses.replace(config, score=score))
        head, network = patch_of(model).heads[0], patch_of(model).networks.get(0)
        features = None
        if network is not None:
            unrotated = patch_of(model).rotary_tables[0].rotate(entry.key, torch.arange(61)[None], inverse=True)
            features = network(unrotated, entry.value)
        outputs[score] = compressed_output(entry, patch_of(model).config, 0, head, features)
        projected = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
            lambda module, states, said=outputs[score]: torch.testing.assert_close(
                states[0], said.transpose(1, 2).flatten(2), rtol=0, atol=1e-5
            )
        )
        model(ids)
        projected.remove()
    assert (outputs[config.score] - outputs["learned"]).abs().max() > 1e-2
    assert torch.equal(compressed_output(entry, config, 0, head), outputs["learned"])  # without features


@pytest.mark.parametrize("name", ["learned", "learned-slot", "open"])
def test_blends_learn_beside_the_tokens_that_a_learned_score_selects(name, tmp_path, monkeypatch):
    recordings, seen = recorded(tmp_path / "texts", tiny_llama()), []

    def noted(entry, config, layer_idx, head, features):
        seen.append(features)
        if CONFIGS[name].has_features:
            keys = rope_rotate(8)(entry.key.double(), -torch.arange(48))
            network = naive_network(patch_of(model).networks[layer_idx])
            expected = naive_features(keys[0], entry.value[0], network)
            torch.testing.assert_close(features[0].double(), torch.tensor(expected).double(), rtol=1e-3, atol=1e-3)
        return compressed_output(entry, config, layer_idx, head, features)

    monkeypatch.setattr(local, "compressed_output", noted)
    model = patch(tiny_llama(), CONFIGS[name])
    train_locally(model, recordings, LocalConfig(steps=1, num_checked=1), tmp_path / "local")
    assert len(seen) == 2 * 4, "of two layers, two texts, each with the head and without"
    assert {features is None for features in seen} == {not CONFIGS[name].has_features}


def test_small_gradients_are_not_lost(tmp_path):
    model = tiny_llama()
    model.lm_head.weight.data *= 1e-9
    expected = record(model, TEXTS[:1].long(), gradients=True)[0].gradient
    assert 0 < expected.abs().max() < 1e-8
    actual = recorded(tmp_path, model, TEXTS[:1]).layer(0, 0, torch.device("cpu")).gradient
    torch.testing.assert_close(actual, expected, rtol=2**-8, atol=0)


def test_what_is_recorded_is_not_recorded_again(tmp_path, calls):
    model = tiny_llama()
    first = recorded(tmp_path, model, TEXTS[:3])
    assert len(calls) == 3
    again = recorded(tmp_path, model, TEXTS)
    assert len(calls) == 4 and again.paths[:3] == first.paths
    first.add(model, TEXTS[3:])
    assert len(calls) == 4 and first.paths == again.paths


def test_a_killed_write_leaves_no_file_taken_for_whole(tmp_path, calls, monkeypatch):
    model, write = tiny_llama(), Path.write_bytes

    def killed(path, content):
        write(path, content[: len(content) // 2])
        raise KeyboardInterrupt

    recorded(tmp_path, model, TEXTS[:1])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "write_bytes", killed)
        recorded(tmp_path, model)
    assert len(list(tmp_path.iterdir())) == 1 and len(calls) == 2
    recordings = recorded(tmp_path, model)
    assert len(calls) == 5 and len(recordings.paths) == len(list(tmp_path.iterdir())) == 4
    for path in recordings.paths:
        load_file(path)


# Learning


def test_error_falls_on_texts_that_were_not_learned_from(tmp_path):
    recordings = recorded(tmp_path / "texts", tiny_llama(), cyclic_texts(9))
    model = patch(tiny_llama())
    untrained = train_locally(model, recordings, LocalConfig(1, 1e-12, 1e-12, num_checked=3), tmp_path / "untrained")
    model = patch(tiny_llama())
    trained = train_locally(model, recordings, LocalConfig(30, 1e-2, 3e-2, num_checked=3), tmp_path / "trained")
    assert [row["layer"] for row in trained] == [0, 1]
    for before, after in zip(untrained, trained, strict=True):
        assert after["error"] < 0.95 and after["error"] < 0.95 * before["error"]


def test_gates_stay_where_they_have_a_gradient(tmp_path):
    recordings = recorded(tmp_path / "texts", tiny_llama())
    model = patch(tiny_llama())
    train_locally(model, recordings, LocalConfig(2, 1e-2, scalar_learning_rate=2.0), tmp_path / "local")
    gates = torch.cat([head.gate for head in patch_of(model).heads.values()])
    assert set(gates.tolist()) >= {0.0, 1.0} and gates.min() == 0 and gates.max() == 1


def test_closed_gates_are_token_selection(tmp_path):
    recordings = recorded(tmp_path / "texts", tiny_llama())
    model = patch(tiny_llama(), LoCoCoConfig(16, block_size=8, kernel_size=5))
    rows = train_locally(model, recordings, LocalConfig(1, 1e-12, 1e-12), tmp_path / "local")
    assert [row["error"] for row in rows] == pytest.approx([1, 1], abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"residual": "layer"}, {"head_rank": 4}, {"slots_per_head": ((12, 20), (22, 10))}],
    ids=["gate-per-slot", "gate-per-layer", "low-rank", "slots-per-head"],
)
def test_closed_gates_open(options, tmp_path):
    recordings = recorded(tmp_path / "texts", tiny_llama(), cyclic_texts(5))
    model = patch(tiny_llama(), LoCoCoConfig(16, block_size=8, kernel_size=5, **options))
    before = heads(model)
    assert all((value == 0).all() for name, value in before.items() if name.endswith("gate"))
    rows = train_locally(model, recordings, LocalConfig(6, 1e-2, 3e-2, num_checked=1), tmp_path / "local")
    assert changed(before, heads(model)) == set(before)
    assert all(head.gate.max() > 0.01 for head in patch_of(model).heads.values())
    assert all(row["error"] != pytest.approx(1, abs=1e-4) for row in rows)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        LoCoCoConfig(16, block_size=8, kernel_size=5, gate_init=0.3, slots_per_head=((12, 20), (22, 10))),
        CONFIGS["learned"],
        CONFIGS["learned-per-head"],
    ],
    ids=["low-rank", "slots-per-head", "learned", "learned-per-head"],
)
def test_loss_and_gradients_are_the_naive_ones(config):
    ids = TEXTS[:1].long()
    entry = record(tiny_llama().double(), ids, gradients=True)[0]
    model = patch(tiny_llama(), config).double()
    head = patch_of(model).heads[0].requires_grad_(True)
    parameters = dict(head.named_parameters())
    networks, features = local._networks(patch_of(model)), None
    assert (networks is not None) == config.has_features
    if networks is not None:
        features = networks.features(0, entry.key, entry.value)
    loss, without = (local._summed_error(entry, config, 0, each, features) for each in (head, None))
    loss = loss / without
    selected = dict(rotate=rope_rotate(8), network=naive_network(patch_of(model).networks.get(0)))

    def naive_error(gate):
        weights = naive_head(head)
        weights.gate = gate
        states = entry.query[0], entry.key[0], entry.value[0]
        output, _ = naive_lococo(*states, config, weights, scale=entry.scale, **selected)
        return ((output - naive_full(entry)[0]) * entry.gradient[0]).sum(-1).square().sum()

    with torch.no_grad():
        selection = naive_error(torch.zeros_like(head.gate))
    expected = naive_error(head.gate) / selection
    torch.testing.assert_close(loss, expected)
    gradients, naive = (torch.autograd.grad(error, list(parameters.values())) for error in (loss, expected))
    for name, actual, wanted in zip(parameters, gradients, naive, strict=True):
        assert wanted.abs().max() > 1e-6, name
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-9, msg=name)


def test_only_one_record_is_in_memory(tmp_path, monkeypatch):
    recordings, layer, alive = recorded(tmp_path / "texts", tiny_llama()), Recordings.layer, []

    def counted(*arguments):
        assert not [part for part in alive if part() is not None]
        entry = layer(*arguments)
        alive[:] = [weakref.ref(part) for part in (entry, entry.query, entry.value, entry.gradient)]
        return entry

    monkeypatch.setattr(Recordings, "layer", counted)
    train_locally(patch(tiny_llama()), recordings, LocalConfig(steps=3, num_checked=2), tmp_path / "local")
    assert alive


# What is left behind


def test_killed_after_a_layer_and_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    recordings, train_layer, trained = recorded(tmp_path / "texts", tiny_llama()), local.train_layer, []
    whole = patch(tiny_llama())
    rows = train_locally(whole, recordings, SHORT, tmp_path / "whole")

    def killed(layer_idx, *arguments):
        if layer_idx == 1 and not trained[1:]:
            trained.append("killed")
            raise KeyboardInterrupt
        trained.append(layer_idx)
        return train_layer(layer_idx, *arguments)

    monkeypatch.setattr(local, "train_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        train_locally(patch(tiny_llama()), recordings, SHORT, tmp_path / "cut")
    resumed = patch(tiny_llama())
    assert train_locally(resumed, recordings, SHORT, tmp_path / "cut") == rows
    assert trained == [0, "killed", 1]
    assert not changed(heads(whole), heads(resumed))
    assert changed(heads(whole), heads(patch(tiny_llama()))) == set(heads(whole))


@pytest.mark.parametrize("requires_grad", [True, False])
def test_flags_modes_and_base_model_stay_as_they_were(requires_grad, tmp_path):
    recordings = recorded(tmp_path / "texts", tiny_llama())
    model = patch(tiny_llama()).train()
    patch_of(model).heads[1].requires_grad_(requires_grad)
    before = [parameter.requires_grad for parameter in model.parameters()]
    train_locally(model, recordings, SHORT, tmp_path / "local")
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not changed(tiny_llama().state_dict(), lococo.unpatch_model(model).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_heads_learn_in_float32_or_wider(dtype, tmp_path):
    recordings = recorded(tmp_path / "texts", tiny_llama())
    model = patch(tiny_llama().to(dtype))
    train_locally(model, recordings, SHORT, tmp_path / "local")
    for index, head in patch_of(model).heads.items():
        learned = load_file(tmp_path / "local" / f"layer_{index:03d}.safetensors")
        for name, parameter in head.named_parameters():
            assert learned[name].dtype == torch.promote_types(dtype, torch.float32) and parameter.dtype == dtype
            assert torch.equal(parameter, learned[name].to(dtype))


# Layers of other kinds


def test_layers_with_a_sliding_window_have_nothing_to_learn(tmp_path):
    recordings = recorded(tmp_path / "texts", build("Gemma2"))
    assert [recordings.layer(index, 0, torch.device("cpu")).window for index in (0, 1)] == [WINDOW, None]
    for compress in (True, False):
        model = patch(build("Gemma2"), dataclasses.replace(CONFIG, compress_windows=compress))
        before = heads(model)
        *compressed, other = train_locally(model, recordings, SHORT, tmp_path / f"local-{compress}")
        assert other["layer"] == 1 and other["error"] != pytest.approx(1)
        assert [(row["layer"], row["error"]) for row in compressed] == ([(0, pytest.approx(1))] if compress else [])
        assert changed(before, heads(model)) == {name for name in before if name.startswith("1.")}


def test_layers_with_slots_of_their_own(tmp_path):
    config = LoCoCoConfig(
        35, block_size=8, kernel_size=5, head_rank=4, gate_init=0.2, slots_per_head=((4, 22), (56, 58))
    )
    recordings = recorded(tmp_path / "texts", tiny_llama())
    model = patch(tiny_llama(), config)
    before = heads(model)
    train_locally(model, recordings, SHORT, tmp_path / "local")
    learned = {name for name in changed(before, heads(model)) if not name.endswith("mass_scale")}
    assert learned >= {"0.conv.weight", "0.expand.weight", "0.gate"}
    assert not any(name.startswith("1.") for name in learned), "nothing is evicted there"


# Failures


def test_too_few_texts_are_refused(tmp_path):
    recordings = recorded(tmp_path / "texts", tiny_llama(), TEXTS[:2])
    with pytest.raises(ValueError, match="more than num_checked=2 texts, got 2"):
        train_locally(patch(tiny_llama()), recordings, LocalConfig(steps=3), tmp_path / "local")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(num_checked=0), "num_checked must be at least 1, got 0"),
        (dict(learning_rate=0.0), "learning_rate must be positive, got 0.0"),
        (dict(scalar_learning_rate=float("nan")), "scalar_learning_rate must be positive, got nan"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LocalConfig(**values)


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    recordings = recorded(tmp_path / "texts", tiny_llama())
    order = torch.randperm(3, generator=torch.Generator().manual_seed(1)).tolist()
    spoiled = recordings.paths[order[2]]
    tensors = load_file(spoiled)
    tensors["1.value"][0, 0, 3] = float("inf")
    with local.safe_open(spoiled, "pt") as file:
        save_file(tensors, spoiled, metadata=file.metadata())
    model = patch(tiny_llama())
    with pytest.raises(FloatingPointError, match="^layer 1, step 2: the local loss is nan$"):
        train_locally(model, recordings, SHORT, tmp_path / "local")
    assert [path.name for path in (tmp_path / "local").iterdir()] == ["layer_000.safetensors"]
    assert all(parameter.requires_grad for parameter in model.parameters())
