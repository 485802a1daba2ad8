"""The Triton kernels, compiled, against float64 at the shapes of real models. On a CPU they are interpreted."""

import itertools
import sys

import torch
from gpu_report import SKIPPED, Report, stage_options

from lococo import LoCoCoConfig
from lococo.compression import base as compressors
from lococo.compression import fusion
from lococo.compression import select as slots
from lococo.compression.codes import Codec
from lococo.compression.fusion import FusionHead
from lococo.kernels import scoring as kernels
from lococo.kernels import triton_attention as triton_kernels
from lococo.kernels import triton_decode
from lococo.kernels.attention import LogitBias, lower_right
from lococo.results.deadline import Deadline, OutOfTime

TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
EXACT = 1e-4  # of sums in float32
SCALE_OF_BIAS, DELAY = 3.0, 100
# batch, heads, kv_heads, queries, entries
SHAPES = {"block": (1, 32, 8, 512, 1024), "odd": (2, 8, 2, 77, 589), "one query": (2, 32, 8, 1, 1024)}
SMALL_SHAPES = {"block": (1, 4, 2, 16, 32), "odd": (2, 4, 2, 7, 29), "one query": (1, 4, 2, 1, 32)}
BLENDS = {
    "gates": dict(gate_init=0.4),
    "low rank, residual of the layer": dict(gate_init=0.7, residual="layer", head_rank=16),
    "no residual, no mass": dict(residual="none", mass_bias=False, score="sum"),
}


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def judge(found, bound, **errors):
    found.update(error=max(errors.values()), bound=bound)
    worst = max(errors, key=errors.get)
    # In this order a NaN is too large as well.
    assert all(error < bound for error in errors.values()), f"{worst} is off by {errors[worst]:.2e}"


def drawn(device, dtype, shape, dim):
    """Queries, keys and values as a model's views are, and a bias."""
    batch, heads, kv_heads, queries, entries = shape
    query = torch.randn(batch, queries, heads, dim, device=device).to(dtype).transpose(1, 2)
    key = torch.randn(batch, kv_heads, entries + 8, dim, device=device).to(dtype)[:, :, :entries]
    value = torch.randn(batch, entries, kv_heads, dim, device=device).to(dtype).transpose(1, 2)
    return query, key, value, SCALE_OF_BIAS * torch.rand(batch, kv_heads, entries, device=device)


def check_attend(found, device, dtype, dim, shape, is_biased):
    query, key, value, bias = drawn(device, dtype, shape, dim)
    bias, scale = bias if is_biased else None, dim**-0.5
    output, lse = triton_kernels.attend(query, key, value, scale, bias)
    wide = [tensor.double() for tensor in (query, key, value)]
    expected = kernels.attend(*wide, scale, LogitBias(bias=bias), "eager")
    logits = wide[0].unflatten(1, (key.shape[1], -1)) @ wide[1].transpose(-1, -2)[:, :, None] * scale
    logits = logits if bias is None else logits + bias[:, :, None, None]
    hidden = ~lower_right(query.shape[2], key.shape[2], 0, device)
    sums = logits.masked_fill_(hidden, float("-inf")).logsumexp(-1).flatten(1, 2)
    assert output.dtype == dtype and lse.dtype == torch.float32
    assert relative_error(lse, sums) < EXACT, f"the log-sum-exp is off by {relative_error(lse, sums):.2e}"
    judge(found, TOLERANCES[dtype], output=relative_error(output, expected))


