"""Every kernel against a float64 softmax written out by hand."""

import functools
import subprocess
import sys
import types

import pytest
import torch
from attention_cases import CASES, by_hand, case
from tiny import tiny_ids, tiny_llama
from torch._subclasses import FakeTensorMode
from torch.nn.attention.bias import CausalBias
from torch.utils.flop_counter import FlopCounterMode

import lococo
from lococo import LoCoCoConfig, patched
from lococo.kernels import attention as backends
from lococo.kernels import scoring as kernels
from lococo.kernels.attention import KernelRequest, best_backend, lower_right
from lococo.kernels.scoring import (
    LogitBias,
    attend,
    attend_and_lse,
    attend_and_score,
    attention_mass,
    computes_at_once,
)

BACKENDS = ["auto", "sdpa", "eager"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_attention_equals_softmax_by_hand(backend, name):
    query, key, value, visibility = case(name)
    with torch.no_grad():
        output = attend(query, key, value, 0.3, visibility, backend)
    expected, _ = by_hand(query, key, value, 0.3, visibility)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("tile", [1, 2, 128])
def test_received_attention_equals_column_sums(name, backend, tile, monkeypatch):
    """With the log-sum-exp of a kernel that has it, and without."""
    monkeypatch.setattr(kernels, "SCORE_TILE", tile)
    query, key, value, visibility = case(name)
    expected_output, probabilities = by_hand(query, key, value, 0.3, visibility)
    with torch.no_grad():
        output, lse = attend_and_lse(query, key, value, 0.3, visibility, backend)
    assert (lse is None) == (backend == "eager" or name in ("one-query", "softcap"))
    torch.testing.assert_close(output, expected_output, rtol=0, atol=1e-12)
    expected = probabilities.unflatten(1, (key.shape[1], -1)).sum(dim=(2, 3))
    got = attention_mass(query, key, 0.3, visibility, lse=lse)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def log_sum_exp(query, key, visibility):
    """(batch, heads, queries), from the probability of the first entry, which every query sees."""
    _, probabilities = by_hand(query, key, key, 0.3, visibility)
    firsts = key[:, :, 0].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = (query * firsts[:, :, None]).sum(-1) * 0.3
    if visibility.softcap:
        logits = visibility.softcap * (logits / visibility.softcap).tanh()
    if visibility.bias is not None:
        logits = logits + visibility.bias[..., :1].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return logits - probabilities[..., 0].log()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("delay", [0, 3, 20])
def test_received_attention_of_queries_that_count(name, with_lse, squared, delay, monkeypatch):
    """By delay and by a mask of counts, that say the same."""
    monkeypatch.setattr(kernels, "SCORE_TILE", 2)
    query, key, value, visibility = case(name)
    lse = log_sum_exp(query, key, visibility) if with_lse else None
    _, probabilities = by_hand(query, key, value, 0.3, visibility)
    counts = lower_right(query.shape[2], key.shape[2], delay, query.device)
    if delay == 0:  # what it says of entries that only a mask shows
        counts = torch.ones_like(counts)
    counted = (probabilities.square() if squared else probabilities) * counts
    expected = counted.unflatten(1, (key.shape[1], -1)).sum(dim=(2, 3))
    for arguments in ({"delay": delay}, {"counts": counts[None, None]}):
        got = attention_mass(query, key, 0.3, visibility, squared=squared, lse=lse, **arguments)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["causal", "mask", "bias"])
def test_log_sum_exp_of_narrow_kernels(name, dtype):
    query, key, value, visibility = case(name, dtype)
    with torch.no_grad():
        output, lse = attend_and_lse(query, key, value, 0.3, visibility)
    bias = None if visibility.bias is None else visibility.bias.double()
    exact = visibility._replace(bias=bias)
    wide = [tensor.double() for tensor in (query, key, value)]
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(lse.double(), log_sum_exp(*wide[:2], exact), rtol=0, atol=tolerance)
    torch.testing.assert_close(output.double(), by_hand(*wide, 0.3, exact)[0], rtol=0, atol=tolerance)


