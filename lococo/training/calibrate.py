"""Calibration from data to a heads folder: budgets, layer-local start, end-to-end training, measurement."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from lococo.compression.centroids import CentroidCompressor
from lococo.config import LoCoCoConfig, check_count
from lococo.data.windows import Windows, prepare
from lococo.heads import ATTACHMENTS, check_heads_folder, heads_digest, load_heads, save_heads
from lococo.models import find_family
from lococo.models.rotary import rotary_tables
from lococo.patch import patched
from lococo.results.journal import Journal
from lococo.results.plots import HeatMap, Lines, Panel, Series, picture
from lococo.state import patch_of
from lococo.training.budgets import allocate_with_scales, slot_levels
from lococo.training.evictions import compressed_layers, eviction_errors, has_centroids
from lococo.training.frozen import modes_kept
from lococo.training.gap import GapRatio, MeasureGap, baselines
from lococo.training.local import Recordings, train_locally
from lococo.training.processes import main_process_first
from lococo.training.recipes import RECIPES, Recipe, adjusted
from lococo.training.runs import (
    RUN_NAME,
    Dataset,
    Result,
    TrainingRun,
    check_same_run,
    loss_panel,
    plain,
    plan_run,
    record_file,
    source_names,
    split_options,
    weights_identity,
    without_folders,
)
from lococo.training.scores import ScoreNetworks, check_scores_of, train_scores
from lococo.training.trainer import HEADS_FOLDER, HeadTrainer

Rows = list[dict[str, Any]]
SCORE_STATE = "scores.safetensors"
ADJUSTMENTS = {"backprop_tokens", "local_steps", "score_texts"}
OF_STEPS = ("steps", "windows_per_step", "learning_rate", "scalar_lr_factor", "backprop_tokens")
RECIPE_OPTIONS = {field.name for field in dataclasses.fields(Recipe)} | ADJUSTMENTS


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    output: str | os.PathLike,
    num_slots: int = 512,
    **options: Any,
) -> Result:
    """Train heads for a model, and write them into a folder with a record of how they were made and their quality.

    ``lococo.calibrate(model, tokenizer, ["my_texts"], num_slots=256, output="heads")``

    The recipe ``"default"`` learns which tokens will be looked up, and finds how many slots each KV head needs.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model, not patched; afterwards it is as it was before, bit for bit.
    dataset : str, path, or iterable
        Hub ids, files or folders, one or several, or documents, as in ``lococo.data.windows.as_sources``. Ten are
        enough to try. RedPajama's sample (``togethercomputer/RedPajama-Data-1T-Sample``) is the command's default.
    output : path
        The heads folder to write.
    num_slots : int
        KV slots per layer and KV head, on average.
    **options
        Everything else, with its default:

        - ``block_size=None``: tokens read between two compressions; as many as slots, at most 512.
          ``slot_bits=16``: of keys and values, as in ``LoCoCoConfig``.
        - ``recipe="default"``: or ``"blend"``, ``"paper"``, or a ``Recipe``; its fields are options, too:
          ``score_texts`` (0: the distant score), ``budget_texts``, ``objective`` (``"distill"``, ``"next-token"``,
          ``"none"``), ``backprop_tokens``, ``steps``, ``windows_per_step``, ``learning_rate``, ``scalar_lr_factor``,
          ``local_steps``, ``local_texts``, ``measure_every``. ``config=None``: a ``LoCoCoConfig`` in place of the
          recipe's.
        - ``scores_from=None``: heads folder or Hub id whose scores are reused: they do not depend on the number of
          slots, and hardly on the size of a block.
        - ``length=4096``: tokens per window; ``first=None``: the first of them that counts for the gap ratio; 512, or
          half the length if that is less.
        - ``num_windows=None``: windows to learn from; as many as the recipe reads. ``num_heldout=8``: windows to
          measure on.
          ``heldout_share``, ``boundaries``, ``text_column``, ``split``, ``seed``: as in ``DataConfig``.
        - ``dtype=torch.bfloat16``: dtype of the saved heads; None: as they were trained.
        - ``work_dir=None``: folder for the state of the run, removed at the end; ``<output>.work``. ``resume=False``:
          whether to continue the run in it. ``cache_dir="~/.cache/lococo"``: token windows and figures that other
          runs can reuse.
        - ``time_limit=None``: seconds after which the run stops, to be resumed.
        - ``training_arguments=None``: for ``transformers.TrainingArguments``: DeepSpeed, logging, precision, but
          nothing that is an option here.
          ``command``: the command that is recorded as having made the heads.
        - ``on_progress=None``: called with every row of the record as soon as it is there, among them the gap ratio,
          and with every step in training the scores: ``step`` of ``steps``, ``loss``, ``closed``.

    Returns
    -------
    Result
        ``folder``, for ``lococo.patch_model(model, heads=folder)``, with a record of the run in ``calibration.json``
        and ``.png``; ``gap_ratio`` of these heads: 0 is the full cache, 1 is H2O; and ``rows``, one per measurement,
        with its ``stage`` and ``step``. Stage ``saved`` is the state that was written into the folder.

    Raises
    ------
    ValueError, TypeError
        For a bad argument, before any work; if there is too little text; or if the run to resume was another.
    FileExistsError
        If ``output`` holds something else, or ``work_dir`` a run that is not resumed or something else.
    FloatingPointError
        If training diverges.
    OutOfTime
        If the time limit came before the end.
    """
    return plan_calibration(dataset, output=output, num_slots=num_slots, **options).run(model, tokenizer)


def plan_calibration(
    dataset: Dataset,
    *,
    output: str | os.PathLike,
    num_slots: int = 512,
    block_size: int | None = None,
    slot_bits: int | tuple[int, int] = 16,
    recipe: str | Recipe = "default",
    config: LoCoCoConfig | None = None,
    scores_from: str | os.PathLike | None = None,
    length: int = 4096,
    num_windows: int | None = None,
    num_heldout: int = 8,
    first: int | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    **options: Any,
) -> Calibration:
    """A calibration, checked before a model is there. Arguments and errors as of ``calibrate``."""
    own = inspect.signature(plan_calibration).parameters
    options = {"command": "lococo.calibrate(...)", **options}
    of_run, changes = split_options("lococo.calibrate", options, own, RECIPE_OPTIONS)
    name = "default" if isinstance(recipe, Recipe) else recipe
    if not isinstance(name, str) or name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, or a Recipe, got {recipe!r}")
    check_count("num_slots", num_slots, least=1)
    if block_size is not None:
        check_count("block_size", block_size, least=1)
    if first is None:
        check_count("length", length, least=2)
    recipe_config, named = RECIPES[name](num_slots, min(num_slots, 512) if block_size is None else block_size)
    recipe_config = dataclasses.replace(recipe_config, slot_bits=slot_bits)
    chosen = adjusted(recipe if isinstance(recipe, Recipe) else named, **changes)
    if chosen.objective is None and changes.get("objective") is None:
        for option in OF_STEPS:
            if changes.get(option):
                raise ValueError(
                    f"{option} is for end-to-end training, which the recipe leaves out: use recipe='blend', got "
                    f"{changes[option]!r}"
                )
    if scores_from is not None:
        if changes.get("score_texts"):
            raise ValueError(f"score_texts must be 0 or not given with scores_from, got {changes['score_texts']}")
        chosen = dataclasses.replace(chosen, scores=None)
    elif chosen.scores is None and recipe_config.has_features:
        recipe_config = dataclasses.replace(recipe_config, score="distant")  # what it is before anything is learned
    return plan_run(
        Calibration,
        dataset,
        output,
        of_run,
        config=recipe_config if config is None else config,
        recipe=chosen,
        scores_from=scores_from,
        length=length,
        num_windows=chosen.windows_needed if num_windows is None else num_windows,
        num_heldout=num_heldout,
        first=min(512, length // 2) if first is None else first,
        dtype=dtype,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration(TrainingRun):
    """A calibration, all but the model.

    Parameters
    ----------
    config : LoCoCoConfig
        The heads to train. ``slots_per_head`` is found by calibration if the recipe says so.
    first : int
        First token of a held-out window that counts for the gap ratio.
    scores_from : path or str, optional
        Heads whose scores are taken.
    dtype : torch.dtype, optional
        Of the saved heads. None: as they were trained.
    recordings_dir : Path, optional
        Recorded texts of this model, data and number of texts, for other runs too. None: in ``work_dir``.
    """

    config: LoCoCoConfig
    recipe: Recipe
    scores_from: str | os.PathLike | None = None
    first: int = 512
    dtype: torch.dtype | None = torch.bfloat16
    recordings_dir: Path | None = None

    work_names = (*TrainingRun.work_names, "recordings", "local", SCORE_STATE)
    trainer = HeadTrainer

    def check(self) -> None:
        """Refuse what cannot be run, before a model is there. Errors as of ``calibrate``."""
        if not isinstance(self.config, LoCoCoConfig):
            raise TypeError(f"config must be a LoCoCoConfig, got {self.config!r}")
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise TypeError(f"dtype must be torch.bfloat16, torch.float32, ... or None, got {self.dtype!r}")
        check_heads_folder(self.output)
        super().check()
        length, config = self.data.length, self.config
        if not isinstance(self.first, int) or not 1 <= self.first < length:
            raise ValueError(f"first must lie between 1 and {length - 1} for windows of {length}, got {self.first!r}")
        self._check_scores()
        trained = {"objective": self.recipe.objective_name, "local_steps": getattr(self.recipe.local, "steps", None)}
        for name, value in trained.items():
            if value is not None and not config.num_fused:
                raise ValueError(
                    f"{name} trains blends, of which the config has none (num_fused=0): use recipe='blend', or a "
                    f"config with fewer heavy hitters, got {value}"
                )
        if not self.data.num_heldout:
            raise ValueError("num_heldout must be at least 1: the heads are measured on held-out windows")
        evicting = (config.num_slots // config.block_size + 1) * config.block_size  # tokens before a compression
        if length <= evicting + 1:
            raise ValueError(
                f"windows of {length} tokens are too short for num_slots={config.num_slots} and "
                f"block_size={config.block_size}: the first token is evicted after {evicting}; choose fewer slots, "
                "smaller blocks or longer windows"
            )

    def _check_scores(self) -> None:
        settings, config, length = self.recipe.scores, self.config, self.data.length
        if self.scores_from is not None:
            if settings is not None or not config.has_features:
                raise ValueError(
                    "scores_from is for a recipe that learns no scores and a config with a learned one, got "
                    f"{'scores=' + repr(settings) if settings else 'score=' + repr(config.score)}"
                )
            check_scores_of(self.scores_from, config)
            return
        if settings is None:
            if config.has_features:
                raise ValueError(f"score={config.score!r} learns from texts: give score_texts, or use score='distant'")
            return
        if not config.has_features:
            raise ValueError(
                f"score_texts must be 0 where no score that learns gives slots (score={config.score!r}, num_heavy="
                f"{config.num_heavy}), got {settings.texts}; or use score='learned' and more slots"
            )
        read = self._score_length
        cut = "" if read == length else " (cut to ScoreConfig.length)"
        if read < 2 * config.block_size:
            raise ValueError(
                f"windows of {read} tokens{cut} are too short for scores: they learn what is looked up after a block "
                f"of {config.block_size}; choose windows of two blocks at least, or smaller blocks"
            )

    @property
    def _score_length(self) -> int:
        """Tokens that scores learn from in a window: so many that there is something to choose from."""
        assert self.recipe.scores is not None
        return min(self.data.length, max(self.recipe.scores.length, 2 * self.config.num_slots))

    @property
    def _finds_budgets(self) -> bool:
        return self.recipe.budget_texts > 0 and self.config.slots_per_head is None

    def check_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a model that the run is not for, and one whose keys cannot be rotated as the config wants it."""
        super().check_model(model, tokenizer)
        compressed_layers(model, self.config)
        for positions in dict.fromkeys((self.config.positions, "absolute")):  # scores are learned from absolute ones
            rotary_tables(find_family(model), dataclasses.replace(self.config, positions=positions))
        if self.scores_from is not None:
            ScoreNetworks.from_heads(model, self.config, self.scores_from)

    def _run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Result:
        with modes_kept(model):
            return self._calibrate(model.eval(), tokenizer)

    def _calibrate(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Result:
        """Train and save; the model is in evaluation mode."""
        usage = self.meter()
        has_steps = self.recipe.objective is not None
        processes = self.processes(on_cpu=model.device.type == "cpu", has_steps=has_steps)
        arguments = self.trainer_arguments(save_every=self.recipe.measure_every) if has_steps else None
        rows: Rows = []

        def add(stage: str, **row: Any) -> None:
            rows.append({"stage": stage, **row})
            self.tell(rows[-1])

        with main_process_first():
            train, heldout = prepare(self.data, tokenizer, self.cache_dir / "tokens")
            description = self._description(weights_identity(model))
            check_same_run(self.work / RUN_NAME, description)
            measured = self.cache_dir / f"measured-{description['model']}.jsonl"
            gap = baselines(model, heldout.ids, self.config, self.first, Journal(measured, self.deadline))
            if processes.is_main_process:
                self.begin(description)
        networks = self._learn_scores(model, train, add)
        with main_process_first():
            # Read anew: the first process has written into it.
            config, scales = self._with_budgets(model, train, Journal(measured, self.deadline), networks, add)
            recordings = Recordings(self.recordings_dir or self.work / "recordings", self.deadline)
            if self.recipe.local:
                recordings.add(model, train.evenly(self.recipe.local_texts))
        torch.manual_seed(self.data.seed)  # the heads' initial weights
        with patched(model, config):
            if networks is not None:
                networks.put_into(patch_of(model))
            if scales and has_centroids(config):
                _weigh_centroids(model, scales)
            add("start", step=0, **gap.measure(model))
            if local := self.recipe.local:
                with main_process_first():
                    for row in train_locally(model, recordings, local, self.work / "local", self.deadline):
                        add("local", **row)
                add("local", step=local.steps, **gap.measure(model))
            if arguments is not None:
                rows += self._train_end_to_end(model, train, gap, arguments)
            processes.wait_for_everyone()  # none still writes into the work folder
            if processes.is_main_process:
                if self.dtype is not None:
                    _round_heads(model, self.dtype)
                    steps = self.recipe.steps if self.recipe.objective else 0
                    add("saved", step=steps, **gap.measure(model))
                self._save(model, config, gap, rows, usage(model.device))
                self.remove_work()
        return Result(self.output, rows)

    def _description(self, model: str) -> dict[str, Any]:
        """What makes one run another, as plain JSON values."""
        recipe = {"recipe": self.recipe, "objective": self.recipe.objective_name, "first": self.first}
        scores = {} if self.scores_from is None else {"scores_from": heads_digest(self.scores_from)}
        return plain({"model": model, "config": self.config.to_dict(), "data": self.data, **recipe, **scores})

    def _learn_scores(self, model: PreTrainedModel, train: Windows, add: Callable[..., None]) -> ScoreNetworks | None:
        """Networks of a learned score, if the recipe says so."""
        settings = self.recipe.scores
        if self.scores_from is not None:
            return ScoreNetworks.from_heads(model, self.config, self.scores_from)
        if settings is None:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.data.seed)
            networks = ScoreNetworks.of(model, self.config)
        windows = train.evenly(settings.texts)[:, : self._score_length]
        tell = functools.partial(self._tell_stage, "scores")
        for row in train_scores(model, networks, windows, settings, self.work / SCORE_STATE, self.deadline, tell):
            add("scores", **row)
        return networks

    def _tell_stage(self, stage: str, **row: Any) -> None:
        self.tell({"stage": stage, **row})

    def _with_budgets(
        self,
        model: PreTrainedModel,
        train: Windows,
        journal: Journal,
        networks: ScoreNetworks | None,
        add: Callable[..., None],
    ) -> tuple[LoCoCoConfig, Sequence[float]]:
        """The config with as many slots for each KV head as it needs, if the recipe says so; weights of centroids."""
        config = self.config
        if not self._finds_budgets:
            return config, ()
        levels = slot_levels(config.num_slots)
        windows = train.evenly(self.recipe.budget_texts)
        errors = eviction_errors(model, windows, config, levels, journal.measure, networks)
        slots, scales = allocate_with_scales(errors, levels, config.num_slots)
        for layer, counts in enumerate(slots):
            for head, count in enumerate(counts or ()):
                scale = {"log_scale": scales[layer]} if has_centroids(config) else {}
                add("budgets", layer=layer, kv_head=head, slots=count, **scale)
        return dataclasses.replace(config, slots_per_head=slots), scales

    def _train_end_to_end(
        self, model: PreTrainedModel, train: Windows, gap: GapRatio, arguments: TrainingArguments
    ) -> Rows:
        recipe, stage = self.recipe, "end-to-end"
        assert recipe.objective is not None
        measuring = MeasureGap(model, gap, recipe.measure_every, lambda row: self.tell({"stage": stage, **row}))
        trainer = HeadTrainer(
            model,
            arguments,
            objective=recipe.objective,
            scalar_lr_factor=recipe.scalar_lr_factor,
            train_dataset=train,
            callbacks=[measuring, *self.callbacks(stage)],
        )
        return self.train(trainer, lambda checkpoint: load_heads(model, checkpoint / HEADS_FOLDER), stage)

    def _save(
        self, model: PreTrainedModel, config: LoCoCoConfig, gap: GapRatio, rows: Rows, usage: dict[str, Any]
    ) -> None:
        """Write the heads folder: how the heads were made, what that took, what they measure, and a picture."""
        last = [row for row in rows if "gap_ratio" in row][-1]
        metrics = {
            "heldout_nll": last["heldout_nll"],
            "heldout_nll_full": gap.full,
            "heldout_nll_h2o": gap.h2o,
            "gap_ratio": last["gap_ratio"],
            "heldout_windows": len(gap.windows),
            "length": self.data.length,
            "first": gap.first,
        }
        training = {
            "command": without_folders(self.command),
            "recipe": plain(self.recipe),
            "objective": self.recipe.objective_name,
            "sources": source_names(self.data.sources),
        }
        contents = (record_file(self.command, model.device, rows, usage=usage), _picture(rows, config))
        attachments = dict(zip(ATTACHMENTS, contents, strict=True))
        save_heads(model, self.output, training=training, metrics=metrics, dtype=self.dtype, attachments=attachments)


