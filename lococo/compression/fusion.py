"""The learned head of a layer: entries in, mixing weights out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from lococo.compression.base import SMALLEST_WEIGHT, Compressor, onloaded, register_compressor
from lococo.compression.entries import Choice, Entries
from lococo.kernels.attention import triton_takes
from lococo.kernels.trials import TRITON, BlendTrial

if TYPE_CHECKING:
    from lococo.config import LoCoCoConfig

ROW_SUM_EPS = 1e-6

# Output channels up to which a convolution on a CPU is faster as a matrix product.
NARROW = 32


@register_compressor("conv")
class FusionHead(Compressor):
    """Weights that blend a layer's entries into its fused slots (Cai et al. 2024, Eq. 6-7).

    One convolution over the entries, shared by all KV heads of the layer, sees the key and value of each entry side
    by side. With ``residual`` a fused slot starts as a copy of one entry, its anchor, and a gate g opens it to the
    blend: ``W = (1 - g) onehot(anchor) + g normalise(ReLU(conv))``. A closed gate (0) is token selection. A channel
    whose ReLU gives 0 for every entry blends them evenly; its gate learns then, its part of the convolution does not.

    Parameters
    ----------
    config : LoCoCoConfig
        Gives ``num_fused`` output channels, the kernel, its rank, the normalisation and the residual.
    head_dim : int
        d, size of a key and of a value.
    """

    def __init__(self, config: LoCoCoConfig, head_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        fused, kernel, rank = config.num_fused, config.kernel_size, config.head_rank
        self.normalization = config.normalization
        self.conv = nn.Conv1d(2 * head_dim, rank or fused, kernel, padding=kernel // 2, bias=rank is None, **factory)
        self.expand = nn.Conv1d(rank, fused, 1, **factory) if rank else None
        if config.init_std is not None:
            nn.init.normal_(self.conv.weight, std=config.init_std)
        gates = {"slot": fused, "layer": 1, "none": 0}[config.residual]
        self.gate = nn.Parameter(torch.full((gates,), config.gate_init, **factory)) if gates else None
        self.mass_scale = nn.Parameter(torch.ones(1, **factory)) if config.has_mass else None
        self._closed: tuple[int, int, bool] | None = None

    def __getstate__(self) -> dict:
        """Without what was read from the gates: in another process their address says nothing."""
        return {**vars(self), "_closed": None}

    @property
    def is_closed(self) -> bool:
        """Whether every gate is shut, so that blends are copies. On a GPU the gates are read only after a change."""
        if self.gate is None or torch.compiler.is_compiling() or self.gate.is_meta:
            return False
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            self._closed = None  # the optimizer's next step may leave address and version as they are (FSDP)
            return False
        # Tensors made in inference mode do not count their changes, and may only be changed in it.
        state = (self.gate.data_ptr(), 0 if self.gate.is_inference() else self.gate._version)
        closed = self._closed
        if closed is None or closed[:2] != state or not self.gate.is_cuda:
            self._closed = closed = (*state, bool((self.gate <= 0).all()))
        return closed[2]

    def weights(self, entries: Entries, choice: Choice) -> torch.Tensor:
        """Mixing weights of every fused slot over the entries, those of ``forward``."""
        return self(entries.keys, entries.values, *choice.blendable(len(entries)))

    def blend(self, entries: Entries, choice: Choice) -> Entries:
        """The fused slots; in one kernel on GPUs, without gradients."""
        if self.normalization == "sum" and not torch.is_grad_enabled() and triton_takes(entries.keys):
            blend = blend_in_triton(entries, *choice.blendable(len(entries)), self)
            if blend is not None:
                return blend
        return super().blend(entries, choice)

    def after_step(self) -> list[nn.Parameter]:
        """Move gates that left [0, 1] back: steps beyond would have to be taken back first."""
        if self.gate is None:
            return []
        with torch.no_grad():
            self.gate.clamp_(0, 1)
        return [self.gate]

    def mass_bias(self, log_mass: torch.Tensor) -> torch.Tensor:
        """Bias on the logits of entries, ``mass_scale`` times their log-mass."""
        with onloaded(self):
            return cast(nn.Parameter, self.mass_scale).to(log_mass.dtype) * log_mass

    def forward(
        self, keys: torch.Tensor, values: torch.Tensor, anchors: torch.Tensor, rest: torch.Tensor
    ) -> torch.Tensor:
        """Mixing weights of every fused slot over the entries.

        Parameters
        ----------
        keys, values : torch.Tensor
            (batch, kv_heads, entries, head_dim), in time order.
        anchors : torch.Tensor
            (batch, kv_heads, slots), the entry each fused slot starts from. Heads with a smaller budget than the
            largest of their layer have fewer than ``num_fused`` and use the first channels.
        rest : torch.Tensor
            (batch, kv_heads, entries), True where an entry may be blended: no slot holds a copy of it.

        Returns
        -------
        torch.Tensor
            (batch, kv_heads, slots, entries) in float32 or wider; rows sum to 1.
        """
        slots = anchors.shape[-1]
        logits = self._logits(keys, values, slots)
        wide = torch.promote_types(logits.dtype, torch.float32)  # row sums of many small weights
        weights = self._normalise(logits.to(wide).relu(), rest[:, :, None])
        gates = self._gates(slots, wide)
        if gates is None:
            return weights
        residual = (1 - gates)[:, None].expand(*anchors.shape, 1)
        return (gates[:, None] * weights).scatter_add(-1, anchors[..., None], residual)

    def logits_and_gates(
        self, keys: torch.Tensor, values: torch.Tensor, slots: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What ``forward`` makes the weights from, for a kernel that makes them itself.

        Returns
        -------
        tuple
            (batch, kv_heads, slots, entries) output of the convolution, and (slots or 1,) gates or None.
        """
        with onloaded(self):
            return self._logits(keys, values, slots), self._gates(slots, torch.float32)

    def _logits(self, keys: torch.Tensor, values: torch.Tensor, slots: int) -> torch.Tensor:
        pairs = torch.cat([keys, values], dim=-1).flatten(0, 1)  # (batch * kv_heads, entries, 2d)
        logits = _convolve(self.conv, pairs.to(self.conv.weight.dtype))
        if self.expand is None:
            logits = logits[:, :slots]
        else:
            with onloaded(self.expand):
                weight, bias = self.expand.weight[:slots, :, 0], cast(nn.Parameter, self.expand.bias)[:slots, None]
                logits = weight @ logits + bias
        return logits.unflatten(0, keys.shape[:2])

    def _gates(self, slots: int, dtype: torch.dtype) -> torch.Tensor | None:
        return None if self.gate is None else _Opening.apply(self.gate[:slots].to(dtype))

    def _normalise(self, logits: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        if self.normalization == "softmax":
            return logits.masked_fill(~rest, float("-inf")).softmax(dim=-1)
        # A row of zeros, common after ReLU, becomes the mean of the rest instead of a division by zero.
        weights = (logits + ROW_SUM_EPS) * rest
        return weights / weights.sum(dim=-1, keepdim=True)


def blend_in_triton(entries: Entries, anchors: torch.Tensor, rest: torch.Tensor, head: FusionHead) -> Entries | None:
    """Blends of a head that divides its weights by their sum, in one kernel; None where Triton does not run.

    Parameters
    ----------
    anchors, rest
        As in ``FusionHead.forward``.
    """
    keys, carried = entries.keys, entries.log_mass
    logits, gates = head.logits_and_gates(keys, entries.values, anchors.shape[-1])
    averaged = [tensor for tensor in (entries.scores, entries.position) if tensor is not None]
    trial = BlendTrial(
        *(keys.device, keys.dtype, keys.shape[-1], logits.dtype, len(averaged)),
        has_mass=carried is not None,
        has_gates=gates is not None,
    )
    blend = TRITON.run(
        trial,
        *(keys, entries.values, averaged, carried, logits, gates, anchors, rest, ROW_SUM_EPS, SMALLEST_WEIGHT),
    )
    if blend is None:
        return None
    keys, values, averages = blend
    log_mass = None if carried is None else averages.pop()
    position = None if entries.position is None else averages.pop()
    return Entries(keys, values, averages.pop() if averages else None, position, log_mass)


class _Opening(torch.autograd.Function):
    """Gates limited to [0, 1], with a gradient at the bounds.

    Gates start at a bound and come back to it, and what ``clamp`` has for a gradient there is a convention that
    differs between releases of torch: 1 up to 2.13, 0 from 2.14 on, with which a closed gate could never open. Here
    the gradient passes from 0 to 1, bounds included, as if there were none; beyond a bound, where an optimizer's last
    step may have led, only what moves the gate back when it is descended.
    """

    @staticmethod
    def forward(ctx: Any, gates: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gates)
        return gates.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (gates,) = ctx.saved_tensors
        leads_away = ((gates < 0) & (gradient > 0)) | ((gates > 1) & (gradient < 0))
        return gradient.masked_fill(leads_away, 0)


def _convolve(conv: nn.Conv1d, entries: torch.Tensor) -> torch.Tensor:
    """(rows, channels, entries) convolution of (rows, entries, 2d) along the entries."""
    is_narrow = conv.out_channels <= NARROW and conv.bias is None
    if entries.device.type != "cpu" or torch.is_grad_enabled() or not is_narrow:
        return conv(entries.transpose(1, 2))
    # The CPU's convolution packs its weights anew at every call; this is one matrix product for all taps.
    with onloaded(conv):
        channels, inputs, kernel = conv.weight.shape
        taps = entries @ conv.weight.permute(1, 2, 0).reshape(inputs, kernel * channels)
    rows, length, width = taps.shape
    taps = F.pad(taps, (0, 0, kernel // 2, kernel // 2))
    strides = (taps.stride(0), width, width + channels, 1)  # of an entry, tap t comes from t rows further down
    return taps.as_strided((rows, length, kernel, channels), strides).sum(dim=2).transpose(1, 2)
