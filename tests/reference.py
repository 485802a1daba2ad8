"""A naive reference of the compressed cache, one token and one head at a time, for comparison in tests.

It shares no code with the package. Everything is meant to run in float64, for one row of a batch without padding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lococo.config import LoCoCoConfig

LEARNED = ("learned", "foreseen")
DISTANT = ("distant", *LEARNED)  # the scores that sum the attention of distant queries
Rotate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass
class Entry:
    """One entry of one KV head: a token, or a blend of tokens.

    Parameters
    ----------
    key, value : Tensor (d)
        Differentiable. Keys are kept as they came: rotated for absolute positions, un-rotated for slot positions.
    score : float
        Attention received.
    born : float
        Index of the token, 0-based.
    log_mass : Tensor ()
        Differentiable. 0 for a token.
    tokens : Tensor (L)
        Weight of every token of the text in it.
    features : list of float
        Of the token it begins with, for a learned score.
    seen : Tensor (d), optional
        The key at its place in the cache, with slot positions and codes: it is coded there anew.
    """

    key: torch.Tensor
    value: torch.Tensor
    score: float
    born: float
    log_mass: torch.Tensor
    tokens: torch.Tensor
    features: list[float] = dataclasses.field(default_factory=list)
    seen: torch.Tensor | None = None


@dataclasses.dataclass
class Decided:
    """What the last compression decided about a token that was an entry of its own.

    Parameters
    ----------
    now : int
        Tokens read before it.
    outcome : str
        "sink", "heavy", "recent", "fused" (a fused slot began with it) or "dropped".
    rank, candidates, kept : int
        Its rank among so many candidates, of which so many were kept; 0 if it was none.
    score, statistic : float
        By which it was ranked, and what that would be without features. NaN if nothing is ranked.
    weights : list of float
        Its part of every slot.
    """

    now: int
    outcome: str
    rank: int
    candidates: int
    kept: int
    score: float
    statistic: float
    weights: list[float]


@dataclasses.dataclass
class NaiveHead:
    """Weights of one layer's compressor, the same for all KV heads. C is F, or the rank r of a low-rank head.

    Parameters
    ----------
    weight : Tensor (C, 2d, kernel)
    bias : Tensor (C), optional
        None for a low-rank head.
    up_weight : Tensor (F, r), optional
        Given for a low-rank head.
    up_bias : Tensor (F), optional
    gate : Tensor (F) or (1), optional
        One gate per slot or one for the layer; not used with residual "none".
    mass_scale : Tensor () or float
    log_scale : Tensor (1), optional
        Of centroids, which have nothing else.
    """

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    up_weight: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    mass_scale: torch.Tensor | float = 1.0
    log_scale: torch.Tensor | None = None

    def logit_bias(self, entry: Entry) -> torch.Tensor:
        """What is added to the logits of an entry ()."""
        if self.log_scale is None:
            return (self.mass_scale * entry.log_mass).sum()
        return entry.log_mass + (self.log_scale[0] if entry.log_mass > 0 else 0.0)


def naive_head(head) -> NaiveHead | None:
    """The weights of a layer's ``FusionHead`` or ``CentroidCompressor``; None for a layer without one."""
    if head is None:
        return None
    if hasattr(head, "log_scale"):
        return NaiveHead(log_scale=head.log_scale)
    up = head.expand
    return NaiveHead(
        weight=head.conv.weight,
        bias=head.conv.bias,
        up_weight=None if up is None else up.weight[..., 0],
        up_bias=None if up is None else up.bias,
        gate=head.gate,
        mass_scale=1.0 if head.mass_scale is None else head.mass_scale,
    )


def naive_network(network) -> dict[str, torch.Tensor] | None:
    """The parameters of a learned score's network; None for a layer without one."""
    return None if network is None else dict(network.named_parameters())


