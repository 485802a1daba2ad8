"""What to fuse and how: one change at a time to the heads of a very small real model.

python -m experiments.ablation_stories260k stories260K.bin

The model is llama2.c's stories260K (5 layers, 8 heads, 4 KV heads, 512 tokens), the texts are sampled from it. Every
variant is calibrated by distillation and its gap ratio measured on other texts, before and after; writes
docs/results/ablation_stories260k.{json,md,png}. A stopped run goes on where it stopped.
"""

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM

from experiments.common import command_of, plot_before_and_after
from experiments.stories260k import load_llama2c
from lococo import LoCoCoConfig, patched
from lococo.config import POSITIONS
from lococo.metrics import gap_ratio, token_nlls
from lococo.results.journal import Journal
from lococo.results.tables import write_result
from lococo.training.budgets import allocate, slot_levels
from lococo.training.evictions import eviction_errors
from lococo.training.frozen import only_heads_learn
from lococo.training.objectives import Distill, WindowLoss

NUM_SLOTS = BLOCK_SIZE = 32
LENGTH = 512
FIRST = 128  # tokens before it have lost little yet
BATCH = 8

# Question, and the changes to the default preset that answer it. S, H and R are sinks, heavy hitters and recents; what
# they leave of 32 slots is fused.
VARIANTS = {
    "budget, M = 32": {
        "S4 H18 R10 (selection)": dict(num_sinks=4, num_heavy=18, num_recent=10),
        "S4 H14 R10 F4": dict(num_sinks=4, num_heavy=14, num_recent=10),
        "S4 H6 R10 F12 (default)": {},
        "S4 H0 R10 F18": dict(num_sinks=4, num_heavy=0, num_recent=10),
        "S1 H9 R10 F12": dict(num_sinks=1, num_heavy=9, num_recent=10),
        "S4 H11 R5 F12": dict(num_sinks=4, num_heavy=11, num_recent=5),
        "S4 H0 R16 F12": dict(num_sinks=4, num_heavy=0, num_recent=16),
        "all fused": dict(num_sinks=0, num_heavy=0, num_recent=0),
    },
    "slots per head": {
        "selection": dict(num_sinks=4, num_heavy=18, num_recent=10, per_head=True),
        "default": dict(per_head=True),
        "S4 H0 R10 F18": dict(num_sinks=4, num_heavy=0, num_recent=10, per_head=True),
        "softmax": dict(normalization="softmax", per_head=True),
        "kernel 3": dict(kernel_size=3, per_head=True),
        "gates 0.3": dict(gate_init=0.3, per_head=True),
        "240 steps": dict(steps=240, per_head=True),
    },
    "normalisation": {
        "softmax": dict(normalization="softmax"),
        "softmax, N(0, 1) weights": dict(normalization="softmax", init_std=1.0),
    },
    "residual": {
        "one gate per layer": dict(residual="layer"),
        "none": dict(residual="none"),
        "gates 0": dict(gate_init=0.0),
        "gates 0.01": dict(gate_init=0.01),
        "gates 0.3": dict(gate_init=0.3),
        "gates 1": dict(gate_init=1.0),
    },
    "mass": {"no bias": dict(mass_bias=False), "no bias, gates 0.3": dict(mass_bias=False, gate_init=0.3)},
    "positions": {
        "slot": dict(positions="slot"),
        "slot, S4 H18 R10": dict(positions="slot", num_sinks=4, num_heavy=18, num_recent=10),
        "slot, S4 H8 R20": dict(positions="slot", num_sinks=4, num_heavy=8, num_recent=20),
        "S4 H8 R20": dict(num_sinks=4, num_heavy=8, num_recent=20),
        "slot, S4 R28": dict(positions="slot", num_sinks=4, num_heavy=0, num_recent=28),
        "S4 R28": dict(num_sinks=4, num_heavy=0, num_recent=28),
    },
    "score": {"mean": dict(score="mean"), "sum (H2O's)": dict(score="sum"), "last": dict(score="last")},
    "kernel": {str(size): dict(kernel_size=size) for size in (1, 3, 7, 31, 61)},
    "rank": {str(rank): dict(head_rank=rank) for rank in (2, 4, 16)},
    "initial weights": {f"N(0, {std}²)": dict(init_std=std) for std in (0.01, 1.0)},
    "chance": {f"seed {seed}": dict(seed=seed) for seed in (1, 2)},
    "presets": {"paper": dict(preset=LoCoCoConfig.paper), "reference": dict(preset=LoCoCoConfig.reference)},
}


