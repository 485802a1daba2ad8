"""The command ``lococo eval needles``."""

from __future__ import annotations

import argparse
from pathlib import Path

from lococo.data.documents import documents
from lococo.evaluation.needles import Filler, by_length, evaluate_needles, make_needles
from lococo.loading import add_model_options, load, load_tokenizer
from lococo.methods import plan_runs
from lococo.results.tables import markdown_table


def add_needles_command(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_model_options(parser)
    parser.add_argument("--methods", default="full,streaming,h2o,lococo-uncalibrated", help="(default: %(default)s)")
    parser.add_argument("--heads", nargs="+", default=[], help="folders or Hub ids of trained heads to compare")
    parser.add_argument("--num-slots", type=int, nargs="+", default=[512], help="(default: 512)")
    parser.add_argument("--block-size", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096], help="tokens (default: 4096)")
    parser.add_argument("--depths", type=int, default=11, help="places of the needle (default: %(default)s)")
    parser.add_argument("--items", type=int, default=1, help="of each length and depth (default: %(default)s)")
    parser.add_argument("--distractors", type=int, default=0, help="other needles (default: %(default)s)")
    parser.add_argument("--data", nargs="+", default=[], help="files of texts to hide needles in (default: made up)")
    parser.add_argument("--chat", action="store_true", help="put prompts into the model's chat template")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("needles"), help="(default: %(default)s)")
    parser.set_defaults(run=_needles)


def _needles(options: argparse.Namespace) -> None:
    runs = plan_runs(options.methods.split(","), options.num_slots, options.block_size, options.heads)
    needles = make_needles(
        load_tokenizer(options),
        Filler(document["text"] for document in documents(options.data)),
        options.lengths,
        depths=options.depths,
        items=options.items,
        distractors=options.distractors,
        chat=options.chat,
        seed=options.seed,
    )
    model, tokenizer = load(options)
    rows = evaluate_needles(model, tokenizer, needles, runs, options.output, options.command_line)
    print(markdown_table(by_length(rows)))