@torch.no_grad()
def _weigh_centroids(model: PreTrainedModel, scales: Sequence[float]) -> None:
    """Set how much the centroids of every layer weigh."""
    for layer, head in patch_of(model).heads.items():
        assert isinstance(head, CentroidCompressor)
        if head.log_scale is not None:
            head.log_scale.fill_(scales[layer])


@torch.no_grad()
def _round_heads(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the heads the values that they have when saved in a dtype."""
    patch = patch_of(model)
    for module in (*patch.heads.values(), *patch.networks.values()):
        for parameter in module.parameters():
            parameter.copy_(parameter.to(dtype))


def _picture(rows: Sequence[dict[str, Any]], config: LoCoCoConfig) -> bytes:
    """PNG: slots per KV head, what scores lose by layer, loss and gap ratio over the steps; what there is of these."""
    panels: list[Panel] = []
    if config.slots_per_head:
        num_kv_heads = max(len(slots or ()) for slots in config.slots_per_head)
        none = (math.nan,) * num_kv_heads  # where a window is kept
        by_head = list(zip(*(slots or none for slots in config.slots_per_head), strict=True))
        panels.append(HeatMap(by_head, f"slots per head, {config.num_slots} on average", "layer", "KV head", log=True))
    if lost := {row["layer"]: row for row in rows if row["stage"] == "scores" and "layer" in row}:
        names = {"lost_before": "distant score", "lost": "learned score", "lost_oracle": "oracle"}
        shares = [
            Series(label, [row[name] for row in lost.values()], list(lost), style={"markersize": 3})
            for name, label in names.items()
        ]
        panels.append(Lines(shares, "later attention to tokens not kept", "layer", "share", bottom=0))
    if any("loss" in row for row in rows):
        panels.append(loss_panel(rows, "training loss"))
    measured = [row for row in rows if row.get("gap_ratio") is not None and row["stage"] != "local"]
    ratios, steps = [row["gap_ratio"] for row in measured], [row["step"] for row in measured]
    title = "gap ratio on held-out text" if ratios else "no gap: H2O loses nothing"
    if panels and len(set(steps)) < 2:
        last = f": {ratios[-1]:.3f}" if ratios else ""
        return picture([panels], (4.4 * len(panels), 3.8), title=title + last)
    bottom, top = 1.1 * min([0.0, *ratios]), 1.1 * max([0.1, *ratios])
    panels.append(Lines([Series("", ratios, steps)], title, "step", bottom=bottom, top=top))
    return picture([panels], (3.7 * len(panels), 3.6))
