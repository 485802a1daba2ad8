"""What only a GPU can show: kernels there equal the CPU's, decoding never waits for it, memory stays flat."""

import pytest
import torch
from attention_cases import CASES, by_hand, case
from configs import CONFIGS, FEW
from tiny import tiny_ids, tiny_llama

from lococo import LoCoCoConfig, patch_model, patched
from lococo import cuda_graphs as graphs
from lococo.compression import select as slots
from lococo.compression.fusion import FusionHead
from lococo.kernels import attention as backends
from lococo.kernels import trials
from lococo.kernels.scoring import LogitBias, attend, attend_and_lse, attention_mass

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MODULES = {
    "triton": "triton",
    "flash_attention_2": "flash_attn.flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}
BACKENDS = [name for name in backends.ATTENTIONS if name not in MODULES or backends._is_installed(MODULES[name])]
DTYPES = [
    (backend, dtype)
    for backend in BACKENDS
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype != torch.float32 or not backend.startswith("flash")
]
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
every_config = pytest.mark.parametrize("name", ["default", "streaming", *FEW])


@pytest.fixture(autouse=True)
def triton_stays_in_use():
    """What would be computed by torch after a fault says nothing about Triton's kernels."""
    yield
    is_on, trials.TRITON.is_on = trials.TRITON.is_on, True
    assert is_on


def relative_error(got, expected):
    return ((got.double().cpu() - expected).norm() / expected.norm()).item()


def on_gpu(tensor, dtype):
    return None if tensor is None else tensor.cuda().to(dtype if tensor.is_floating_point() else tensor.dtype)


@pytest.mark.parametrize(("backend", "dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_float64_by_hand(name, backend, dtype):
    query, key, value, visibility = case(name)
    expected, probabilities = by_hand(query, key, value, 0.3, visibility)
    there = [on_gpu(tensor, dtype) for tensor in (query, key, value)]
    seen = LogitBias(on_gpu(visibility.mask, dtype), on_gpu(visibility.bias, dtype), visibility.softcap)
    with torch.no_grad():
        output = attend(*there, 0.3, seen, backend)
        same, lse = attend_and_lse(*there, 0.3, seen, backend)
        masses = [attention_mass(*there[:2], 0.3, seen, lse=known) for known in (None, lse)]
    assert relative_error(output, expected) < TOLERANCES[dtype]
    assert relative_error(same, expected) < TOLERANCES[dtype]
    columns = probabilities.unflatten(1, (key.shape[1], -1)).sum(dim=(2, 3))
    for mass in masses:
        assert relative_error(mass, columns) < TOLERANCES[dtype]


@pytest.mark.parametrize(("backend", "dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("queries", "entries", "dim"), [(512, 1024, 128), (100, 612, 64), (77, 589, 80), (1, 1024, 128), (32, 700, 256)]
)
def test_large_segments_equal_float64(queries, entries, dim, biased, backend, dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, queries, 8, dim, generator=generator).to(dtype).transpose(1, 2)
    key, value = torch.randn(2, 2, 2, entries, dim, generator=generator).to(dtype).unbind()
    bias = torch.rand(2, 2, entries, generator=generator) * 5 if biased else None
    exact, scale = [tensor.double() for tensor in (query, key, value)], dim**-0.5
    expected = attend(*exact, scale, LogitBias(bias=bias), "eager")
    counted = {"squared": True, "delay": 100}
    expected_mass = attention_mass(*exact[:2], scale, LogitBias(bias=bias), **counted)
    there = [tensor.cuda() for tensor in (query, key, value)]
    seen = LogitBias(bias=None if bias is None else bias.cuda())
    with torch.no_grad():
        output, lse = attend_and_lse(*there, scale, seen, backend)
        mass = attention_mass(*there[:2], scale, seen, **counted, lse=lse)
    assert relative_error(output, expected) < TOLERANCES[dtype]
    assert relative_error(mass, expected_mass) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("residual", ["slot", "layer", "none"])
def test_compression_in_one_kernel_equals_torch(residual, dtype):
    """The same compression without gradients, where Triton blends, and with them, where torch does."""
    config = LoCoCoConfig(512, residual=residual, gate_init=0.4)
    torch.manual_seed(0)
    head, shape = FusionHead(config, 128).cuda(), (2, 3, 1024)
    entries = slots.Entries(
        keys=torch.randn(*shape, 128, device="cuda").to(dtype),
        values=torch.randn(*shape, 128, device="cuda").to(dtype),
        scores=torch.rand(shape, device="cuda"),
        position=torch.arange(1024.0, device="cuda").expand(shape),
        log_mass=torch.rand(shape, device="cuda"),
    )
    expected = slots.compress(entries, 2048, config, head)
    with torch.no_grad():
        got = slots.compress(entries, 2048, config, head)
    for mine, theirs in zip(got.tensors()[:5], expected.tensors()[:5], strict=True):
        assert mine.dtype == theirs.dtype
        assert relative_error(mine, theirs.detach().double().cpu()) < TOLERANCES[dtype]


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
def test_auto_scores_in_triton():
    query = torch.randn(1, 4, 300, 64, device="cuda", dtype=torch.float16)
    key = torch.randn(1, 2, 500, 64, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        _, lse = attend_and_lse(query, key, key, 0.125, LogitBias())
        mass = attention_mass(query, key, 0.125, LogitBias(), lse=lse)
    assert backends.triton_takes(query) and lse is not None
    assert mass.sum().item() == pytest.approx(4 * 300, rel=1e-3)


@every_config
@pytest.mark.parametrize("padded", [False, True])
def test_model_on_gpu_equals_model_on_cpu(name, padded):
    ids, mask = tiny_ids(3, 61), torch.ones(3, 61, dtype=torch.long)
    if padded:
        mask[0, :13] = mask[1, :2] = 0
    logits = []
    for device in ("cpu", "cuda"):
        model = tiny_llama()
        torch.manual_seed(0)
        with patched(model, CONFIGS[name]), torch.no_grad():
            model.to(device)
            logits.append(model(ids.to(device), attention_mask=mask.to(device)).logits.cpu()[mask.bool()])
    torch.testing.assert_close(*logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_config
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_never_waits_for_the_gpu(name, padded, dtype):
    """All steps, those that compress too, run with host synchronisation made an error."""
    model = tiny_llama().to("cuda", dtype)
    ids, mask = tiny_ids(2, 40).cuda(), torch.ones(2, 40, dtype=torch.long, device="cuda")
    if padded:
        mask[0, :5] = 0
    with patched(model, CONFIGS[name]), torch.no_grad():
        output = model(ids, attention_mask=mask, use_cache=True)
        token = ids[:, -1:]
        for step in range(30):
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            position = mask.sum(-1, keepdim=True) - 1
            torch.cuda.set_sync_debug_mode("error" if step > 9 else "default")  # kernels are chosen in the first steps
            try:
                output = model(
                    token, attention_mask=mask, position_ids=position, past_key_values=output.past_key_values
                )
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_config
@pytest.mark.parametrize("padded", [False, True])
def test_recorded_steps_give_the_bits_of_launched_ones(name, padded, dtype, monkeypatch):
    ids, mask = tiny_ids(3, 40).cuda(), torch.ones(3, 40, dtype=torch.long, device="cuda")
    if padded:
        mask[0, :13] = mask[1, :2] = 0
    torch.manual_seed(0)
    model = patch_model(tiny_llama(), CONFIGS[name]).to("cuda", dtype)
    recordings = []

    def recorder(function):
        recordings.append(function)
        return graphs.record_cuda_graph(function)

    def answer(recorders):
        monkeypatch.setattr(graphs, "RECORDERS", recorders)
        options = dict(max_new_tokens=40, do_sample=False, return_dict_in_generate=True, output_logits=True)
        return torch.stack(model.generate(ids, attention_mask=mask, **options).logits)

    assert torch.equal(answer({"cuda": recorder}), answer({}))
    moves_apart = padded and CONFIGS[name].positions == "slot"
    assert len(recordings) == (0 if moves_apart else 1)


@pytest.mark.parametrize("chunk", [512, None])
def test_memory_of_reading_is_flat(chunk):
    model = tiny_llama(max_position_embeddings=1 << 17).cuda()
    peaks = []
    with patched(model, LoCoCoConfig(64, block_size=64), prefill_chunk_size=chunk), torch.no_grad():
        for length in (4096, 65536):
            ids = tiny_ids(1, length).cuda()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(ids, logits_to_keep=1)
            peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 1.02 * peaks[0]


def test_gradients_on_gpu_equal_those_on_cpu():
    ids = tiny_ids(2, 61)
    gradients = []
    for device in ("cpu", "cuda"):
        model = tiny_llama()
        torch.manual_seed(0)
        with patched(model, CONFIGS["open"]):
            model.to(device)
            model(ids.to(device), labels=ids.to(device)).loss.backward()
            gradients.append([parameter.grad.cpu() for parameter in model.parameters()])
    for here, there in zip(*gradients, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-4)
