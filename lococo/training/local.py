"""Layer-local calibration: every head alone learns to reproduce the full attention of its layer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from lococo.compression.base import Compressor
from lococo.config import LoCoCoConfig
from lococo.files import write_whole
from lococo.models.rotary import rotary_tables
from lococo.results.deadline import Deadline
from lococo.state import Patch, patch_of
from lococo.training.frozen import only_heads_learn
from lococo.training.recipes import LocalConfig
from lococo.training.record import LayerRecord, compressed_output, fisher_error, record
from lococo.training.scores import ScoreNetworks

TENSORS = ("query", "key", "value", "output", "gradient")
FACTS = ("scale", "window", "softcap")


class Recordings:
    """What the layers saw, on disk: one safetensors file per text, read a layer at a time.

    Parameters
    ----------
    folder : Path
        Made if missing. Texts recorded by an earlier run that was killed are not recorded again.
    deadline : Deadline, optional
        No text is recorded after it: ``add`` raises ``OutOfTime``.
    """

    def __init__(self, folder: Path, deadline: Deadline | None = None) -> None:
        self.folder = folder
        self.deadline = deadline or Deadline()
        self.paths: list[Path] = []

    def add(self, model: PreTrainedModel, windows: torch.Tensor) -> None:
        """Record texts of (texts, tokens) ids in half precision, with gradients; the model is not patched."""
        for ids in tqdm(windows, desc="recording", unit="text", disable=None):
            path = self.folder / f"{len(self.paths):05d}.safetensors"
            if not path.is_file():
                self.deadline.check()
                write_whole(path, _to_bytes(record(model, ids[None].long(), gradients=True)))
            self.paths.append(path)

    def layer(
        self, layer_idx: int, text: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> LayerRecord:
        """One layer's record of one text."""
        with safe_open(self.paths[text], "pt") as file:
            facts = json.loads(file.metadata()[str(layer_idx)])
            tensors = {name: file.get_tensor(f"{layer_idx}.{name}").to(device, dtype) for name in TENSORS}
        return LayerRecord(**tensors, **facts)


def _to_bytes(records: dict[int, LayerRecord]) -> bytes:
    tensors, facts = {}, {}
    for index, entry in records.items():
        for name in TENSORS:
            # Gradients are small numbers that float16 would flush to zero; the others need its digits.
            dtype = torch.bfloat16 if name == "gradient" else torch.float16
            tensors[f"{index}.{name}"] = getattr(entry, name).to(dtype).contiguous().cpu()
        facts[str(index)] = json.dumps({name: getattr(entry, name) for name in FACTS})
    return save(tensors, metadata=facts)


def train_locally(
    model: nn.Module,
    recordings: Recordings,
    settings: LocalConfig,
    folder: Path,
    deadline: Deadline | None = None,
) -> list[dict[str, float]]:
    """Train the head of every layer on recordings, layer after layer; no pass through the model.

    The loss is the ``fisher_error`` of the attention output over the unrolled segments, relative to that of plain
    token selection, so that every text counts alike. Tokens are selected with the networks of a learned score as they
    are.

    Parameters
    ----------
    model : torch.nn.Module
        Patched; its heads are changed.
    folder : Path
        Gets a file per finished layer; a killed run goes on after the last of them.
    deadline : Deadline, optional
        No layer begins after it: ``OutOfTime`` is raised.

    Returns
    -------
    list of dict
        ``layer``, and ``error``: on texts that were not learned from, relative to token selection (1 is no gain).
        Of all layers but those that keep their sliding window.

    Raises
    ------
    ValueError
        If there are not more recordings than ``num_checked``.
    FloatingPointError
        If a layer's loss is not finite; names the layer and the step.
    """
    if len(recordings.paths) <= settings.num_checked:
        raise ValueError(
            f"local calibration needs more than num_checked={settings.num_checked} texts, got {len(recordings.paths)}"
        )
    rows, patch = [], patch_of(model)
    networks = _networks(patch)
    windows = patch.family.windows
    heads = [(index, head) for index, head in patch.heads.items() if not patch.config.keeps(windows[index])]
    with only_heads_learn(model, patch), tqdm(heads, desc="local", unit="layer", disable=None) as bar:
        for layer_idx, head in bar:
            path = folder / f"layer_{layer_idx:03d}.safetensors"
            if not path.is_file():
                (deadline or Deadline()).check()
                error = train_layer(layer_idx, head, patch.config, recordings, settings, networks)
                tensors = {name: parameter.detach().cpu() for name, parameter in head.named_parameters()}
                write_whole(path, save(tensors, metadata={"error": json.dumps(error)}))
            head.load_state_dict(load_file(path))
            with safe_open(path, "pt") as file:
                rows.append({"layer": layer_idx, "error": json.loads(file.metadata()["error"])})
            bar.set_postfix(error=f"{rows[-1]['error']:.3f}")
    return rows


def _networks(patch: Patch) -> ScoreNetworks | None:
    if not patch.networks:
        return None
    recorded = dataclasses.replace(patch.config, positions="absolute")
    return ScoreNetworks(recorded, patch.networks, rotary_tables(patch.family, recorded))


def train_layer(
    layer_idx: int,
    head: Compressor,
    config: LoCoCoConfig,
    recordings: Recordings,
    settings: LocalConfig,
    networks: ScoreNetworks | None = None,
) -> float:
    """Train the head of one layer. Returns its error, as in ``train_locally``, which has the details."""
    scalars = [parameter for parameter in head.parameters() if parameter.dim() == 1]
    kernels = [parameter for parameter in head.parameters() if parameter.dim() > 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": kernels, "lr": settings.learning_rate},
            {"params": scalars, "lr": settings.scalar_learning_rate, "weight_decay": 0.0},
        ]
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, settings.steps)
    learned = len(recordings.paths) - settings.num_checked
    order = torch.randperm(learned, generator=torch.Generator().manual_seed(layer_idx)).tolist()
    weight = next(head.parameters())
    selection: dict[int, torch.Tensor] = {}  # error of plain token selection, by text

    def relative_error(text: int) -> torch.Tensor:
        entry = recordings.layer(layer_idx, text, weight.device, weight.dtype)
        features = None if networks is None else networks.features(layer_idx, entry.key, entry.value)
        if text not in selection:
            with torch.no_grad():
                selection[text] = _summed_error(entry, config, layer_idx, features=features).clamp_min(1e-30)
        return _summed_error(entry, config, layer_idx, head, features) / selection[text]

    for step in range(settings.steps):
        loss = relative_error(order[step % learned])
        if not loss.isfinite():
            raise FloatingPointError(f"layer {layer_idx}, step {step}: the local loss is {loss.item()}")
        if not loss.requires_grad:
            break  # nothing is fused: the layer has a sliding window, or a slot for every token
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        head.after_step()
    with torch.no_grad():
        errors = [relative_error(text).item() for text in range(learned, len(recordings.paths))]
    return sum(errors) / len(errors)


def _summed_error(
    entry: LayerRecord,
    config: LoCoCoConfig,
    layer_idx: int,
    head: Compressor | None = None,
    features: torch.Tensor | None = None,
) -> torch.Tensor:
    return fisher_error(compressed_output(entry, config, layer_idx, head, features), entry).sum()
