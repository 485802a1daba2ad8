"""Is a patched model with enough slots, asked through ``lococo``, the model that lm-eval itself would have asked?

Every choice of some few-shot questions gets its log-likelihood twice: from lm-eval's own model of Transformers, not
patched, a prompt at a time; and from ``lococo`` with more slots than a prompt has tokens, shared examples read once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from experiments.common import add_model_options, command_of, load
from lococo.evaluation.few_shot import FewShotTask, read_tasks
from lococo.evaluation.harness import LoCoCoLM, PrefixLM
from lococo.results.tables import write_result

HOW = (
    "Log-likelihood of every choice by lm-eval's own HFLM on the unpatched model and by LoCoCoLM with num_slots of at "
    "least a prompt's tokens: largest difference in nats, choices that are greedy for one only, questions answered "
    "otherwise."
)


def options_of_command() -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_options(parser)
    parser.add_argument("--tasks", nargs="+", default=["arc_easy:5", "winogrande:5"], metavar="NAME:SHOTS")
    parser.add_argument(
        "--include-path", type=Path, help="folder of task files in lm-eval's format (default: the Hub)"
    )
    parser.add_argument("--num-slots", type=int, default=1024, help="(default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--limit", type=int, default=25, help="questions per task (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/results/lm_eval_agreement"))
    return parser.parse_args()


def scores_of(lm: Any, prompts: list[list[Instance]]) -> list[list[tuple[float, bool]]]:
    """(log-likelihood, whether greedy) of every choice of every question."""
    return [
        lm.loglikelihood([Instance(each.request_type, each.doc, each.arguments, each.idx) for each in choices])
        for choices in prompts
    ]


def best(scores: list[tuple[float, bool]]) -> int:
    """The choice that is most likely."""
    return max(range(len(scores)), key=lambda choice: scores[choice][0])


def compare(
    task: FewShotTask, prompts: list[list[Instance]], theirs: Any, ours: Any, num_slots: int
) -> dict[str, Any]:
    """One row of the result."""
    longest = max(ours.tokens_read(each.args)[1] for choices in prompts for each in choices)
    if longest > num_slots:
        raise SystemExit(f"{task.name}: a prompt has {longest} tokens, more than the {num_slots} slots")
    expected, found = scores_of(theirs, prompts), scores_of(ours, prompts)
    pairs = [pair for both in zip(expected, found, strict=True) for pair in zip(*both, strict=True)]
    return {
        "task": task.name,
        "shots": task.shots,
        "num_slots": num_slots,
        "longest_prompt": longest,
        "questions": len(prompts),
        "choices": len(pairs),
        "largest_difference": max(abs(one - other) for (one, _), (other, _) in pairs),
        "greedy_for_one_only": sum(one != other for (_, one), (_, other) in pairs),
        "answered_otherwise": sum(best(one) != best(other) for one, other in zip(expected, found, strict=True)),
    }


def main() -> None:
    """Ask both, and write the result."""
    options = options_of_command()
    tasks = read_tasks(options.tasks, options.include_path, seed=0)
    model, tokenizer = load(options)
    plain = PrefixLM(model, tokenizer=tokenizer)
    asked = [[task.prompt(plain, question).requests for question in task.questions(options.limit)] for task in tasks]
    theirs = HFLM(model, tokenizer=tokenizer, backend="causal")
    untouched, _ = load(options)
    ours = LoCoCoLM(untouched, num_slots=options.num_slots, block_size=options.block_size, tokenizer=tokenizer)
    rows = [
        compare(task, prompts, theirs, ours, options.num_slots) for task, prompts in zip(tasks, asked, strict=True)
    ]
    command = command_of("lm_eval_agreement")
    write_result(options.output, command, model.device, rows, how=HOW)
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