def naive_features(
    keys: torch.Tensor, values: torch.Tensor, network: dict[str, torch.Tensor]
) -> list[list[list[float]]]:
    """What a learned score's network says of tokens: layer norm, a layer with SiLU, a linear layer, in float16.

    Parameters
    ----------
    keys, values : Tensor (num_kv_heads, L, d)
        Keys un-rotated.
    network : dict
        Its parameters by name.

    Returns
    -------
    list
        Features of every token of every KV head.
    """
    num_kv_heads, length, _ = keys.shape
    weights = {name: parameter.detach().double() for name, parameter in network.items()}
    features: list[list[list[float]]] = [[] for _ in range(num_kv_heads)]
    for token in range(length):
        seen = [vector[token] for vector in (*keys.detach().double(), *values.detach().double())]
        inputs = torch.cat(seen)
        inputs = (inputs - inputs.mean()) / (inputs.var(correction=0) + 1e-5).sqrt()
        inputs = inputs * weights["normed.weight"] + weights["normed.bias"]
        hidden = weights["hidden.weight"] @ inputs + weights["hidden.bias"]
        said = weights["output.weight"] @ (hidden / (1 + (-hidden).exp())) + weights["output.bias"]
        for of_head, part in zip(features, said.chunk(num_kv_heads), strict=True):
            of_head.append(part.half().tolist())
    return features


def foreseen(statistic: float, age: float, features: list[float]) -> float:
    """What features make of a token's statistic: the one place where the learned score's formula is."""
    bias, trust, decay = features
    received, read_since = (math.log(statistic + 1e-5) + 8) / 4, (math.log(max(age, 1.0)) - 6) / 1.5
    change = bias + trust * received + decay * read_since
    return (statistic + 1e-5) * math.exp(min(max(change, -60), 60))


