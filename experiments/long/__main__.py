"""The command, and the rows it writes."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoConfig

from experiments.common import add_model_options, command_of, load, load_tokenizer
from experiments.long.answers import answers
from experiments.long.items import Item, Task
from experiments.long.metrics import aggregate
from experiments.long.needles import BABILONG, RULER, babi_file, generated_task
from experiments.long.prompts import Prompts
from experiments.long.sets import LONGBENCH, SCROLLS, SETS
from lococo.data.documents import documents
from lococo.evaluation.needles import Filler
from lococo.evaluation.tasks import picture_of
from lococo.files import write_whole
from lococo.methods import Run, plan_runs
from lococo.results.journal import Journal
from lococo.results.plots import GAP, HeatMap, picture
from lococo.results.tables import beside, label_of, markdown_table, write_result

GROUPS = {"scrolls": tuple(SCROLLS), "longbench": tuple(LONGBENCH), "ruler": tuple(RULER), "babilong": BABILONG}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(prog="python -m experiments.long", description=__doc__)
    add_model_options(parser)
    parser.add_argument(
        "--tasks", nargs="+", required=True, help=f"{', '.join(GROUPS)} or one of theirs (scrolls-qasper), squality"
    )
    parser.add_argument("--data-dir", type=Path, help="folder of the sets' files (default: the sets of the Hub)")
    parser.add_argument("--methods", default="full,streaming,h2o,lococo-uncalibrated", help="(default: %(default)s)")
    parser.add_argument("--heads", nargs="+", default=[], help="folders or Hub ids of trained heads to compare")
    parser.add_argument("--num-slots", type=int, nargs="+", default=[512], help="(default: 512)")
    parser.add_argument("--block-size", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--limit", type=int, help="items per set, drawn by the seed (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, help="at most so many per answer (default: as the set says)")
    parser.add_argument("--chat", action="store_true", help="put prompts into the model's chat template")
    parser.add_argument(
        "--max-length", type=int, help="tokens of prompt and answer the full cache may hold (default: the model's)"
    )
    parser.add_argument(
        "--truncate",
        choices=["middle", "middle-full"],
        help="leave out the middle of documents that are too long, for all methods or for full alone",
    )
    generated = parser.add_argument_group("ruler and babilong")
    generated.add_argument("--lengths", type=int, nargs="+", default=[4096], help="tokens (default: 4096)")
    generated.add_argument("--items", type=int, default=22, help="per task and length (default: %(default)s)")
    generated.add_argument("--filler", type=Path, nargs="+", default=[], help=".txt or .jsonl (default: made up)")
    parser.add_argument("--output", type=Path, default=Path("docs/results/long"), help="(default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer what the command line asks."""
    options = parse(arguments)
    names = task_names(options.tasks)
    runs = plan_runs(options.methods.split(","), options.num_slots, options.block_size, list(map(str, options.heads)))
    _check(options, names)
    sets = [SETS[name].task(name, options.data_dir, options.limit, options.seed) for name in names if name in SETS]
    filler = Filler(document["text"] for document in documents(list(map(str, options.filler))))
    prompts = Prompts(load_tokenizer(options), options.chat)
    generated = [
        generated_task(name, prompts, filler, length, options.items, options.seed, options.data_dir)
        for name in names
        if name not in SETS
        for length in options.lengths
    ]
    tasks = [_shorter_answers(task, options.max_new_tokens) for task in (*sets, *generated)]
    limit = options.max_length or _longest_text(options)
    texts = [(task, fitting(prompts, task, runs, limit, options.truncate)) for task in tasks]
    model, _ = load(options)
    rows = run(model, prompts, texts, runs, options.output, command_of("long", arguments))
    print(markdown_table(rows))


def task_names(wanted: Sequence[str]) -> list[str]:
    """Names of tasks, groups in place of their members.

    Raises
    ------
    ValueError
        If a name is not known.
    """
    known = {**{name: (name,) for name in (*SETS, *RULER, *BABILONG)}, **GROUPS}
    for name in wanted:
        if name not in known:
            raise ValueError(f"unknown task {name!r}: choose from {', '.join(sorted(known))}")
    return list(dict.fromkeys(each for name in wanted for each in known[name]))


