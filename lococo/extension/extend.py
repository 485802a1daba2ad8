"""Extension from data to a folder: a model learns to read texts longer than those it was trained on."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lococo.config import LoCoCoConfig, check_count
from lococo.data.windows import prepare
from lococo.extension.adapters import adapted, adapter_config, checkpoint_layers, restored, unfreeze
from lococo.extension.folder import (
    RECORD_NAMES,
    Extension,
    check_extension_folder,
    merge_extended,
    save_extended,
)
from lococo.extension.rope_scaling import RopeScaling, scale_positions
from lococo.extension.sharding import gathered, sharded_arguments
from lococo.extension.trainer import ExtensionTrainer, load_parts
from lococo.heads import load_heads, read_heads_config
from lococo.models import base_config
from lococo.patch import patched
from lococo.results.plots import picture
from lococo.training.objectives import NextToken
from lococo.training.recipes import TrainingRecipe, check_ranges
from lococo.training.runs import (
    RUN_NAME,
    Dataset,
    Result,
    TrainingRun,
    check_model,
    check_same_run,
    loss_panel,
    plain,
    plan_run,
    record_file,
    source_names,
    split_options,
    weights_identity,
)

COMPRESSED = ("lococo", "h2o", "streaming")
# Methods that read with the full cache, and what is in force while they are trained: ``with FULL_CACHE[name](model)``.
FULL_CACHE: dict[str, Callable[[nn.Module], contextlib.AbstractContextManager]] = {"full": contextlib.nullcontext}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtensionRecipe(TrainingRecipe):
    """What a run of ``extend_context`` does.

    Parameters
    ----------
    method : {"lococo", "h2o", "streaming", "full"}
        The cache that the model learns to read with; another of ``FULL_CACHE`` reads as "full" does.
    rope_scaling : RopeScaling
        Positions of the longer texts. A cache with positions of its own ("streaming", ``positions="slot"``) leaves
        them as they are.
    config : LoCoCoConfig, optional
        The compressed cache. None for the full one.
    rank, alpha : int
        LoRA's r and alpha.
    learning_rate : float
        Of adapters, embeddings and norms.
    heads_learning_rate : float
        Of the heads' convolutions.
    depth : int, optional
        Compressions that back-propagation goes through at most: memory does not grow with the window. None: all.
    save_every : int
        Steps between two checkpoints.

    Raises
    ------
    ValueError
        If a value is out of range, or method and config do not fit.
    """

    method: str
    rope_scaling: RopeScaling
    config: LoCoCoConfig | None
    rank: int = 8
    alpha: int = 16
    steps: int = 1000
    windows_per_step: int = 8
    learning_rate: float = 5e-5
    heads_learning_rate: float = 1e-3
    depth: int | None = 2
    save_every: int = 100

    def __post_init__(self) -> None:
        check_method(self.method)
        if not isinstance(self.config, LoCoCoConfig | None):
            raise TypeError(f"config must be a LoCoCoConfig, got {self.config!r}")
        reads_all = self.method in FULL_CACHE
        if reads_all != (self.config is None):
            raise ValueError(f"method={self.method!r} needs {'no config' if reads_all else 'a config'}")
        super().__post_init__()
        least = dict.fromkeys(("rank", "alpha", "steps", "save_every", "depth"), 1)
        check_ranges(self, least, ("heads_learning_rate",))

    @property
    def extension(self) -> Extension:
        """What such a run makes."""
        keeps_positions = self.config is not None and self.config.positions == "slot"
        scaling = None if keeps_positions else self.rope_scaling
        return Extension(self.method, self.rope_scaling.length, scaling, self.config)

    @property
    def objective(self) -> NextToken:
        """The next token, back-propagation cut after ``depth`` compressions."""
        if self.config is None or self.depth is None:
            return NextToken()
        return NextToken(backprop_tokens=self.depth * self.config.block_size)


def check_method(method: str) -> None:
    """Refuse a method that is not known.

    Raises
    ------
    ValueError
        Lists those that are.
    """
    methods = (*COMPRESSED, *FULL_CACHE)
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}, got {method!r}")


def extension_config(
    method: str, num_slots: int, block_size: int, positions: str | None = None
) -> LoCoCoConfig | None:
    """The compressed cache of a method: ours with low-rank heads whose gates start a little open; None for others.

    Raises
    ------
    ValueError
        If the method has no such positions.
    """
    check_method(method)
    positions = positions or ("slot" if method == "streaming" else "absolute")
    if method == "lococo":
        return LoCoCoConfig(num_slots, block_size, head_rank=16, gate_init=0.05, positions=positions)  # type: ignore
    if method in FULL_CACHE and positions != "absolute":
        raise ValueError(f"positions are of a compressed cache, method={method!r} has none: got {positions!r}")
    presets = {"h2o": LoCoCoConfig.h2o, "streaming": LoCoCoConfig.streaming_llm}
    return presets[method](num_slots, block_size=block_size, positions=positions) if method in presets else None


def heads_config(heads: str | os.PathLike, positions: str | None = None) -> LoCoCoConfig:
    """The config of saved heads; in other positions than theirs, and then with as many slots for all KV heads."""
    config = read_heads_config(heads)
    if positions in (None, config.positions):
        return config
    return dataclasses.replace(config, positions=positions, slots_per_head=None)  # type: ignore[arg-type]


def extend_context(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    output: str | os.PathLike,
    factor: float = 8.0,
    original_length: int | None = None,
    **options: Any,
) -> Result:
    """Train a model to read longer texts, and write what was trained into a folder for ``load_extended``.

    ``lococo.extend_context(model, tokenizer, ["my_texts"], factor=4, output="extended")``

    Adapters, copies of embeddings and norms, and heads are trained in float32; a base model in bfloat16 computes in
    bfloat16.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model, not patched. Its weights are the same afterwards, bit for bit, unless it was sharded.
    dataset : str, path, or iterable
        Hub ids, files or folders, one or several, or documents, as in ``lococo.data.windows.as_sources``.
    output : path
        The folder to write: adapters for PEFT, heads, what it was made from, and the losses.
    factor : float
        New length / old length.
    original_length : int, optional
        Old length in tokens. None: the model's ``max_position_embeddings``.
    **options
        Everything else, with its default:

        - ``method="lococo"``: or ``"h2o"``, ``"streaming"``, ``"full"``; ``rope_type="linear"``, or ``"yarn"``,
          ``"dynamic"``.
        - ``num_slots=512``, ``block_size=None`` (as many, at most 512), ``positions=None``: the compressed cache, by
          default in absolute positions, streaming in those of slots. ``heads=None``: folder or Hub id of heads to
          start from, which say slots and block, and positions if they are not given; in positions of slots all KV
          heads get as many. ``config=None``: a ``LoCoCoConfig`` in place of these.
        - ``steps``, ``windows_per_step``, ``learning_rate``, ``heads_learning_rate``, ``scalar_lr_factor``, ``rank``,
          ``alpha``, ``depth``, ``save_every``: as in ``ExtensionRecipe``.
        - ``length=None``: tokens per window; as many as the new length. ``num_windows=None``: as many as the steps
          read. ``boundaries``, ``text_column``, ``split``, ``seed``: as in ``DataConfig``.
        - ``merge_into=None``: folder for a plain checkpoint with all that was trained in its weights.
        - ``shard=False``: whether every process keeps only a part of each layer's weights (FSDP2). The model should
          then be on the CPU.
        - ``work_dir``, ``resume``, ``cache_dir``, ``time_limit``, ``training_arguments``, ``on_progress``: as of
          ``lococo.calibrate``.

    Returns
    -------
    Result
        ``folder``, for ``lococo.load_extended(base, folder)``, and ``rows``: ``step``, ``loss``, ``grad_norm`` and
        ``learning_rate`` of every step.

    Raises
    ------
    ValueError, TypeError
        For a bad argument, before any work, or if the run to resume was another.
    FileExistsError
        If a folder holds something else, or ``work_dir`` a run that is not resumed.
    FloatingPointError
        If training diverges.
    OutOfTime
        If the time limit came before the end.
    """
    check_model(model, tokenizer)
    if original_length is None:
        original_length = getattr(base_config(model).get_text_config(), "max_position_embeddings", None)
        if original_length is None:
            raise ValueError("the model's config has no max_position_embeddings: say original_length")
    plan = plan_extension(dataset, output=output, factor=factor, original_length=original_length, **options)
    return plan.run(model, tokenizer)


def plan_extension(
    dataset: Dataset,
    *,
    output: str | os.PathLike,
    original_length: int,
    factor: float = 8.0,
    rope_type: str = "linear",
    method: str = "lococo",
    num_slots: int = 512,
    block_size: int | None = None,
    positions: str | None = None,
    heads: str | os.PathLike | None = None,
    config: LoCoCoConfig | None = None,
    length: int | None = None,
    num_windows: int | None = None,
    merge_into: str | os.PathLike | None = None,
    shard: bool = False,
    **options: Any,
) -> ExtensionRun:
    """An extension, checked before a model is there. Arguments and errors as of ``extend_context``."""
    own = set(inspect.signature(plan_extension).parameters)
    options = {"command": "lococo.extend_context(...)", **options}
    if heldout := options.keys() & {"num_heldout", "heldout_share"}:
        raise TypeError(f"lococo.extend_context has no option {', '.join(sorted(heldout))}: it measures on no text")
    of_run, fields = split_options("lococo.extend_context", options, own, RECIPE_OPTIONS)
    check_count("num_slots", num_slots, least=1)
    if heads is not None and method != "lococo":
        raise ValueError(f'heads are for method="lococo", got method={method!r}')
    if config is None and heads is not None:
        config = heads_config(heads, positions)
    elif config is None:
        block_size = min(num_slots, 512) if block_size is None else block_size
        config = extension_config(method, num_slots, block_size, positions)
    scaling = RopeScaling(factor, original_length, rope_type)
    recipe = ExtensionRecipe(method=method, rope_scaling=scaling, config=config, **fields)
    return plan_run(
        ExtensionRun,
        dataset,
        output,
        of_run,
        recipe=recipe,
        length=scaling.length if length is None else length,
        num_windows=recipe.windows_needed if num_windows is None else num_windows,
        num_heldout=0,
        heads=None if heads is None else os.fspath(heads),
        merge_into=merge_into,
        shard=shard,
    )


RECIPE_OPTIONS = {field.name for field in dataclasses.fields(ExtensionRecipe)} - {"method", "rope_scaling", "config"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtensionRun(TrainingRun):
    """An extension, all but the model. No window of its data is held out.

    Parameters
    ----------
    heads : str, optional
        Folder or Hub id of heads that the training starts from; made for the recipe's config.
    merge_into : Path, optional
        Folder for a plain checkpoint with all that was trained in its weights.
    shard : bool
        Every process keeps a part of each layer's weights only (FSDP2).
    """

    recipe: ExtensionRecipe
    heads: str | None = None
    merge_into: Path | None = None
    shard: bool = False

    trainer = ExtensionTrainer

    def check(self) -> None:
        """Refuse what cannot be run, before a model is there. Errors as of ``extend_context``."""
        if not isinstance(self.shard, bool):
            raise TypeError(f"shard must be True or False, got {self.shard!r}")
        check_extension_folder(self.output)
        if self.merge_into is not None and self.shard:
            raise ValueError("a sharded run writes no merged model: lococo.merge_extended makes one of what it writes")
        if self.merge_into is not None and self.merge_into.exists():
            raise FileExistsError(f"{self.merge_into} exists; give a new folder for the merged model")
        super().check()
        if not importlib.util.find_spec("peft"):
            raise ImportError("extension needs the package peft: pip install lococo[train]")

    def check_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a model whose positions cannot be stretched, too, or that adapters find no place in."""
        super().check_model(model, tokenizer)
        if hasattr(model, "peft_config"):
            raise ValueError("the model has adapters already: merge them first (model.merge_and_unload())")
        with restored(model):
            if self.recipe.extension.rope_scaling:
                scale_positions(model, self.recipe.extension.rope_scaling)
            adapter_config(model, self.recipe.rank, self.recipe.alpha)

    def _run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Result:
        usage = self.meter()
        processes = self.processes(on_cpu=model.device.type == "cpu" and not self.shard)
        if self.shard and processes.num_processes == 1:
            raise ValueError(
                "shard=True needs several processes, this is the only one: start it with accelerate launch"
            )
        arguments = self.trainer_arguments(
            save_every=self.recipe.save_every,
            bf16=model.dtype == torch.bfloat16,  # what learns is wider
            fp16=model.dtype == torch.float16,
            **(sharded_arguments() if self.shard else {}),
        )
        with processes.main_process_first():
            windows, _ = prepare(self.data, tokenizer, self.cache_dir / "tokens")
            named = {"data": self.data, "recipe": self.recipe, "heads": self.heads, "shard": self.shard}
            description = plain({"model": weights_identity(model), **named})
            check_same_run(self.work / RUN_NAME, description)
            if processes.is_main_process:
                self.begin(description)
        # What could put a sharded model together again would keep the memory of the whole one.
        kept = contextlib.nullcontext() if self.shard else restored(model)
        with kept, extended_for_training(model, self.recipe, self.heads, self.data.seed) as learner:
            trainer = ExtensionTrainer(
                learner,
                arguments,
                objective=self.recipe.objective,
                heads_learning_rate=self.recipe.heads_learning_rate,
                scalar_lr_factor=self.recipe.scalar_lr_factor,
                train_dataset=windows,
                callbacks=self.callbacks(),
            )
            rows = self.train(trainer, lambda checkpoint: load_parts(learner, checkpoint))
            processes.wait_for_everyone()  # none still writes into the work folder
            with gathered(learner):
                if processes.is_main_process:
                    files = self._record(rows, usage(processes.device), processes.device)
                    save_extended(learner, self.output, self.recipe.extension, files)
                    if self.merge_into is not None:  # a copy: the model itself is to be as it was
                        merge_extended(copy.deepcopy(learner), self.merge_into, tokenizer)
                    self.remove_work()
        return Result(self.output, rows)

    def _record(self, rows: list[dict[str, Any]], usage: dict[str, Any], device: torch.device) -> dict[str, bytes]:
        """``training.json`` and ``training.png`` by name."""
        facts = {"recipe": self.recipe, "length": self.data.length, "sources": source_names(self.data.sources)}
        title = f"training loss, {self.recipe.method}, {self.recipe.rope_scaling.length}"
        contents = (
            record_file(self.command, device, rows, **plain(facts), usage=usage),
            picture([[loss_panel(rows, title)]], (6, 3.6)),
        )
        return dict(zip(RECORD_NAMES, contents, strict=True))


@contextlib.contextmanager
def extended_for_training(
    model: PreTrainedModel, recipe: ExtensionRecipe, heads: str | None = None, seed: int = 0
) -> Iterator[Any]:
    """A model inside a ``with`` block, ready to be trained: scaled, with adapters, and its cache in force."""
    extension = recipe.extension
    if extension.rope_scaling:
        scale_positions(model, extension.rope_scaling)
    torch.manual_seed(seed)  # first weights of adapters and heads
    learner = adapted(model, adapter_config(model, recipe.rank, recipe.alpha))
    with patched(learner, recipe.config) if recipe.config else FULL_CACHE[recipe.method](learner):
        if heads is not None:
            load_heads(learner, heads)
        unfreeze(learner)
        if recipe.config is None:  # its memory grows with the window
            checkpoint_layers(model)
        yield learner.train()
