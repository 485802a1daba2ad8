"""Triton kernels against their twins in float64: interpreted on the CPU, compiled where there is a GPU."""

import collections
import random
import warnings

import pytest
import torch
import triton.language as tl
from configs import FORESEEN
from families import build
from tiny import patched_llama, tiny_ids, tiny_llama
from triton.runtime.interpreter import InterpreterBuilder

from lococo import LoCoCoConfig, patched
from lococo.cache import decode
from lococo.cache.buffers import LayerModules
from lococo.compression import base as compressors
from lococo.compression import fusion
from lococo.compression import select as slots
from lococo.compression.codes import Codec
from lococo.compression.fusion import FusionHead
from lococo.kernels import attention as backends
from lococo.kernels import scoring as kernels
from lococo.kernels import trials, triton_blend, triton_decode
from lococo.kernels import triton_attention as triton_kernels
from lococo.kernels.attention import LogitBias, lower_right
from lococo.state import patch_of
from lococo.vllm import pages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# batch, heads, kv_heads, queries, entries, head_dim
SHAPES = {
    "grouped": (2, 6, 2, 37, 101, 64),
    "ungrouped": (1, 2, 2, 67, 67, 80),
    "several-blocks": (1, 3, 1, 50, 150, 128),
    "one-query": (2, 4, 2, 1, 75, 80),
}


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch):
    """NumPy has no bfloat16, and the interpreter multiplies its bits as if they were integers."""
    create_dot = InterpreterBuilder.create_dot

    def in_float32(builder, a, b, total, precision, imprecise):
        widened = [
            builder.create_fp_ext(operand, tl.float32) if operand.dtype.scalar == tl.bfloat16 else operand
            for operand in (a, b)
        ]
        return create_dot(builder, *widened, total, precision, imprecise)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", in_float32)


@pytest.fixture(autouse=True)
def nothing_tried_yet(monkeypatch):
    monkeypatch.setattr(trials.TRITON, "is_on", True)
    monkeypatch.setattr(trials.TRITON, "_passed", set())


def tensors(shape, dtype, seed=0):
    """(query, key, value, bias) as a model's views and a cache's slices are: no two with the same strides."""
    batch, heads, kv_heads, queries, entries, dim = shape
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, queries, heads, dim, generator=generator).transpose(1, 2)
    key = torch.randn(batch, kv_heads, entries + 9, dim, generator=generator)[:, :, :entries]
    value = torch.randn(batch, entries, kv_heads, dim, generator=generator).transpose(1, 2)
    bias = torch.randn(batch, kv_heads, entries + 3, generator=generator)[:, :, :entries]
    return *(tensor.to(DEVICE, dtype) for tensor in (query, key, value)), bias.to(DEVICE)


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_and_its_log_sum_exp(shape, biased, dtype):
    query, key, value, bias = tensors(shape, dtype)
    bias = bias if biased else None
    output, lse = triton_kernels.attend(query, key, value, 0.2, bias)
    wide = [tensor.double() for tensor in (query, key, value)]
    expected = kernels.attend(*wide, 0.2, LogitBias(bias=bias), "eager")
    assert output.dtype == dtype and lse.dtype == torch.float32
    assert relative_error(output, expected) < TOLERANCES[dtype]
    logits = wide[0].unflatten(1, (key.shape[1], -1)) @ wide[1].transpose(-1, -2)[:, :, None] * 0.2
    logits = logits if bias is None else logits + bias[:, :, None, None]
    hidden = ~lower_right(query.shape[2], key.shape[2], 0, logits.device)
    expected = logits.masked_fill(hidden, float("-inf")).logsumexp(-1).flatten(1, 2)
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("squared", "delay"),
    [
        (False, 0),
        (True, 23),
        *(pytest.param(*counted, marks=pytest.mark.slow) for counted in ((False, 23), (True, 0))),
    ],
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_mass(shape, delay, squared, dtype):
    query, key, value, bias = tensors(shape, dtype)
    bias = None if squared else bias
    _, lse = triton_kernels.attend(query, key, value, 0.2, bias)
    mass = triton_kernels.attention_mass(query, key, 0.2, lse, bias, delay, squared)
    seen, delayed = LogitBias(bias=bias), {"squared": squared, "delay": delay}
    expected = kernels.attention_mass(query.double(), key.double(), 0.2, seen, **delayed)
    assert mass.dtype == torch.float32
    assert relative_error(mass, expected) < 1e-4
    # The log-sum-exp of another kernel has other strides.
    other = lse.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(triton_kernels.attention_mass(query, key, 0.2, other, bias, delay, squared), mass)


