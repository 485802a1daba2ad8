"""A patched model goes through whatever people put around models, and says the same afterwards."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama
from wrapped import CONFIG, IDS, LEARNED, SLOT_POSITIONS, assert_equal, environment, head_values, logits, patched

import lococo
from lococo.state import patch_of

PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


# Copies


@pytest.mark.parametrize("unpatched", ["original", "copy"])
def test_deepcopy_is_patched_by_itself(unpatched, full, compressed):
    pair = {"original": patched(tiny_llama())}
    pair["copy"] = copy.deepcopy(pair["original"])
    assert_equal(logits(pair["copy"]), compressed, atol=0)
    lococo.unpatch_model(pair[unpatched])
    assert_equal(logits(pair.pop(unpatched)), full, atol=0)
    assert_equal(logits(*pair.values()), compressed, atol=0)


def test_deepcopy_has_heads_of_its_own(compressed):
    model = patched(tiny_llama())
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        for head in patch_of(duplicate).heads.values():
            head.gate.zero_()
    assert_equal(logits(model), compressed, atol=0)
    selection = logits(patched(tiny_llama(), dataclasses.replace(CONFIG, gate_init=0.0)))
    assert_equal(logits(duplicate), selection)


FRESH_PROCESS = """
import sys
import torch

model, ids = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    compressed = model(input_ids=ids).logits
    import lococo

    full = lococo.unpatch_model(model)(input_ids=ids).logits
