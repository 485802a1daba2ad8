"""Learned scores from forward passes: networks learn to tell which tokens will be looked up."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from lococo.config import LoCoCoConfig
from lococo.files import write_whole
from lococo.heads import read_heads_config
from lococo.models import find_family
from lococo.models.family import execution_device
from lococo.models.rotary import Rotary, rotary_tables
from lococo.patch import patched
from lococo.registry import SCORES
from lococo.results.deadline import Deadline, OutOfTime
from lococo.state import Patch, patch_of
from lococo.training.lookups import Lookups, record_lookups
from lococo.training.processes import is_over_anywhere, summed
from lococo.training.recipes import ScoreConfig

# Log-probability, all but, of a token that is no candidate.
HIDDEN = -1e4
# What is closed of the way to the oracle is told as a mean over so many of the last texts.
TOLD_TEXTS = 32


@dataclasses.dataclass
class ScoreNetworks:
    """The networks of a model's layers, as trainings use them.

    Attributes
    ----------
    config : LoCoCoConfig
        Of the average head: networks learn with the same slots for all.
    by_layer : dict of int to torch.nn.Module
        On the devices of their layers; new ones in float32.
    rotary : dict
        What takes the rotation off a layer's keys.
    """

    config: LoCoCoConfig
    by_layer: dict[int, nn.Module]
    rotary: Mapping[int, Rotary | None]

    @classmethod
    def of(cls, model: PreTrainedModel, config: LoCoCoConfig) -> ScoreNetworks:
        """New ones for a model that is not patched."""
        family, config = find_family(model), dataclasses.replace(config, slots_per_head=None)
        score, num_kv_heads = SCORES[config.score](), family.shape["num_kv_heads"]
        by_layer: dict[int, nn.Module] = {}
        for index, layer in family.layers.items():
            network = score.network(num_kv_heads, family.head_dim(layer), device=execution_device(layer))
            assert network is not None  # config.has_features
            by_layer[index] = network
        return cls(config, by_layer, rotary_tables(family, dataclasses.replace(config, positions="absolute")))

    @torch.no_grad()
    def features(self, layer_idx: int, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """What a layer's network makes of recorded (batch, kv_heads, tokens, head_dim) keys, rotated, and values."""
        rotary = self.rotary.get(layer_idx)
        if rotary is not None:
            key = rotary.rotate(key, torch.arange(key.shape[2], device=key.device)[None], inverse=True)
        return self.by_layer[layer_idx](key, value)

    def digest(self) -> str:
        """To tell one training from another."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.named_tensors().items()}
        return hashlib.sha256(save(tensors)).hexdigest()

    @classmethod
    @torch.no_grad()
    def from_heads(cls, model: PreTrainedModel, config: LoCoCoConfig, heads: str | os.PathLike) -> ScoreNetworks:
        """Those of saved heads, a folder or a Hub id, for a model that is not patched.

        Raises
        ------
        ValueError, OSError
            As of ``check_scores_of`` and ``load_heads``.
        """
        check_scores_of(heads, config)
        networks = cls.of(model, config)
        with patched(model, heads=heads):
            for mine, its in networks._pairs(patch_of(model)):
                mine.copy_(its)
        return networks

    @torch.no_grad()
    def put_into(self, patch: Patch) -> None:
        """Copy all networks into those of a patched model."""
        for mine, its in self._pairs(patch):
            its.copy_(mine)

    def _pairs(self, patch: Patch) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        for index, network in patch.networks.items():
            yield from zip(self.by_layer[index].parameters(), network.parameters(), strict=True)

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """All parameters as ``{layer}.{name}``."""
        return {
            f"{index}.{name}": parameter
            for index, network in self.by_layer.items()
            for name, parameter in network.named_parameters()
        }


def check_scores_of(heads: str | os.PathLike, config: LoCoCoConfig) -> None:
    """Refuse heads whose scores are not what a config asks for.

    Raises
    ------
    ValueError
        If their score is another. Blocks may have another size: what will be looked up hardly depends on it.
    OSError
        If there is no such folder, or the Hub could not deliver it.
    """
    theirs = read_heads_config(heads).score
    if theirs != config.score:
        raise ValueError(f"the scores of {heads} were learned with score={theirs!r}, not {config.score!r}")


def train_scores(
    model: PreTrainedModel,
    networks: ScoreNetworks,
    windows: torch.Tensor,
    settings: ScoreConfig,
    path: Path,
    deadline: Deadline | None = None,
    tell: Callable[..., None] | None = None,
) -> list[dict[str, float]]:
    """Train networks of a learned score on texts as they come, a few at a time; no backward through the model.

    At the end of every block of a text each token that the score decides about has a logit (``Score.logits``). Their
    softmax is to be the share of the attention that the token will receive from what comes after; the loss is the
    cross-entropy, averaged over blocks and KV heads. All layers learn from the same forward passes.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Not patched.
    networks : ScoreNetworks
        Changed in place.
    windows : torch.Tensor
        (texts, tokens) token ids. Processes of a distributed run share the texts of every step.
    path : Path
        File of the state after every few texts; a killed run goes on from it.
    deadline : Deadline, optional
        No text is read after it: ``OutOfTime`` is raised.
    tell : callable, optional
        Called with what is known after some texts: ``step`` of ``steps``, ``loss``, and ``closed``, the share of the
        way from new networks to the oracle that is gone.

    Returns
    -------
    list of dict
        Of every few texts ``texts``, learned from before them, and of every layer but those with a sliding window
        ``layer``; with ``lost_before`` (by a new network), ``lost`` and ``lost_oracle``: the share of later attention
        to tokens that are not kept, on texts that the network had not learned from when they were measured.
    """
    trainer = _Trainer(model, networks, settings, len(windows), path)
    trainer.load()
    batches = windows.split(settings.texts_at_once)
    with tqdm(total=len(windows), desc="scores", unit="text", disable=None) as bar:
        bar.update(sum(map(len, batches[: trainer.batch])))
        for batch in batches[trainer.batch :]:
            if is_over_anywhere(deadline or Deadline()):
                raise OutOfTime
            loss = trainer.learn_from(batch)
            bar.update(len(batch))
            bar.set_postfix(loss=f"{loss:.3f}", closed=f"{trainer.closed:.2f}")
            if tell is not None:
                tell(step=trainer.batch, steps=len(batches), loss=loss, closed=trainer.closed)
    return trainer.rows()


class _Trainer:
    """The optimizer of all networks, and what is known of them."""

    def __init__(
        self, model: PreTrainedModel, networks: ScoreNetworks, settings: ScoreConfig, num_texts: int, path: Path
    ) -> None:
        self.model, self.networks, self.settings, self.path = model, networks, settings, path
        self.parameters = networks.named_tensors()
        matrices = [each for each in self.parameters.values() if each.dim() > 1]
        others = [each for each in self.parameters.values() if each.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=settings.learning_rate,
        )
        self.batch = 0
        self.batches = -(-num_texts // settings.texts_at_once)
        # Of every batch, by layer: before, now, oracle; NaN where a sliding window leaves nothing to foresee.
        self.lost: list[list[list[float]]] = []

    @property
    def closed(self) -> float:
        """How much of the way from a new network to the oracle is gone, on the last texts before they are learned."""
        before, now, oracle = self._recently_lost().nanmean(dim=0).nan_to_num().tolist()
        return (before - now) / max(before - oracle, 1e-9)

    def rows(self) -> list[dict[str, float]]:
        """What ``train_scores`` returns."""
        size = self.settings.texts_at_once
        lost = torch.tensor(self.lost).nanmean(dim=1)  # (batches, 3)
        curve = [
            {"texts": size * index, "lost_before": before, "lost": now, "lost_oracle": oracle}
            for index, (before, now, oracle) in enumerate(lost.tolist())
            if not math.isnan(now)
        ]
        return curve + [
            {"layer": index, "lost_before": before, "lost": now, "lost_oracle": oracle}
            for index, (before, now, oracle) in zip(self.layers, self._recently_lost().tolist(), strict=True)
            if not math.isnan(now)
        ]

    def _recently_lost(self) -> torch.Tensor:
        """(layers, 3), a mean over the last texts."""
        return torch.tensor(self.lost[-max(TOLD_TEXTS // self.settings.texts_at_once, 1) :]).mean(dim=0)

    @property
    def layers(self) -> list[int]:
        """Layers with a network, those with a sliding window included."""
        return list(self.networks.by_layer)

    def learn_from(self, windows: torch.Tensor) -> float:
        """Read texts, measure on them, learn from them; save. Returns the first loss."""
        steps = [self._read(batch) for batch in windows.split(self.settings.texts_per_step)]
        lost = [weight * self._lost_shares(text) for texts, weight in steps for text in texts]
        self.lost.append(summed([torch.stack(lost).sum(dim=0) / len(steps)])[0].tolist())
        losses = []
        for index in range(self.settings.repeats * len(steps)):
            done = (self.batch + index / (self.settings.repeats * len(steps))) / self.batches
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * (1 - done)
            losses.append(self._learn(*steps[index % len(steps)]))
        self.batch += 1
        if PartialState().is_main_process:
            self.save()
        return losses[0]

    def _read(self, windows: torch.Tensor) -> tuple[list[dict[int, Lookups]], float]:
        """Texts of a step that are of this process, and the weight of each."""
        processes = PartialState()
        mine, weight = windows[processes.process_index :: processes.num_processes], 1 / len(windows)
        if not len(mine):  # fewer texts than processes: this one takes part with nothing, in all sums
            mine, weight = windows[:1], 0.0
        config, rotary = self.networks.config, self.networks.rotary
        return [record_lookups(self.model, ids[None].long(), config, rotary) for ids in mine], weight

    def _learn(self, texts: Sequence[dict[int, Lookups]], weight: float) -> float:
        """A step of the optimizer; loss over all processes' texts."""
        self.optimizer.zero_grad()
        total = 0.0
        for text in texts:
            for layer_idx, lookups in text.items():
                loss = lookup_loss(self.networks.by_layer[layer_idx], lookups, self.networks.config)
                (weight * loss).backward()
                total += weight * loss.item() / len(text)
        total = float(summed([torch.tensor(total, dtype=torch.float64)])[0])
        if not math.isfinite(total):  # in all processes, so that none waits for another
            raise FloatingPointError(f"scores, step {self.batch + 1} of {self.batches}: the loss is {total}")
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        for gradient, total_gradient in zip(gradients, summed(gradients), strict=True):
            gradient.copy_(total_gradient)
        self.optimizer.step()
        return total

    @torch.no_grad()
    def _lost_shares(self, text: dict[int, Lookups]) -> torch.Tensor:
        """(layers, 3) of a text."""
        shares = []
        for layer_idx in self.layers:
            if layer_idx not in text:
                shares.append([math.nan] * 3)
                continue
            lookups, network = text[layer_idx], self.networks.by_layer[layer_idx]
            features = network(lookups.keys, lookups.values)
            shares.append(lost_shares(lookups, self.networks.config, features))
        return torch.tensor(shares, dtype=torch.float64)

    def save(self) -> None:
        """Write everything that a later process goes on from."""
        tensors = {f"parameter.{name}": tensor.detach().cpu() for name, tensor in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = torch.as_tensor(value).cpu()
        facts = {"batch": self.batch, "lost": self.lost}
        write_whole(self.path, save(tensors, metadata={"facts": json.dumps(facts)}))

    def load(self) -> None:
        """Go on from what a killed run has saved."""
        if not self.path.is_file():
            return
        with safe_open(self.path, "pt") as file, torch.no_grad():
            facts, names = json.loads(file.metadata()["facts"]), set(file.keys())
            self.batch, self.lost = facts["batch"], facts["lost"]
            for name, parameter in self.parameters.items():
                parameter.copy_(file.get_tensor(f"parameter.{name}"))
                if f"step.{name}" not in names:  # of a layer with a sliding window, which learns nothing
                    continue
                state = {key: file.get_tensor(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
                }


def lookup_loss(network: Any, lookups: Lookups, config: LoCoCoConfig) -> torch.Tensor:
    """Cross-entropy between the attention that tokens will receive and the softmax of their scores' logits."""
    entries, age = lookups.entries(network(lookups.keys, lookups.values))
    later = lookups.later * lookups.is_candidate
    shares = later / later.sum(dim=-1, keepdim=True).clamp_min(1e-12)
    logits = SCORES[config.score]().logits(entries, age, config).masked_fill(~lookups.is_candidate, HIDDEN)
    return -(shares * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


def lost_shares(lookups: Lookups, config: LoCoCoConfig, features: torch.Tensor) -> list[float]:
    """Share of later attention to candidates that are not kept: by new networks, by features, and by the oracle."""
    is_full = lookups.seen.flatten() > config.num_slots  # where everything fits nothing is chosen
    if not is_full.any():
        return [0.0, 0.0, 0.0]
    entries, age = lookups.entries(features)
    later = lookups.later * lookups.is_candidate
    kept = min(config.num_heavy + config.num_fused, later.shape[-1])  # type: ignore[operator]
    score, new, lost = SCORES[config.score](), dataclasses.replace(entries, features=None), []
    for ranking in (score.rank(new, age, config), score.rank(entries, age, config), later):
        best = ranking.masked_fill(~lookups.is_candidate, float("-inf")).topk(kept, dim=-1).indices
        share = 1 - later.gather(-1, best).sum(-1) / later.sum(-1).clamp_min(1e-12)
        lost.append(float(share[is_full].float().mean()))
    return lost