def test_log_sum_exp_is_left_to_training():
    query, key, value, visibility = case("causal")
    query.requires_grad_()
    output, lse = attend_and_lse(query, key, value, 0.3, visibility)
    assert output.requires_grad and lse is None


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tile", [1, 2, 128])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("delay", [0, 3, 20])
def test_attention_and_what_is_received_from_the_same_probabilities(name, tile, squared, delay, monkeypatch):
    """By hand, and as they are one after the other; what counts by a delay and by a mask of counts."""
    monkeypatch.setattr(kernels, "SCORE_TILE", tile)
    query, key, value, visibility = case(name)
    expected, probabilities = by_hand(query, key, value, 0.3, visibility)
    counts = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
    if delay:
        counts = lower_right(query.shape[2], key.shape[2], delay, query.device)
    counted = (probabilities.square() if squared else probabilities) * counts
    columns = counted.unflatten(1, (key.shape[1], -1)).sum(dim=(2, 3))
    with torch.no_grad():
        for options in ({"delay": delay}, {"counts": counts[None, None]}):
            output, received = attend_and_score(query, key, value, 0.3, visibility, squared=squared, **options)
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(received, columns, rtol=0, atol=1e-12)
            apart = attention_mass(query, key, 0.3, visibility, squared=squared, **options)
            torch.testing.assert_close(received, apart, rtol=0, atol=1e-12)
        torch.testing.assert_close(output, attend(query, key, value, 0.3, visibility), rtol=0, atol=1e-12)


def test_both_are_made_at_once_on_a_cpu_without_gradients():
    query = torch.zeros(1, 1, 1, 1)
    with torch.no_grad():
        assert computes_at_once(query, 0.0, "auto") and computes_at_once(query.double(), 0.0, "auto")
        assert not any(computes_at_once(query.to(dtype), 0.0, "auto") for dtype in (torch.bfloat16, torch.float16))
        assert not computes_at_once(query, 0.1, "auto") and not computes_at_once(query.to("meta"), 0.0, "auto")
        assert not any(computes_at_once(query, 0.0, name) for name in backends.ATTENTIONS if name != "auto")
    assert not computes_at_once(query, 0.0, "auto")


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize(
    "options",
    [{}, {"positions": "slot"}, {"slots_per_head": ((24, 8), (6, 26))}, {"score": "learned"}, {"score": "sum"}],
    ids=str,
)
def test_a_model_reads_the_same_at_once_and_one_after_the_other(options, padding, monkeypatch):
    """Logits, and scores of all that is held."""
    at_once, found = [], []
    noted = kernels.attend_and_score
    monkeypatch.setattr(kernels, "attend_and_score", lambda *call: at_once.append(1) or noted(*call))
    ids, mask = tiny_ids(2, 61), torch.ones(2, 61, dtype=torch.long)
    mask[0, :padding] = 0
    config = LoCoCoConfig(16, **{"block_size": 8, "gate_init": 0.4, **options})
    for attention in ("auto", "sdpa", "eager"):
        torch.manual_seed(0)
        with patched(tiny_llama().double(), config, attention=attention) as model:
            read = model(ids, attention_mask=mask, use_cache=True)
        found.append([read.logits, *(layer.entries.scores for layer in read.past_key_values.layers)])
        assert bool(at_once) == (attention == "auto")
        at_once.clear()
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], rtol=0, atol=1e-10)


def test_padding_queries_do_not_vote():
    query, key, value, visibility = case("mask")
    counts = torch.tensor([[[1, 1, 0, 0, 0]], [[1, 1, 1, 1, 0]]], dtype=torch.bool)[..., None]
    _, probabilities = by_hand(query, key, value, 0.3, visibility)
    expected = (probabilities * counts).unflatten(1, (key.shape[1], -1)).sum(dim=(2, 3))
    torch.testing.assert_close(attention_mass(query, key, 0.3, visibility, counts), expected, rtol=0, atol=1e-12)


