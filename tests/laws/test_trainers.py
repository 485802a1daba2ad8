"""Trainers of others, and processes side by side, have the gradients of a plain backward."""

import dataclasses
import subprocess
import sys
from functools import partial

import distributed_worker
import pytest
import torch
from tiny import tiny_llama
from torch.utils.checkpoint import checkpoint
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from wrapped import CONFIG, IDS, assert_equal, environment, logits, patched

import lococo
from lococo.state import patch_of


def gradients(model):
    return {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def freeze_base(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lococo_head" in name)


def checkpointing(use_reentrant):
    """Arguments of ``TrainingArguments``, whose name changes with Transformers 6."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": use_reentrant}}


class GradientKeeper(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = gradients(model)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("trained", ["everything", "heads"])
def test_trainer_with_checkpointing_has_the_gradients_of_a_plain_backward(use_reentrant, trained, tmp_path):
    labels = IDS.clone()
    labels[:, 0] = -100  # has no prediction; some Trainer versions would count it
    models = [patched(tiny_llama()) for _ in range(2)]
    layer_calls = []
    for model in models:
        if trained == "heads":
            freeze_base(model)
            model.enable_input_require_grads()
    models[0].train()(input_ids=IDS, labels=labels).loss.backward()
    models[1].model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda *_: layer_calls.append(1))
    keeper = GradientKeeper()
    Trainer(
        model=models[1],
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            max_grad_norm=0,
            **checkpointing(use_reentrant),
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[dict(input_ids=row, labels=label) for row, label in zip(IDS, labels, strict=True)],
        callbacks=[keeper],
    ).train()
    expected = gradients(models[0])
    assert len(layer_calls) == 2  # forward, and again in backward
    assert keeper.gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradient is None) == (trained == "heads" and "lococo_head" not in name), name
        if gradient is not None:
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(keeper.gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_reads_a_given_cache_no_second_time(use_reentrant):
    losses, kept = [], []
    for checkpoints in (False, True):
        model = patched(tiny_llama()).train()
        if checkpoints:
            model._set_gradient_checkpointing(
                gradient_checkpointing_func=partial(checkpoint, use_reentrant=use_reentrant)
            )
        cache = lococo.LoCoCoCache(CONFIG, 2) if checkpoints else None
        losses.append(model(input_ids=IDS, labels=IDS, past_key_values=cache).loss)
        losses[-1].backward()
        kept.append(gradients(model))
    assert_equal(*losses)
    for name, gradient in kept[0].items():
        torch.testing.assert_close(kept[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_training_without_a_cache_leaves_none_behind():
    model = patched(tiny_llama()).train()
    assert model(input_ids=IDS, use_cache=False).past_key_values is None
    model.config.use_cache = False  # as Transformers' Trainer sets it
    assert model(input_ids=IDS).past_key_values is None


@pytest.mark.parametrize("length", [12, 16, 64])
def test_every_head_parameter_has_a_gradient_whatever_the_length(length):
    model = patched(tiny_llama()).train()
    ids = IDS[:, :length]
    model(input_ids=ids, labels=ids).loss.backward()
    for head in patch_of(model).heads.values():
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None, name
            assert (parameter.grad.abs().max() > 0) == (length > CONFIG.capacity), name


def test_heads_of_sliding_window_layers_have_a_gradient_too():
    sizes = tiny_llama().config.to_dict()
    sizes = {name: sizes[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")}
    model = MistralForCausalLM(MistralConfig(**sizes, num_hidden_layers=2, intermediate_size=48, sliding_window=8))
    patched(model).train()(input_ids=IDS, labels=IDS).loss.backward()
    assert patch_of(model).heads
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_short_text_trains_in_half_precision_with_heads_whose_sum_overflows():
    model = patched(tiny_llama()).half()
    with torch.no_grad():
        for head in patch_of(model).heads.values():
            head.conv.weight.fill_(500.0)
            assert head.conv.weight.sum().isinf()
    assert model(input_ids=IDS[:, :12]).logits.isfinite().all()


def test_gates_opened_by_training_are_seen_though_address_and_version_stay():
    model = patched(tiny_llama(), dataclasses.replace(CONFIG, gate_init=0.0))
    closed = logits(model)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    gates = [head.gate for head in patch_of(model).heads.values()]
    # As FSDP does it: the gathered weights change under a version counter that is put back.
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(gates)):
        for gate in gates:
            gate.fill_(CONFIG.gate_init)
    opened = logits(model.eval())
    assert (opened - closed).abs().max() > 0.1
    assert_equal(opened, logits(patched(tiny_llama())))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Results of the two processes of ``distributed_worker``."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, distributed_worker.__file__]
    workers = [subprocess.Popen([*command, str(rank), folder], env=environment()) for rank in range(2)]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("gate_init", distributed_worker.GATES)
@pytest.mark.parametrize("strategy", distributed_worker.STRATEGIES)
def test_two_processes_train_like_one(strategy, gate_init, two_processes):
    model = distributed_worker.make_model(gate_init)
    start = distributed_worker.parameters(model)
    expected = distributed_worker.train(model, ranks=[0, 1])
    parameters = distributed_worker.parameters(model)
    assert all((parameters[name] - start[name]).abs().max() > 1e-6 for name in start)
    results = [result[strategy, gate_init] for result in two_processes]
    assert_equal(sum(result["losses"] for result in results) / 2, expected["losses"])
    for result in results:
        assert_equal(result["before"], expected["before"])
        assert_equal(result["after"], expected["after"], atol=1e-4)
        assert result["parameters"].keys() == parameters.keys()
        for name, value in parameters.items():
            assert_equal(result["parameters"][name], value, atol=1e-6)
