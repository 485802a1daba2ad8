"""What it costs the loss that a KV head keeps only so many slots, measured on texts that an unpatched model reads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from lococo.compression.centroids import CentroidCompressor, closest_centroid
from lococo.compression.entries import Entries
from lococo.compression.select import Budget, rank
from lococo.config import LoCoCoConfig
from lococo.models import base_shape, find_family
from lococo.registry import COMPRESSORS, SCORES
from lococo.training.lookups import fast_products
from lococo.training.record import LayerRecord, record
from lococo.training.scores import ScoreNetworks

# Log of the factor by which centroids may weigh more than their tokens' number: what is tried for each layer.
LOG_SCALES = tuple(half / 2 for half in range(8))

# What decides which tokens stay, and what becomes of the others.
SELECTION_FIELDS = (
    *("block_size", "num_sinks", "num_heavy", "num_recent", "num_fused", "residual", "score", "compressor", "scaling"),
)

Measure = Callable[[Sequence, Callable[[], list]], list]


def eviction_errors(
    model: PreTrainedModel,
    windows: torch.Tensor,
    config: LoCoCoConfig,
    levels: Sequence[int],
    measure: Measure,
    networks: ScoreNetworks | None = None,
) -> torch.Tensor:
    """What it costs the loss that one KV head at a time keeps only so many slots.

    For every text, layer and KV head the attention output with evicted tokens is compared with the full cache's. Its
    difference, projected on the gradient of the next-token loss, is squared and summed over tokens and query heads:
    the diagonal of the loss' (empirical) Fisher information along the error. A text is read once for all levels, with
    the full cache's attention for the score's statistics.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Not patched.
    windows : torch.Tensor
        (texts, tokens) token ids.
    config : LoCoCoConfig
        Shares of the slots. Of compressors, centroids are computed; with another nothing is fused here, a fused slot
        is its anchor (with ``residual="none"``, which has no anchors, the earliest token).
    levels : sequence of int
        Numbers of slots to try.
    measure : callable
        ``Journal.measure`` of a journal for this model: a killed run goes on at the text where it stopped.
    networks : ScoreNetworks, optional
        Of a learned score. None: the score is that of new ones.

    Returns
    -------
    torch.Tensor
        (scales, levels, layers, kv_heads) in float64, for centroids that weigh by each of ``LOG_SCALES``; one scale
        where there are none. A mean over texts, of which each counts as much: those of a text are relative to their
        sum over layers and heads at the level closest to ``config.num_slots``. NaN in layers that keep their window.

    Raises
    ------
    ValueError
        If every layer keeps its window.
    """
    shape, layers = base_shape(model), compressed_layers(model, config)
    middle = min(range(len(levels)), key=lambda index: abs(levels[index] - config.num_slots))
    configs = [config.with_slots(slots) for slots in levels]
    scales = _log_scales(configs)
    total = torch.zeros(len(scales), len(levels), len(layers), shape["num_kv_heads"], dtype=torch.float64)
    chosen = [{name: getattr(each, name) for name in SELECTION_FIELDS} for each in configs]
    known = None if networks is None else networks.digest()
    for ids in tqdm(windows, desc="slots per head", unit="text", disable=None):
        key = ("eviction_errors", chosen, scales, ids.tolist(), known, layers)
        found = measure(key, functools.partial(_text_errors, model, ids, configs, networks, layers))
        errors = torch.tensor(found, dtype=torch.float64)
        total += errors / errors[0, middle].sum().clamp_min(1e-30)
    every = total.new_full((*total.shape[:2], shape["num_layers"], total.shape[3]), float("nan"))
    every[:, :, layers] = total / len(windows)
    return every


def compressed_layers(model: PreTrainedModel, config: LoCoCoConfig) -> list[int]:
    """Layers of a model that keep slots, and not what their window sees.

    Raises
    ------
    ValueError
        If there are none.
    """
    windows = find_family(model).windows
    layers = [index for index, window in enumerate(windows) if not config.keeps(window)]
    if not layers:
        raise ValueError(
            f"every layer of {type(model).__name__} keeps its sliding window (compress_windows=False): there is "
            "nothing to calibrate; use compress_windows=True"
        )
    return layers


def _text_errors(
    model: PreTrainedModel,
    ids: torch.Tensor,
    configs: Sequence[LoCoCoConfig],
    networks: ScoreNetworks | None,
    layers: Sequence[int],
) -> list:
    """(scales, levels, layers, kv_heads) of a text, as lists."""
    smaller = [config for config in configs if config.num_slots < len(ids)]  # with more nothing is evicted
    errors = []
    with fast_products(model):
        records = record(model, ids[None].long(), gradients=True)
    for layer_idx in layers:
        entry, features = records[layer_idx], None
        if networks is not None and entry.window is None:
            features = networks.features(layer_idx, entry.key, entry.value)
        errors.append(layer_errors(entry, smaller, features).cpu())
    found = torch.stack(errors, dim=2)
    return F.pad(found, (0, 0, 0, 0, 0, len(configs) - len(smaller))).tolist()


@torch.no_grad()
def layer_errors(
    entry: LayerRecord, configs: Sequence[LoCoCoConfig], features: torch.Tensor | None = None
) -> torch.Tensor:
    """``fisher_error`` of one layer's KV heads, summed over tokens, for several numbers of slots at once.

    Without the evicted tokens D a query's output changes by ``-sum_D p (v - o) / (1 - sum_D p)``; centroids of values
    v_c that receive s_c, in units of all attention there was, add ``s_c (v_c - o)`` above and ``s_c`` below the line.

    Parameters
    ----------
    entry : LayerRecord
        Of one text, with gradients.
    configs : sequence of LoCoCoConfig
        Alike but for the slots.
    features : torch.Tensor, optional
        (1, kv_heads, tokens, num_features), for a learned score. None: those of a new one.

    Returns
    -------
    torch.Tensor
        (scales, configs, kv_heads) in float64, as of ``eviction_errors``.
    """
    assert entry.gradient is not None, "record(..., gradients=True)"
    kv_heads, tokens = entry.key.shape[1:3]
    size, score = configs[0].block_size, SCORES[configs[0].score]()
    wide = torch.promote_types(entry.key.dtype, torch.float32)
    query, gradient, output = (
        each[0].to(wide).unflatten(0, (kv_heads, -1))
        for each in (entry.query * entry.scale, entry.gradient, entry.output)
    )
    key, value = entry.key[0].to(wide), entry.value[0].to(wide)
    along = (gradient * output).sum(dim=-1)  # (kv_heads, groups, tokens)
    scales = torch.tensor(_log_scales(configs), device=key.device).exp()
    runs = len(scales) > 1 and entry.window is None
    errors = torch.zeros(len(scales), len(configs), kv_heads, dtype=torch.float64, device=key.device)
    centroids = [_Centroids(key, value, config) for config in configs if runs]
    sums = key.new_zeros(len(configs), kv_heads, tokens)
    is_kept = torch.ones_like(sums, dtype=torch.bool)
    position = torch.arange(tokens, device=key.device)
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        for index, config in enumerate(configs if start else ()):
            every = Entries(
                entry.key[:, :, :start],
                entry.value[:, :, :start],
                sums[None, index, :, :start],
                position[:start].expand(1, kv_heads, start),
                features=None if features is None else features[:, :, :start],
            )
            kept = _kept(every, is_kept[index, :, :start], config, entry.window)
            if runs:
                centroids[index].join(is_kept[index, :, :start] & ~kept)
            is_kept[index, :, :start] = kept
            sums[index] *= config.score_fade**size
        logits = query[:, :, start:stop].flatten(1, 2) @ key[:, :stop].transpose(1, 2)
        if entry.softcap is not None:
            logits.div_(entry.softcap).tanh_().mul_(entry.softcap)
        distance = position[start:stop, None] - position[:stop]
        is_hidden = (distance < 0) if entry.window is None else (distance < 0) | (distance >= entry.window)
        logits = logits.unflatten(1, (-1, stop - start)).masked_fill(is_hidden, float("-inf"))
        probs = logits.softmax(dim=-1)
        if start:
            gained = gradient[:, :, start:stop].flatten(1, 2) @ value[:, :start].transpose(1, 2)
            gained = (gained.unflatten(1, (-1, stop - start)) - along[:, :, start:stop, None]) * probs[..., :start]
            kept = is_kept[:, :, :stop].permute(1, 2, 0).to(probs.dtype)  # (kv_heads, entries, configs)
            above = -(gained.flatten(1, 2) @ (1 - kept[:, :start])).mT  # (kv_heads, configs, groups * queries)
            below = (probs.flatten(1, 2) @ kept).clamp_min(1e-6).mT
            changes = (above / below)[None]
            if runs:
                all_logits = logits.logsumexp(dim=-1).flatten(1)
                parts = (query, gradient, along)
                seen = (*(part[:, :, start:stop].flatten(1, 2) for part in parts), all_logits, entry.softcap)
                received = zip(*(each.received(*seen) for each in centroids), strict=True)
                one, one_gain, many, many_gain = (torch.stack(each, dim=1) for each in received)
                factor = scales[:, None, None, None]
                changes = (above + one_gain + factor * many_gain) / (below + one + factor * many)
            errors += changes.double().square().sum(dim=-1).mT
        received = (probs.square_() if score.power == 2 else probs).sum(dim=1)
        sums[:, :, :stop] += received.sum(dim=1)
        for index, config in enumerate(configs):
            near = slice(max(start - config.score_delay + 1, 0), stop)
            is_early = distance[:, near] < config.score_delay
            sums[index, :, near] -= (received[..., near] * is_early).sum(dim=1)
    return errors


def has_centroids(config: LoCoCoConfig) -> bool:
    """Whether what is evicted goes on in centroids."""
    return config.num_fused > 0 and issubclass(COMPRESSORS[config.compressor], CentroidCompressor)


def _log_scales(configs: Sequence[LoCoCoConfig]) -> tuple[float, ...]:
    """What is tried: no more than one where nothing goes on in centroids."""
    return LOG_SCALES if any(map(has_centroids, configs)) else LOG_SCALES[:1]


class _Centroids:
    """Those of a layer's KV heads with so many slots, while a text is read."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor, config: LoCoCoConfig) -> None:
        self.key, self.value = key, value
        assert config.num_sinks is not None
        first = slice(config.num_sinks, config.num_sinks + config.num_fused)
        self.first = range(key.shape[1])[first]
        self.keys, self.values = key[:, first], value[:, first]
        self.mass = key.new_zeros(self.keys.shape[:2])

    def join(self, is_evicted: torch.Tensor) -> None:
        """Take the evicted ones of the tokens read, (kv_heads, tokens)."""
        if not len(self.first) or not is_evicted.any():  # in all heads: they have as many slots
            return
        seen = is_evicted.shape[1]
        closest = closest_centroid(self.key[:, :seen], self.keys)
        number = torch.arange(seen, device=closest.device)
        is_first = (number >= self.first.start) & (number < self.first.stop)
        closest = torch.where(is_first, number - self.first.start, closest)
        slot = torch.arange(len(self.first), device=closest.device)[:, None]
        joins = ((closest[:, None] == slot) & is_evicted[:, None]).to(self.key.dtype)
        before, self.mass = self.mass[..., None], self.mass + joins.sum(dim=-1)
        now = self.mass[..., None]  # not 0: every one has its first
        self.keys = (before * self.keys + joins @ self.key[:, :seen]) / now
        self.values = (before * self.values + joins @ self.value[:, :seen]) / now

    def received(
        self,
        query: torch.Tensor,
        gradient: torch.Tensor,
        along: torch.Tensor,
        all_logits: torch.Tensor,
        softcap: float | None,
    ) -> tuple[torch.Tensor, ...]:
        """Attention that centroids receive, in units of all there was, and what its change means to the loss.

        Parameters
        ----------
        query, gradient : torch.Tensor
            (kv_heads, queries, head_dim).
        along, all_logits : torch.Tensor
            (kv_heads, queries), gradient times output; log-sum-exp of the logits.

        Returns
        -------
        tuple of torch.Tensor
            Each (kv_heads, queries): of centroids of one token and of those of several.
        """
        logits = query @ self.keys.mT
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        weights = (logits - all_logits[..., None]).exp() * self.mass[:, None]
        gained = (gradient @ self.values.mT - along[..., None]) * weights
        is_many = (self.mass > 1).to(weights.dtype)[..., None]
        return (
            *((each @ (1 - is_many)).squeeze(-1) for each in (weights, gained)),
            *((each @ is_many).squeeze(-1) for each in (weights, gained)),
        )


def _kept(entries: Entries, is_kept: torch.Tensor, config: LoCoCoConfig, window: int | None) -> torch.Tensor:
    """Which of the tokens read, (kv_heads, tokens) of those still kept, a compression keeps."""
    seen = is_kept.shape[-1]
    sinks, heavy, recent, fused = Budget.of(config, window)
    runs = window is None and has_centroids(config)
    if seen <= config.num_slots:
        return is_kept
    ranking = rank(entries, seen, config, window)
    number = torch.arange(seen, device=is_kept.device)
    order = -number.float().expand(is_kept.shape) if ranking is None else ranking[0]
    order = order.masked_fill(~is_kept, float("-inf"))
    order = order.masked_fill((number < sinks) | (number >= seen - recent), float("inf"))
    if runs:
        order = order.masked_fill((number >= sinks) & (number < sinks + fused), float("-inf"))
        fused = 0
    best = order.sort(dim=-1, descending=True, stable=True).indices[:, : sinks + heavy + recent + fused]
    return torch.zeros_like(is_kept).scatter_(-1, best, True) & is_kept
