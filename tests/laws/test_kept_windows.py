"""Layers with a sliding window keep what it sees, exactly, if there are slots enough, or if they are to."""

import copy
import dataclasses
import pickle

import pytest
import torch
from configs import CODED, CONFIGS, opened
from families import FAMILIES, KEPT, LENGTH, NARROW, SPLITS, WINDOW, build, fitting, gap, pad_left, read
from tiny import tiny_ids, tiny_llama

import lococo
from lococo import LoCoCoCache, LoCoCoConfig
from lococo.compression import select
from lococo.models import find_family
from lococo.state import patch_of

M, B = 6, 5  # fewer slots than every window sees
FEW = LoCoCoConfig(M, block_size=B, num_sinks=1, num_heavy=2, num_recent=1, gate_init=0.5, compress_windows=False)
ROUNDED = dict(rtol=0, atol=1e-5)  # the unpatched models' softmax is in float32
SAME = dict(rtol=0, atol=1e-6)
SIZES = {"Qwen2-half-narrow": NARROW}
every_hybrid = pytest.mark.parametrize("family", KEPT)
every_way = pytest.mark.parametrize(
    "config",
    [
        FEW,
        fitting("Gemma2", dataclasses.replace(CONFIGS["slots-per-head"], compress_windows=False)),
        dataclasses.replace(CONFIGS["learned"], compress_windows=False),
        dataclasses.replace(CONFIGS["h2o"], compress_windows=False),
    ],
    ids=["few", "slots-per-head", "learned", "h2o"],
)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def patched(family, config=FEW, **features):
    """A patched hybrid in float64, with the row of slots at the layer that has them."""
    if config.slots_per_head is not None:
        row = next(row for row in config.slots_per_head if row)
        rows = [row, row]
        rows[KEPT[family]] = None
        config = dataclasses.replace(config, slots_per_head=tuple(rows), compress_windows=False)
    torch.manual_seed(1)
    return lococo.patch_model(build(family, **features).double(), config)


def of_layers(model, ids, hidden=None):
    """What the attention layers make of a text: inputs and outputs; of these inputs, if they are given."""
    inputs, outputs, handles = {}, {}, []

    def before(index, module, args, kwargs):
        if hidden is not None:
            kwargs["hidden_states"] = hidden[index]
        inputs[index] = kwargs["hidden_states"]
        return args, kwargs

    for index, layer in patch_or_family(model).layers.items():
        handles.append(
            layer.register_forward_pre_hook(
                lambda module, args, kwargs, index=index: before(index, module, args, kwargs), with_kwargs=True
            )
        )
        handles.append(
            layer.register_forward_hook(
                lambda module, args, output, index=index: outputs.__setitem__(index, output[0])
            )
        )
    model(ids)
    for handle in handles:
        handle.remove()
    return inputs, outputs


def patch_or_family(model):
    return patch_of(model) if lococo.is_patched(model) else find_family(model)


@every_way
@every_hybrid
def test_a_layer_with_a_window_attends_as_in_the_full_model(family, config):
    ids = tiny_ids(2, LENGTH)
    hidden, full = of_layers(build(family).double(), ids)
    _, compressed = of_layers(patched(family, config), ids, hidden)
    for index in full:
        if index == KEPT[family]:
            torch.testing.assert_close(compressed[index], full[index], **ROUNDED)
        else:
            assert gap(compressed[index], full[index]) > 1e-3


@every_hybrid
def test_with_slots_for_a_whole_text_in_the_other_layers_the_model_is_the_full_one(family):
    ids = tiny_ids(2, LENGTH)
    full = build(family).double()(ids).logits
    model = patched(family, LoCoCoConfig(LENGTH, block_size=B, slots_per_head=((LENGTH, LENGTH), None)))
    torch.testing.assert_close(read(model, ids), full, **ROUNDED)
    for split in SPLITS.values():
        torch.testing.assert_close(read(model, ids, split), full, **ROUNDED)


@every_way
@every_hybrid
def test_neither_calls_nor_padding_matter(family, config):
    model, rows = patched(family, config), [tiny_ids(1, length)[0] for length in (LENGTH, 38, 30)]
    ids, mask = pad_left(rows)
    alone = [read(model, row[None])[0] for row in rows]
    for split in [None, *SPLITS.values()]:
        together = read(model, ids, split, mask)
        for row, logits in enumerate(alone):
            torch.testing.assert_close(together[row, -len(logits) :], logits, **SAME)


