import dataclasses
import json

import pytest
from configs import CODED, CONFIGS

from lococo.compression.base import COMPRESSORS
from lococo.compression.scores import SCORES
from lococo.config import CONFIG_NAME, LoCoCoConfig

REGISTERED = {"score": set(SCORES), "compressor": set(COMPRESSORS)}  # before a test adds its own

PRESETS = [LoCoCoConfig, LoCoCoConfig.paper, LoCoCoConfig.reference, LoCoCoConfig.h2o, LoCoCoConfig.streaming_llm]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("num_slots", [1, 2, 5, 7, 128, 512])
def test_every_budget_adds_up(preset, num_slots):
    config = preset(num_slots)
    parts = (config.num_sinks, config.num_heavy, config.num_recent, config.num_fused)
    assert sum(parts) == num_slots
    assert min(parts) >= 0


def test_presets_are_what_they_are_named_after():
    paper, reference = LoCoCoConfig.paper(128), LoCoCoConfig.reference(128)
    assert (paper.num_fused, paper.normalization, paper.residual) == (128, "sum", "none")
    assert (reference.num_heavy, reference.num_fused, reference.score) == (64, 64, "last")
    assert (reference.normalization, reference.residual, reference.gate_init) == ("softmax", "layer", 0.5)
    h2o, streaming = LoCoCoConfig.h2o(128), LoCoCoConfig.streaming_llm(128)
    assert (h2o.num_heavy, h2o.num_recent, h2o.score) == (64, 64, "sum")
    assert (streaming.num_sinks, streaming.num_recent, streaming.positions) == (4, 124, "slot")


def test_default_has_a_closed_gate_and_fused_slots():
    config = LoCoCoConfig(128)
    assert config.gate_init == 0 and config.num_fused > 0 and config.score == "distant"


@pytest.mark.parametrize("preset", [LoCoCoConfig.paper, LoCoCoConfig.h2o, LoCoCoConfig.streaming_llm])
def test_presets_take_overrides(preset):
    assert preset(64, block_size=32, kernel_size=3).kernel_size == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_slots": 0}, "num_slots must be an integer of at least 1, got 0"),
        ({"num_slots": 12.5}, "got 12.5"),
        ({"num_slots": True}, "got True"),
        ({"block_size": 0}, "block_size must be an integer of at least 1, got 0"),
        ({"kernel_size": 20}, "kernel_size must be odd .* got 20"),
        ({"num_sinks": -1}, "num_sinks must be an integer of at least 0, got -1"),
        (
            {"num_slots": 16, "num_sinks": 8, "num_heavy": 8, "num_recent": 8},
            r"num_sinks=8 \+ num_heavy=8 \+ num_recent=8 = 24 must not exceed num_slots=16",
        ),
        ({"head_rank": 0}, "head_rank must be an integer of at least 1, got 0"),
        ({"decode_block_size": 99, "block_size": 8}, "must not exceed block_size=8, got 99"),
        ({"normalization": "l2"}, "normalization must be one of sum, softmax, got 'l2'"),
        ({"residual": "yes"}, "residual must be one of"),
        ({"positions": "relative"}, "positions must be one of absolute, slot, got 'relative'"),
        ({"score": "max"}, "score must be one of"),
        ({"gate_init": 1.5}, "gate_init must lie between 0 and 1, got 1.5"),
        ({"gate_init": "a"}, "gate_init must lie between 0 and 1, got 'a'"),
        ({"gate_init": True}, "gate_init must lie between 0 and 1, got True"),
        ({"gate_init": float("nan")}, "gate_init must lie between 0 and 1, got nan"),
        ({"init_std": 0.0}, "init_std must be positive and finite, got 0.0"),
        ({"init_std": "a"}, "init_std must be positive and finite, got 'a'"),
        ({"init_std": float("inf")}, "init_std must be positive and finite, got inf"),
        ({"score": [1]}, r"score must be one of distant, .*, got \[1\]"),
        ({"compressor": None}, "compressor must be one of conv, centroids, got None"),
        ({"mass_bias": "no"}, "mass_bias must be True or False, got 'no'"),
        ({"mass_bias": 0}, "mass_bias must be True or False, got 0"),
        ({"slots_per_head": 16}, "slots_per_head must give the slots of every KV head, layer by layer, got 16"),
        ({"slots_per_head": (16,)}, r"slots_per_head must give the slots of every KV head, .*, got \(16,\)"),
        ({"num_slots": 16, "num_sinks": 17}, "does not add up: num_sinks=17 must not exceed num_slots=16"),
        ({"num_slots": 16, "num_recent": 17}, "does not add up: num_recent=17 must not exceed num_slots=16"),
        ({"num_slots": 16, "num_heavy": 17}, "does not add up: num_heavy=17 must not exceed num_slots=16"),
        ({"num_slots": 16, "num_sinks": 9, "num_heavy": 8}, r"num_sinks=9 \+ num_heavy=8 = 17 must not exceed"),
        ({"num_slots": 16, "num_heavy": "8"}, "num_heavy must be an integer of at least 0, got '8'"),
        ({"slots_per_head": ((8, 8), (8, 9)), "num_slots": 8}, "must not exceed num_slots=8 on average, got 8.25"),
        ({"slots_per_head": ((8, 0),)}, "every number in slots_per_head must be an integer of at least 1, got 0"),
        ({"slots_per_head": ((8,), ())}, "at least one KV head in every layer"),
        ({"slots_per_head": (None, None)}, "at least one KV head in every layer, got an empty layer or none"),
        ({"slots_per_head": ((8, 9), None), "num_slots": 8}, "=8 on average, got 8.50 over 2 KV heads"),
        ({"compress_windows": 1}, "compress_windows must be True or False, got 1"),
        ({"compress_windows": "no"}, "compress_windows must be True or False, got 'no'"),
        (
            {"compress_windows": False, "positions": "slot"},
            "compress_windows=False needs positions='absolute': places in the cache differ from layer to layer",
        ),
        ({"slots_per_head": ((8,),), "positions": "slot"}, "slots_per_head needs positions='absolute'"),
    ],
)
def test_bad_values_are_named_with_the_rule(values, message):
    with pytest.raises(ValueError, match=message):
        LoCoCoConfig(**values)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("num_slots", ["16", None, 0, 7.5], ids=repr)
