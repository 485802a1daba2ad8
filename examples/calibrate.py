"""Train heads for a model and see what they are worth: the steps of ``lococo calibrate --recipe blend``, one by one.

The first two of them, scores and slots per head, are all that its default recipe does.

python examples/calibrate.py --model folder --data texts.jsonl --output heads
accelerate launch examples/calibrate.py --model folder --data texts.jsonl --output heads
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import lococo
from lococo.data.windows import DataConfig, prepare
from lococo.metrics import perplexity
from lococo.state import patch_of
from lococo.training.budgets import allocate_with_scales, slot_levels
from lococo.training.evictions import eviction_errors
from lococo.training.objectives import Distill
from lococo.training.recipes import ScoreConfig
from lococo.training.scores import ScoreNetworks, train_scores
from lococo.training.trainer import HeadTrainer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument("--gguf-file", help="GGUF file in that folder")
    parser.add_argument("--data", nargs="+", required=True, help="files, folders or Hub ids of texts")
    parser.add_argument("--length", type=int, default=2048, help="tokens per window (default: %(default)s)")
    parser.add_argument("--num-slots", type=int, default=256, help="slots per layer (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="training steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="heads folder to write")
    options = parser.parse_args()

    process = PartialState()
    tokenizer = AutoTokenizer.from_pretrained(options.model, gguf_file=options.gguf_file)
    model = AutoModelForCausalLM.from_pretrained(options.model, gguf_file=options.gguf_file, dtype=torch.float32)
    model.to(process.device).eval()
    data = DataConfig(tuple(options.data), options.length, options.steps * process.num_processes, num_heldout=4)
    with process.main_process_first(), tempfile.TemporaryDirectory() as folder:
        train, heldout = prepare(data, tokenizer, folder)
    texts = [ids[None].long() for ids in heldout.ids]
    process.print(f"perplexity with the full cache: {perplexity(model, texts, first=options.length // 2):.3f}")

    torch.manual_seed(0)  # the same first weights in every process
    slots, block_size = options.num_slots, min(options.num_slots, 512)
    config = lococo.LoCoCoConfig(slots, block_size, score="learned", head_rank=16, gate_init=0.05)

    # 1. What will be looked up is foreseen when it is read: networks learn it from forward passes.
    networks = ScoreNetworks.of(model, config)
    with tempfile.TemporaryDirectory() as folder:
        train_scores(model, networks, train.ids, ScoreConfig(texts=len(train.ids)), Path(folder) / "scores")

    # 2. Slots go to the KV heads whose evicted tokens the loss would miss.
    levels = slot_levels(slots)
    errors = eviction_errors(model, train.evenly(7), config, levels, lambda key, measured: measured(), networks)
    slots_per_head, _ = allocate_with_scales(errors, levels, slots)
    config = dataclasses.replace(config, slots_per_head=slots_per_head)
    lococo.patch_model(model, config)
    networks.put_into(patch_of(model))

    # 3. Blends are distilled from the full cache.
    with tempfile.TemporaryDirectory() as folder:
        arguments = dict(max_steps=options.steps, learning_rate=1e-3, per_device_train_batch_size=1, logging_steps=10)
        on_cpu = process.device.type == "cpu"
        arguments = TrainingArguments(folder, **arguments, use_cpu=on_cpu, save_strategy="no", report_to=[])
        objective = Distill(backprop_tokens=4 * block_size)
        HeadTrainer(model, arguments, objective=objective, scalar_lr_factor=10, train_dataset=train).train()
    if process.is_main_process:
        lococo.save_heads(model, options.output, dtype=torch.bfloat16)
    process.print(
        f"with {options.num_slots} slots per layer: {perplexity(model, texts, first=options.length // 2):.3f}"
    )


if __name__ == "__main__":
    main()
