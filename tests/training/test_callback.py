"""Trainers that know nothing of heads go on from their checkpoints as if they had not stopped."""

import pytest
import torch
from tiny import tiny_llama
from transformers import Trainer, TrainingArguments
from wrapped import IDS, head_values, patched

import lococo
from lococo.training.callback import SaveHeadsCallback

ROWS = [dict(input_ids=row, labels=row) for row in IDS]


def trainer(folder, callbacks=(SaveHeadsCallback,), **options):
    arguments = TrainingArguments(
        **dict(output_dir=str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=1, seed=3),
        **dict(use_cpu=True, report_to=[], disable_tqdm=True),
        **{"learning_rate": 0.05, **options},
    )
    return Trainer(
        model=patched(tiny_llama()),
        args=arguments,
        train_dataset=ROWS,
        eval_dataset=ROWS,
        callbacks=[callback() for callback in callbacks],
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was not stopped, with its checkpoints."""
    run = trainer(tmp_path_factory.mktemp("whole"))
    run.train()
    return run


def values(run):
    return [parameter.detach() for parameter in run.model.parameters()]


def test_resumed_training_has_the_weights_of_one_that_was_not_stopped(whole):
    resumed = trainer(whole.args.output_dir)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert not any(map(torch.equal, head_values(resumed.model), head_values(patched(tiny_llama()))))
    assert all(map(torch.equal, values(resumed), values(whole)))


def test_a_checkpoint_holds_heads_to_patch_with(whole):
    model = lococo.patch_model(tiny_llama(), heads=f"{whole.args.output_dir}/checkpoint-4/heads")
    assert all(map(torch.equal, head_values(model), head_values(whole.model)))


def test_heads_of_the_best_checkpoint_come_back_at_the_end(tmp_path):
    run = trainer(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, greater_is_better=True)
    run.train()
    best = lococo.patch_model(tiny_llama(), heads=f"{run.state.best_model_checkpoint}/heads")
    last = lococo.patch_model(tiny_llama(), heads=f"{tmp_path}/checkpoint-4/heads")
    assert all(map(torch.equal, head_values(run.model), head_values(best)))
    assert not any(map(torch.equal, head_values(run.model), head_values(last)))


def test_a_checkpoint_without_heads_is_refused(tmp_path):
    trainer(tmp_path, callbacks=()).train()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-2/heads does not exist: .*without SaveHeadsCallback"):
        trainer(tmp_path).train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")


def test_heads_of_another_training_in_the_folder_are_refused(tmp_path):
    """A checkpoint from elsewhere, and one of the same step in the folder to write."""
    for name, rate in (("one", 0.05), ("other", 0.02)):
        trainer(tmp_path / name, logging_steps=1, learning_rate=rate).train()
    with pytest.raises(ValueError, match=r"other/checkpoint-2 is of another training"):
        trainer(tmp_path / "other", logging_steps=1).train(resume_from_checkpoint=f"{tmp_path}/one/checkpoint-2")


def test_a_model_without_heads_is_refused_before_the_first_step(tmp_path):
    run = trainer(tmp_path)
    lococo.unpatch_model(run.model)
    with pytest.raises(ValueError, match="is not patched: it has no heads"):
        run.train()
    assert run.state.global_step == 0
