"""What each part of calibrated heads is worth: the same heads with one part at a time switched off, whole texts read.

python -m experiments.parts --model folder --data texts.jsonl --heads calibrated-heads

Nothing is calibrated anew: without learned scores slots go by the distant score, without slots per head all
heads have as many, without centroids their slots go to heavy hitters. Bits are the other way about: they are saved,
not added. Writes docs/results/parts.{json,md,png}; a stopped run goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.common import add_model_options, command_of, load
from lococo.config import LoCoCoConfig
from lococo.data.texts import Cut, read_windows
from lococo.digest import model_digest
from lococo.evaluation.equal_bytes import bytes_per_head
from lococo.evaluation.losses import ALL_DOMAINS, Losses, digest, measure_losses
from lococo.evaluation.perplexity import loss_row
from lococo.files import write_whole
from lococo.heads import read_heads_config
from lococo.methods import Run, plan_runs
from lococo.metrics import CONFIDENCE, RESAMPLES, mean_interval
from lococo.patch import patched
from lococo.results.journal import Journal
from lococo.results.plots import Bars, Series, picture
from lococo.results.tables import beside, markdown_table, write_result
from lococo.state import patch_of

FIRST = 512
REPEATS = 3  # readings, of which the fastest counts
WHOLE = "all parts"


@dataclasses.dataclass(frozen=True)
class Part(Run):
    """Calibrated heads without one of their parts, whose config is ``config``."""

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with all but this part of the heads."""
        assert self.config is not None and self.heads is not None
        weights = self.weights(model)
        with patched(model, self.config):
            patch = patch_of(model)
            for name, modules in weights.items():
                for layer, module in getattr(patch, name).items():
                    module.load_state_dict(modules[layer])
            yield model

    def weights(self, model: nn.Module) -> dict[str, dict[int, dict[str, torch.Tensor]]]:
        """Of the whole heads, what this part's heads and networks have, by layer."""
        with patched(model, heads=self.heads):
            patch = patch_of(model)
            assert self.config is not None
            is_like = {"heads": self.config.has_mass, "networks": self.config.score == patch.config.score}
            return {
                name: {layer: module.state_dict() for layer, module in getattr(patch, name).items()}
                for name, is_there in is_like.items()
                if is_there
            }


def parts(heads: str) -> list[Run]:
    """The heads, and the same without each of their parts."""
    config = read_heads_config(heads)
    without: dict[str, LoCoCoConfig] = {
        "learned scores": dataclasses.replace(config, score="distant"),
        "slots per head": dataclasses.replace(config, slots_per_head=None),
        "centroids": dataclasses.replace(config, num_heavy=config.num_heavy + config.num_fused),  # type: ignore
        "the weight of centroids": dataclasses.replace(config, mass_bias=False),
    }
    return [
        Run(WHOLE, config, heads),
        *(Part(f"without {name}", each, heads) for name, each in without.items()),
        Part("in 8 bits", dataclasses.replace(config, slot_bits=8), heads),
    ]


@torch.no_grad()
def cost(model: Any, run: Run, ids: torch.Tensor) -> dict[str, float]:
    """CPU seconds of reading a text."""
    with run.applied(model):
        seconds = []
        for _ in range(REPEATS):
            started = time.process_time()
            model(ids, use_cache=True, logits_to_keep=1)
            seconds.append(time.process_time() - started)
    return {"seconds": min(seconds)}


def worth(losses: Losses, run: Run, group: tuple[int, str]) -> dict[str, float | None]:
    """What a variant of heads loses more than the whole of them, nats per token, with its interval over documents."""
    whole = next((each for each in losses if (each.name, each.heads) == (WHOLE, run.heads)), None)
    if run.heads is None or whole is None:
        return {"worth": None, "worth_low": None, "worth_high": None}
    measured, base = losses[run][group], losses[whole][group]
    nll, tokens = measured.table
    low, high = mean_interval(nll - base.table[0], tokens) or (None, None)
    return {"worth": measured.mean - base.mean, "worth_low": low, "worth_high": high}


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """What every variant loses over all domains, a bar for each number of slots."""
    shown = [row for row in rows if row["domain"] == ALL_DOMAINS and row["worth"] is not None]
    names = [name for name in dict.fromkeys(row["method"] for row in shown) if name != WHOLE]

    def end(row: dict[str, Any], name: str) -> float:
        return row["worth"] if row[name] is None else row[name]

    series = []
    for slots in dict.fromkeys(row["num_slots"] for row in shown):
        found = {row["method"]: row for row in shown if row["num_slots"] == slots}
        bars = [found[name] for name in names]
        low, high = ([end(row, name) for row in bars] for name in ("worth_low", "worth_high"))
        series.append(Series(f"{slots} slots", [row["worth"] for row in bars], None, low, high))
    panel = Bars(names, series, xlabel="lost by switching it off (nats per token)")
    write_whole(path, picture([[panel]], (7, panel.height)))


def parse() -> argparse.Namespace:
    """The options, checked before anything is loaded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help=".jsonl or .txt files of held-out texts")
    parser.add_argument("--heads", nargs="+", required=True, help="folders or Hub ids of calibrated heads")
    parser.add_argument("--length", type=int, default=4096, help="tokens per window (default: %(default)s)")
    parser.add_argument(
        "--documents", type=int, default=4, help="windows per file, one of each document (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results/parts"), help="(default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Measure, and write the result."""
    options = parse()
    # What heads are compared with has their slots and their blocks.
    compared = [run for run in plan_runs(["full", "h2o", "h2o-slot"], heads=options.heads) if run.heads is None]
    runs = [*compared, *(run for heads in options.heads for run in parts(heads))]
    model, tokenizer = load(options)
    cut = Cut((options.length,), FIRST, options.documents, per_document=1)
    windows = read_windows(options.data, tokenizer, cut)
    journal = Journal(beside(options.output, ".partial.jsonl"), of=model_digest(model))
    losses = measure_losses(model, windows, runs, FIRST, journal)
    costs = {
        run: journal.measure(
            (run.name, run.identity(), digest(windows[0].ids)), functools.partial(cost, model, run, windows[0].ids)
        )
        for run in runs
    }
    held = {run: bytes_per_head(model, run, options.length) for run in runs}
    rows = [
        {**loss_row(losses, run, group), **worth(losses, run, group), **costs[run], "bytes_per_head": held[run]}
        for run, groups in losses.items()
        for group in groups
    ]
    shown = ["domain", "method", "num_slots", "nll", "gap_ratio", "gap_low", "gap_high"]
    shown += ["worth", "worth_low", "worth_high", "seconds", "bytes_per_head"]
    how = (
        f"Windows of {options.length} tokens, those from the {FIRST}th on count. worth: nats per token that are lost "
        f"without the part, worth_low and worth_high its {CONFIDENCE:.0%} interval, {RESAMPLES} bootstrap resamples "
        f"of the documents. seconds: CPU time of reading the first window, the fastest of {REPEATS}; bytes_per_head: "
        f"bytes of the cache by layer and KV head, in {str(model.dtype)[6:]}."
    )
    table = [{name: row[name] for name in shown} for row in rows if row["domain"] == ALL_DOMAINS]
    facts: dict[str, Any] = {"how": how, "seconds": journal.seconds, "commits": journal.commits}
    write_result(options.output, command_of("parts"), model.device, rows, table=table, **facts)
    plot(rows, beside(options.output, ".png"))
    journal.finish()
    print(markdown_table(table))


if __name__ == "__main__":
    main()