def _check(options: argparse.Namespace, names: Sequence[str]) -> None:
    for option in ("limit", "items", "max_new_tokens", "max_length"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be at least 1, got {value}")
    if any(name in SETS and SETS[name].metric.startswith("rouge") for name in names):
        _need("rouge_score", "rouge-score")
    _need("matplotlib", "matplotlib")
    for name in names:
        if name in BABILONG:
            babi_file(name, options.data_dir)


def _need(module: str, package: str) -> None:
    if not importlib.util.find_spec(module):
        raise ImportError(f"this needs the package {package}: pip install {package}")


def _longest_text(options: argparse.Namespace) -> int:
    """Tokens that the model was made for."""
    config = AutoConfig.from_pretrained(options.model, gguf_file=options.gguf_file)
    return config.get_text_config().max_position_embeddings


def _shorter_answers(task: Task, max_new_tokens: int | None) -> Task:
    return dataclasses.replace(task, max_new_tokens=min(task.max_new_tokens, max_new_tokens or task.max_new_tokens))


Texts = dict[bool, tuple[Item, ...]]


def fitting(prompts: Prompts, task: Task, runs: Sequence[Run], limit: int, truncate: str | None) -> Texts:
    """Items for the full cache (True) and for caches of fixed size (False).

    Parameters
    ----------
    limit : int
        Tokens of prompt and answer.
    truncate : "middle", "middle-full" or None
        Cut longer ones for every method, for the full cache alone, or not at all.

    Raises
    ------
    ValueError
        If a prompt is too long for the full cache, and none may be cut.
    """
    room = limit - task.max_new_tokens
    longest = max(len(prompts.ids(item)) for item in task.items)
    if longest <= room:
        return {True: task.items, False: task.items}
    if truncate is None and any(run.config is None for run in runs):
        raise ValueError(
            f"{task.name}: a prompt has {longest} tokens, and {task.max_new_tokens} for its answer make more than the "
            f"{limit} of the full cache; choose --truncate middle, another --max-length, or leave out the method full"
        )
    cut = task.items if truncate is None else tuple(prompts.cut(item, room) for item in task.items)
    return {True: cut, False: cut if truncate == "middle" else task.items}


def run(
    model: Any,
    prompts: Prompts,
    texts: Sequence[tuple[Task, Texts]],
    runs: Sequence[Run],
    output: Path,
    command: str,
) -> list[dict[str, Any]]:
    """Answer, score, write ``<output>.json``, ``.md`` and pictures, and return the rows. A killed run resumes."""
    journal = Journal(beside(output, ".partial.jsonl"))
    rows, needles = [], []
    for each in tqdm(runs, desc="methods", disable=None):
        with each.applied(model):
            for task, by_cache in texts:
                items = by_cache[each.config is None]
                found = answers(model, prompts, task, items, each, journal)
                shown = tqdm(found, desc=f"{each.name} {task.name}", total=len(items), leave=False, disable=None)
                figures = list(shown)
                rows.append(_row(prompts, task, items, each, figures))
                needles += _by_depth(rows[-1], items, figures)
    write_result(output, command, model.device, rows, needles=needles)
    write_whole(beside(output, ".png"), picture_of(rows, ("task", "length")))
    if needles:
        write_whole(beside(output, "_needles.png"), needles_picture(needles))
    journal.finish()
    return rows


def _row(
    prompts: Prompts, task: Task, items: Sequence[Item], each: Run, figures: Sequence[Sequence[float]]
) -> dict[str, Any]:
    score, error = aggregate(figures)
    return {
        "task": task.name,
        "source": task.source,
        **each.columns,
        "length": task.length or max(len(prompts.ids(item)) for item in items),
        "items": len(items),
        "metric": task.metric,
        "score": score,
        "stderr": error,
    }


def _by_depth(row: dict[str, Any], items: Sequence[Item], figures: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    by_depth = defaultdict(list)
    for item, (score, *_) in zip(items, figures, strict=True):
        if item.depth is not None:
            by_depth[item.depth].append(score)
    what = {name: row[name] for name in ("task", "method", "num_slots", "length")}
    return [
        {**what, "depth": depth, "items": len(scores), "score": sum(scores) / len(scores)}
        for depth, scores in by_depth.items()
    ]


def needles_picture(needles: Sequence[dict[str, Any]]) -> bytes:
    """A heat map per task and method: what was found, by depth of the needle and length of the text."""
    found = {(row["task"], label_of(row), row["depth"], row["length"]): row["score"] for row in needles}
    tasks = list(dict.fromkeys(row["task"] for row in needles))
    methods = list(dict.fromkeys(map(label_of, needles)))
    lengths, depths = (sorted({row[name] for row in needles}) for name in ("length", "depth"))

    def panel(task: str, method: str) -> HeatMap:
        values = [[found.get((task, method, depth, length), GAP) for length in lengths] for depth in depths]
        names = {"xticks": list(map(str, lengths)), "yticks": [f"{depth:.0%}" for depth in depths]}
        return HeatMap(values, f"{task}\n{method}", **names, limits=(0, 1), colors="RdYlGn")

    grid = [[panel(task, method) for method in methods] for task in tasks]
    size = (1.5 + 2.4 * len(methods), 0.6 + 2.4 * len(tasks))
    return picture(grid, size, xlabel="tokens", ylabel="depth of the needle")


if __name__ == "__main__":
    main()