def test_mass_without_a_late_query_is_nothing():
    query, key, value, _ = tensors(SHAPES["ungrouped"], torch.float32)
    _, lse = triton_kernels.attend(query, key, value, 0.2)
    assert not triton_kernels.attention_mass(query, key, 0.2, lse, delay=67).any()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("values", "dim"),
    [
        ({"gate_init": 0.3}, 64),
        ({"gate_init": 0.7, "residual": "layer", "head_rank": 3}, 80),
        ({"residual": "none", "mass_bias": False, "score": "sum"}, 128),
        ({"gate_init": 1.0, "num_heavy": 0}, 64),
    ],
)
def test_blend(values, dim, dtype):
    config = LoCoCoConfig(100, block_size=50, num_sinks=4, **values)
    torch.manual_seed(0)
    head = FusionHead(config, dim).to(DEVICE)
    shape, entries = (2, 2, 147), 147
    everything = slots.Entries(
        keys=torch.randn(2, 2, 160, dim, device=DEVICE).to(dtype)[:, :, :entries],
        values=torch.randn(2, entries, 2, dim, device=DEVICE).to(dtype).transpose(1, 2),
        scores=torch.rand(shape, device=DEVICE) if config.num_heavy else None,
        position=torch.arange(entries, device=DEVICE).expand(shape).float(),
        log_mass=torch.rand(2, 2, 160, device=DEVICE)[:, :, :entries] if config.has_mass else None,
    )
    ranking = None if everything.scores is None else slots.rank(everything, 200, config)
    choice = slots.choose(ranking, entries, slots.Budget.of(config), everything.keys)
    anchors = choice.anchors.gather(-1, choice.fused)
    rest = torch.ones(shape, dtype=torch.bool, device=DEVICE)
    rest = rest.scatter(-1, choice.anchors, False).scatter(-1, anchors, True)
    with torch.no_grad():
        got = fusion.blend_in_triton(everything, anchors, rest, head)
        weights = head(everything.keys, everything.values, anchors, rest).double()
    wide = everything.map(lambda tensor: tensor.double())
    expected = slots.Entries(
        keys=weights @ wide.keys,
        values=weights @ wide.values,
        scores=None if wide.scores is None else (weights @ wide.scores[..., None])[..., 0],
        position=(weights @ wide.position[..., None])[..., 0],
        log_mass=None if wide.log_mass is None else compressors.log_mass(weights, wide.log_mass),
    )
    for name in ("keys", "values", "scores", "position", "log_mass"):
        mine, theirs = getattr(got, name), getattr(expected, name)
        assert (mine is None) == (theirs is None), name
        if theirs is not None:
            tolerance = TOLERANCES[dtype] if name in ("keys", "values") else 1e-5
            assert relative_error(mine, theirs) < tolerance, name
            assert mine.dtype == getattr(everything, name).dtype


def test_backend_leaves_masks_caps_and_gradients_to_torch(in_every_type):
    query, key, value, bias = tensors((1, 2, 1, 5, 20, 16), torch.float32)
    mask = torch.rand(1, 1, 5, 20, device=DEVICE) < 0.5
    mask[..., 0] = True
    for seen in (LogitBias(mask, bias), LogitBias(softcap=2.0), LogitBias(bias=bias)):
        query.requires_grad_(seen.bias is not None)
        output = kernels.attend(query, key, value, 0.3, seen, "triton")
        assert relative_error(output, kernels.attend(query, key, value, 0.3, seen, "eager").double()) < 1e-6
        assert output.requires_grad == query.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_backend_leaves_wide_types_to_torch(dtype, monkeypatch):
    calls = []
    attend = triton_kernels.attend
    monkeypatch.setattr(triton_kernels, "attend", lambda *arguments: calls.append(arguments) or attend(*arguments))
    query, key, value, bias = tensors((1, 2, 1, 5, 20, 16), dtype)
    output = kernels.attend(query, key, value, 0.3, LogitBias(bias=bias), "triton")
    expected = kernels.attend(query, key, value, 0.3, LogitBias(bias=bias), "eager")
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    assert bool(calls) == (dtype == torch.bfloat16)


