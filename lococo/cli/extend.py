"""The command ``lococo extend``."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

from lococo.extension.folder import METHODS
from lococo.extension.rope_scaling import ROPE_TYPES
from lococo.loading import add_model_options, load, longest_text
from lococo.results.deadline import OutOfTime


def add_extend_command(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``lococo extend``."""
    add_model_options(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder to write, for lococo.load_extended")
    parser.add_argument("--method", default="lococo", choices=METHODS, help="(default: %(default)s)")
    length = parser.add_argument_group("length")
    length.add_argument("--factor", type=float, default=8.0, help="new length / old length (default: 8)")
    length.add_argument("--original-length", type=int, help="old length in tokens (default: the model's)")
    length.add_argument("--rope-type", default="linear", choices=ROPE_TYPES, help="(default: %(default)s)")
    length.add_argument("--length", type=int, help="tokens per window (default: the new length)")
    cache = parser.add_argument_group("compressed cache")
    cache.add_argument("--num-slots", type=int, default=512, help="(default: %(default)s)")
    cache.add_argument("--block-size", type=int, help="(default: as many as slots, at most 512)")
    cache.add_argument(
        "--positions", default="absolute", choices=["absolute", "slot"], help="of lococo; slot: not stretched"
    )
    cache.add_argument("--heads", help="folder or Hub id of heads to start from; sets slots and block of lococo")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--dataset", nargs="+", help="Hub ids, files or folders (default: togethercomputer/RedPajama-Data-1T-Sample)"
    )
    text.add_argument("--text-column", default="text", help="(default: %(default)s)")
    text.add_argument("--windows", type=int, help="training windows (default: as many as the steps read)")
    text.add_argument("--boundaries", default="reset", choices=["reset", "none"], help="between documents")
    text.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    how = parser.add_argument_group("training")
    how.add_argument("--steps", type=int, default=1000, help="(default: %(default)s)")
    how.add_argument("--windows-per-step", type=int, default=8, help="global batch (default: %(default)s)")
    how.add_argument("--learning-rate", type=float, default=5e-5, help="of all but heads (default: %(default)s)")
    how.add_argument("--heads-learning-rate", type=float, default=1e-3, help="(default: %(default)s)")
    how.add_argument("--lora-rank", type=int, default=8, help="(default: %(default)s)")
    how.add_argument("--lora-alpha", type=int, default=16, help="(default: %(default)s)")
    how.add_argument(
        "--depth", type=int, default=2, help="compressions that back-propagation goes through; 0: all (default: 2)"
    )
    how.add_argument("--save-every", type=int, default=100, help="steps between checkpoints (default: %(default)s)")
    how.add_argument("--deepspeed", nargs="?", const="zero2", help="ZeRO-2, or a DeepSpeed config file")
    how.add_argument("--fsdp", action="store_true", help="shard the model over the processes (FSDP2)")
    how.add_argument("--time-limit", type=float, help="seconds; the same command with --resume goes on")
    parser.add_argument("--merge", type=Path, metavar="FOLDER", help="write a plain checkpoint and its heads, too")
    parser.add_argument("--work-dir", type=Path, help="state of the run (default: OUTPUT.work)")
    parser.add_argument(
        "--cache-dir", type=Path, default=Path("~/.cache/lococo"), help="token windows (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in the work folder")
    parser.set_defaults(run=_extend)


def _extend(options: argparse.Namespace) -> None:
    from lococo.data.windows import DEFAULT_DATASET
    from lococo.extension.extend import plan_extension
    from lococo.training.runs import this_process

    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError("accelerate launch was told to use FSDP: leave that out and give lococo extend --fsdp")
    if options.heads is not None and options.method != "lococo":
        raise ValueError(f"--heads is for --method lococo, got --method {options.method}")
    deepspeed = deepspeed_file(options.deepspeed)
    if options.fsdp and deepspeed:
        raise ValueError("--fsdp and --deepspeed both spread the training over the processes: give one of them")
    names = ["factor", "rope_type", "method", "num_slots", "block_size", "positions", "heads", "length", "boundaries"]
    names += ["text_column", "seed", "work_dir", "cache_dir", "resume", "time_limit"]
    names += ["steps", "windows_per_step", "learning_rate", "heads_learning_rate", "save_every"]
    plan = plan_extension(
        options.dataset or [DEFAULT_DATASET],
        output=options.output,
        original_length=options.original_length or longest_text(options),
        num_windows=options.windows,
        merge_into=options.merge,
        shard=options.fsdp,
        training_arguments={"deepspeed": deepspeed} if deepspeed else None,
        command=options.command_line,
        rank=options.lora_rank,
        alpha=options.lora_alpha,
        depth=options.depth or None,
        **{name: getattr(options, name) for name in names},
    )
    process = this_process(on_cpu=options.device == "cpu")  # "cuda" is its own GPU from here on
    model, tokenizer = load(argparse.Namespace(**{**vars(options), "device": "cpu"}) if options.fsdp else options)
    try:
        rows = plan.run(model, tokenizer).rows
    except OutOfTime:
        process.print(f"out of time: the same command with --resume goes on from {plan.work}")
        return
    process.print(f"{options.output}: loss {rows[0]['loss']:.3f} at step 1, {rows[-1]['loss']:.3f} at the end")


def deepspeed_file(wanted: str | None) -> str | None:
    """The DeepSpeed config that an option names, ``zero2`` for ours.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ImportError
        If DeepSpeed is not installed.
    """
    from lococo.training.window_trainer import DEEPSPEED_ZERO2

    path = str(DEEPSPEED_ZERO2) if wanted == "zero2" else wanted
    if path and not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such DeepSpeed config file")
    if path and not importlib.util.find_spec("deepspeed"):
        raise ImportError("--deepspeed needs the package deepspeed: pip install deepspeed")
    return path
