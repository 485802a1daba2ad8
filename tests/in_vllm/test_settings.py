"""What layers compute with, of a server's model: from a small one of the same shape."""

import pytest
import torch
from families import FAMILIES, build
from tiny import patched_llama

import lococo
from lococo import LoCoCoConfig
from lococo.state import patch_of
from lococo.vllm.settings import Settings, skeleton

WINDOWED = ("Mistral-window", "Qwen2-half-window", "Qwen2-half-narrow", "Gemma2", "Gemma3")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in WINDOWED])
def test_layers_are_those_of_the_model(family, tmp_path):
    """The same heads, networks and rotation, from a config that knows no weights."""
    model = build(family)
    config = LoCoCoConfig(12, block_size=4, num_heavy=4, score="learned", compressor="centroids")
    torch.manual_seed(0)
    patch = patch_of(lococo.patch_model(model, config))
    for network in patch.networks.values():
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter)
    heads = str(lococo.save_heads(model, tmp_path / "heads", dtype=None))
    made = Settings.of({"heads": heads}).modules(model.config, torch.float32)
    keys, values = torch.randn(2, 3, patch.family.shape["num_kv_heads"], 5, patch.family.shape["head_dim"])
    positions = torch.arange(40, 45)[None]
    assert made.keys() == patch.layers.keys()
    for index, modules in made.items():
        assert torch.equal(modules.network(keys, values), patch.networks[index](keys, values))
        assert torch.equal(modules.head.log_scale, patch.heads[index].log_scale)
        rotary = patch.rotary_tables[index]
        assert (modules.rotary is None) == (rotary is None)
        if rotary is not None:
            turned = modules.rotary.rotate(keys, positions, inverse=True)
            torch.testing.assert_close(turned, rotary.rotate(keys, positions, inverse=True))
    small = sum(parameter.numel() for parameter in skeleton(model.config, torch.float32).parameters())
    assert small < sum(parameter.numel() for parameter in model.parameters())


def test_options_of_a_command_line_become_a_config(tmp_path):
    assert Settings.of({"num_slots": 64, "slot_bits": [8, 4]}).config == LoCoCoConfig(64, slot_bits=(8, 4))
    heads = str(lococo.save_heads(patched_llama(LoCoCoConfig(12, block_size=4)), tmp_path / "heads"))
    assert Settings.of({"heads": heads}) == Settings(LoCoCoConfig(12, block_size=4), heads)
    assert Settings.of({"heads": heads, "slot_bits": 8}).config.bits == (8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (None, "LoCoCo needs to know its slots"),
        ({}, "LoCoCo needs to know its slots"),
        ([], "LoCoCo needs to know its slots"),
        ({"heads": None}, "LoCoCo needs to know its slots"),
        ({"heads": None, "num_slots": None}, "LoCoCo needs to know its slots"),
        ({"slots": 3, "num_slots": 4}, "has slots: known are heads, "),
        ({"heads": "x", "num_slots": 4}, "has num_slots: beside heads there may be slot_bits alone"),
        ({"num_slots": 4, "positions": "slot"}, "positions must be 'absolute'"),
        ({"num_slots": 4, "decode_block_size": 2}, "decode_block_size=2 must be left out"),
        ({"num_slots": "4"}, "num_slots must be an integer"),
        ({"num_slots": 4, "slot_bits": 5}, "slot_bits must be 16, 8 or 4"),
    ],
)
def test_options_that_are_wrong_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Settings.of(options)
