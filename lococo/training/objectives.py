"""What heads are trained for: predicting the next token, or predicting what the full cache predicts."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from lococo.compat import cache_of, with_cache
from lococo.compression.base import Compressor
from lococo.context import ForwardRequest
from lococo.patch import suspended
from lococo.state import Patch, find_patch, patch_of
from lococo.whole_text import reading_pieces

# Tokens whose logits are held at once, the same on every machine.
LOSS_CHUNK = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(abc.ABC):
    """A loss for every token that has a next one.

    Parameters
    ----------
    backprop_tokens : int, optional
        Back-propagation through the cache ends at every multiple of so many tokens, each chunk's backward coming
        before the next chunk's forward, so that memory does not grow with the window. What is compressed where two
        chunks meet trains the heads with the later one. None: it goes through the whole window.

    Attributes
    ----------
    needs_full_cache : bool
        Whether ``losses`` wants to know what the full model predicts.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    backprop_tokens: int | None = None
    needs_full_cache: ClassVar[bool] = False

    def __post_init__(self) -> None:
        tokens = self.backprop_tokens
        if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
            raise ValueError(f"backprop_tokens must be a whole number of at least 1, or None, got {tokens!r}")

    @abc.abstractmethod
    def losses(self, logits: torch.Tensor, targets: torch.Tensor, full_logits: torch.Tensor | None) -> torch.Tensor:
        """Loss of every prediction.

        Parameters
        ----------
        logits : torch.Tensor
            (batch, tokens, vocabulary), through the compressed cache.
        targets : torch.Tensor
            (batch, tokens), the token that came next.
        full_logits : torch.Tensor, optional
            As ``logits``, through the full cache. None unless ``needs_full_cache``.

        Returns
        -------
        torch.Tensor
            (batch, tokens) in nats, in float32 or wider.
        """

    def spans(self, tokens: int) -> list[tuple[int, int]]:
        """Chunks (start, stop) of a window of some predicted tokens; each has a backward of its own."""
        step = self.backprop_tokens or max(tokens, 1)
        return [(start, min(start + step, tokens)) for start in range(0, max(tokens, 1), step)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken(Objective):
    """Cross-entropy of the next token through the compressed cache: end to end, as in Cai et al. 2024, Algorithm 2."""

    def losses(
        self, logits: torch.Tensor, targets: torch.Tensor, full_logits: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Cross-entropy; the full model is not asked."""
        return F.cross_entropy(_wide(logits).flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(Objective):
    """KL(full || compressed): the same model with its full cache teaches, without gradients.

    Parameters
    ----------
    temperature : float
        Both models' logits are divided by it; the KL is then multiplied by its square, so that gradients keep their
        size.
    next_token_weight : float
        Share of ``NextToken`` in the loss, from 0 to below 1.
    backprop_tokens : int, optional
        As of ``Objective``.
    """

    temperature: float = 1.0
    next_token_weight: float = 0.0
    needs_full_cache: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature!r}")
        if not 0 <= self.next_token_weight < 1:
            raise ValueError(
                f"next_token_weight must lie from 0 to below 1 (for 1 use NextToken), got {self.next_token_weight!r}"
            )

    def losses(self, logits: torch.Tensor, targets: torch.Tensor, full_logits: torch.Tensor | None) -> torch.Tensor:
        """Divergence from the full model, with its share of cross-entropy."""
        full = (_wide(cast(torch.Tensor, full_logits)) / self.temperature).log_softmax(dim=-1)
        compressed = (_wide(logits) / self.temperature).log_softmax(dim=-1)
        divergence = self.temperature**2 * F.kl_div(compressed, full, reduction="none", log_target=True).sum(dim=-1)
        if not self.next_token_weight:
            return divergence
        return torch.lerp(divergence, NextToken().losses(logits, targets), self.next_token_weight)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Caches:
    """What a patched model remembers of the windows it has begun to read, compressed and in full.

    Parameters
    ----------
    model : torch.nn.Module
        A patched causal language model.
    patch : Patch, optional
        Its handle. None: looked up.
    """

    def __init__(self, model: nn.Module, patch: Patch | None = None) -> None:
        self.model = model
        self.patch = patch or patch_of(model)
        self.compressed = self.patch.new_cache()
        self.full: Any = None
        self.full_tokens = 0

    def losses(
        self, objective: Objective, input_ids: torch.Tensor, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Losses of some tokens of windows. Arguments and result as in ``WindowLoss.forward``."""
        if input_ids.shape[1] < 2:
            raise ValueError(f"windows need at least 2 tokens, one to predict, got {input_ids.shape[1]}")
        stop = input_ids.shape[1] - 1 if stop is None else stop
        step = self.patch.prefill_chunk_size or LOSS_CHUNK
        losses = []
        with reading_pieces(self.patch.decoder, last_position=input_ids.shape[1] - 2):
            for first in range(start, stop, step):
                last = min(first + step, stop)
                ids, targets = input_ids[:, first:last], input_ids[:, first + 1 : last + 1]
                full = self.full_logits(ids) if objective.needs_full_cache else None
                losses.append(objective.losses(self.logits(ids), targets, full))
        return torch.cat(losses, dim=1)

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, vocabulary) through the compressed cache, which has read the tokens afterwards."""
        # Named as a request, the cache is used in training mode too, and the model makes none of its own beside it.
        with self.patch.asking(ForwardRequest(cache=self.compressed)):
            return self.model(input_ids=input_ids, use_cache=False).logits

    @torch.no_grad()
    def full_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The same through the full cache, without gradients."""
        start, self.full_tokens = self.full_tokens, self.full_tokens + input_ids.shape[1]
        positions = torch.arange(start, self.full_tokens, device=input_ids.device)[None]
        cache = with_cache(self.model, self.full)
        with suspended(self.patch.decoder):
            output = self.model(input_ids=input_ids, position_ids=positions, **cache, use_cache=True)
        self.full = cache_of(output)
        return output.logits

    def detach(self) -> None:
        """Cut the graph: back-propagation ends here."""
        self.compressed.detach()


class WindowLoss(nn.Module):
    """Losses of a patched model over windows, as a module whose only parameters are the heads.

    The model around the heads is no part of it: whatever trains, wraps, casts or saves this module leaves the model
    alone.

    Parameters
    ----------
    model : torch.nn.Module
        A patched causal language model.
    objective : Objective

    Raises
    ------
    ValueError
        If the model is not patched, has no heads, or PEFT trains copies of them.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.patch = patch_of(model)
        heads = self.patch.heads
        if not heads:
            raise ValueError(f"the model has no heads to train: it is patched with {self.patch.config}")
        for head in heads.values():
            if not isinstance(head, Compressor):
                raise ValueError(
                    f"the heads are inside {type(head).__name__}: leave lococo_head out of PEFT's modules_to_save"
                )
        object.__setattr__(self, "model", model)  # not registered as a part
        self.heads = nn.ModuleDict({str(index): head for index, head in heads.items()})
        self.objective = objective
        if hasattr(model, "hf_device_map"):
            self.hf_device_map = model.hf_device_map  # keeps Trainer from moving heads away from their layers

    def new_caches(self) -> Caches:
        """For windows of which nothing has been read."""
        return Caches(self.model, self.patch)

    def forward(
        self, input_ids: torch.Tensor, caches: Caches | None = None, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Losses of some tokens, those before them already read into the caches.

        Parameters
        ----------
        input_ids : torch.Tensor
            (batch, length), whole windows without padding.
        caches : Caches, optional
            Have read the tokens before ``start`` and hold those before ``stop`` afterwards. None: new ones.
        start, stop : int
            Tokens whose next token is predicted; stop is None or at most ``length - 1``.

        Returns
        -------
        torch.Tensor
            (batch, stop - start) in nats.

        Raises
        ------
        ValueError
            If windows have fewer than two tokens.
        """
        return (caches or self.new_caches()).losses(self.objective, input_ids, start, stop)


class NextTokenLoss(nn.Module):
    """Losses of a model over windows, as a module whose parameters are those of the model.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model. A patched one reads windows chunk by chunk, another one whole.
    objective : NextToken

    Raises
    ------
    ValueError
        If the windows of a model that is not patched are to be read in chunks.
    """

    def __init__(self, model: nn.Module, objective: NextToken) -> None:
        super().__init__()
        self.model = model
        self.patch = find_patch(model)
        self.objective = objective
        if objective.backprop_tokens is not None and self.patch is None:
            raise ValueError("backprop_tokens is for compressed caches: a full cache is trained on whole windows")
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # FSDP shards layer by layer

    def new_caches(self) -> Caches | None:
        """For windows of which nothing has been read. None where they are read whole."""
        return Caches(self.model, self.patch) if self.patch else None

    def forward(
        self, input_ids: torch.Tensor, caches: Caches | None = None, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Losses of some tokens. Arguments and result as in ``WindowLoss.forward``; without a cache of all tokens."""
        caches = caches or self.new_caches()
        if caches is not None:
            return caches.losses(self.objective, input_ids, start, stop)
        logits = self.model(input_ids=input_ids[:, :-1], use_cache=False).logits
        parts = zip(logits.split(LOSS_CHUNK, dim=1), input_ids[:, 1:].split(LOSS_CHUNK, dim=1), strict=True)
        return torch.cat([self.objective.losses(logits, targets) for logits, targets in parts], dim=1)