def check_mass(found, device, dtype, dim, shape, squared):
    query, key, value, bias = drawn(device, dtype, shape, dim)
    bias, scale, delay = None if squared else bias, dim**-0.5, min(DELAY, shape[3] // 2)
    _, lse = triton_kernels.attend(query, key, value, scale, bias)
    mass = triton_kernels.attention_mass(query, key, scale, lse, bias, delay, squared)
    seen = LogitBias(bias=bias)
    expected = kernels.attention_mass(query.double(), key.double(), scale, seen, squared=squared, delay=delay)
    judge(found, EXACT, mass=relative_error(mass, expected))


def check_blend(found, device, dtype, dim, num_slots, fields):
    config = LoCoCoConfig(num_slots, block_size=num_slots, **fields)
    entries, shape = 2 * num_slots, (2, 4, 2 * num_slots)
    head = FusionHead(config, dim).to(device)
    everything = slots.Entries(
        keys=torch.randn(*shape, dim, device=device).to(dtype),
        values=torch.randn(*shape, dim, device=device).to(dtype),
        scores=torch.rand(shape, device=device),
        position=torch.arange(entries, device=device).expand(shape).float(),
        log_mass=torch.rand(shape, device=device) if config.has_mass else None,
    )
    choice = slots.choose(
        slots.rank(everything, 4 * num_slots, config), entries, slots.Budget.of(config), everything.keys
    )
    anchors = choice.anchors.gather(-1, choice.fused)
    rest = torch.ones(shape, dtype=torch.bool, device=device)
    rest = rest.scatter(-1, choice.anchors, False).scatter(-1, anchors, True)
    with torch.no_grad():
        got = fusion.blend_in_triton(everything, anchors, rest, head)
        weights = head(everything.keys, everything.values, anchors, rest).double()
    expected = {"keys": weights @ everything.keys.double(), "values": weights @ everything.values.double()}
    errors = {name: relative_error(getattr(got, name), tensor) for name, tensor in expected.items()}
    judge(found, TOLERANCES[dtype], **errors)
    numbers = {"scores": everything.scores, "position": everything.position}
    expected = {name: (weights @ tensor.double()[..., None])[..., 0] for name, tensor in numbers.items()}
    if config.has_mass:
        expected["log_mass"] = compressors.log_mass(weights, everything.log_mass.double())
    for name, tensor in expected.items():
        error = relative_error(getattr(got, name), tensor)
        assert error < EXACT, f"{name} are off by {error:.2e}"


def check_decode(found, device, dtype, dim, shape, bits):
    """A token's attention to codes, two KV heads of a text one behind the other."""
    batch, heads, _, _, entries = shape
    codec, kv_heads = Codec(bits, (dim, dim), (dtype, dtype)), 2
    numbers = [torch.randn(batch, entries, dim, device=device).to(dtype) for _ in range(2)]
    held = [each if each is None else each.contiguous() for pair in codec.coded(*numbers) for each in pair]
    query, scale = torch.randn(batch, heads, dim, device=device).to(dtype), dim**-0.5
    bias = SCALE_OF_BIAS * torch.rand(batch, entries, device=device).to(dtype)
    first = torch.tensor([0, entries // 2], device=device)
    at = torch.tensor([[entries // 2 - 1, entries - 1]], device=device).repeat(batch, 1)
    output, received = triton_decode.attend_codes(query, *held, codec, bias, at, scale, first, True, True)
    (keys, _), (values, _) = codec.rounded(*numbers)
    halves = torch.arange(entries, device=device) // (entries // 2)
    logits = query.double() @ keys.double().mT * scale + bias.double()[:, None]
    of_head = torch.arange(heads, device=device)[:, None] // (heads // kv_heads)
    probs = logits.masked_fill(halves != of_head, float("-inf")).softmax(-1)
    error = relative_error(received, probs.square().sum(1))
    assert error < TOLERANCES[dtype] / 4, f"the attention received is off by {error:.2e}"
    judge(found, TOLERANCES[dtype], output=relative_error(output, probs @ values.double()))


def checks(dims, dtypes, is_small):
    """(names, check, arguments), the heads of most models first; rare ones at one shape."""
    for dim, dtype in itertools.product(dims, dtypes):
        shapes = SMALL_SHAPES if is_small else SHAPES
        for name, shape in list(shapes.items())[: None if dim in (64, 128) else 1]:
            for flag in (True, False):
                yield ("attend", dim, dtype, name + ", bias" * flag), check_attend, (shape, flag)
            if shape[3] == 1:
                continue
            for flag in (True, False):
                yield ("mass", dim, dtype, name + ", squared" * flag), check_mass, (shape, flag)
        for bits in ((8, 8), (8, 4), (16, 16)):
            shape = (1, 4, 2, 1, 64) if is_small else (2, 32, 8, 1, 1024)
            yield ("decode", dim, dtype, "{} and {} bits".format(*bits)), check_decode, (shape, bits)
        for name, fields in BLENDS.items():
            yield ("blend", dim, dtype, name), check_blend, (32 if is_small else 512, fields)


def main():
    parser = stage_options(__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64, 80, 256])
    parser.add_argument("--time-limit", type=float, help="seconds after which no check begins")
    options = parser.parse_args()
    is_small = options.device == "cpu"
    # NumPy, in which kernels are interpreted, has no bfloat16.
    dtypes = [torch.float16] if is_small else list(TOLERANCES)
    report = Report(options, "Relative errors against float64; seconds with compilation.")
    deadline, planned = Deadline(options.time_limit), list(checks(options.head_dims, dtypes, is_small))
    torch.manual_seed(0)
    try:
        for (kernel, dim, dtype, case), check, arguments in planned:
            deadline.check()
            narrow = str(dtype).removeprefix("torch.")
            with report.check(kernel=kernel, head_dim=dim, dtype=narrow, case=case) as found:
                check(found, report.device, dtype, dim, *arguments)
    except OutOfTime:
        missed = f"no time for {len(planned) - len(report.rows)} of {len(planned)} checks"
        report.add(kernel="", head_dim=None, dtype="", case="", outcome=SKIPPED, detail=missed)
    return report.status()


if __name__ == "__main__":
    sys.exit(main())
