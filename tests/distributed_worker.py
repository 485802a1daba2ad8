"""Three training steps of a patched model in one process, or in one of two under DDP or FSDP2.

As a script, ``distributed_worker.py RANK FOLDER``: one of the two processes, which writes ``FOLDER/RANK.pt``.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
from tiny import tiny_ids, tiny_llama
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lococo

# Length of each process's text, step by step; texts of 12 tokens fit into the slots and leave the heads unused.
LENGTHS = [(64, 64), (64, 12), (12, 12)]
STRATEGIES = ("ddp", "fsdp2")
# A gate that starts shut is found shut by the evaluation before training, and must be found open by the one after.
GATES = (0.0, 0.3)


def make_model(gate_init):
    config = lococo.LoCoCoConfig(num_slots=16, block_size=8, kernel_size=5, gate_init=gate_init)
    return lococo.patch_model(tiny_llama(), config)


def train(model, ranks):
    """Logits before and after training, and the loss of each step: the mean over the texts of ``ranks``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = evaluate(model)
    losses = []
    model.train()
    for step, lengths in enumerate(LENGTHS):
        texts = [tiny_ids(1, lengths[rank], seed=10 * step + rank) for rank in ranks]
        loss = sum(model(input_ids=ids, labels=ids).loss for ids in texts) / len(texts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return {"before": before, "after": evaluate(model), "losses": torch.stack(losses)}


@torch.no_grad()
def evaluate(model):
    return model.eval()(input_ids=tiny_ids(2, 64, seed=99)).logits


def parameters(model):
    return {
        name: getattr(value, "full_tensor", lambda value=value: value)().detach().clone()
        for name, value in model.named_parameters()
    }


def run(rank, strategy, gate_init):
    model = make_model(gate_init)
    if strategy == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    return {**train(wrapped, [rank]), "parameters": parameters(model)}


def main(rank, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    results = {(strategy, gate): run(rank, strategy, gate) for strategy in STRATEGIES for gate in GATES}
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
