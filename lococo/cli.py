"""The command line: ``lococo generate | eval | bench``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import lococo
from lococo.config import LoCoCoConfig
from lococo.evaluation.methods import METHODS, as_method, method_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Bad input ends with one line on stderr and status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    options.command_line = shlex.join(["lococo", *arguments])
    try:
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"lococo: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lococo", description="Long texts in a fixed number of key-value slots.")
    parser.add_argument("--version", action="version", version=f"lococo {lococo.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="read a long prompt and answer"))
    evaluations = commands.add_parser("eval", help="measure quality").add_subparsers(required=True, metavar="WHAT")
    _add_perplexity(evaluations.add_parser("ppl", help="perplexity by domain and method"))
    benchmarks = commands.add_parser("bench", help="measure speed and memory").add_subparsers(
        required=True, metavar="WHAT"
    )
    _add_memory(benchmarks.add_parser("memory", help="cache bytes against tokens read"))
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument("--gguf-file", help="GGUF file in that folder")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, ... (default: the checkpoint's, fp32 on CPU)"
    )


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt-file", type=Path, help="text file to read")
    prompt.add_argument("--prompt", help="text to read")
    parser.add_argument("--question", help="asked after the text; with it the model's chat template is used")
    parser.add_argument("--max-prompt-tokens", type=int, help="read at most so many tokens of the text")
    parser.add_argument("--method", default="lococo-uncalibrated", choices=METHODS, help="(default: %(default)s)")
    parser.add_argument("--heads", help="folder or Hub id of trained heads; sets method, slots and block")
    parser.add_argument("--num-slots", type=int, default=LoCoCoConfig.num_slots, help="(default: %(default)s)")
    parser.add_argument("--block-size", type=int, help="(default: as many as slots, at most 512)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.set_defaults(run=_generate)


def _add_perplexity(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help=".jsonl or .txt files")
    parser.add_argument("--methods", default="full,streaming,h2o,h2o-slot,lococo-uncalibrated")
    parser.add_argument("--num-slots", type=int, nargs="+", default=[128], help="(default: 128)")
    parser.add_argument("--block-size", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens per text (default: %(default)s)")
    parser.add_argument("--first", type=int, default=512, help="first token that counts (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=6, help="texts per file (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/results/perplexity"), help="(default: %(default)s)")
    parser.set_defaults(run=_perplexity)


def _add_memory(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--methods", default="full,h2o,lococo-uncalibrated")
    parser.add_argument("--num-slots", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16384, help="(default: %(default)s)")
    parser.add_argument("--step", type=int, default=512, help="tokens between two readings (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/results/memory"), help="(default: %(default)s)")
    parser.set_defaults(run=_memory)


def load(options: argparse.Namespace):
    """Model and tokenizer named by the options."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = options.dtype
    if dtype == "auto" and device == "cpu":
        dtype = "float32"  # half precision is many times slower there
    extra = {"gguf_file": options.gguf_file} if options.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(options.model, **extra)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, **extra)
    return model.to(device).eval(), tokenizer


def prompt_ids(tokenizer, text: str, question: str | None = None, max_tokens: int | None = None):
    """(1, tokens) ids of a text, cut to its first tokens, with the question after it in the model's chat format.

    Raises
    ------
    ValueError
        If there is a question and the tokenizer has no chat template, or the text is empty.
    """
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :max_tokens]
    if not ids.shape[1]:
        raise ValueError("the prompt is empty")
    if question is None:
        return ids
    if not tokenizer.chat_template:
        raise ValueError("--question needs a model with a chat template; put the question into the prompt instead")
    content = f"{tokenizer.decode(ids[0], skip_special_tokens=True)}\n\n{question}"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return chat["input_ids"]


def _generate(options: argparse.Namespace) -> None:
    from transformers import TextStreamer

    from lococo.generation import read_and_answer

    text = options.prompt if options.prompt is not None else options.prompt_file.read_text(encoding="utf-8")
    config = method_config(options.method, options.num_slots, options.block_size or min(options.num_slots, 512))
    model, tokenizer = load(options)
    ids = prompt_ids(tokenizer, text, options.question, options.max_prompt_tokens).to(model.device)
    if options.heads:
        lococo.patch_model(model, heads=options.heads)
        config = None
    with as_method(model, config):
        reading = read_and_answer(
            model,
            ids,
            max_new_tokens=options.max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            do_sample=False,
        )
    print(f"\n{reading.summary()}")


def _perplexity(options: argparse.Namespace) -> None:
    from lococo.evaluation.ppl_table import run
    from lococo.evaluation.results import markdown_table

    model, tokenizer = load(options)
    rows = run(
        model,
        tokenizer,
        options.data,
        options.methods.split(","),
        options.num_slots,
        options.block_size,
        options.length,
        options.first,
        options.documents,
        options.output,
        options.command_line,
    )
    print(markdown_table([row for row in rows if row["domain"] == "all"]))


def _memory(options: argparse.Namespace) -> None:
    from lococo.bench import cache_growth

    model, _ = load(options)
    cache_growth(
        model,
        options.methods.split(","),
        options.num_slots,
        options.block_size,
        options.tokens,
        options.step,
        options.output,
        options.command_line,
    )


if __name__ == "__main__":
    sys.exit(main())