def read_on(model, cache, ids, seen):
    """Logits of what comes after ``seen`` tokens, token by token and in a call."""
    logits = []
    for part in ids[:, seen:].split([1] * 7 + [ids.shape[1] - seen - 7], dim=1):
        logits.append(model(part, past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, dim=1)


def from_file(cache, folder):
    return LoCoCoCache.load(cache.save(folder / "cache"))


@every_way
@every_hybrid
def test_copies_and_files_go_on_as_the_cache_does(family, config, tmp_path):
    model, ids = patched(family, config), tiny_ids(2, LENGTH)
    cache = model(ids[:, :29], use_cache=True).past_key_values
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), from_file(cache, tmp_path)]
    expected = read(model, ids)[:, 29:]
    for each in (cache, *copies):
        assert [layer.config for layer in each.layers] == [layer.config for layer in cache.layers]
        torch.testing.assert_close(read_on(model, each, ids, 29), expected, **SAME)


@every_hybrid
def test_rows_change_places_and_go(family):
    model, ids = patched(family), tiny_ids(3, LENGTH)
    cache = model(ids[:, :29], use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    expected = read(model, ids[[2, 1]])[:, 29:]
    torch.testing.assert_close(read_on(model, cache, ids[[2, 1]], 29), expected, **SAME)


@every_hybrid
@pytest.mark.parametrize("name", ["8", "per-head"])
def test_windows_of_codes(family, name):
    model, ids = patched(family, CODED[name]), tiny_ids(2, LENGTH)
    whole = read(model, ids)
    for split in SPLITS.values():
        torch.testing.assert_close(read(model, ids, split), whole, **SAME)


@every_hybrid
def test_a_window_takes_no_more_than_it_needs(family):
    """A window's tokens but the one that reads, and a block; nothing for scores, whatever ``num_slots``."""
    entries, window = {}, SIZES.get(family, WINDOW)
    for slots in (M, 4 * WINDOW):
        config = LoCoCoConfig(slots, block_size=B, gate_init=0.5, compress_windows=False)
        cache = patched(family, config)(tiny_ids(2, LENGTH), use_cache=True).past_key_values
        layer, other = cache.layers[KEPT[family]], cache.layers[1 - KEPT[family]]
        held = layer.entries
        assert held.keys.shape[1] == 2 * (window - 1 + B) and other.entries.keys.shape[1] == 2 * (slots + B)
        assert (held.scores, held.log_mass, held.features) == (None, None, None)
        entries[slots] = layer.nbytes
    assert len(set(entries.values())) == 1


def test_a_window_of_one_token():
    model, ids = build("Qwen2-half-window", sliding_window=1).double(), tiny_ids(2, LENGTH)
    full = model(ids).logits
    lococo.patch_model(model, LoCoCoConfig(LENGTH, block_size=B))
    torch.testing.assert_close(read(model, ids), full, **ROUNDED)
    torch.testing.assert_close(read(model, ids, SPLITS["mixed"]), full, **ROUNDED)


# What is in force


@every_hybrid
@pytest.mark.parametrize("short", [0, 1])
def test_slots_that_are_enough_for_a_window_hold_no_more_than_it_sees(family, short):
    slots = SIZES.get(family, WINDOW) - 1 - short
    config = LoCoCoConfig(slots, block_size=B, gate_init=0.5)
    ids = tiny_ids(2, LENGTH)
    hidden, full = of_layers(build(family).double(), ids)
    model = lococo.patch_model(build(family).double(), config)
    _, ours = of_layers(model, ids, hidden)
    layer = KEPT[family]
    assert (gap(ours[layer], full[layer]) < 1e-5) == (not short)
    entries = model(ids, use_cache=True).past_key_values.layers[layer].entries
    assert entries.keys.shape[1] == 2 * (slots + B) and (entries.scores is None) == (not short)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_knows_the_windows_that_masks_have(family):
    model = lococo.patch_model(build(family), FEW)
    cache = model(tiny_ids(1, LENGTH), use_cache=True).past_key_values
    assert patch_of(model).family.windows == tuple(layer.window for layer in cache.layers)


def test_windows_of_every_layer_are_kept_if_asked_for():
    model, ids = build("Mistral-window").double(), tiny_ids(2, LENGTH)
    full = model(ids).logits
    for compress, is_exact in ((True, False), (False, True)):
        with lococo.patched(model, dataclasses.replace(FEW, compress_windows=compress)):
            assert (gap(read(model, ids), full) < 1e-5) == is_exact


@every_hybrid
def test_windows_are_compressed_if_asked_for(family):
    ids, config = tiny_ids(2, LENGTH), dataclasses.replace(FEW, compress_windows=True)
    hidden, full = of_layers(build(family).double(), ids)
    model = patched(family, config)
    _, compressed = of_layers(model, ids, hidden)
    assert gap(compressed[KEPT[family]], full[KEPT[family]]) > 1e-3
    assert {layer.entries.keys.shape[1] for layer in model(ids, use_cache=True).past_key_values.layers} == {
        2 * (M + B)
    }


def test_saved_heads_say_it_and_load_again(tmp_path):
    ids, config = tiny_ids(2, LENGTH), opened(slots_per_head=((24, 8), None), compress_windows=False)
    model = patched("Gemma2", config)
    folder = lococo.save_heads(model, tmp_path / "heads", dtype=torch.float64)
    saved = LoCoCoConfig.from_pretrained(folder)
    assert saved == patch_of(model).config and saved.compress_windows is False
    assert "layers with a sliding window keep what it sees" in (folder / "README.md").read_text()
    loaded = lococo.patch_model(build("Gemma2").double(), heads=folder)
    assert torch.equal(read(loaded, ids), read(model, ids))


# What is refused


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "Gemma2",
            dict(slots_per_head=((16, 16), (16, 16)), compress_windows=False),
            r"gives slots to layer 0, \(16, 16\), which keeps its sliding window of 20 tokens: give None in their",
        ),
        (
            "Gemma2",
            dict(slots_per_head=(None, (16, 16))),
            "gives None for layer 0, which has a sliding window that is compressed: give the slots of its 2 KV heads",
        ),
        (
            "Gemma2",
            dict(slots_per_head=((16, 16), None), compress_windows=False),
            "gives slots to layer 0",
        ),
        (
            "Mistral-window",
            dict(slots_per_head=(None, (16, 16))),
            "gives None for layer 0, which has a sliding window that is compressed",
        ),
        (
            "Llama",
            dict(slots_per_head=((16, 16), None)),
            "gives None for layer 1, which has no sliding window: give the slots of its 2 KV heads",
        ),
        (
            "Gemma2",
            dict(compress_windows=False, slots_per_head=(None,) * 2 + ((16, 16),)),
            "is for 3 layers with 2 KV heads, the model has 2",
        ),
    ],
)
def test_slots_per_head_that_do_not_fit_the_windows_are_refused_by_name(family, changes, message):
    model = build(family)
    with pytest.raises(ValueError, match=f"slots_per_head {message}"):
        lococo.patch_model(model, opened(**changes))
    assert not lococo.is_patched(model)


def test_a_cache_of_another_window_is_refused():
    ids = tiny_ids(1, LENGTH)
    cache = patched("Qwen2-half-window")(ids[:, :29], use_cache=True).past_key_values
    other = patched("Qwen2-half-window", sliding_window=WINDOW + 3)
    with pytest.raises(ValueError, match="layer 1 .* sliding window of 20 tokens, this model's has 23"):
        other(ids[:, 29:], past_key_values=cache)
    compressed = lococo.patch_model(
        build("Qwen2-half-window").double(), dataclasses.replace(FEW, compress_windows=True)
    )
    with pytest.raises(ValueError, match="filled with compress_windows=False, .* compress_windows=True"):
        compressed(ids[:, 29:], past_key_values=cache)


def test_the_budget_of_a_kept_window_is_recents_alone():
    config = FEW.for_window(WINDOW)
    assert select.Budget.of(config, WINDOW) == (0, 0, WINDOW - 1, 0)
    compressed = dataclasses.replace(FEW, compress_windows=True)
    assert config.for_window(None) is config and compressed.for_window(WINDOW) is compressed
    assert patch_of(lococo.patch_model(tiny_llama(), FEW)).config is FEW
