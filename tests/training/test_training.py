"""End-to-end training changes the heads as the mathematics says, and nothing else."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch
import training_worker
from peft import LoraConfig, get_peft_model
from tiny import tiny_ids, tiny_llama
from training_worker import CONFIG, IDS, assert_same, head_trainer, heads, logits, patched_tiny, windows
from transformers import TrainerCallback

import lococo
from lococo.state import patch_of
from lococo.training.frozen import checksums, only_heads_learn
from lococo.training.objectives import Distill, NextToken, WindowLoss
from lococo.training.window_trainer import DEEPSPEED_ZERO2, GatesWithinReach, last_checkpoint


class Callback(TrainerCallback):
    """Does something after every step."""

    def __init__(self, on_step_end):
        self.do = on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        self.do(state, control)


@pytest.mark.parametrize("objective", [NextToken(), Distill(backprop_tokens=20)])
def test_only_heads_change_and_everything_is_put_back(objective, tmp_path):
    model = patched_tiny(attention_dropout=0.5).train()
    model.model.layers[0].mlp.eval()
    model.model.layers[1].mlp.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    expected = WindowLoss(patched_tiny(), objective)(windows(1)[0]["input_ids"][None]).mean().item()
    trainer = head_trainer(model, tmp_path, objective, windows(1), logging_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-3)  # no dropout
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lococo_head" not in name), name
        assert parameter.grad is None
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache


def test_a_changed_base_model_stops_the_run(tmp_path):
    model = patched_tiny()
    weight = model.model.norm.weight

    def touch(state, control):
        weight.data[3] = torch.nextafter(weight[3], weight[3] + 1)

    with pytest.raises(RuntimeError, match=r"changed the base model: model\.norm\.weight$"):
        head_trainer(model, tmp_path, NextToken(), callbacks=[Callback(touch)]).train()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_checksums_see_one_bit_and_the_order(dtype):
    model = patched_tiny(dtype=dtype)
    before = checksums(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data[torch.tensor([1, 0, *range(2, len(weight))])]
    model.lm_head.weight.data[5, 5] *= -1
    after = checksums(model)
    changed = [name for name in before if before[name] != after[name]]
    assert changed == ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
    assert not any("lococo_head" in name for name in before)


def test_scalars_have_a_learning_rate_of_their_own_and_no_decay(tmp_path):
    model = patched_tiny(dataclasses.replace(CONFIG, head_rank=4))
    trainer = head_trainer(model, tmp_path, NextToken(), scalar_lr_factor=10.0, weight_decay=0.1)
    with only_heads_learn(model):
        optimizer = trainer.create_optimizer()
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for head in patch_of(model).heads.values():
        for name, parameter in head.named_parameters():
            is_kernel = name in ("conv.weight", "expand.weight")
            group = groups.pop(parameter)
            assert (group["lr"], group["weight_decay"]) == pytest.approx((0.05, 0.1) if is_kernel else (0.5, 0.0))
    assert not groups


def test_closed_gates_open_and_stay_within_reach(tmp_path):
    model = patched_tiny(dataclasses.replace(CONFIG, gate_init=0.0))
    with torch.no_grad():
        patch_of(model).heads[0].gate[0] = -0.5
    trainer = head_trainer(model, tmp_path, Distill(), max_steps=4, learning_rate=0.01)
    trainer.train()
    gates = torch.stack([head.gate for head in patch_of(model).heads.values()])
    assert gates.max() > 0.005
    assert gates.min() == 0


def test_gates_that_deepspeed_keeps_copies_of_are_moved_there_too(monkeypatch):
    model, copies = patched_tiny(), []
    utilities = types.ModuleType("deepspeed.utils")
    utilities.safe_set_full_fp32_param = lambda gate, value: copies.append((gate, value.clone()))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", utilities)
    gate = patch_of(model).heads[1].gate
    gate._hp_mapping = object()  # how DeepSpeed marks them
    with torch.no_grad():
        gate[0] = 1.5
    GatesWithinReach(patch_of(model)).on_step_end()
    ((moved, value),) = copies
    assert moved is gate and value[0] == 1 and torch.equal(value, gate)


def test_heads_with_budgets_of_their_own_train_too(tmp_path):
    config = lococo.LoCoCoConfig(16, block_size=8, slots_per_head=((24, 8), (6, 26)))
    model = patched_tiny(config)
    before = heads(model)
    assert all((head.gate == 0).all() for head in patch_of(model).heads.values())
    head_trainer(model, tmp_path, Distill(backprop_tokens=30)).train()
    assert all((value - before[name]).abs().max() > 1e-4 for name, value in heads(model).items())


def repetitive(count):
    """Windows that repeat sixteen tokens, each from another place on."""
    period = torch.randperm(16, generator=torch.Generator().manual_seed(0)) + 1
    dataset = windows(count, 96)
    dataset.ids = torch.stack([period.roll(index).repeat(6) for index in range(count)]).int()
    return dataset


@pytest.mark.parametrize("objective", [NextToken(), Distill(backprop_tokens=20)])
def test_closed_gates_of_layers_open(objective, tmp_path):
    model = patched_tiny(dataclasses.replace(CONFIG, gate_init=0.0, residual="layer"), torch.float32)
    head_trainer(model, tmp_path, objective, repetitive(8), max_steps=6).train()
    assert all(head.gate > 1e-3 for head in patch_of(model).heads.values())


def test_divergence_falls_on_a_repetitive_text(tmp_path):
    model = patched_tiny(dataclasses.replace(CONFIG, gate_init=0.1), torch.float32)
    dataset = repetitive(8)
    trainer = head_trainer(model, tmp_path, Distill(), dataset, eval_dataset=dataset, max_steps=30)
    before = trainer.evaluate()["eval_loss"]
    ids = torch.stack([item["input_ids"] for item in dataset])
    assert before == pytest.approx(WindowLoss(model, Distill())(ids).mean().item(), rel=1e-4)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.filterwarnings("ignore:.torch.cpu.amp.autocast:FutureWarning")  # used by older Transformers itself
def test_heads_of_a_half_precision_model_learn_in_float32(bf16, tmp_path):
    model = patched_tiny(dtype=torch.bfloat16)
    trainer = head_trainer(
        model, tmp_path, Distill(backprop_tokens=20), bf16=bf16, save_strategy="steps", save_steps=3
    )
    trainer.train()
    assert {state["exp_avg"].dtype for state in trainer.optimizer.state.values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    again = lococo.patch_model(tiny_llama(), heads=tmp_path / "checkpoint-3" / "heads")
    saved = heads(again)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in saved.values())
    assert_same(heads(model), {name: value.bfloat16() for name, value in saved.items()})


def test_accumulated_gradients_are_those_of_a_bigger_batch(tmp_path):
    for task in training_worker.TASKS:
        accumulated = training_worker.run(task, tmp_path, per_device=1, accumulation=4)
        expected = training_worker.run(task, tmp_path, per_device=4, accumulation=1)
        assert_same(accumulated["heads"], expected["heads"], atol=1e-9)
        assert accumulated["losses"] == pytest.approx(expected["losses"], abs=1e-4)


# Two processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Results of the two processes of ``training_worker``."""
    folder = tmp_path_factory.mktemp("training")
    path = [str(Path(lococo.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, training_worker.__file__]
    workers = [subprocess.Popen([*command, str(rank), folder], env=environment) for rank in range(2)]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("task", training_worker.TASKS)
def test_two_processes_train_like_one(task, two_processes, tmp_path):
    start = heads(patched_tiny())
    expected = training_worker.run(task, tmp_path, per_device=4, accumulation=1)
    assert all((value - start[name]).abs().max() > 1e-4 for name, value in expected["heads"].items())
    for result in two_processes:
        assert_same(result[task]["heads"], expected["heads"], atol=1e-5)
        assert result[task]["losses"] == pytest.approx(expected["losses"], abs=1e-4)
        assert result[task]["exchanges"] == 3  # one each step, whatever the chunks and batches in it


@pytest.mark.slow
def test_two_processes_learn_scores_like_one_also_from_fewer_texts(two_processes, tmp_path):
    expected = training_worker.learn_scores(tmp_path)
    for result in two_processes:
        assert_same(result["scores"]["networks"], expected["networks"], atol=1e-9)
        for row, of_one in zip(result["scores"]["rows"], expected["rows"], strict=True):
            assert row == pytest.approx(of_one, abs=1e-6)


@pytest.mark.slow
def test_suspension_reaches_into_ddp(two_processes):
    expected = logits(tiny_llama().double(), tiny_ids(1, 64))
    assert all(torch.equal(result["suspended"], expected) for result in two_processes)


@pytest.mark.slow
def test_processes_end_where_the_first_of_them_has_no_time_left(two_processes):
    assert [result["stopped"] for result in two_processes] == 2 * [(2, True, [1], True)]


@pytest.mark.slow
def test_heads_in_parts_are_refused(two_processes):
    for result in two_processes:
        assert "lies in parts on several processes (FSDP)" in result["sharded"]


# Memory


class Alive:
    """A tensor that autograd keeps for the backward."""

    def __init__(self, tensor):
        self.tensor = tensor


def most_saved(objective, length, folder):
    """The largest number of tensors that autograd keeps at the same time in a training step."""
    alive, most = weakref.WeakSet(), 0

    def pack(tensor):
        nonlocal most
        kept = Alive(tensor.detach())  # with its graph, it would hold the node that holds it
        alive.add(kept)
        most = max(most, len(alive))
        return kept

    trainer = head_trainer(patched_tiny(), folder, objective, windows(1, length), max_steps=1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        trainer.train()
    return most


def test_truncated_backpropagation_keeps_no_more_for_longer_windows(tmp_path):
    short, long = (most_saved(NextToken(backprop_tokens=24), length, tmp_path) for length in (97, 193))
    assert 0 < long <= short
    short, long = (most_saved(NextToken(), length, tmp_path) for length in (97, 193))
    assert long > 1.8 * short


# Checkpoints


def stop_after(step):
    return Callback(lambda state, control: setattr(control, "should_training_stop", state.global_step >= step))


@pytest.mark.parametrize("objective", [NextToken(), Distill(backprop_tokens=20)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(objective, tmp_path):
    options = dict(max_steps=5, gradient_accumulation_steps=2, save_strategy="steps", save_steps=2)
    kept, first, resumed = (patched_tiny(dtype=torch.float32) for _ in range(3))
    head_trainer(kept, tmp_path / "kept", objective, windows(6), **options).train()
    head_trainer(first, tmp_path / "cut", objective, windows(6), callbacks=[stop_after(2)], **options).train()
    trainer = head_trainer(resumed, tmp_path / "cut", objective, windows(6), **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5
    assert not torch.equal(heads(first)["0.gate"], heads(kept)["0.gate"])
    assert_same(heads(resumed), heads(kept))


def test_a_checkpoint_holds_heads_and_no_base_model(tmp_path):
    model = patched_tiny()
    head_trainer(model, tmp_path, NextToken(), save_strategy="steps", save_steps=3).train()
    checkpoint = tmp_path / "checkpoint-3"
    names = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert names == {
        "heads/README.md",
        "heads/lococo_config.json",
        "heads/lococo_heads.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    }
    assert_same(heads(lococo.patch_model(tiny_llama().double(), heads=checkpoint / "heads")), heads(model))


def test_a_checkpoint_whose_writing_was_cut_short_is_passed_over(tmp_path):
    options = dict(max_steps=12, save_strategy="steps", save_steps=3)
    head_trainer(patched_tiny(), tmp_path, NextToken(), callbacks=[stop_after(9)], **options).train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    (tmp_path / "checkpoint-9" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-9" / "optimizer.pt").unlink()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    trainer = head_trainer(patched_tiny(), tmp_path, NextToken(), **options)
    trainer.train(resume_from_checkpoint=True)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-12"
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        trainer.train(resume_from_checkpoint=True)


def test_the_best_heads_can_be_loaded_at_the_end(tmp_path):
    model = patched_tiny()
    options = dict(save_strategy="steps", eval_strategy="steps", save_steps=1, eval_steps=1, logging_steps=1)
    trainer = head_trainer(
        model, tmp_path, Distill(), eval_dataset=windows(2), load_best_model_at_end=True, learning_rate=1.0, **options
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert best.name == f"checkpoint-{min(losses, key=losses.get)}"
    assert_same(heads(model), heads(lococo.patch_model(tiny_llama().double(), heads=best / "heads")))


# Failures


def test_a_head_that_is_not_finite_is_named(tmp_path):
    model = patched_tiny()
    bias = patch_of(model).heads[1].conv.bias

    def spoil(state, control):
        if state.global_step == 2:
            bias.data[0] = float("nan")

    trainer = head_trainer(model, tmp_path, Distill(), windows(1), callbacks=[Callback(spoil)])
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert str(error.value) == (
        "step 3: the loss of tokens 0 to 62 of window 0 (domain0) is not finite; "
        "in layer 1 the head's conv.bias is not finite"
    )
    assert not any(module.training for module in model.modules())


def test_an_overflow_of_the_base_model_is_named_with_its_place(tmp_path):
    model, dataset = patched_tiny(), windows(3)
    dataset.ids = torch.where(dataset.ids == 63, 62, dataset.ids)
    dataset.ids[1, 30] = 63
    model.model.embed_tokens.weight.data[63] = float("inf")
    options = dict(per_device_train_batch_size=3, logging_steps=1)
    with pytest.raises(FloatingPointError) as error:
        head_trainer(model, tmp_path, NextToken(backprop_tokens=20), dataset, **options).train()
    assert str(error.value) == (
        "step 1: the loss of tokens 20 to 39 of window 1 (domain1) is not finite; "
        "all heads are finite: the numbers of the base model overflow"
    )


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(tmp_path):
    model = patched_tiny()
    before = heads(model)
    patch_of(model).heads[1].mass_scale.register_hook(lambda gradient: gradient / 0)
    with pytest.raises(FloatingPointError, match="step 1: in layer 1 the gradient of the head's mass_scale"):
        head_trainer(model, tmp_path, NextToken()).train()
    assert_same(heads(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(gradient_checkpointing=True), "gradient_checkpointing=True .*backprop_tokens"),
        (dict(scalar_lr_factor=0.0), "scalar_lr_factor must be positive, got 0.0"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # its name before Transformers 6
def test_what_cannot_train_heads_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        head_trainer(patched_tiny(), tmp_path, **{"objective": NextToken(), **options})


def test_models_without_heads_to_train_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not patched"):
        head_trainer(tiny_llama(), tmp_path, NextToken())
    with pytest.raises(ValueError, match="no heads to train.*num_heavy=8"):
        head_trainer(lococo.patch_model(tiny_llama(), lococo.LoCoCoConfig.h2o(16)), tmp_path, NextToken())
    adapted = get_peft_model(patched_tiny(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lococo_head"]))
    with pytest.raises(ValueError, match="ModulesToSaveWrapper.*modules_to_save"):
        head_trainer(adapted, tmp_path, NextToken())


def test_heads_of_a_model_with_lora_train_without_it(tmp_path):
    adapted = get_peft_model(patched_tiny(), LoraConfig(target_modules=["q_proj"]))
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    head_trainer(adapted, tmp_path, Distill()).train()
    for name, parameter in adapted.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lococo_head" not in name), name


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_padded_windows_are_refused(mode, tmp_path):
    mask = torch.ones(64, dtype=torch.long)
    mask[:5] = 0
    dataset = [{"input_ids": IDS[0], "attention_mask": mask}]
    trainer = head_trainer(patched_tiny(), tmp_path, NextToken(), dataset, eval_dataset=dataset)
    with pytest.raises(ValueError, match="must not be padded"):
        getattr(trainer, mode)()


def test_deepspeed_config_leaves_to_the_trainer_what_it_knows():
    config = json.loads(DEEPSPEED_ZERO2.read_text())
    assert config["zero_optimization"]["stage"] == 2
    automatic = ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"]
    assert [config[name] for name in [*automatic, "gradient_clipping"]] == ["auto"] * 4
    assert config["bf16"]["enabled"] == config["fp16"]["enabled"] == "auto"
    # With an optimizer or a scheduler of its own, DeepSpeed would not take those of the trainer.
    assert not {"optimizer", "scheduler"} & config.keys()
