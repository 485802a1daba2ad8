"""Extensions of a tiny model sharded over two processes (FSDP2), and the same under DDP.

As a script, ``sharding_worker.py RANK FOLDER``: one of the two processes, which writes ``FOLDER/RANK.pt``.
"""

import gc
import os
import sys
import weakref
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from extension_worker import CONFIGS, LEARNED, learned, recipe, trainer
from numbered_words import word_tokenizer
from tiny import tiny_llama
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from training_worker import join

from lococo.data.windows import DataConfig
from lococo.extension.extend import ExtensionRun, extended_for_training
from lococo.extension.sharding import gathered, sharded_arguments
from lococo.state import is_ours

# Checkpointed layers, tied embeddings, adapters in wider numbers than the rest.
CASES = {
    "lococo": ("lococo", {}, torch.float32),
    "full": ("full", {}, torch.float32),
    "full, tied": ("full", {"tie_word_embeddings": True}, torch.float32),
    "lococo, tied, bfloat16": ("lococo", {"tie_word_embeddings": True}, torch.bfloat16),
    "learned": ("learned", {}, torch.float32),
}


def let_accelerate_shard_on_cpus():
    """Accelerate shards on GPUs alone; what it does there works on CPUs."""
    begin = AcceleratorState.__init__

    def begin_with_a_device(self, *args, **kwargs):
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        begin(self, *args, **kwargs)

    AcceleratorState.__init__ = begin_with_a_device


def run(case, folder, resume=None, **options):
    """What three steps make of a tiny model, its losses, and the share of it that this process keeps."""
    method, overrides, dtype = CASES[case]
    how = recipe(method) if method in CONFIGS else recipe(config=LEARNED)
    model = tiny_llama(**overrides).to(dtype)
    whole = sum(parameter.numel() for parameter in model.parameters())
    some_weight = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    with extended_for_training(model, how) as learner:
        training = trainer(learner, how, folder, gradient_accumulation_steps=1, bf16=dtype.itemsize == 2, **options)
        training.train(resume_from_checkpoint=resume)
        gc.collect()
        with gathered(learner):
            found = learned(learner)
        named = learner.named_parameters()
        frozen = [each for name, each in named if not each.requires_grad and not is_ours(name)]
        kept = sum(getattr(each, "to_local", lambda each=each: each)().numel() for each in frozen)
        return {
            "learned": found,
            "losses": [entry["loss"] for entry in training.state.log_history if "loss" in entry],
            "share": kept / whole,
            "whole_weight_is_gone": some_weight() is None,
            "is_sharded_by_layer": all(isinstance(layer, FSDPModule) for layer in model.model.layers),
        }


def extend(folder):
    """An extension with ``shard=True``."""
    places = dict(output=folder / "extended", work_dir=folder / "work", cache_dir=folder / "cache")
    data = DataConfig((str(folder / "text.jsonl"),), length=64, num_windows=6, num_heldout=0, boundaries="none")
    ExtensionRun(data=data, recipe=recipe(), shard=True, **places).run(tiny_llama(), word_tokenizer(words=61))


def main(rank, folder):
    join(rank, folder)
    results = {("ddp", case): run(case, folder / "ddp" / case) for case in CASES}
    let_accelerate_shard_on_cpus()
    for case in CASES:
        place, options = folder / "fsdp" / case, dict(save_strategy="steps", save_steps=2, **sharded_arguments())
        results["fsdp", case] = run(case, place, **options)
        results["resumed", case] = run(case, place, resume=str(place / "checkpoint-2"), **options)
    extend(folder)
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
