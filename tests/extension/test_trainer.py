"""Extension trains what it says, with the gradients of the mathematics, in memory that does not grow."""

import dataclasses
import subprocess
import sys
import weakref
from pathlib import Path

import extension_worker
import pytest
import torch
from extension_worker import CONFIG, CONFIGS, SCALING, learned, recipe, trainer
from naive_llama import naive_gradients
from tiny import tiny_ids, tiny_llama
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, TrainerCallback

import lococo
from lococo.data.windows import Windows
from lococo.extension.adapters import checkpoint_layers, restored
from lococo.extension.extend import extended_for_training
from lococo.extension.rope_scaling import scale_positions
from lococo.extension.trainer import ExtensionTrainer
from lococo.state import HEAD

IDS = tiny_ids(2, 64, seed=1)


def away_from_zero(learner):
    """Random adapters: LoRA's second factor is zero at first, so that the first has no gradient."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return learner


class Gradients(TrainerCallback):
    """Keeps the gradients of the last step."""

    found: dict[str, torch.Tensor]

    def __init__(self, learner):
        self.learner = learner

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """See ``TrainerCallback``."""
        named = self.learner.named_parameters()
        self.found = {name: parameter.grad.clone() for name, parameter in named if parameter.requires_grad}


def gradients(learner, how, folder, ids=IDS):
    """Gradients of one training step."""
    data, kept = Windows(ids.int(), ["text"] * len(ids)), Gradients(learner)
    options = dict(max_steps=1, per_device_train_batch_size=len(ids), gradient_accumulation_steps=1, max_grad_norm=0)
    trainer(learner, how, folder, data, callbacks=[kept], **options).train()
    return kept.found


@pytest.mark.parametrize(
    "depth", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow), None]
)
@pytest.mark.parametrize("method", ["lococo", pytest.param("h2o", marks=pytest.mark.slow)])
def test_gradients_equal_the_naive_reference(method, depth, tmp_path):
    how = recipe(method, depth=depth)
    with extended_for_training(tiny_llama().double(), how) as learner:
        found = gradients(away_from_zero(learner), how, tmp_path)
    tokens = 8 * (depth or 8)
    with extended_for_training(tiny_llama().double(), how) as learner:
        model = away_from_zero(learner).base_model.model
        expected = naive_gradients(model, IDS, range(tokens, 63, tokens))
    assert len(found) == len(expected)
    for name, gradient in found.items():
        reference = expected[name.removeprefix("base_model.model.")]
        assert reference.abs().max() > 1e-7, name
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-9, msg=name)


def test_as_many_compressions_as_there_are_is_full_backpropagation(tmp_path):
    found = []
    for depth in (None, 8, 100, 7):
        how = recipe(depth=depth)
        with extended_for_training(tiny_llama().double(), how) as learner:
            found.append(gradients(away_from_zero(learner), how, tmp_path))
    whole, enough, more, less = found
    torch.testing.assert_close(enough, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(more, whole, rtol=0, atol=1e-12)
    assert any((less[name] - whole[name]).abs().max() > 1e-6 for name in whole)


def test_the_first_segment_trains_keys_and_values(tmp_path):
    how = recipe(depth=1)
    first = IDS[:, :9]  # nothing is compressed yet
    with extended_for_training(tiny_llama().double(), how) as learner:
        found = gradients(away_from_zero(learner), how, tmp_path, first)
    for name in [name for name in found if "k_proj.lora" in name or "v_proj.lora" in name]:
        assert found[name].abs().max() > 1e-6, name


@pytest.mark.parametrize("method", CONFIGS)
def test_what_is_trained_and_how_fast(method, tmp_path):
    how = recipe(method)
    with extended_for_training(tiny_llama().bfloat16(), how) as learner:
        names = learned(learner)
        kinds = ["lora_A", "lora_B", "embed_tokens", "layernorm", "model.norm"]
        kinds += [HEAD] if method == "lococo" else []
        assert {kind for kind in kinds for name in names if kind in name} == set(kinds)
        assert all(any(kind in name for kind in kinds) for name in names)
        targets = {name.split(".")[-4] for name in names if "lora_A" in name}
        assert targets == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert {value.dtype for value in names.values()} == {torch.float32}
        optimizer = trainer(learner, how, tmp_path).create_optimizer()
        rates = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
        decays = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
        for name, parameter in learner.named_parameters():
            if parameter.requires_grad:
                head_rate = 0.05 if parameter.dim() > 1 else 0.5
                assert rates[id(parameter)] == (head_rate if HEAD in name else 0.01)
                assert decays[id(parameter)] == 0.0
            else:
                assert id(parameter) not in rates


@pytest.mark.parametrize("method", CONFIGS)
def test_training_changes_what_is_trained_and_leaves_the_model_as_it_was(method, tmp_path):
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits, names = model(IDS).logits, {name for name, _ in model.named_modules()}
    config = model.config.to_dict()
    with restored(model), extended_for_training(model, recipe(method)) as learner:
        start = learned(learner)
        trainer(learner, recipe(method), tmp_path).train()
        assert all((value != start[name]).any() for name, value in learned(learner).items())
    assert {name for name, _ in model.named_modules()} == names
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert torch.equal(model(IDS).logits, logits)
    assert not model.training and not lococo.is_patched(model) and not hasattr(model, "peft_config")
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def everything_in(model):
    """What hangs on every module by name: attributes by identity, except those that are equal copies."""
    return {
        (path, name): {key: id(each) for key, each in value.items()} if isinstance(value, dict) else value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
    }


@pytest.mark.parametrize("method", CONFIGS)
def test_nothing_of_an_extension_hangs_on_a_restored_model(method, tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    model.model.layers[0].mlp.gate_proj.requires_grad_(False)
    model.model.layers[1].train()
    flags, before = [each.requires_grad for each in model.parameters()], everything_in(model)
    with pytest.raises(KeyboardInterrupt), restored(model), extended_for_training(model, recipe(method)) as learner:
        trainer(learner, recipe(method), tmp_path).train()
        checkpoint_layers(model)
        raise KeyboardInterrupt
    assert everything_in(model) == before
    assert [each.requires_grad for each in model.parameters()] == flags


def test_closed_gates_open(tmp_path):
    closed = recipe(config=dataclasses.replace(CONFIG, gate_init=0.0))
    with extended_for_training(tiny_llama(), closed) as learner:
        gates = [parameter for name, parameter in learner.named_parameters() if name.endswith(f"{HEAD}.gate")]
        assert gates and all((gate == 0).all() for gate in gates)
        trainer(learner, closed, tmp_path).train()
        assert all(gate.max() > 0.01 for gate in gates)


def test_tied_embeddings_stay_tied(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    with extended_for_training(model, recipe()) as learner:
        trainer(learner, recipe(), tmp_path).train()
        inside = learner.base_model.model
        trained = inside.get_input_embeddings().weight
        assert (trained != model.model.embed_tokens.original_module.weight).any()
        hidden = torch.randn(3, 32)
        torch.testing.assert_close(inside.lm_head(hidden), hidden @ trained.T)


# Memory


class Alive:
    """A tensor that autograd keeps for the backward."""

    def __init__(self, tensor):
        self.tensor = tensor


def most_saved(method, length, folder, depth=2):
    """The largest number of bytes that autograd keeps at the same time in a training step."""
    alive, most = weakref.WeakSet(), 0

    def pack(tensor):
        nonlocal most
        kept = Alive(tensor.detach())  # with its graph, it would hold the node that holds it
        alive.add(kept)
        most = max(most, sum(each.tensor.nbytes for each in alive))
        return kept

    how = recipe(method, depth=depth)
    watching = torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor)
    with extended_for_training(tiny_llama(), how) as learner, watching:
        gradients(learner, how, folder, tiny_ids(1, length))
    return most


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lococo", "h2o", "streaming"])
def test_memory_does_not_grow_with_the_window(method, tmp_path):
    short, long = (most_saved(method, length, tmp_path) for length in (97, 385))
    assert 0 < long <= 1.01 * short
    if method == "lococo":
        whole, longer = (most_saved(method, length, tmp_path, depth=None) for length in (97, 385))
        assert longer > 2 * whole > 2 * short


# Several processes


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    command = [sys.executable, str(Path(extension_worker.__file__))]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for method in CONFIGS:
        alone = extension_worker.run(method, tmp_path / "alone" / method, accumulation=2)
        torch.testing.assert_close(found[0][method], found[1][method], rtol=0, atol=0)
        torch.testing.assert_close(found[0][method], alone, rtol=0, atol=1e-7)


# Failures


def test_arguments_that_cannot_work_are_refused(tmp_path):
    refused = pytest.raises(ValueError, match="push_to_hub=True")
    with extended_for_training(tiny_llama(), recipe()) as learner, refused:
        trainer(learner, recipe(), tmp_path, push_to_hub=True)
    for name, value in {"gradient_checkpointing": True, "neftune_noise_alpha": 5.0}.items():
        with pytest.raises(ValueError, match=f"{name}={value} is not supported by ExtensionTrainer: "):
            ExtensionTrainer.check_supported({name: value})
    with extended_for_training(tiny_llama(), recipe("full")) as learner:
        how = recipe()
        with pytest.raises(ValueError, match="backprop_tokens is for compressed caches"):
            trainer(learner, how, tmp_path)


@pytest.mark.parametrize("method", ["lococo", "full"])
def test_divergence_names_the_parameter(method, tmp_path):
    with extended_for_training(tiny_llama(), recipe(method)) as learner:
        with torch.no_grad():
            learner.base_model.model.model.layers[1].self_attn.v_proj.lora_A["default"].weight[0, 0] = float("nan")
        with pytest.raises(FloatingPointError, match=r"step 1: .*window \d.*layers.1.*v_proj.lora_A.*not fin"):
            trainer(learner, recipe(method), tmp_path).train()


def test_stretched_positions_are_trained(tmp_path):
    plain, stretched = tiny_llama(), scale_positions(tiny_llama(), SCALING)
    for method, expected in [("full", stretched), ("streaming", plain)]:
        with extended_for_training(tiny_llama(), recipe(method)) as learner:
            found = learner.base_model.model.model.rotary_emb.inv_freq
            assert torch.equal(found, expected.model.rotary_emb.inv_freq)


def test_a_restored_model_has_its_own_configs_inside_its_config():
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=8, **sizes)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=tiny_llama().config, image_token_index=1)
    )
    decoder = model.model.language_model
    assert model.config.text_config is decoder.config
    before = decoder.config.to_dict()
    with restored(model):
        scale_positions(model, SCALING)
    assert model.config.text_config is decoder.config
    assert decoder.config.to_dict() == before