@torch.no_grad()
def sample(model: LlamaForCausalLM, texts: int, seed: int) -> torch.Tensor:
    """(texts, LENGTH) token ids of stories the model tells."""
    torch.manual_seed(seed)
    begin = torch.full((texts, 1), model.config.bos_token_id)
    options = dict(max_new_tokens=LENGTH - 1, do_sample=True, top_p=0.95, top_k=0)
    return model.generate(begin, attention_mask=torch.ones_like(begin), **options)


def measure(model: LlamaForCausalLM, texts: torch.Tensor) -> float:
    """Nats per token."""
    return statistics.fmean(token_nlls(model, ids[None], FIRST).mean().item() for ids in texts)


def patched_nll(model: LlamaForCausalLM, config: LoCoCoConfig, texts: torch.Tensor) -> float:
    """Nats per token of a patched model."""
    with patched(model, config):
        return measure(model, texts)


def calibrated(model, config, train, heldout, steps=60, learning_rate=5e-3, seed=0) -> tuple[float, float, float]:
    """Nats per token on held-out texts before and after distillation, and the mean gate after it."""
    torch.manual_seed(seed)
    with patched(model, config):
        before = measure(model, heldout)
        if not config.num_fused:
            return before, before, 0.0
        loss = WindowLoss(model, Distill())
        gates = [head.gate for head in loss.heads.values() if head.gate is not None]
        matrices = [parameter for parameter in loss.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in loss.parameters() if parameter.dim() == 1]
        groups = [{"params": matrices}, {"params": vectors, "lr": 5 * learning_rate, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=learning_rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        batches = torch.randint(len(train), (steps, BATCH), generator=torch.Generator().manual_seed(seed))
        with only_heads_learn(model):
            for batch in batches:
                optimizer.zero_grad()
                loss(train[batch]).mean().backward()
                torch.nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                for gate in gates:
                    gate.data.clamp_(0, 1)
        opened = torch.cat(gates).mean().item() if gates else 1.0
        return before, measure(model, heldout), opened


def h2o_config(positions: str) -> LoCoCoConfig:
    """H2O of the same size."""
    return LoCoCoConfig.h2o(NUM_SLOTS, block_size=BLOCK_SIZE, positions=positions)


def variant(changes: dict[str, Any], per_head: tuple[tuple[int, ...], ...]) -> tuple[LoCoCoConfig, dict[str, Any]]:
    """Config and training arguments of a variant."""
    fields = dict(changes)
    training = {name: fields.pop(name) for name in ("steps", "learning_rate", "seed") if name in fields}
    if fields.pop("per_head", False):
        fields["slots_per_head"] = per_head
    if preset := fields.pop("preset", None):
        return preset(NUM_SLOTS, block_size=BLOCK_SIZE), training
    return LoCoCoConfig(NUM_SLOTS, block_size=BLOCK_SIZE, **{"gate_init": 0.05, **fields}), training


def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="stories260K.bin of llama2.c")
    parser.add_argument("--output", type=Path, default=Path("docs/results/ablation_stories260k"))
    options = parser.parse_args()

    model = load_llama2c(options.model)
    journal = Journal(options.output.with_suffix(".partial.jsonl"))
    texts = torch.tensor(journal.measure(["texts"], lambda: sample(model, 320, seed=0).tolist()))
    train, heldout = texts[:256], texts[256:]
    levels = slot_levels(NUM_SLOTS)
    errors = eviction_errors(model, train[:24], LoCoCoConfig(NUM_SLOTS, BLOCK_SIZE), levels, journal.measure)
    per_head = allocate(errors[0], levels, NUM_SLOTS)

    full = journal.measure(["full"], functools.partial(measure, model, heldout))
    h2o = min(
        journal.measure(["h2o", positions], functools.partial(patched_nll, model, h2o_config(positions), heldout))
        for positions in POSITIONS
    )
    rows = []
    for question, variants in VARIANTS.items():
        for name, changes in tqdm(variants.items(), desc=question, disable=None):
            config, training = variant(changes, per_head)
            run = functools.partial(calibrated, model, config, train, heldout, **training)
            before, after, gate = journal.measure([config.to_dict(), training], run)
            ratios = {"untrained": gap_ratio(before, full, [h2o]), "trained": gap_ratio(after, full, [h2o])}
            rows.append({"question": question, "variant": name, **ratios, "mean_gate": gate})
    command = command_of("ablation_stories260k", [options.model.name])
    write_result(options.output, command, "cpu", rows)
    labels = [f"{row['question']}: {row['variant']}" for row in rows]
    before, after = ([row[stage] for row in rows] for stage in ("untrained", "trained"))
    plot_before_and_after(labels, before, after, "gap ratio (1 is H2O)", options.output.with_suffix(".png"))
    journal.finish()


if __name__ == "__main__":
    main()
