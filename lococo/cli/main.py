"""The command line: ``lococo generate | calibrate | extend | eval | inspect | bench | convert-chatglm``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import lococo
from lococo.cli.ablate import add_ablate_command
from lococo.cli.bench import add_bench_commands
from lococo.cli.evaluate import add_eval_commands
from lococo.cli.extend import add_extend_command, deepspeed_file
from lococo.cli.inspect import add_inspect_command
from lococo.config import LoCoCoConfig
from lococo.loading import add_model_options, load
from lococo.methods import METHODS, as_method, method_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Bad input ends with one line on stderr and status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    options.command_line = shlex.join(["lococo", *arguments])
    try:
        options.run(options)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"lococo: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lococo", description="Long texts in a fixed number of key-value slots.")
    parser.add_argument("--version", action="version", version=f"lococo {lococo.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="read a long prompt and answer"))
    _add_calibrate(commands.add_parser("calibrate", help="train heads for a model"))
    add_extend_command(commands.add_parser("extend", help="train a model to read longer texts"))
    evaluations = commands.add_parser("eval", help="measure quality")
    measures = evaluations.add_subparsers(required=True, metavar="WHAT")
    add_eval_commands(measures)
    add_ablate_command(measures.add_parser("ablate", help="memory size, kernel size and kinds of slots compared"))
    add_inspect_command(commands.add_parser("inspect", help="a page that shows which tokens each slot holds"))
    benchmarks = commands.add_parser("bench", help="measure speed and memory")
    add_bench_commands(benchmarks.add_subparsers(required=True, metavar="WHAT"))
    _add_convert_chatglm(
        commands.add_parser("convert-chatglm", help="write a ChatGLM2 or ChatGLM3 checkpoint as Transformers' own GLM")
    )
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
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


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--output", type=Path, required=True, help="heads folder to write")
    parser.add_argument("--num-slots", type=int, default=LoCoCoConfig.num_slots, help="(default: %(default)s)")
    parser.add_argument("--block-size", type=int, help="(default: as many as slots, at most 512)")
    parser.add_argument("--recipe", default="default", choices=["default", "paper"], help="(default: %(default)s)")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--dataset", nargs="+", help="Hub ids, files or folders (default: togethercomputer/RedPajama-Data-1T-Sample)"
    )
    text.add_argument("--text-column", default="text", help="(default: %(default)s)")
    text.add_argument("--length", type=int, default=4096, help="tokens per window (default: %(default)s)")
    text.add_argument("--first", type=int, default=512, help="first token that is measured (default: %(default)s)")
    text.add_argument("--windows", type=int, help="training windows (default: as many as the recipe reads)")
    text.add_argument("--heldout", type=int, default=8, help="windows to measure on (default: %(default)s)")
    text.add_argument("--boundaries", default="reset", choices=["reset", "none"], help="between documents")
    text.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    how = parser.add_argument_group("how (default: as the recipe says)")
    how.add_argument(
        "--objective", choices=["distill", "next-token", "none"], help="end-to-end training; none: no such"
    )
    how.add_argument("--steps", type=int, help="of end-to-end training")
    how.add_argument("--windows-per-step", type=int, help="global batch")
    how.add_argument("--learning-rate", type=float)
    how.add_argument("--backprop-tokens", type=int, help="length of back-propagation; 0: the whole window")
    how.add_argument("--budget-texts", type=int, help="texts for the slots of each KV head; 0: the same for all")
    how.add_argument("--local-steps", type=int, help="layer-local training first, so many texts per layer; 0: none")
    how.add_argument("--local-texts", type=int, help="texts recorded for it")
    how.add_argument("--measure-every", type=int, help="steps between two looks at the gap ratio")
    how.add_argument("--deepspeed", nargs="?", const="zero2", help="ZeRO-2, or a DeepSpeed config file")
    parser.add_argument("--work-dir", type=Path, help="state of the run (default: OUTPUT.work)")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=Path("~/.cache/lococo"),
        help="token windows and figures (default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in the work folder")
    parser.set_defaults(run=_calibrate)


def _add_convert_chatglm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of a ChatGLM2 or ChatGLM3 checkpoint")
    parser.add_argument("destination", metavar="DST", type=Path, help="folder to write")
    parser.set_defaults(run=_convert_chatglm)


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


def _calibrate(options: argparse.Namespace) -> None:
    from lococo.data.windows import DEFAULT_DATASET
    from lococo.training.calibrate import plan_calibration
    from lococo.training.runs import this_process

    names = ["objective", "backprop_tokens", "local_steps", "steps", "windows_per_step", "learning_rate"]
    names += ["budget_texts", "local_texts", "measure_every"]
    deepspeed = deepspeed_file(options.deepspeed)
    plan = plan_calibration(
        options.dataset or [DEFAULT_DATASET],
        output=options.output,
        num_slots=options.num_slots,
        block_size=options.block_size,
        recipe=options.recipe,
        length=options.length,
        first=options.first,
        num_windows=options.windows,
        num_heldout=options.heldout,
        boundaries=options.boundaries,
        text_column=options.text_column,
        seed=options.seed,
        work_dir=options.work_dir,
        cache_dir=options.cache_dir,
        resume=options.resume,
        training_arguments={"deepspeed": deepspeed} if deepspeed else None,
        command=options.command_line,
        **{name: getattr(options, name) for name in names},
    )
    process = this_process(on_cpu=options.device == "cpu")  # "cuda" is its own GPU from here on
    made = plan.run(*load(options))
    if process.is_main_process:
        ratio = "-" if made.gap_ratio is None else f"{made.gap_ratio:.3f}"
        print(f"{options.output}: gap ratio {ratio} (0 is the full cache, 1 is H2O, - where H2O loses nothing)")


def _convert_chatglm(options: argparse.Namespace) -> None:
    from lococo.models.chatglm.convert import convert_chatglm

    convert_chatglm(options.source, options.destination)
    print(f"{options.destination}: AutoModelForCausalLM and AutoTokenizer load it without remote code")


if __name__ == "__main__":
    sys.exit(main())
