"""What each part of calibrated heads is worth: the same heads with one part at a time switched off.

python -m experiments.parts --model folder --data texts.jsonl --heads calibrated-heads

Nothing is calibrated anew: without learned scores slots go by the distant score, without slots per head all
heads have as many, without centroids their slots go to heavy hitters. Writes docs/results/parts.{json,md,png}; a
stopped run goes on.
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
from lococo.evaluation.losses import ALL_DOMAINS, measure_losses
from lococo.evaluation.perplexity import loss_row
from lococo.files import write_whole
from lococo.heads import read_heads_config
from lococo.methods import Run, plan_runs
from lococo.patch import patched
from lococo.results.journal import Journal
from lococo.results.plots import Bars, Series, picture
from lococo.results.tables import beside, markdown_table, write_result
from lococo.state import patch_of

BLOCK_SIZE = 128
FIRST = 512
REPEATS = 3  # readings, of which the fastest counts


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
    return [Run("all parts", config, heads), *(Part(f"without {name}", each, heads) for name, each in without.items())]


@torch.no_grad()
def cost(model: Any, run: Run, ids: torch.Tensor) -> dict[str, float]:
    """CPU seconds of reading a text, and bytes of its cache per layer and KV head."""
    with run.applied(model):
        seconds = []
        for _ in range(REPEATS):
            started = time.process_time()
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
            seconds.append(time.process_time() - started)
    sizes = [layer.keys.nbytes + layer.values.nbytes if run.config is None else layer.nbytes for layer in cache.layers]
    return {"seconds": min(seconds), "bytes": sum(sizes) / (len(sizes) * model.config.num_key_value_heads)}


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The gap ratio of every variant over all domains."""
    shown = [row for row in rows if row["domain"] == ALL_DOMAINS and row["gap_ratio"] is not None]
    bars = Bars(
        [row["method"] for row in shown],
        [Series("", [row["gap_ratio"] for row in shown])],
        xlabel="gap ratio: 0 is the full cache, 1 is H2O",
    )
    write_whole(path, picture([[bars]], (7, bars.height)))


def parse() -> argparse.Namespace:
    """The options, checked before anything is loaded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help=".jsonl or .txt files of held-out texts")
    parser.add_argument("--heads", required=True, help="folder or Hub id of calibrated heads")
    parser.add_argument("--length", type=int, default=4096, help="tokens per window (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=1, help="windows per file (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/results/parts"), help="(default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Measure, and write the result."""
    options = parse()
    variants = parts(options.heads)
    slots = variants[0].num_slots
    assert slots is not None
    runs = [*plan_runs(["full", "h2o", "h2o-slot"], [slots], BLOCK_SIZE), *variants]
    model, tokenizer = load(options)
    texts = read_windows(options.data, tokenizer, Cut((options.length,), 2 * FIRST, options.documents))
    journal = Journal(beside(options.output, ".partial.jsonl"))
    losses = measure_losses(model, texts, runs, FIRST, journal)
    costs = {
        run: journal.measure((run.name, run.identity()), functools.partial(cost, model, run, texts[0].ids))
        for run in runs
    }
    rows = [{**loss_row(losses, run, group), **costs[run]} for run, groups in losses.items() for group in groups]
    shown = ["domain", "method", "nll", "gap_ratio", "gap_low", "gap_high", "seconds", "bytes"]
    how = (
        f"Windows of {options.length} tokens, those from the {FIRST}th on count. seconds: CPU time of reading the "
        f"first, the fastest of {REPEATS}; bytes: of its cache, per layer and KV head."
    )
    write_result(options.output, command_of("parts"), model.device, rows, columns=shown, how=how)
    plot(rows, beside(options.output, ".png"))
    journal.finish()
    print(markdown_table([{name: row[name] for name in shown} for row in rows if row["domain"] == ALL_DOMAINS]))


if __name__ == "__main__":
    main()