def test_mixed_types_reach_no_kernel(calls, monkeypatch):
    """One of them is wide, so all are; two narrow ones together are wide too."""
    monkeypatch.setattr(backends, "TRITON_DTYPES", backends.HALF_TYPES)
    for module in (kernels, fusion):
        monkeypatch.setattr(module, "triton_takes", lambda tensor: tensor.dtype in backends.HALF_TYPES)
    query, key, value, bias = tensors(SHAPES["grouped"], torch.bfloat16)
    lse = triton_kernels.attend(query, key, value, 0.2, bias)[1]
    expected = kernels.attention_mass(query.double(), key.double(), 0.2, LogitBias(bias=bias))
    calls.clear()
    for dtype in (torch.float32, torch.float16):
        output = kernels.attend(query, key.to(dtype), value, 0.2, LogitBias(bias=bias), "triton")
        mass = kernels.attention_mass(query, key.to(dtype), 0.2, LogitBias(bias=bias), lse=lse)
        assert output.dtype == torch.bfloat16 and relative_error(mass, expected) < 1e-2
    assert not calls


@pytest.mark.parametrize("seed", range(16))
def test_random_shapes_and_strides(seed):
    """Sizes around those of tiles, views of every kind, entries no query counts for."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice(list(TOLERANCES))
    dim, batch, kv_heads = draw.choice([1, 8, 33, 40, 64, 72, 96]), draw.choice([1, 2]), draw.choice([1, 2, 3])
    groups, entries = draw.choice([1, 2, 3, 5, 8]), draw.choice([1, 2, 16, 17, 63, 65, 129])
    queries = draw.choice([number for number in (1, 2, 16, 17, 33, entries) if number <= entries])
    layout = draw.choice(["dense", "tokens", "sparse", "expanded"])
    query, key, value = (
        strided(layout, batch, heads, tokens, dim).to(DEVICE, dtype)
        for heads, tokens in ((kv_heads * groups, queries), (kv_heads, entries), (kv_heads, entries))
    )
    bias = draw.choice([None, 3 * torch.randn(batch, kv_heads, entries), torch.randn(batch, kv_heads, 2 * entries)])
    bias = bias if bias is None else bias[..., :: bias.shape[-1] // entries].to(DEVICE)
    delay, squared = draw.choice([0, 1, 16, 40, entries, entries + 7]), draw.random() < 0.5

    output, lse = triton_kernels.attend(query, key, value, dim**-0.5, bias)
    wide = [tensor.double() for tensor in (query, key, value)]
    seen = LogitBias(bias=bias if bias is None else bias.double())
    assert relative_error(output, kernels.attend(*wide, dim**-0.5, seen, "eager")) < TOLERANCES[dtype]
    mass = triton_kernels.attention_mass(query, key, dim**-0.5, lse, bias, delay, squared)
    expected = kernels.attention_mass(*wide[:2], dim**-0.5, seen, squared=squared, delay=delay)
    assert (mass - expected).norm() <= 5e-4 * expected.norm()


def strided(layout, batch, heads, tokens, dim):
    """(batch, heads, tokens, dim) as models and caches hand it over."""
    if layout == "tokens":
        return torch.randn(batch, tokens, heads, dim).transpose(1, 2)
    if layout == "sparse":
        return torch.randn(batch, heads, tokens + 5, 2 * dim)[:, :, 3 : 3 + tokens, ::2]
    if layout == "expanded":
        return torch.randn(1, heads, tokens, dim).expand(batch, -1, -1, -1)
    return torch.randn(batch, heads, tokens, dim)


@pytest.mark.parametrize("seed", range(12))
def test_random_blends(seed):
    """Any number of slots, entries and averages; rows without a positive weight; gates open, shut and none."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype, dim, kv_heads = draw.choice(list(TOLERANCES)), draw.choice([1, 8, 33, 64, 72]), draw.choice([1, 2, 3])
    slots_, entries = draw.choice([1, 2, 31, 33, 70]), draw.choice([2, 17, 64, 65, 150])
    layout = draw.choice(["dense", "tokens", "sparse", "expanded"])
    keys, values = (strided(layout, 2, kv_heads, entries, dim).to(DEVICE, dtype) for _ in range(2))
    averaged = [100 * torch.rand(2, kv_heads, entries, device=DEVICE) for _ in range(draw.choice([0, 1, 2]))]
    carried = draw.choice([None, torch.rand(2, kv_heads, 2 * entries)[..., :entries].to(DEVICE)])
    logits = torch.randn(2, kv_heads, slots_, entries).to(DEVICE, draw.choice([dtype, torch.float32]))
    logits = -logits.abs() if draw.random() < 0.3 else logits
    gates = draw.choice([None, torch.rand(slots_), torch.rand(1), torch.zeros(slots_), torch.ones(slots_)])
    gates = gates if gates is None else gates.to(DEVICE)
    anchors = torch.randint(0, entries, (2, kv_heads, slots_), device=DEVICE)
    rest = torch.rand(2, kv_heads, entries, device=DEVICE) < draw.choice([0.1, 0.5, 1.1])
    rest = rest.scatter(-1, anchors, True)

    got = triton_blend.blend(keys, values, list(averaged), carried, logits, gates, anchors, rest, 1e-6, 1e-9)
    weights = (logits.double().relu() + 1e-6) * rest[:, :, None]
    weights = weights / weights.sum(-1, keepdim=True)
    if gates is not None:
        copies = torch.nn.functional.one_hot(anchors, entries)
        weights = gates.double()[:, None] * weights + (1 - gates.double()[:, None]) * copies
    for mine, mixed in zip(got[:2], (keys, values), strict=True):
        assert relative_error(mine, weights @ mixed.double()) < 1.5 * TOLERANCES[dtype]
    expected = [(weights @ column.double()[..., None])[..., 0] for column in averaged]
    expected += [] if carried is None else [compressors.log_mass(weights, carried.double())]
    for mine, theirs in zip(got[2], expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("bits", "sizes", "groups", "squared"),
    [
        ((8, 8), (64, 64), 3, False),
        ((8, 4), (80, 80), 1, True),
        ((4, 16), (128, 40), 8, False),
        ((4, 4), (33, 33), 2, False),
        ((16, 16), (64, 64), 2, True),
    ],
)
@pytest.mark.parametrize("starts", [None, (0, 91, 45)])
def test_decoding_from_codes(starts, bits, sizes, groups, squared, dtype):
    torch.manual_seed(0)
    codec, rows, entries, kv_heads = Codec(bits, sizes, (dtype, dtype)), 2, 130, 1 if starts is None else 3
    numbers = [torch.randn(rows, entries, size).to(DEVICE, dtype) for size in sizes]
    coded = [each if each is None else each.contiguous() for pair in codec.coded(*numbers) for each in pair]
    query = torch.randn(rows, sizes[0], kv_heads * groups).to(DEVICE, dtype).transpose(1, 2)
    bias = torch.randn(rows, entries).to(DEVICE, dtype)
    bias[:, :40], bias[0, 45:47] = float("-inf"), float("-inf")  # a whole tile, and what a window does not reach
    first = torch.tensor(starts or [0], device=DEVICE)
    at = torch.tensor([[44], [129]] if starts is None else [[44, 129, 90], [44, 91, 60]], device=DEVICE)
    arguments = (query, *coded, codec, bias, at, 0.2, None if starts is None else first)
    output, received = triton_decode.attend_codes(*arguments, True, squared)
    assert output.dtype == dtype and received.dtype == torch.float32

    (keys, _), (values, _) = codec.rounded(*(tensor.clone() for tensor in numbers))
    expected, wanted = torch.zeros(output.shape).double(), torch.zeros(rows, entries).double()
    for row in range(rows):
        for head in range(kv_heads * groups):
            own = slice(int(first[head // groups]), int(at[row, head // groups]) + 1)
            logits = keys[row, own].double() @ query[row, head].double() * 0.2 + bias[row, own].double()
            probs = logits.softmax(-1).cpu()
            expected[row, head] = probs @ values[row, own].double().cpu()
            wanted[row, own] += probs.square() if squared else probs
    assert relative_error(output.cpu(), expected) < TOLERANCES[dtype]
    assert relative_error(received.cpu(), wanted) < max(1e-3, TOLERANCES[dtype] / 4)
    again, nothing = triton_decode.attend_codes(*arguments)
    assert nothing is None and torch.equal(again, output)
    # Rows that lie in pages, among others and apart from each other.
    where, memory = torch.tensor([3, 1], device=DEVICE), []
    for each in coded:
        room = None if each is None else each.new_zeros(5, each.shape[1] + 2, each.shape[2])[:, :entries]
        memory.append(room if room is None else room.index_copy_(0, where, each))
    again, more = triton_decode.attend_codes(query, *memory, *arguments[5:], True, squared, where)
    assert torch.equal(again, output) and torch.equal(more, received)


CODED_RUNS = {
    "one-budget": dict(score="last", slot_bits=8),
    "squares": dict(score="sum", slot_bits=4),
    "slots-per-head": dict(
        score="learned", compressor="centroids", slot_bits=(8, 4), slots_per_head=((8, 24), (16, 16))
    ),
    "in-slots": dict(positions="slot", slot_bits=8),
}


@pytest.mark.parametrize("changes", CODED_RUNS.values(), ids=CODED_RUNS)
@pytest.mark.parametrize("family", ["Llama", pytest.param("Mistral-window", marks=pytest.mark.slow)])
def test_model_decodes_from_codes(changes, family, in_every_type, monkeypatch):
    """In a kernel that reads codes as after all were decoded, with scores that choose what stays."""
    calls, kernel = [], triton_decode.attend_codes
    monkeypatch.setattr(triton_decode, "attend_codes", lambda *arguments: calls.append(1) or kernel(*arguments))
    ids = tiny_ids(2, 60).to(DEVICE)

    def generate():
        torch.manual_seed(0)
        model = build(family)
        with patched(model.to(DEVICE), LoCoCoConfig(16, block_size=8, **changes)), torch.no_grad():
            read = model(ids[:, :30], use_cache=True)
            steps = [model(ids[:, i : i + 1], past_key_values=read.past_key_values).logits for i in range(30, 60)]
        return torch.cat(steps, dim=1)

    def tried():
        return sum(isinstance(each, trials.DecodeTrial) for each in trials.TRITON._passed)

    got = generate()
    assert tried() and trials.TRITON.is_on and len(calls) == 2 * 30 + tried()
    monkeypatch.setattr(trials.TRITON, "is_on", False)
    calls.clear()
    torch.testing.assert_close(got, generate(), rtol=0, atol=2e-3)  # what rounds differently may get another code
    assert not calls


@pytest.mark.parametrize("changes", [*CODED_RUNS.values(), dict(score="last")], ids=[*CODED_RUNS, "no-codes"])
def test_texts_in_pages_decode_in_triton(changes, monkeypatch):
    """Many texts at once, from where their pages lie."""
    config = LoCoCoConfig(16, block_size=8, **{**changes, "positions": "absolute"})
    patch = patch_of(patched_llama(config))
    modules = LayerModules(patch.heads.get(1), patch.networks.get(1), patch.rotary_tables.get(1))
    configs = config.layer_configs(1) if config.slots_per_head else config.layer_configs(1) * 2
    layout = pages.PageLayout.of(configs, 4, 8, torch.float32, modules.network)
    states = [torch.randn(40, 3, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 3)]

    def decode():
        memory = torch.zeros(5, layout.nbytes, dtype=torch.uint8)
        layer = pages.PagedLayer(config, 1, layout, 4, memory, modules, 0.4)
        steps = []
        for step, (query, key, value) in enumerate(zip(*states, strict=True)):
            batch = pages.StepBatch.of(torch.tensor([4, 0, 2]), [step] * 3, 8)
            steps.append(layer.step(query, key, value[:, :2], batch))
        return torch.stack(steps)

    with torch.inference_mode():
        expected = decode()
        monkeypatch.setattr(pages, "triton_takes", lambda tensor: True)
        calls, kernel = [], triton_decode.attend_codes
        monkeypatch.setattr(triton_decode, "attend_codes", lambda *arguments: calls.append(1) or kernel(*arguments))
        got = decode()
    assert len(calls) == 40 + 1 and trials.TRITON.is_on  # a trial
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("fault", ["launch", "wrong"])
def test_first_fault_of_decoding_from_codes_leaves_it_to_torch(fault, in_every_type, monkeypatch):
    kernel, calls = triton_decode.attend_codes, []

    def spoiled(*arguments):
        calls.append(1)
        output, received = kernel(*arguments)
        return FAULTS[fault](output), received

    def generate():
        with patched(tiny_llama().to(DEVICE), LoCoCoConfig(16, block_size=8, slot_bits=8)) as model, torch.no_grad():
            return model.generate(tiny_ids(1, 20).to(DEVICE), max_new_tokens=12, do_sample=False)

    expected = generate()
    trials.TRITON._passed.clear()
    monkeypatch.setattr(triton_decode, "attend_codes", spoiled)
    with pytest.warns(UserWarning, match="attend_codes failed"):
        assert torch.equal(generate(), expected)
    assert len(calls) == 1 and not trials.TRITON.is_on


def read_and_generate(attention, padded=False, score="distant"):
    """(tokens, vocabulary) logits of a prompt and of five steps after it."""
    ids, mask = tiny_ids(2, 45).to(DEVICE), torch.ones(2, 45, dtype=torch.long, device=DEVICE)
    if padded:
        mask[0, :13] = 0
    model = tiny_llama().to(DEVICE)
    torch.manual_seed(0)
    config = LoCoCoConfig(16, block_size=8, gate_init=0.4, score=score)
    with patched(model, config, attention=attention), torch.no_grad():
        read = model(ids[:, :40], attention_mask=mask[:, :40], use_cache=True)
        steps = [read.logits]
        for step in range(40, 45):
            call = {"attention_mask": mask[:, : step + 1], "past_key_values": read.past_key_values}
            steps.append(model(ids[:, step : step + 1], **call).logits)
    return torch.cat(steps, dim=1)[mask.bool()]


KERNELS = {"attend": triton_kernels, "attention_mass": triton_kernels, "blend": triton_blend}


@pytest.fixture
def calls(in_every_type, monkeypatch):
    """How often each kernel ran for a model whose attention is Triton's, trials included."""
    calls = collections.Counter()

    def counted(name, function):
        def kernel(*arguments):
            calls[name] += 1
            return function(*arguments)

        return kernel

    for name, module in KERNELS.items():
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return calls


@pytest.fixture
def in_every_type(monkeypatch):
    """What is left to torch on a CPU and in float32, here in Triton."""
    monkeypatch.setattr(backends, "TRITON_DTYPES", (*backends.HALF_TYPES, torch.float32))
    for module in (kernels, fusion, decode):
        monkeypatch.setattr(module, "triton_takes", lambda tensor: True)


@pytest.mark.parametrize(("score", "padded"), [("distant", False), ("distant", True), (FORESEEN, False)])
def test_model_reads_and_generates_the_same(score, padded, calls, monkeypatch):
    """Attention, scores and blends of a whole model, those that only torch can do among them."""
    got = read_and_generate("triton", padded, score)
    # Of unpadded segments all is scored in Triton; attention to a padded row's neighbours needs a mask.
    assert trials.TRITON.is_on and all(calls[name] > 1 for name in (["blend"] if padded else KERNELS))
    monkeypatch.setattr(trials.TRITON, "is_on", False)
    calls.clear()
    torch.testing.assert_close(got, read_and_generate("sdpa", padded, score), rtol=0, atol=1e-4)
    assert not calls


def wrong_by(share):
    """A result whose last number is off by a share of the largest."""

    def spoil(result):
        if isinstance(result, (tuple, list)):
            return type(result)(spoil(part) for part in result)
        result.view(-1)[-1] += share * result.abs().max()
        return result

    return spoil


def raising(error):
    def spoil(result):
        raise error

    return spoil


FAULTS = {
    "import": raising(ImportError("no C compiler")),
    "launch": raising(RuntimeError("out of resource: shared memory")),
    "system": raising(OSError("cannot open shared object file")),
    "of-its-own": raising(type("CompilationError", (Exception,), {})("at 1:0")),
    "wrong": wrong_by(0.1),
    "not-a-number": wrong_by(float("nan")),
}


@pytest.mark.parametrize(
    ("name", "fault"),
    [*(("attend", fault) for fault in ("import", "launch", "wrong", "not-a-number"))]
    + [("attention_mass", "wrong"), ("blend", "wrong")]
    + [
        pytest.param(*each, marks=pytest.mark.slow)
        for each in (("attend", "system"), ("attend", "of-its-own"), ("attention_mass", "import"), ("blend", "launch"))
    ],
)
def test_first_fault_of_a_kernel_leaves_everything_to_torch(name, fault, calls, monkeypatch):
    kernel, spoil = getattr(KERNELS[name], name), FAULTS[fault]
    monkeypatch.setattr(KERNELS[name], name, lambda *arguments: spoil(kernel(*arguments)))
    with pytest.warns(UserWarning) as told:
        got = read_and_generate("triton")
    (warning,) = [str(warning.message) for warning in told if "Triton" in str(warning.message)]
    assert f"{name} failed" in warning and "from here on" in warning
    assert calls[name] == 1 and not trials.TRITON.is_on
    calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        expected = read_and_generate("triton")
    assert not calls
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", KERNELS)
def test_fault_after_a_good_trial(name, calls, monkeypatch):
    kernel = getattr(KERNELS[name], name)

    def fails_late(*arguments):
        result = kernel(*arguments)
        if calls[name] == 3:
            raise RuntimeError("device-side assert")
        return result

    monkeypatch.setattr(KERNELS[name], name, fails_late)
    with pytest.warns(UserWarning, match=f"{name} failed: RuntimeError: device-side assert"):
        got = read_and_generate("triton")
    assert calls[name] == 3
    torch.testing.assert_close(got, read_and_generate("sdpa"), rtol=0, atol=1e-4)


def test_full_memory_is_no_fault_of_a_kernel(in_every_type, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(triton_kernels, "attend", full)
    query, key, value, _ = tensors(SHAPES["one-query"], torch.float32)
    with pytest.raises(torch.OutOfMemoryError):
        kernels.attend(query, key, value, 0.2, LogitBias(), "triton")
    assert trials.TRITON.is_on


def test_no_trial_while_a_graph_is_recorded(calls, monkeypatch):
    """A kernel that passed its trial may be recorded; others are left to torch, and tried later."""
    query, key, value, bias = tensors(SHAPES["one-query"], torch.float32)

    def attend(bias):
        return kernels.attend(query, key, value, 0.2, LogitBias(bias=bias), "triton")

    attend(None)
    assert calls["attend"] == 2
    monkeypatch.setattr(trials, "_is_recorded", lambda device: True)
    attend(None)
    assert calls["attend"] == 3
    output = attend(bias)
    assert calls["attend"] == 3 and trials.TRITON.is_on
    monkeypatch.undo()
    torch.testing.assert_close(output, kernels.attend(query, key, value, 0.2, LogitBias(bias=bias)))


def test_trials_leave_random_numbers_alone(calls):
    query, key, value, _ = tensors(SHAPES["one-query"], torch.float32)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    kernels.attend(query, key, value, 0.2, LogitBias(), "triton")
    assert calls["attend"] == 2 and torch.equal(torch.rand(3), expected)