def test_presets_refuse_numbers_of_slots_by_name(preset, num_slots):
    with pytest.raises(ValueError, match=f"num_slots must be an integer of at least 1, got {num_slots!r}"):
        preset(num_slots)


@pytest.mark.parametrize("preset", [LoCoCoConfig, LoCoCoConfig.paper, LoCoCoConfig.streaming_llm])
def test_presets_name_the_part_that_is_too_large(preset):
    with pytest.raises(ValueError, match=r"does not add up: num_sinks=20 .*must not exceed num_slots=16"):
        preset(16, num_sinks=20)
    with pytest.raises(ValueError, match="num_sinks must be an integer of at least 0, got '4'"):
        preset(16, num_sinks="4")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("num_slots", [1, 3, 5, 16, 47, 128, 700])
def test_other_slots_are_shared_out_in_the_same_proportions(preset, num_slots):
    config = preset(128)
    other = config.with_slots(num_slots)
    kinds = ("num_sinks", "num_heavy", "num_recent", "num_fused")
    parts = [getattr(other, kind) for kind in kinds]
    assert sum(parts) == other.num_slots == num_slots and min(parts) >= 0
    for kind, part in zip(kinds[1:], parts[1:], strict=True):
        assert abs(part - getattr(config, kind) * num_slots / 128) <= 4 + num_slots / 32
        assert getattr(config, kind) or not part, "a kind the preset does not have"
    assert config.with_slots(128) == config


@pytest.mark.parametrize("others", [[], [None, None]], ids=["every layer", "some keep their window"])
def test_slots_per_head_come_back_from_json(others, tmp_path):
    config = LoCoCoConfig(8, slots_per_head=[[4, 12], [8, 7], *others])
    config.save_pretrained(tmp_path)
    assert LoCoCoConfig.from_pretrained(tmp_path) == config
    assert config.slots_per_head == ((4, 12), (8, 7), *others)
    assert [head.num_slots for head in config.layer_configs(1)] == [8, 7]


def test_configs_of_earlier_versions_compress_windows():
    values = LoCoCoConfig(8, compress_windows=False).to_dict()
    assert LoCoCoConfig.from_dict(values).compress_windows is False
    del values["compress_windows"]
    assert LoCoCoConfig.from_dict(values) == LoCoCoConfig(8)


@pytest.mark.parametrize("option", [{"attention": "eager"}, {"prefill_chunk_size": 512}], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_options_of_the_patch_are_told_from_the_method(preset, option):
    name, value = next(iter(option.items()))
    message = rf"has no {name}: it is an option of lococo.patch_model\(model, config, {name}={value!r}\)"
    with pytest.raises(TypeError, match=message):
        preset(16, **option)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("attention", ["auto", "of a later version"])
def test_a_file_of_today_with_options_of_the_patch_loads(tmp_path, attention):
    config = LoCoCoConfig(16, block_size=8)
    values = {**config.to_dict(), "attention": attention, "prefill_chunk_size": 512}
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"config": values}))
    assert LoCoCoConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(LoCoCoConfig)])
def test_the_matrix_of_all_laws_has_every_field_and_choice(field):
    found = {getattr(config, field) for config in (*CONFIGS.values(), *CODED.values())}
    assert found >= REGISTERED[field] if field in REGISTERED else len(found) > 1, f"tests/configs.py lacks a {field}"


def test_unknown_keyword_is_an_error():
    with pytest.raises(TypeError, match="num_slot"):
        LoCoCoConfig(num_slot=3)


@pytest.mark.parametrize("preset", PRESETS)
def test_saved_config_loads_equal(preset, tmp_path):
    config = preset(48, block_size=16)
    config.save_pretrained(tmp_path)
    assert LoCoCoConfig.from_pretrained(tmp_path) == config
    assert list(tmp_path.iterdir()) == [tmp_path / CONFIG_NAME]


def test_unknown_fields_in_a_file_warn_and_are_left_out(tmp_path):
    content = {"config": {**LoCoCoConfig(32).to_dict(), "from_the_future": 1}}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert LoCoCoConfig.from_pretrained(tmp_path) == LoCoCoConfig(32)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"config": 3}'])
def test_broken_config_file_is_named(tmp_path, text):
    (tmp_path / CONFIG_NAME).write_text(text)
    with pytest.raises(ValueError, match=CONFIG_NAME):
        LoCoCoConfig.from_pretrained(tmp_path)


def test_missing_config_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="save_heads"):
        LoCoCoConfig.from_pretrained(tmp_path)
