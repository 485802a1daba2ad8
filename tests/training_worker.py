"""Heads of a tiny model trained by ``HeadTrainer``, and its scores, in one process or in one of two.

As a script, ``training_worker.py RANK FOLDER``: one of the two processes, which writes ``FOLDER/RANK.pt``.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from families import build
from tiny import tiny_ids, tiny_llama
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainingArguments

import lococo
from lococo.data.windows import Windows
from lococo.patch import suspended
from lococo.results.deadline import Deadline, OutOfTime
from lococo.state import patch_of
from lococo.training.objectives import Distill, NextToken
from lococo.training.processes import main_process_first
from lococo.training.recipes import ScoreConfig
from lococo.training.scores import ScoreNetworks, train_scores
from lococo.training.trainer import HeadTrainer
from lococo.training.window_trainer import StopInTime

CONFIG = lococo.LoCoCoConfig(
    num_slots=16, block_size=8, num_sinks=2, num_heavy=4, num_recent=4, kernel_size=5, gate_init=0.3
)
IDS = tiny_ids(2, 64, seed=1)
# Chunks that end inside a block, and gradients of two batches before a step.
TASKS = {"full": NextToken(), "truncated": Distill(backprop_tokens=20, next_token_weight=0.3)}


def patched_tiny(config=CONFIG, dtype=torch.float64, prefill_chunk_size=None, **overrides):
    """A patched model in evaluation mode, with the same random heads every time."""
    model = lococo.patch_model(tiny_llama(**overrides), config, prefill_chunk_size=prefill_chunk_size).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for head in patch_of(model).heads.values():
            for parameter in head.conv.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def windows(count=8, length=64, seed=3):
    return Windows(tiny_ids(count, length, seed=seed).int(), [f"domain{index % 2}" for index in range(count)])


def head_trainer(model, folder, objective, dataset=None, **options):
    names = {"objective", "eval_dataset", "callbacks", "scalar_lr_factor"}
    arguments = dict(
        output_dir=str(folder),
        max_steps=3,
        learning_rate=0.05,
        per_device_train_batch_size=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    arguments.update((name, value) for name, value in options.items() if name not in names)
    return HeadTrainer(
        model,
        TrainingArguments(**arguments),
        objective=objective,
        train_dataset=windows() if dataset is None else dataset,
        **{name: value for name, value in options.items() if name in names},
    )


def heads(model):
    return {
        f"{index}.{name}": parameter.detach().clone()
        for index, head in patch_of(model).heads.items()
        for name, parameter in head.named_parameters()
    }


@torch.no_grad()
def logits(model, ids=IDS, **options):
    return model(input_ids=ids, **options).logits


def assert_same(actual, expected, atol=0.0):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=atol, msg=name)


class Exchanges(TrainerCallback):
    """Counts how often DDP exchanges gradients (in one bucket, as small as the heads are)."""

    count = 0

    def on_train_begin(self, args, state, control, **kwargs):
        if isinstance(self.trainer.model_wrapped, DistributedDataParallel):
            self.trainer.model_wrapped.register_comm_hook(None, self.exchange)

    def exchange(self, state, bucket):
        self.count += 1
        return allreduce_hook(None, bucket)


def run(task, folder, per_device, accumulation):
    """Heads after three steps of four windows each, and the losses on the way."""
    model = patched_tiny()
    exchanges = Exchanges()
    options = dict(per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation, logging_steps=1)
    exchanges.trainer = head_trainer(model, folder, TASKS[task], callbacks=[exchanges], **options)
    exchanges.trainer.train()
    losses = [entry["loss"] for entry in exchanges.trainer.state.log_history if "loss" in entry]
    return {"heads": heads(model), "losses": losses, "exchanges": exchanges.count}


def learn_scores(folder):
    """Networks of a learned score after steps of three texts, two and one, what was told of them, and rows."""
    model = build("Qwen2-half-window").double()
    config = lococo.LoCoCoConfig(16, block_size=8, score="learned", num_sinks=2, num_heavy=8, num_recent=6)
    torch.manual_seed(0)
    networks, told = ScoreNetworks.of(model, config), []
    for network in networks.by_layer.values():
        network.double()  # in float32 the order of a sum decides over weights whose gradient is near Adam's epsilon
    settings = ScoreConfig(texts_at_once=3, texts_per_step=3, repeats=2)
    for texts in (tiny_ids(5, 48), tiny_ids(4, 48)):
        path = folder / f"{len(texts)}.safetensors"
        rows = train_scores(model, networks, texts, settings, path, tell=lambda **row: told.append(row))
    return {"networks": {name: each.detach() for name, each in networks.named_tensors().items()}, "rows": told + rows}


@torch.no_grad()
def suspended_in_ddp():
    """Logits of a patched model inside DDP while it is suspended."""
    model = patched_tiny()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    wrapped = DistributedDataParallel(model)
    with suspended(wrapped):
        return wrapped(input_ids=tiny_ids(1, 64)).logits


class AfterAsking(Deadline):
    """Is over once it has been asked so often."""

    def __init__(self, times):
        super().__init__()
        self.left = times

    @property
    def is_over(self):
        """Asked by whoever is to end in time."""
        self.left -= 1
        return self.left < 0


def out_of_time(function):
    """Whether a function runs out of time."""
    try:
        function()
    except OutOfTime:
        return True
    return False


def stop_in_time(rank, folder):
    """Where each process ends of which the first has less time than the second."""
    stop = StopInTime(AfterAsking(1 + rank))
    trainer = head_trainer(patched_tiny(), folder / "stopped", NextToken(), callbacks=[stop], max_steps=6)
    trainer.train()
    config = lococo.LoCoCoConfig(16, block_size=8, score="learned", num_sinks=2, num_heavy=8, num_recent=6)
    model, settings = tiny_llama(), ScoreConfig(texts_at_once=2, repeats=1)
    told = []
    in_scores = out_of_time(
        lambda: train_scores(
            model,
            ScoreNetworks.of(model, config),
            tiny_ids(8, 48),
            settings,
            folder / "stopped.safetensors",
            AfterAsking(1 + rank),
            lambda **row: told.append(row["step"]),
        )
    )

    def wait_for_the_first():
        with main_process_first():
            if rank == 0:
                raise OutOfTime

    return trainer.state.global_step, in_scores, told, out_of_time(wait_for_the_first)


def save_sharded(folder):
    """What is said of heads of which each process has a part."""
    model = patched_tiny()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    try:
        lococo.save_heads(model, folder / "sharded")
    except ValueError as error:
        return str(error)


def join(rank, folder):
    """Become one of two processes."""
    torch.set_num_threads(1)
    launched = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    # Accelerate wants to be told an address, though the group is there already.
    os.environ.update(**launched, MASTER_ADDR="localhost", MASTER_PORT="0")
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))


def main(rank, folder):
    join(rank, folder)
    results = {task: run(task, folder / task, per_device=1, accumulation=2) for task in TASKS}
    results |= {"scores": learn_scores(folder), "suspended": suspended_in_ddp()}
    results |= {"stopped": stop_in_time(rank, folder), "sharded": save_sharded(folder)}
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