torch.save((compressed, full), sys.argv[2])
"""


@pytest.mark.slow
def test_torch_save_of_the_whole_model_loads_in_a_fresh_process(tmp_path, full, compressed):
    torch.save((patched(tiny_llama()), IDS), tmp_path / "model.pt")
    command = [sys.executable, "-c", FRESH_PROCESS, tmp_path / "model.pt", tmp_path / "logits.pt"]
    subprocess.run(command, check=True, timeout=100, env=environment())
    loaded_compressed, loaded_full = torch.load(tmp_path / "logits.pt")
    assert_equal(loaded_compressed, compressed)
    assert_equal(loaded_full, full)


# Accelerate


class Counter(ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("part", ["", "model", "model.layers.0", "model.layers.1.self_attn"])
@pytest.mark.parametrize("first", ["patch", "hook"])
@pytest.mark.parametrize("first_undone", ["patch", "hook"])
def test_accelerate_hooks_come_and_go(part, first, first_undone, full, compressed):
    model, counter = tiny_llama(), Counter()
    module = model.get_submodule(part)
    do = {"patch": lambda: patched(model), "hook": lambda: add_hook_to_module(module, counter)}
    undo = {"patch": lambda: lococo.unpatch_model(model), "hook": lambda: remove_hook_from_module(module)}
    do.pop(first)()
    do.popitem()[1]()
    assert_equal(logits(model), compressed, atol=0)
    undo.pop(first_undone)()
    assert_equal(logits(model), compressed if first_undone == "hook" else full, atol=0)
    undo.popitem()[1]()
    assert_equal(logits(model), full, atol=0)
    assert counter.calls == (1 if first_undone == "hook" else 2)


def spread(model, folder):
    """One layer in memory, one on disk."""
    return dispatch_model(
        model, {part: "disk" if part == "model.layers.1" else "cpu" for part in PARTS}, offload_dir=folder
    )


def offload(model, folder):
    return cpu_offload(model, torch.device("cpu"))


@pytest.mark.parametrize("place", [spread, offload])
@pytest.mark.parametrize("first", ["patch", "place"])
@pytest.mark.parametrize("config", [CONFIG, SLOT_POSITIONS, LEARNED], ids=["absolute", "slot", "learned"])
def test_offloaded_weights_give_the_same_logits(place, first, config, tmp_path):
    expected = patched(tiny_llama(), config)
    if first == "patch":
        model = place(patched(tiny_llama(), config), tmp_path)
    else:
        model = patched(place(tiny_llama(), tmp_path), config)
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    assert_equal(logits(model), logits(expected), atol=0)
    with_gradients = model(input_ids=IDS).logits.detach()
    assert_equal(with_gradients, expected(input_ids=IDS).logits.detach(), atol=0)
    assert_equal(with_gradients, logits(expected))
    options = dict(max_new_tokens=12, do_sample=False)
    assert model.generate(IDS, **options).tolist() == expected.generate(IDS, **options).tolist()


@pytest.mark.parametrize("config", [CONFIG, SLOT_POSITIONS], ids=["absolute", "slot"])
@pytest.mark.parametrize("padding", [0, 5])
def test_layers_on_another_device_use_nothing_of_the_first(config, padding):
    model = patched(tiny_llama(), config)
    for part in ("model.layers.1", "model.norm", "lm_head"):
        module = model.get_submodule(part).to("meta")
        module.register_forward_pre_hook(to_meta, with_kwargs=True)
    mask = torch.ones_like(IDS)
    mask[1, :padding] = 0
    cache = None
    for ids in (IDS[:, :40], IDS[:, 40:]):
        output = model(input_ids=ids, attention_mask=mask[:, : 40 if cache is None else 64], past_key_values=cache)
        cache = output.past_key_values
    assert output.logits.is_meta
    assert output.logits.shape == (2, 24, 64)
    assert [layer.buffers()[0].device.type for layer in cache.layers] == ["cpu", "meta"]


def to_meta(module, args, kwargs):
    def move(value):
        if isinstance(value, tuple):
            return tuple(map(move, value))
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    return move(args), {name: move(value) for name, value in kwargs.items()}


# PEFT


def with_lora(model, **options):
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    return get_peft_model(model, config).eval()


@pytest.fixture(scope="module")
def adapted(compressed):
    """Logits of a patched model whose weights hold the LoRA update, with no PEFT around it."""
    result = logits(patched(with_lora(tiny_llama()).merge_and_unload()))
    assert (result - compressed).abs().max() > 1
    return result


def test_lora_before_patching(adapted):
    model = patched(with_lora(tiny_llama()))
    assert_equal(logits(model), adapted)
    lococo.unpatch_model(model)
    assert_equal(logits(model), logits(with_lora(tiny_llama())), atol=0)


@pytest.mark.parametrize("modules_to_save", [None, ["lococo_head"]])
def test_lora_after_patching(modules_to_save, adapted, compressed):
    model = with_lora(patched(tiny_llama()), modules_to_save=modules_to_save)
    assert_equal(logits(model), adapted)
    with model.disable_adapter():
        assert_equal(logits(model), compressed, atol=0)
    lococo.unpatch_model(model)
    assert_equal(logits(model), logits(with_lora(tiny_llama())), atol=0)


def sgd_step(model):
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5).step()
    model.zero_grad()
    return model.eval()


def test_heads_in_modules_to_save_train_and_travel_with_the_adapter(tmp_path, adapted):
    model = with_lora(patched(tiny_llama()), modules_to_save=["lococo_head"])
    trained = logits(sgd_step(model))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(patched(tiny_llama()), tmp_path / "adapter")
    assert_equal(logits(loaded), trained, atol=0)
    lococo.save_heads(model, tmp_path / "heads")
    merged = model.merge_and_unload()
    assert_equal(logits(merged), trained)
    assert not any(map(torch.equal, head_values(merged), head_values(patched(tiny_llama()))))
    untrained = patched(tiny_llama())
    lococo.load_heads(untrained, tmp_path / "heads")
    assert all(map(torch.equal, head_values(untrained), head_values(merged)))


def test_without_modules_to_save_peft_freezes_the_heads(adapted):
    model = with_lora(patched(tiny_llama()))
    before = head_values(model)
    assert (logits(sgd_step(model)) - adapted).abs().max() > 0.1
    assert not any(
        parameter.requires_grad for head in patch_of(model).heads.values() for parameter in head.parameters()
    )
    assert all(map(torch.equal, head_values(model), before))