def test_received_squares_equal_column_sums_of_squares():
    query, key, value, visibility = case("mask")
    _, probabilities = by_hand(query, key, value, 0.3, visibility)
    expected = probabilities.square().unflatten(1, (key.shape[1], -1)).sum(dim=(2, 3))
    got = attention_mass(query, key, 0.3, visibility, squared=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_by_hand(name):
    query, key, value, visibility = case(name)
    variables = [query, key, value] + ([] if visibility.bias is None else [visibility.bias])
    for variable in variables:
        variable.requires_grad_()
    weights = torch.randn(query.shape, dtype=query.dtype, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((attend(query, key, value, 0.3, visibility) * weights).sum(), variables)
    expected = torch.autograd.grad((by_hand(query, key, value, 0.3, visibility)[0] * weights).sum(), variables)
    for gradient, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-11)


@pytest.mark.parametrize("way", ["softmax", "log-sum-exp", "with-attention"])
def test_two_tiles_are_held_for_scores(way):
    from experiments.benchmarks.counters import HeldBytes

    queries, entries = 1024, 1536
    query, key = torch.randn(1, 2, queries, 8), torch.randn(1, 1, entries, 8)
    read = functools.partial(attention_mass, query, key, lse=torch.zeros(1, 2, queries))
    if way != "log-sum-exp":
        read = functools.partial(attention_mass, query, key)
    if way == "with-attention":
        read = functools.partial(attend_and_score, query, key, torch.randn_like(key))
    read(scale=0.3, logit_bias=LogitBias())  # what is kept for the next call is made
    with HeldBytes() as held, torch.no_grad():
        read(scale=0.3, logit_bias=LogitBias(), squared=True, delay=100)
    tile = 4 * 2 * kernels.SCORE_TILE * entries
    assert held.largest <= tile
    assert held.peak <= (1.5 if way == "log-sum-exp" else 2.5) * tile


NARROW = KernelRequest("cuda", torch.bfloat16, 128)


@pytest.mark.parametrize(
    ("request_", "backend"),
    [
        (NARROW, "sdpa"),
        (NARROW._replace(is_biased=True), "triton"),
        (NARROW._replace(is_biased=True, dtype=torch.float16, head_dim=80), "triton"),
        (NARROW._replace(is_biased=True, dtype=torch.float32), "sdpa"),
        (NARROW._replace(is_biased=True, dtype=torch.float64), "sdpa"),
        (NARROW._replace(is_biased=True, head_dim=320), "sdpa"),
        (NARROW._replace(is_biased=True, device="cpu"), "sdpa"),
        (NARROW._replace(is_biased=True, is_masked=True), "sdpa"),
        (NARROW._replace(is_biased=True, is_softcapped=True), "sdpa"),
        (NARROW._replace(is_biased=True, has_dropout=True), "sdpa"),
        (NARROW._replace(is_biased=True, needs_gradient=True), "sdpa"),
    ],
)
def test_auto_goes_to_triton_for_what_torch_lacks(request_, backend):
    assert best_backend(request_, has_triton=True) == backend
    assert best_backend(request_, has_triton=False) == "sdpa"


@pytest.mark.parametrize(("queries", "kv_heads"), [(5, 2), (5, 6), (12, 2)])
def test_flash_on_a_gpu_gives_its_log_sum_exp(queries, kv_heads, monkeypatch):
    """Also of a segment behind slots, for which torch's check refuses its own upper-left causality."""

    def takes(parameters):
        query, key, *_, is_causal, _ = parameters
        return not (is_causal and query.shape[2] != key.shape[2])

    monkeypatch.setattr("torch.backends.cuda.SDPAParams", lambda *parameters: parameters)
    monkeypatch.setattr("torch.backends.cuda.can_use_flash_attention", takes)
    with FakeTensorMode(), torch.no_grad():
        query = torch.empty(2, 6, queries, 16, dtype=torch.bfloat16, device="cuda")
        key, value = (torch.empty(2, kv_heads, 12, 16, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        output, lse = backends._flash_with_lse(query, key, value, 0.3, None)
    assert output.shape == query.shape and lse.shape == query.shape[:3]


def test_causality_on_a_gpu_under_a_dispatch_mode(monkeypatch):
    on_cpu = lower_right(5, 12, 0, torch.device("cpu"))
    monkeypatch.setattr(backends, "lower_right", lambda queries, entries, delay, device: on_cpu)
    assert isinstance(backends._causality(5, 12, torch.device("cuda")), CausalBias)
    with FlopCounterMode(display=False):
        assert backends._causality(5, 12, torch.device("cuda")) is on_cpu


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_attention_under_a_dispatch_mode(backend, name):
    query, key, value, visibility = case(name)
    with FlopCounterMode(display=False), torch.no_grad():
        output, lse = attend_and_lse(query, key, value, 0.3, visibility, backend)
        mass = attention_mass(query, key, 0.3, visibility, lse=lse)
        at_once = attend_and_score(query, key, value, 0.3, visibility)
    expected, probabilities = by_hand(query, key, value, 0.3, visibility)
    columns = probabilities.unflatten(1, (key.shape[1], -1)).sum(dim=(2, 3))
    for found in ((output, mass), at_once):
        torch.testing.assert_close(found, (expected, columns), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float16),
    ],
    ids=str,
)
def test_mixed_types_are_computed_in_the_widest(dtypes, name, backend):
    query, key, value, visibility = case(name)
    query, key, value = (tensor.to(dtype) for tensor, dtype in zip((query, key, value), dtypes, strict=True))
    with torch.no_grad():
        output, lse = attend_and_lse(query, key, value, 0.3, visibility, backend)
        same = attend(query, key, value, 0.3, visibility, backend)
        mass = attention_mass(query, key, 0.3, visibility, lse=lse)
        at_once, received = attend_and_score(query, key, value, 0.3, visibility)
    expected, probabilities = by_hand(query.double(), key.double(), value.double(), 0.3, visibility)
    assert output.dtype == same.dtype == at_once.dtype == query.dtype
    rounding = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[query.dtype]
    for each in (output, at_once):
        torch.testing.assert_close(each.double(), expected, rtol=0, atol=rounding)
    columns = probabilities.unflatten(1, (key.shape[1], -1)).sum(dim=(2, 3))
    for each in (mass, received):
        torch.testing.assert_close(each.double(), columns, rtol=0, atol=1e-4)


def test_mass_is_not_rounded_by_autocast():
    query, key, value, visibility = case("causal", torch.float32)
    _, probabilities = by_hand(query, key, value, 0.3, visibility)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mass = attention_mass(query, key, 0.3, visibility)
        output, received = attend_and_score(query, key, value, 0.3, visibility)
    columns = probabilities.unflatten(1, (key.shape[1], -1)).sum(dim=(2, 3))
    torch.testing.assert_close(mass, columns, rtol=0, atol=1e-5)
    torch.testing.assert_close(received, columns, rtol=0, atol=1e-5)
    torch.testing.assert_close(output, by_hand(query, key, value, 0.3, visibility)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("backend", "most"), [("flash_attention_2", 256), ("flash_attention_4", 128)])
@pytest.mark.parametrize(
    ("dtype", "is_narrow"), [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)]
)
def test_flash_packages_are_asked_only_for_what_they_can(backend, most, dtype, is_narrow, monkeypatch):
    """A stand-in for the packages, which need a GPU: the sizes and types that reach them."""
    asked = []

    def flash_attn_func(query, key, value, **options):
        asked.append((query.shape[-1], query.dtype))
        return torch.zeros_like(query)

    package = types.ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func
    package.cute = package
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", package)
    monkeypatch.setattr(backends, "_is_installed", lambda name: True)
    for head_dim in (most - 8, most, most + 8):
        query, key, value = torch.randn(3, 1, 2, 4, head_dim, dtype=dtype).unbind()
        for bias in (None, torch.rand(1, 2, 4)):
            output = attend(query, key, value, 0.1, LogitBias(bias=bias), backend)
            assert output.shape == query.shape
    expected = [(most - 8, dtype), (most, dtype), (most, dtype)]
    assert asked == (expected if is_narrow else [])


