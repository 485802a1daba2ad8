"""TRL's DPOTrainer prefers through the compressed cache, and its reference reads through it, too."""

import copy

import pytest
import torch
from datasets import Dataset
from small_training import Witness, arguments, lora, old_names, parts_with_gradients, token_logps, tokenizer, words
from tiny import tiny_llama
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from wrapped import CONFIG, patched

pytestmark = old_names
BETA = 0.1
PAIRS = Dataset.from_dict(
    {
        "prompt": [words(20, 1), words(9, 2)],
        "chosen": [words(25, 3), words(30, 4)],
        "rejected": [words(31, 5), words(12, 6)],
    }
)


def trainer(folder, model=None, reference=None, peft_config=None, callbacks=(), **options):
    return DPOTrainer(
        model=patched(tiny_llama()) if model is None else model,
        ref_model=reference,
        args=arguments(DPOConfig, folder, beta=BETA, **options),
        train_dataset=PAIRS,
        processing_class=tokenizer(),
        peft_config=peft_config,
        callbacks=list(callbacks),
    )


@torch.no_grad()
def logps(model, batch):
    """(pairs,) log-probabilities of the chosen and of the rejected completions."""
    counted = token_logps(model, batch["input_ids"], batch["attention_mask"]) * batch["completion_mask"][:, 1:]
    return counted.sum(dim=1).chunk(2)


def loss_by_hand(model, reference, batch):
    (chosen, rejected), (was_chosen, was_rejected) = logps(model, batch), logps(reference, batch)
    margins = BETA * ((chosen - was_chosen) - (rejected - was_rejected))
    return -torch.nn.functional.logsigmoid(margins).mean().item()


def batch_of(run):
    return next(iter(run.get_train_dataloader()))


def compressed():
    return patched(tiny_llama())


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("kind", ["copy", "full"])
def test_policy_and_reference_read_each_as_it_is_patched(kind, precompute, tmp_path):
    reference = copy.deepcopy(compressed()) if kind == "copy" else tiny_llama()
    witness = Witness()
    run = trainer(tmp_path, None, reference, callbacks=[witness], precompute_ref_log_probs=precompute)
    batch = batch_of(run)
    assert batch["input_ids"].shape[1] > CONFIG.capacity and not batch["attention_mask"].all()
    expected = loss_by_hand(compressed(), compressed() if kind == "copy" else tiny_llama(), batch)
    run.train()
    log = run.state.log_history[0]
    chosen, rejected = logps(compressed(), batch)
    assert log["logps/chosen"] == pytest.approx(chosen.mean().item(), abs=1e-3)
    assert log["logps/rejected"] == pytest.approx(rejected.mean().item(), abs=1e-3)
    assert log["loss"] == pytest.approx(expected, abs=1e-4)
    assert (kind == "full") == (abs(expected - 0.6931) > 0.01)
    assert parts_with_gradients(witness) == {"base", "heads"}


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("modules_to_save", [None, ["lococo_head"]])
def test_with_adapters_the_reference_is_the_patched_model_without_them(modules_to_save, precompute, tmp_path):
    witness = Witness()
    run = trainer(
        tmp_path,
        peft_config=lora(modules_to_save=modules_to_save),
        callbacks=[witness],
        precompute_ref_log_probs=precompute,
        max_steps=2,
    )
    assert run.ref_model is None
    batch = batch_of(run)
    run.train()
    first, second = run.state.log_history[:2]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert second["rewards/margins"] > 0.01
    assert first["logps/chosen"] == pytest.approx(logps(compressed(), batch)[0].mean().item(), abs=1e-3)
    assert parts_with_gradients(witness) == ({"lora", "heads"} if modules_to_save else {"lora"})


def test_a_whole_model_without_reference_precomputes_that_of_the_patched_one(tmp_path):
    run = trainer(tmp_path, precompute_ref_log_probs=True)
    batch = batch_of(run)
    for name, expected in zip(("ref_chosen_logps", "ref_rejected_logps"), logps(compressed(), batch), strict=True):
        torch.testing.assert_close(batch[name], expected, rtol=0, atol=1e-3)


def test_a_reference_that_trl_loads_itself_has_the_full_cache(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    model = patched(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    run = trainer(tmp_path / "run", model)
    expected = loss_by_hand(compressed(), tiny_llama(), batch_of(run))
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)
