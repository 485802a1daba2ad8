"""How much of the full cache's advantage over H2O heads win back, measured during training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from lococo.config import LoCoCoConfig
from lococo.methods import as_method, method_config
from lococo.metrics import gap_ratio, mean_nll
from lococo.models import find_family
from lococo.models.rotary import rotary_tables
from lococo.results.journal import Journal

BASELINES = ("full", "h2o", "h2o-slot")


@dataclasses.dataclass(frozen=True)
class GapRatio:
    """``lococo.metrics.gap_ratio`` on some windows: 0 is the full cache, 1 is H2O.

    Attributes
    ----------
    windows : torch.Tensor
        (texts, tokens).
    first : int
        First token that counts.
    full, h2o : float
        Mean nll of the full cache, and of H2O with the better of its two position modes, where the model has both.
    """

    windows: torch.Tensor
    first: int
    full: float
    h2o: float

    def measure(self, model: PreTrainedModel) -> dict[str, float | None]:
        """``heldout_nll`` and ``gap_ratio`` of a model as it is now patched."""
        nll = mean_nll(model, self.windows, self.first)
        return {"heldout_nll": nll, "gap_ratio": gap_ratio(nll, self.full, [self.h2o])}


def baselines(
    model: PreTrainedModel, windows: torch.Tensor, config: LoCoCoConfig, first: int, journal: Journal
) -> GapRatio:
    """What the gap ratio of heads with a config is measured against."""
    nlls = {}
    for name in BASELINES:
        method = method_config(name, config.num_slots, config.block_size)
        if method is not None and method.positions == "absolute":
            method = dataclasses.replace(method, compress_windows=config.compress_windows)
        if method is not None and not _can_be_read(model, method):
            continue
        with as_method(model, method):
            key = ("baseline", name, method and method.to_dict(), windows.tolist(), first)
            nlls[name] = journal.measure(key, lambda: mean_nll(model, windows, first))
    return GapRatio(windows, first, nlls.pop("full"), min(nlls.values()))


def _can_be_read(model: PreTrainedModel, config: LoCoCoConfig) -> bool:
    """Whether a model's keys can be moved, if a config moves them."""
    try:
        rotary_tables(find_family(model), config)
    except ValueError:
        return False
    return True


class MeasureGap(TrainerCallback):
    """Measures the gap ratio every so many steps, and logs it.

    Parameters
    ----------
    tell : callable
        Called with every row of the log that is added.
    """

    def __init__(
        self, model: PreTrainedModel, gap: GapRatio, every: int, tell: Callable[[dict[str, Any]], Any]
    ) -> None:
        self.model, self.gap, self.every, self.tell = model, gap, every, tell

    def on_step_end(self, args, state, control, **kwargs):
        """Measure, if it is the step for it."""
        is_last = state.global_step == state.max_steps
        if state.is_world_process_zero and (state.global_step % self.every == 0 or is_last):
            state.log_history.append({"step": state.global_step, **self.gap.measure(self.model)})
            self.tell(state.log_history[-1])