@pytest.mark.parametrize(
    ("backend", "module", "message"),
    [
        ("flash_attention_2", "flash_attn.flash_attn_interface", r"pip install lococo\[flash\]"),
        ("flash_attention_4", "flash_attn.cute", "pip install --pre flash-attn-4"),
        ("triton", "triton", "pip install triton"),
    ],
)
def test_backend_says_what_is_missing(backend, module, message, monkeypatch):
    monkeypatch.setattr(backends, "_is_installed", lambda name: name != module)
    query, key, value, visibility = case("causal")
    with pytest.raises(ImportError, match=message):
        attend(query, key, value, 0.3, visibility, backend)


def test_triton_asks_for_a_gpu(monkeypatch):
    monkeypatch.setattr(backends, "_is_installed", lambda name: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a GPU, the model is on cpu"):
        attend(*case("causal", torch.float32)[:3], 0.3, LogitBias(), "triton")


def test_nothing_optional_is_imported_with_lococo():
    code = "import sys; import lococo.attention, lococo.compression.select; "
    code += "print([name for name in sys.modules if name.startswith(('lococo.kernels.triton', 'flash_attn'))])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@torch.no_grad()
def test_an_attention_of_ones_own_reads_as_the_library_does(monkeypatch):
    """It is asked for every segment, with masks, biases and softcaps."""
    monkeypatch.setattr(backends.ATTENTIONS, "_items", dict(backends.ATTENTIONS._items))
    calls = []

    @lococo.register_attention("own")
    def own(query, key, value, scale, visibility, dropout, wants_lse):
        calls.append((visibility.mask is not None, visibility.bias is not None))
        return backends.ATTENTIONS["eager"](query, key, value, scale, visibility, dropout, wants_lse)

    ids, mask = tiny_ids(2, 61), torch.ones(2, 61, dtype=torch.long)
    mask[0, :9] = 0
    logits = []
    for attention in ("own", "eager"):
        torch.manual_seed(0)
        config = LoCoCoConfig(16, block_size=8, gate_init=0.4)
        with patched(tiny_llama(), config, attention=attention) as model:
            logits.append([model(ids).logits, model(ids, attention_mask=mask).logits])
    assert all(map(torch.equal, *logits))
    assert {(False, True), (True, True)} <= set(calls)
    with pytest.raises(ValueError, match="attention must be one of auto, .*, own, got 'theirs'"):
        lococo.patch_model(tiny_llama(), attention="theirs")
    with pytest.raises(ValueError, match="attention 'sdpa' is registered already"):
        lococo.register_attention("sdpa")(own)
    with pytest.raises(ValueError, match="attention 'sdpa' is registered already"):
        lococo.register_attention("sdpa")(functools.partial(own))
    with pytest.raises(TypeError, match="an attention must be a function"):
        lococo.register_attention("number")(3)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"positions": "slot"}, {"slots_per_head": ((20, 12), (9, 16))}, {"num_heavy": 0, "gate_init": 0.0}],
    ids=["default", "slot", "per-head", "closed"],
)
def test_an_attention_of_ones_own_decodes_as_the_library_does(monkeypatch, options):
    monkeypatch.setattr(backends.ATTENTIONS, "_items", dict(backends.ATTENTIONS._items))
    queries = []

    @lococo.register_attention("softmax")
    def attend(query, key, value, scale, logit_bias, dropout, wants_lse):
        """A softmax written out, for one bias per entry and lower-right causality."""
        queries.append(query.shape[2])
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
        logits = query @ key.transpose(-1, -2) * scale
        if logit_bias.bias is not None:
            bias = logit_bias.bias.repeat_interleave(query.shape[1] // logit_bias.bias.shape[1], dim=1)
            logits = logits + bias[:, :, None]
        is_seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        output = logits.masked_fill(~is_seen, float("-inf")).softmax(-1) @ value
        return output.transpose(0, 1).contiguous().transpose(0, 1), None  # in a layout of its own

    ids, found = tiny_ids(2, 60), []
    for attention in ("softmax", "auto"):
        torch.manual_seed(0)
        config = LoCoCoConfig(16, **{"block_size": 8, "gate_init": 0.4, **options})
        with patched(tiny_llama(), config, attention=attention) as model:
            cache, logits = None, []
            for part in ids.split([21, *[1] * 30, 9], dim=1):
                output = model(part, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits.append(output.logits)
            found.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
    assert queries.count(1) == 2 * 30  # of two layers