def naive_rounded(vector: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers of a vector (d) as their codes of so many bits will be decoded; the gradient passes through.

    The least number of every 64 (8 bits) or 32 (4 bits), and the distance between two codes, are in float16.
    """
    if bits == 16:
        return vector
    numbers, found, size = vector.detach().tolist(), [], {8: 64, 4: 32}[bits]
    for start in range(0, len(numbers), size):
        group = numbers[start : start + size]
        step = torch.tensor((max(group) - min(group)) / (2**bits - 1)).half().item()
        least = torch.tensor(min(group)).half().item()
        for number in group:
            code = round((number - least) / step) if step > 0 else 0
            found.append(min(max(code, 0), 2**bits - 1) * step + least)
    return vector + (torch.tensor(found, dtype=vector.dtype) - vector.detach())


def delay_and_fade(config: LoCoCoConfig) -> tuple[int, float]:
    """By how many entries a query must be later to count for a token, and what is left of its part per token read."""
    if config.score in LEARNED:
        return min(config.block_size // 4, 32), 0.8 ** (1 / 128)
    return config.num_recent, 0.8 ** (1 / config.num_slots)


def naive_lococo(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LoCoCoConfig,
    head: NaiveHead | None = None,
    rotate: Rotate | None = None,
    scale: float | None = None,
    blocks: list[int] | None = None,
    window: int | None = None,
    cuts: Collection[int] = (),
    network: dict[str, torch.Tensor] | None = None,
    decided: list[dict[int, Decided]] | None = None,
) -> tuple[torch.Tensor, list[list[Entry]]]:
    """One attention layer over a compressed cache.

    Parameters
    ----------
    q : Tensor (num_heads, L, d)
    k, v : Tensor (num_kv_heads, L, d)
        q and k come rotated for absolute positions, un-rotated for slot positions.
    config : LoCoCoConfig
        With ``slots_per_head``, the first layer's are taken.
    head : NaiveHead, optional
        Needed where slots are fused; heads that fuse fewer slots use its first channels.
    rotate : callable, optional
        ``rotate(x (..., n, d), positions (n))``, needed for slot positions and a learned score's network.
    scale : float, optional
        Factor on ``q . k``; default ``d ** -0.5``.
    blocks : list of int, optional
        Lengths of the blocks that end in a compression, default all full blocks of ``config.block_size``. Tokens
        after them are read without one.
    window : int, optional
        Tokens a query sees. Nothing is fused then, and no sink is kept: what the window will see comes first. With
        ``compress_windows=False`` a block's end evicts what no later query sees, and nothing else.
    cuts : collection of int
        Tokens before which back-propagation ends: what is held when one comes is cut from its graph. A block that
        ends there is compressed after the cut.
    network : dict, optional
        Parameters of a learned score's network by name. Not used in layers with a window.
    decided : list, optional
        Gets what was decided about every token, for each KV head.

    Returns
    -------
    output : Tensor (num_heads, L, d)
    entries : list of lists of Entry
        What each KV head holds at the end, in time order.
    """
    num_heads, length, dim = q.shape
    num_kv_heads = k.shape[0]
    group = num_heads // num_kv_heads
    scale = dim**-0.5 if scale is None else scale
    blocks = [config.block_size] * (length // config.block_size) if blocks is None else list(blocks)
    if sum(blocks) > length:
        raise ValueError(f"blocks cover {sum(blocks)} tokens, but there are only {length}")
    if config.positions == "slot" and rotate is None:
        raise ValueError("slot positions need rotate")

    key_bits, value_bits = config.bits
    v = torch.stack([torch.stack([naive_rounded(value, value_bits) for value in head]) for head in v])
    if config.positions == "absolute":
        k = torch.stack([torch.stack([naive_rounded(key, key_bits) for key in head]) for head in k])
    features: list[list[list[float]]] = [[[]] * length] * num_kv_heads
    if network is not None and window is None:
        assert rotate is not None
        is_rotated = config.positions == "absolute"
        features = naive_features(rotate(k, -torch.arange(length)) if is_rotated else k, v, network)
    outputs, held = [], []
    for h in range(num_kv_heads):
        queries = q[h * group : (h + 1) * group]
        head_config = config if config.slots_per_head is None else config.with_slots(config.slots_per_head[0][h])
        if window is not None:
            heavy = head_config.num_slots - head_config.num_recent
            is_enough = config.num_slots >= window - 1 and not config.slots_per_head and config.positions == "absolute"
            compress = config.compress_windows and not is_enough
            changes = dict(slots_per_head=None, num_sinks=0, num_heavy=heavy, compress_windows=compress)
            head_config = dataclasses.replace(head_config, **changes)
        of_tokens: dict[int, Decided] = {}
        output, entries = _read(
            queries, k[h], v[h], features[h], head_config, head, rotate, scale, blocks, window, cuts, of_tokens
        )
        if decided is not None:
            decided.append(of_tokens)
        outputs.append(output)
        held.append(entries)
    return torch.cat(outputs), held


def _read(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    features: list[list[float]],
    config: LoCoCoConfig,
    head: NaiveHead | None,
    rotate: Rotate | None,
    scale: float,
    blocks: list[int],
    window: int | None,
    cuts: Collection[int],
    decided: dict[int, Decided],
) -> tuple[torch.Tensor, list[Entry]]:
    """One KV head: queries (G, L, d), keys and values (L, d) -> output (G, L, d) and the entries at the end."""
    length = keys.shape[0]
    left_over = length - sum(blocks)
    entries: list[Entry] = []
    outputs = []
    now = 0
    for number, block in enumerate([*blocks, left_over]):
        if config.score == "last":
            for entry in entries:
                entry.score = 0.0
        for token in range(now, now + block):
            if token in cuts and token > now:
                entries = [_cut(entry) for entry in entries]
            itself = torch.zeros(length, dtype=keys.dtype)
            itself[token] = 1.0
            key, there = keys[token], None
            if config.positions == "slot" and config.bits[0] != 16:
                place = torch.tensor([len(entries)])
                there = naive_rounded(rotate(key[None], place)[0], config.bits[0])
                key = naive_rounded(rotate(there[None], -place)[0], config.bits[0])
            entries.append(
                Entry(key, values[token], 0.0, float(token), keys.new_zeros(()), itself, features[token], there)
            )
            seen = entries if window is None else [entry for entry in entries if token - entry.born < window]
            outputs.append(_attend(queries[:, token], entries, seen, config, head, rotate, scale))
        now += block
        if now in cuts:
            entries = [_cut(entry) for entry in entries]
        if number < len(blocks) and window is not None and not config.compress_windows:
            entries = _within(entries, now, window, decided)
        elif number < len(blocks) and len(entries) > config.num_slots:
            entries = _compress(entries, config, head, now, window, decided)
            for place, entry in enumerate(entries):
                if entry.seen is not None:
                    moved = rotate(entry.key[None], torch.tensor([place]))[0]
                    entries[place] = dataclasses.replace(entry, seen=naive_rounded(moved, config.bits[0]))
        if config.score in DISTANT and number < len(blocks):
            for entry in entries:
                entry.score *= delay_and_fade(config)[1] ** block
    return torch.stack(outputs, dim=1), entries


def _within(entries: list[Entry], now: int, window: int, decided: dict[int, Decided]) -> list[Entry]:
    """Those that the query after ``now`` tokens sees, besides itself."""
    seen = [entry for entry in entries if now - entry.born < window]
    unseen = [entry for entry in entries if now - entry.born >= window]
    for index, entry in enumerate(seen if unseen else ()):
        own = [float(other == index) for other in range(len(seen))]
        decided[int(entry.born)] = Decided(now, "recent", 0, len(unseen), 0, math.nan, math.nan, own)
    for index, entry in enumerate(unseen, start=1):
        decided[int(entry.born)] = Decided(now, "dropped", index, len(unseen), 0, math.nan, math.nan, [0.0])
    return seen


def _cut(entry: Entry) -> Entry:
    """The same entry without its graph."""
    detached = {name: getattr(entry, name).detach() for name in ("key", "value", "log_mass")}
    if entry.seen is not None:
        detached["seen"] = entry.seen.detach()
    return dataclasses.replace(entry, **detached)


def _attend(
    queries: torch.Tensor,
    entries: list[Entry],
    seen: list[Entry],
    config: LoCoCoConfig,
    head: NaiveHead | None,
    rotate: Rotate | None,
    scale: float,
) -> torch.Tensor:
    """Queries (G, d) of the last entry's token over the entries seen -> (G, d). Adds to the scores of the entries."""
    keys = torch.stack([entry.key for entry in entries])
    values = torch.stack([entry.value for entry in entries])
    if config.positions == "slot":
        positions = torch.arange(len(entries))
        keys = rotate(keys, positions)
        if config.bits[0] != 16:
            keys = torch.stack([entry.seen for entry in entries])
        queries = torch.cat([rotate(query[None], positions[-1:]) for query in queries])

    hidden = torch.tensor([all(entry is not other for other in seen) for entry in entries])
    bias = keys.new_zeros(len(entries)).masked_fill(hidden, -math.inf)
    if config.has_mass and head is not None:
        bias = bias + torch.stack([head.logit_bias(entry) for entry in entries])

    outputs = []
    for query in queries:
        probabilities = torch.softmax(keys @ query * scale + bias, dim=0)
        outputs.append(probabilities @ values)
        distant = len(entries) - delay_and_fade(config)[0] if config.score in DISTANT else len(entries)
        for entry, probability in zip(entries[: max(distant, 0)], probabilities.tolist(), strict=False):
            entry.score += probability**2 if config.score in DISTANT else probability
    return torch.stack(outputs)


def _compress(
    entries: list[Entry],
    config: LoCoCoConfig,
    head: NaiveHead | None,
    now: int,
    window: int | None,
    decided: dict[int, Decided],
) -> list[Entry]:
    """N entries -> ``config.num_slots`` entries, after ``now`` tokens."""
    num_entries = len(entries)
    sinks = list(range(config.num_sinks))
    recents = list(range(num_entries - config.num_recent, num_entries))
    candidates = list(range(config.num_sinks, num_entries - config.num_recent))

    def rank(index: int, is_foreseen: bool = True) -> float:
        entry = entries[index]
        if window is not None and now - entry.born >= window:
            return -math.inf
        if config.score == "mean":
            return entry.score / (now - entry.born)
        if config.score in DISTANT:
            delay, fade = delay_and_fade(config)
            queries = max(now - entry.born - delay, 0)
            statistic = entry.score / ((1 - fade**queries) / (1 - fade) + 8)
            return (
                foreseen(statistic, now - entry.born, entry.features) if entry.features and is_foreseen else statistic
            )
        return entry.score

    def decide(candidates: list[int], kept: int, shares: dict[int, torch.Tensor]) -> None:
        """Note it of every token, with the weights of the entries in each slot by the entry it begins with."""
        for index, entry in enumerate(entries):
            if entry.tokens.float().max() == 1:
                weights = [shares[first][index].item() for first in sorted(shares)]
                outcome = "dropped" if index not in shares else "fused"
                if index in sinks or index in recents:
                    outcome = "sink" if index in sinks else "recent"
                elif index in candidates[: config.num_heavy]:
                    outcome = "heavy"
                decided[int(entry.tokens.argmax())] = Decided(
                    now,
                    outcome,
                    candidates.index(index) + 1 if index in candidates else 0,
                    len(candidates),
                    kept,
                    rank(index) if is_ranked else math.nan,
                    rank(index, is_foreseen=False) if is_ranked else math.nan,
                    weights,
                )

    begins_with_best = config.residual != "none" and config.compressor != "centroids"
    is_ranked = config.num_heavy > 0 or (config.num_fused > 0 and begins_with_best)
    if is_ranked:
        candidates.sort(key=lambda index: (-rank(index), index))
    if config.compressor == "centroids":
        return _with_centroids(entries, candidates, config, decide)
    heavy = candidates[: config.num_heavy]
    anchors = sorted(candidates[config.num_heavy : config.num_heavy + config.num_fused])

    slots = {index: entries[index] for index in sinks + heavy + recents}
    shares = dict(zip(slots, torch.eye(num_entries)[list(slots)], strict=True))
    rest = [index for index in range(num_entries) if index not in slots]
    if anchors:
        if head is None:
            raise ValueError("fused slots need a head")
        weights = _fusion_weights(entries, rest, anchors, config, head)
        for channel, anchor in enumerate(anchors):
            slots[anchor] = dataclasses.replace(
                _fuse(entries, weights[channel], config), features=entries[anchor].features
            )
            shares[anchor] = weights[channel]
    decide(candidates, len(heavy) + len(anchors), shares)
    return [slots[index] for index in sorted(slots)]


def _with_centroids(
    entries: list[Entry], candidates: list[int], config: LoCoCoConfig, decide: Callable[..., None]
) -> list[Entry]:
    """N entries -> slots: every one that is evicted joins the closest of those after the sinks."""
    centroids = list(range(config.num_sinks, config.num_sinks + config.num_fused))
    ranked = [index for index in candidates if index not in centroids]
    heavy = ranked[: config.num_heavy]
    slots = {index: entries[index] for index in range(len(entries)) if index not in candidates}
    slots.update({index: entries[index] for index in heavy})
    shares = dict(zip(slots, torch.eye(len(entries))[list(slots)], strict=True))
    members = {index: [index] for index in centroids}
    for index, entry in enumerate(entries):
        if index not in slots and index not in centroids:
            closest = min(centroids, key=lambda other: float((entries[other].key - entry.key).square().sum()))
            members[closest].append(index)
    for index, joined in members.items():
        counts = [entries[member].log_mass.exp() if config.has_mass else torch.tensor(1.0) for member in joined]
        weights = torch.zeros(len(entries), dtype=torch.float64)
        weights[joined] = torch.stack([count.detach().double() for count in counts]) / float(sum(counts))
        shares[index] = weights
        blend = _fuse(entries, weights, config)
        slots[index] = dataclasses.replace(
            blend, log_mass=torch.stack(counts).sum().log(), features=entries[index].features
        )
    decide(ranked, len(heavy), shares)
    return [slots[index] for index in sorted(slots)]


def _fusion_weights(
    entries: list[Entry], rest: list[int], anchors: list[int], config: LoCoCoConfig, head: NaiveHead
) -> torch.Tensor:
    """W (F, N): row f holds what each entry gives to fused slot f; 0 for entries that are not in rest."""
    activations = torch.relu(_convolve(entries, head))
    rows = []
    for channel, anchor in enumerate(anchors):
        blend = _normalize(activations[channel], rest, config.normalization)
        if config.residual != "none":
            gate = _opening(head.gate[channel if config.residual == "slot" else 0])
            onehot = torch.zeros_like(blend)
            onehot[anchor] = 1.0
            blend = (1.0 - gate) * onehot + gate * blend
        rows.append(blend)
    return torch.stack(rows)


def _opening(gate: torch.Tensor) -> torch.Tensor:
    """A gate () as the share of the blend: limited to [0, 1], with slope 1 there and at the bounds.

    Beyond a bound it has slope 1 for gradients that a descent step takes back towards the bound, and 0 for others.
    """
    place = gate.item()
    opening = gate + (min(max(place, 0.0), 1.0) - place)
    if opening.requires_grad and place < 0:
        opening.register_hook(lambda slope: torch.where(slope < 0, slope, 0.0))
    if opening.requires_grad and place > 1:
        opening.register_hook(lambda slope: torch.where(slope > 0, slope, 0.0))
    return opening


def _convolve(entries: list[Entry], head: NaiveHead) -> torch.Tensor:
    """Zero-padded 1-D convolution (cross-correlation) over the N entries, and the pointwise step -> (F, N)."""
    num_entries = len(entries)
    kernel_size = head.weight.shape[-1]
    inputs = [torch.cat([entry.key, entry.value]) for entry in entries]
    columns = []
    for centre in range(num_entries):
        column = torch.zeros_like(head.weight[:, 0, 0]) if head.bias is None else head.bias
        for tap in range(kernel_size):
            index = centre + tap - kernel_size // 2
            if 0 <= index < num_entries:
                column = column + head.weight[:, :, tap] @ inputs[index]
        if head.up_weight is not None:
            column = head.up_weight @ column
            if head.up_bias is not None:
                column = column + head.up_bias
        columns.append(column)
    return torch.stack(columns, dim=1)


def _normalize(activation: torch.Tensor, rest: list[int], normalization: str) -> torch.Tensor:
    """Activations (N) of one channel -> weights (N) that add up to 1 over rest and are 0 elsewhere."""
    chosen = activation[rest]
    chosen = chosen.softmax(dim=0) if normalization == "softmax" else (chosen + 1e-6) / (chosen + 1e-6).sum()
    return torch.zeros_like(activation).index_put((torch.tensor(rest),), chosen)


def _fuse(entries: list[Entry], weights: torch.Tensor, config: LoCoCoConfig) -> Entry:
    """The blend of N entries under weights (N)."""
    fixed = weights.tolist()
    log_mass = weights.new_zeros(())
    if config.has_mass:
        counted = weights[weights > 1e-9]
        log_mass = (counted * (1.0 / counted).log()).sum()
        log_mass = log_mass + sum(weight * entry.log_mass for weight, entry in zip(weights, entries, strict=True))
    return Entry(
        key=naive_rounded(
            sum(weight * entry.key for weight, entry in zip(weights, entries, strict=True)), config.bits[0]
        ),
        value=naive_rounded(
            sum(weight * entry.value for weight, entry in zip(weights, entries, strict=True)), config.bits[1]
        ),
        score=math.fsum(weight * entry.score for weight, entry in zip(fixed, entries, strict=True)),
        born=math.fsum(weight * entry.born for weight, entry in zip(fixed, entries, strict=True)),
        log_mass=log_mass,
        tokens=sum(weight * entry.tokens for weight, entry in zip(fixed, entries, strict=True)),
        seen=entries[0].seen,
    )


def naive_full(entry):
    """(batch, heads, tokens, head_dim) of a recorded layer, in float64."""
    groups = entry.query.shape[1] // entry.key.shape[1]
    key, value = (tensor.double().repeat_interleave(groups, dim=1) for tensor in (entry.key, entry.value))
    logits = entry.query.double() @ key.transpose(-1, -2) * entry.scale
    if entry.softcap is not None:
        logits = entry.softcap * torch.tanh(logits / entry.softcap)
    tokens = key.shape[2]
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    seen = (distance >= 0) & (distance < (entry.window or tokens))
    return logits.masked_fill(~seen, float("-inf")).softmax(-1) @ value


def naive_h2o(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_slots: int, block_size: int, scale: float
) -> tuple[torch.Tensor, list[list[int]]]:
    """H2O (Zhang et al. 2023) at absolute positions: half heavy hitters by accumulated attention, half recents.

    Tokens are evicted after each full block that leaves more than ``num_slots`` of them, per KV head; the attention a
    token received is added up over the query heads of its group.

    Parameters
    ----------
    q : Tensor (num_heads, L, d)
    k, v : Tensor (num_kv_heads, L, d)
        q and k rotated.
    num_slots, block_size : int
    scale : float

    Returns
    -------
    output : Tensor (num_heads, L, d)
    kept : list of lists of int
        Token indices each KV head holds at the end.
    """
    num_heads, length, _ = q.shape
    num_kv_heads = k.shape[0]
    num_heavy = num_slots // 2
    output = torch.zeros_like(q)
    kept_per_head = []
    for h in range(num_kv_heads):
        kept: set[int] = set()
        received = [0.0] * length
        for token in range(length):
            kept.add(token)
            seen = sorted(kept)
            for query_head in range(num_heads):
                if query_head // (num_heads // num_kv_heads) != h:
                    continue
                attention = (q[query_head, token] @ k[h, seen].T * scale).softmax(-1)
                output[query_head, token] = attention @ v[h, seen]
                for index, other in enumerate(seen):
                    received[other] += attention[index].item()
            if (token + 1) % block_size == 0 and len(kept) > num_slots:
                recent = set(seen[len(seen) - (num_slots - num_heavy) :])
                others = sorted(kept - recent)
                # sorted() keeps the order of equals, reversed or not: of two equal tokens the earlier one stays.
                heavy = set(sorted(others, key=lambda other: received[other], reverse=True)[:num_heavy])
                kept = recent | heavy
        kept_per_head.append(sorted(kept))
    return output, kept_per_head


def naive_streaming_llm(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_slots: int,
    num_sinks: int,
    block_size: int,
    scale: float,
    rotate: Rotate | None = None,
) -> tuple[torch.Tensor, list[int]]:
    """StreamingLLM (Xiao et al. 2023): the first tokens and the last ones.

    Tokens are evicted after each full block that leaves more than ``num_slots`` of them.

    Parameters
    ----------
    q : Tensor (num_heads, L, d)
    k, v : Tensor (num_kv_heads, L, d)
    num_slots, num_sinks, block_size : int
    scale : float
    rotate : callable, optional
        ``rotate(x (..., n, d), positions (n))``: q and k come un-rotated and positions are those inside the cache.

    Returns
    -------
    output : Tensor (num_heads, L, d)
    kept : list of int
        Token indices held at the end, the same for all heads.
    """
    num_heads, length, _ = q.shape
    group = num_heads // k.shape[0]
    output = torch.zeros_like(q)
    kept: list[int] = []
    for token in range(length):
        kept.append(token)
        for query_head in range(num_heads):
            query = q[query_head, token][None]
            keys = k[query_head // group, kept]
            if rotate is not None:
                query = rotate(query, torch.tensor([len(kept) - 1]))
                keys = rotate(keys, torch.arange(len(kept)))
            attention = torch.softmax(query @ keys.T * scale, dim=-1)
            output[query_head, token] = (attention @ v[query_head // group, kept])[0]
        if (token + 1) % block_size == 0 and len(kept) > num_slots:
            first_recent = token + 1 - (num_slots - num_sinks)
            kept = [index for index in kept if index < num_sinks or index >= first_recent]
    return output, kept


def rope_rotate(dim: int, theta: float = 10000.0) -> Rotate:
    """Rotary embedding in the half-split convention of Llama.

    Parameters
    ----------
    dim : int
        d, even.
    theta : float

    Returns
    -------
    rotate : callable
        ``rotate(x (..., n, d), positions (n)) -> (..., n, d)``.
    """
    frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = positions.to(torch.float64)[:, None] * frequencies
        first, second = x[..., : dim // 2], x[..., dim // 2 :]
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
        )

    return rotate
