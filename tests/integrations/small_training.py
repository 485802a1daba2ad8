"""Texts, arguments and a witness for one small step of a trainer of TRL."""

import random

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from words import WORDS, word_tokenizer

# TRL 1.16 calls activation checkpointing by the name of before.
old_names = pytest.mark.filterwarnings(r"ignore:.gradient_checkpointing\w*. is deprecated:FutureWarning")

OPTIONS = dict(
    max_steps=1,
    per_device_train_batch_size=2,
    learning_rate=0.05,
    lr_scheduler_type="constant",
    optim="sgd",
    max_grad_norm=0,
    bf16=False,
    use_cpu=True,
    dataloader_pin_memory=False,
    report_to=[],
    save_strategy="no",
    logging_steps=1,
    disable_tqdm=True,
    seed=0,
)


def arguments(config_class, folder, **options):
    return config_class(**{**OPTIONS, "output_dir": str(folder), **options})


def tokenizer():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "<s>"
    return tokenizer


def words(count, seed):
    return " " + " ".join(random.Random(seed).choices(WORDS, k=count))


def lora(**options):
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


class Witness(TrainerCallback):
    """The gradients of the last step, by parameter."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = gradients(model)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def parts_with_gradients(witness):
    """What learned: ``lora``, ``heads``, ``base``. A LoRA matrix beside one that is still zero has none yet."""
    learned = {name for name, gradient in witness.gradients.items() if gradient.abs().max() > 0}
    return {"lora" if "lora_" in name else "heads" if "lococo_head" in name else "base" for name in learned}


def token_logps(model, ids, mask):
    """(batch, tokens - 1) log-probability of each token but the first, as the model gives it in one plain forward."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
