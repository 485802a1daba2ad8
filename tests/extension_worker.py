"""Extensions of a tiny model, in one process or in one of two under DDP.

As a script, ``extension_worker.py RANK FOLDER``: one of the two processes, which writes ``FOLDER/RANK.pt``.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from configs import FORESEEN
from tiny import tiny_ids, tiny_llama
from torch import distributed
from training_worker import join
from transformers import TrainingArguments

import lococo
from lococo.data.windows import Windows
from lococo.extension.extend import ExtensionRecipe, extended_for_training
from lococo.extension.rope_scaling import RopeScaling
from lococo.extension.trainer import ExtensionTrainer

CONFIG = lococo.LoCoCoConfig(
    num_slots=16, block_size=8, num_sinks=2, num_heavy=4, num_recent=4, kernel_size=5, gate_init=0.3
)
LEARNED = dataclasses.replace(CONFIG, score=FORESEEN)
SCALING = RopeScaling(4, 16)
CONFIGS = {
    "lococo": CONFIG,
    "h2o": lococo.LoCoCoConfig.h2o(16, block_size=8),
    "streaming": lococo.LoCoCoConfig.streaming_llm(16, block_size=8),
    "full": None,
}


def recipe(method="lococo", **changes):
    given = dict(steps=3, windows_per_step=2, learning_rate=0.01, heads_learning_rate=0.05, depth=2, save_every=1)
    return ExtensionRecipe(
        **{"method": method, "rope_scaling": SCALING, "config": CONFIGS.get(method), **given, **changes}
    )


def windows(count=6, length=64):
    return Windows(tiny_ids(count, length, seed=3).int(), ["text"] * count)


def trainer(learner, how, folder, dataset=None, callbacks=(), **options):
    arguments = dict(
        output_dir=str(folder),
        max_steps=how.steps,
        learning_rate=how.learning_rate,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=how.windows_per_step,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
    )
    return ExtensionTrainer(
        learner,
        TrainingArguments(**{**arguments, **options}),
        objective=how.objective,
        heads_learning_rate=how.heads_learning_rate,
        scalar_lr_factor=how.scalar_lr_factor,
        train_dataset=windows() if dataset is None else dataset,
        callbacks=list(callbacks),
    )


def learned(learner):
    """Copies of all that is trained, by name."""
    return {
        name: parameter.detach().clone() for name, parameter in learner.named_parameters() if parameter.requires_grad
    }


def run(method, folder, accumulation):
    """What three steps of two windows each make of a tiny model."""
    how = recipe(method)
    with extended_for_training(tiny_llama().double(), how) as learner:
        trainer(learner, how, folder, gradient_accumulation_steps=accumulation).train()
        return learned(learner)


def main(rank, folder):
    join(rank, folder)
    torch.save({method: run(method, folder / method, accumulation=1) for method in CONFIGS}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
