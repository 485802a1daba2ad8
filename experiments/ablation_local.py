"""What to fuse and how, on a real model: one change at a time to the heads of some layers, trained layer by layer.

python -m experiments.ablation_local --model folder --data texts.jsonl --heads calibrated-heads

No pass through the model is needed once its layers are recorded, so a variant takes a minute. Errors are those of the
attention output as the loss feels it, on texts that were not learned from, relative to plain token selection with the
slots per head of the given heads. Writes docs/results/ablation_local.{json,md,png}; a stopped run goes on.
"""

import argparse
import dataclasses
import functools
import statistics
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.common import command_of, plot_before_and_after
from lococo import LoCoCoConfig
from lococo.compression.fusion import FusionHead
from lococo.data.windows import DataConfig, prepare
from lococo.models import base_shape
from lococo.results.journal import Journal
from lococo.results.tables import write_result
from lococo.training.local import LocalConfig, Recordings, train_layer
from lococo.training.record import compressed_output, fisher_error

SETTINGS = LocalConfig(steps=40, num_checked=4)
CPU = torch.device("cpu")


def variants(num_slots: int) -> dict[str, dict]:
    """Changes to the default preset. F is the share of the slots that are fused, R that of the recents."""
    sinks, slots = 4, num_slots
    recents = slots * 5 // 16
    none_heavy = dict(num_sinks=sinks, num_heavy=0, num_recent=recents)
    return {
        "default: F 3/8, R 5/16, rank 16, gates 0.05": {},
        "no heavy hitters": none_heavy,
        "no heavy hitters, softmax": dict(**none_heavy, normalization="softmax"),
        "softmax": dict(normalization="softmax"),
        "no mass bias": dict(mass_bias=False),
        "one gate per layer": dict(residual="layer"),
        "no residual": dict(residual="none"),
        "gates 0.01": dict(gate_init=0.01),
        "gates 0.2": dict(gate_init=0.2),
        "rank 4": dict(head_rank=4),
        "full rank": dict(head_rank=None),
        "kernel 3": dict(kernel_size=3),
        "kernel 61": dict(kernel_size=61),
        "weights N(0, 0.001²)": dict(init_std=0.001),
        "score mean": dict(score="mean"),
        "the same slots for every head": dict(slots_per_head=None),
    }


@torch.no_grad()
def errors(recordings: Recordings, config: LoCoCoConfig, layer: int, head: FusionHead | None = None) -> list[float]:
    """Error of a layer on each of the texts that are not learned from."""
    entries = (recordings.layer(layer, text, CPU) for text in range(len(recordings.paths))[-SETTINGS.num_checked :])
    return [fisher_error(compressed_output(entry, config, layer, head), entry).sum().item() for entry in entries]


def measure(
    recordings: Recordings, config: LoCoCoConfig, selection: LoCoCoConfig, layer: int, head_dim: int
) -> dict[str, float]:
    """Errors of a layer relative to those of token selection: gates closed, not trained, trained."""
    largest = max(config.layer_configs(layer), key=lambda each: each.num_fused)
    torch.manual_seed(layer)
    head = FusionHead(largest, head_dim)
    plain = errors(recordings, selection, layer)

    def relative(measured: list[float]) -> float:
        return statistics.fmean(mine / other for mine, other in zip(measured, plain, strict=True))

    row = {"selection": relative(errors(recordings, config, layer))}
    row["untrained"] = relative(errors(recordings, config, layer, head))
    train_layer(layer, head, config, recordings, SETTINGS)
    row["trained"] = relative(errors(recordings, config, layer, head))
    return row


def main() -> None:
    """Record the layers, then run the variants."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument("--gguf-file", help="GGUF file in that folder")
    parser.add_argument("--data", nargs="+", required=True, help="files, folders or Hub ids of texts")
    parser.add_argument("--heads", type=Path, required=True, help="heads folder that gives the slots per head")
    parser.add_argument("--length", type=int, default=2048, help="tokens per text (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=24, help="texts to record (default: %(default)s)")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 20])
    parser.add_argument("--work-dir", type=Path, default=Path("runs/ablation_local"), help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/results/ablation_local"))
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model, gguf_file=options.gguf_file)
    model = AutoModelForCausalLM.from_pretrained(options.model, gguf_file=options.gguf_file, dtype=torch.float32)
    data = DataConfig(tuple(options.data), options.length, options.texts, num_heldout=0)
    recordings = Recordings(options.work_dir / "recordings")
    recordings.add(model.eval(), prepare(data, tokenizer, options.work_dir / "tokens")[0].ids)

    given = LoCoCoConfig.from_pretrained(options.heads)
    selection = LoCoCoConfig(given.num_slots, given.block_size, slots_per_head=given.slots_per_head)
    base = dataclasses.replace(selection, head_rank=16, gate_init=0.05).to_dict()
    budget = dict.fromkeys(("num_sinks", "num_heavy", "num_recent"))  # what is not given takes its default share
    journal = Journal(options.output.with_suffix(".partial.jsonl"))
    rows = []
    for name, changes in tqdm(variants(given.num_slots).items(), disable=None):
        config = LoCoCoConfig(**{**base, **budget, **changes})
        run = functools.partial(measure, recordings, config, selection, head_dim=base_shape(model)["head_dim"])
        layers = [
            journal.measure([layer, config.to_dict()], functools.partial(run, layer)) for layer in options.layers
        ]
        means = {key: statistics.fmean(row[key] for row in layers) for key in layers[0]}
        by_layer = {f"layer {layer}": row["trained"] for layer, row in zip(options.layers, layers, strict=True)}
        rows.append({"variant": name, **means, **by_layer})
    write_result(options.output, command_of("ablation_local"), CPU, rows)
    before, after = ([row[stage] for row in rows] for stage in ("untrained", "trained"))
    labels = [row["variant"] for row in rows]
    plot_before_and_after(labels, before, after, "error (1 is token selection)", options.output.with_suffix(".png"))
    journal.finish()


if __name__ == "__main__":
    main()
