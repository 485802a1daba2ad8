"""TRL's SFTTrainer trains through the compressed cache."""

import dataclasses

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from small_training import (
    Witness,
    arguments,
    assert_same_gradients,
    gradients,
    lora,
    old_names,
    parts_with_gradients,
    tokenizer,
    words,
)
from tiny import tiny_llama
from trl import SFTConfig, SFTTrainer
from wrapped import CONFIG, LEARNED, assert_equal, head_values, logits, patched

from lococo.training.callback import SaveHeadsCallback

pytestmark = old_names
TEXTS = Dataset.from_dict({"text": [words(60, 1), words(46, 2)]})


def trainer(folder, model=None, peft_config=None, callbacks=(), **options):
    return SFTTrainer(
        model=patched(tiny_llama()) if model is None else model,
        args=arguments(SFTConfig, folder, **options),
        train_dataset=TEXTS,
        eval_dataset=TEXTS,
        processing_class=tokenizer(),
        peft_config=peft_config,
        callbacks=list(callbacks),
    )


def batch_of(run):
    return {name: tensor for name, tensor in next(iter(run.get_train_dataloader())).items()}


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_whole_model_has_the_loss_and_the_gradients_of_a_plain_backward(checkpointing, tmp_path):
    witness = Witness()
    run = trainer(tmp_path, callbacks=[witness], gradient_checkpointing=checkpointing)
    expected, batch = patched(tiny_llama()).train(), batch_of(run)
    assert batch["input_ids"].shape[1] > CONFIG.capacity and not batch["attention_mask"].all()
    run.train()
    loss = expected(**batch).loss
    loss.backward()
    full = tiny_llama()(**batch).loss
    assert (loss - full).abs() > 0.01
    assert run.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert_same_gradients(witness.gradients, gradients(expected))
    assert parts_with_gradients(witness) == {"base", "heads"}


def test_evaluation_reads_through_the_slots(tmp_path):
    run = trainer(tmp_path)
    loss = patched(tiny_llama())(**batch_of(run)).loss
    assert run.evaluate()["eval_loss"] == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize("modules_to_save", [None, ["lococo_head"]])
def test_adapters_learn_and_heads_where_they_are_named(modules_to_save, tmp_path):
    witness = Witness()
    run = trainer(tmp_path, peft_config=lora(modules_to_save=modules_to_save), callbacks=[witness], max_steps=2)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(
        patched(tiny_llama())(**batch_of(run)).loss.item(), abs=1e-5
    )
    assert parts_with_gradients(witness) == ({"lora", "heads"} if modules_to_save else {"lora"})
    run.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(patched(tiny_llama()), tmp_path / "adapter").eval()
    trained = logits(run.model.eval())
    assert (trained - logits(patched(tiny_llama()))).abs().max() > 0.01
    assert_equal(logits(loaded), trained, atol=0)


def test_all_linear_means_the_linear_layers_of_the_base_model(tmp_path):
    config = dataclasses.replace(lora(), target_modules="all-linear")
    run = trainer(tmp_path, patched(tiny_llama(), LEARNED), config)
    adapted = {name.split(".lora_")[0].split(".")[-1] for name, _ in run.model.named_parameters() if "lora_" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("packed", [dict(packing=True, max_length=128), dict(padding_free=True, max_length=None)])
def test_texts_packed_into_a_row_are_refused(packed, tmp_path):
    with pytest.raises(ValueError, match=r"packed sequences\) are not supported"):
        trainer(tmp_path, **packed).train()


def test_texts_cut_into_rows_of_one_length_are_not(tmp_path):
    run = trainer(tmp_path, packing=True, packing_strategy="wrapped", max_length=54)
    assert batch_of(run)["attention_mask"].all()
    loss = patched(tiny_llama())(**batch_of(run)).loss.item()
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-5)


def test_mixed_precision_is_close(tmp_path):
    run = trainer(tmp_path, bf16=True)
    loss = patched(tiny_llama())(**batch_of(run)).loss.item()
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(loss, abs=0.05)


def test_resumed_training_has_the_heads_of_the_checkpoint(tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    whole = trainer(tmp_path, callbacks=[SaveHeadsCallback()], **options)
    whole.train()
    resumed = trainer(tmp_path, callbacks=[SaveHeadsCallback()], **options)
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    assert all(map(torch.equal, head_values(resumed.model), head_values(whole.model)))
    assert_equal(logits(resumed.model.eval()), logits(whole.model.eval()))
