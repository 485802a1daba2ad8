"""Bytes of caches by layer and KV head, and as many slots as fit into those of another."""

import dataclasses
import itertools

import pytest
import torch
from tiny import SIZES, patched_llama, tiny_llama
from transformers import MistralConfig, MistralForCausalLM

import lococo
from lococo import LoCoCoConfig
from lococo.evaluation.equal_bytes import bytes_per_head, plan_equal_bytes
from lococo.methods import Run, method_config

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 8


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture
def heads(tmp_path):
    torch.manual_seed(0)
    config = LoCoCoConfig(12, block_size=4, score="learned", slots_per_head=((6, 18), (12, 12)), slot_bits=8)
    return str(lococo.save_heads(patched_llama(config), tmp_path / "mine"))


def test_bytes_are_those_of_the_cache_that_has_read_a_text(model):
    ids = torch.randint(0, model.config.vocab_size, (1, 50))
    for config in (None, LoCoCoConfig.h2o(16, block_size=8), LoCoCoConfig(16, block_size=8, slot_bits=(8, 4))):
        run = Run("any", config)
        with torch.no_grad(), run.applied(model):
            cache = model(ids, use_cache=True).past_key_values
        held = lococo.generation.cache_bytes(cache)
        assert bytes_per_head(model, run, 50) == round(held / (LAYERS * KV_HEADS))
    assert bytes_per_head(model, Run("full", None), 50) == 50 * 2 * HEAD_DIM * 4
    assert not lococo.is_patched(model)


def test_every_run_has_the_most_slots_that_fit(model, heads):
    methods = ["full", "streaming", "h2o", "h2o-slot", "lococo-uncalibrated"]
    runs = plan_equal_bytes(model, "h2o:24", methods, [8, 4], [heads], ["16", "8", "8-4"])
    by_name = {run.name: run for run in runs}
    assert len(by_name) == len(runs)
    most = bytes_per_head(model, Run("h2o", method_config("h2o", 24, 8)))
    for name in ("h2o", "h2o-slot"):  # what the gap ratio relates to
        assert by_name[name].config == method_config(name, 24, 8)
    assert {run.reference_slots for run in runs} == {24}
    fitted = set(by_name) - {"full", "h2o", "h2o-slot", "lococo-8", "lococo-8-4", "lococo"}
    names = itertools.product(methods[1:], ("", "-b4"), ("", "-8", "-8-4"))
    wanted = set(map("".join, names))
    assert fitted == wanted - {"h2o", "h2o-slot"}
    for name in fitted:
        run = by_name[name]
        assert run.config.block_size == (4 if "-b4" in name else 8)
        more = dataclasses.replace(run, config=run.config.with_slots(run.num_slots + 1))
        assert bytes_per_head(model, run) <= most < bytes_per_head(model, more)
    assert by_name["h2o-8"].num_slots > 24 and by_name["h2o-b4"].num_slots > 24
    assert by_name["h2o-8-4"].num_slots > by_name["h2o-8"].num_slots


def test_heads_are_compared_in_the_formats_in_which_they_fit(model, heads):
    def names(reference, *bits):
        return [run.name for run in plan_equal_bytes(model, reference, ["h2o"], [8], [heads], bits) if run.heads]

    assert names("h2o:12") == ["lococo-8"], "as they were trained"
    assert names("h2o:100", "16", "8") == ["lococo", "lococo-8"]
    assert names("h2o:6", "16", "8") == ["lococo-8"]
    with pytest.raises(ValueError, match=r"h2o:1 takes \d+ bytes by layer and KV head, .*mine \d[\d,]*"):
        names("h2o:1", "16")


def test_where_every_layer_keeps_its_window_more_slots_take_no_more_bytes():
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=32)).eval()
    for reference in ("h2o:24", "h2o:64"):  # 64: itself no less than the window
        by_name = {run.name: run for run in plan_equal_bytes(model, reference, ["full", "h2o"], [8], (), ["16", "8"])}
        most = bytes_per_head(model, by_name["h2o"])
        assert by_name["h2o-8"].num_slots >= 31 and bytes_per_head(model, by_name["h2o-8"]) <= most


@pytest.mark.parametrize("reference", ["h2o", "h2o:", "h2o:0", "h2o:x", "full:3", "full", "h2o:-2"])
def test_references_that_are_none_are_refused(model, reference):
    with pytest.raises(ValueError, match="a cache of as many bytes is METHOD:M, h2o:128 for instance, got"):
        plan_equal_bytes(model, reference, ["h2o"], [8])


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(ValueError, match="h2o-b64 does not fit into .* bytes by layer and KV head with blocks of 64"):
        plan_equal_bytes(model, "h2o:4", ["h2o"], [8, 64])
    with pytest.raises(ValueError, match="unknown method 'h3o'"):
        plan_equal_bytes(model, "h2o:4", ["h3o"], [8])
