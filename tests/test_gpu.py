"""What only a GPU can show: kernels there equal the CPU's, decoding never waits for it, memory stays flat."""

import pytest
import torch
from test_kernels import CASES, by_hand, case
from tiny import tiny_ids, tiny_llama

from lococo import LoCoCoConfig, graphs, patch_model, patched
from lococo.kernels import Visibility, attend, attention_mass

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
CONFIGS = {
    "default": LoCoCoConfig(16, block_size=8),
    "open": LoCoCoConfig(16, block_size=8, gate_init=0.4),
    "open-slot": LoCoCoConfig(16, block_size=8, gate_init=0.4, positions="slot"),
    "slots-per-head": LoCoCoConfig(16, block_size=8, gate_init=0.4, slots_per_head=((24, 8), (6, 26))),
    "h2o": LoCoCoConfig.h2o(16, block_size=8),
    "streaming": LoCoCoConfig.streaming_llm(16, block_size=8),
}


def relative_error(got, expected):
    return ((got.double().cpu() - expected).norm() / expected.norm()).item()


def on_gpu(tensor, dtype):
    return None if tensor is None else tensor.cuda().to(dtype if tensor.is_floating_point() else tensor.dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_float64_by_hand(name, backend, dtype):
    query, key, value, visibility = case(name)
    expected, probabilities = by_hand(query, key, value, 0.3, visibility)
    there = [on_gpu(tensor, dtype) for tensor in (query, key, value)]
    seen = Visibility(on_gpu(visibility.mask, dtype), on_gpu(visibility.bias, dtype), visibility.softcap)
    with torch.no_grad():
        output = attend(*there, 0.3, seen, backend)
        mass = attention_mass(*there[:2], 0.3, seen)
    assert relative_error(output, expected) < TOLERANCES[dtype]
    columns = probabilities.unflatten(1, (key.shape[1], -1)).sum(dim=(2, 3))
    assert relative_error(mass, columns) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("queries", "entries", "dim"), [(512, 1024, 128), (100, 612, 64), (1, 1024, 128)])
def test_large_segments_equal_float64(queries, entries, dim, dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 8, queries, dim, generator=generator).to(dtype)
    key, value = torch.randn(2, 2, 2, entries, dim, generator=generator).to(dtype).unbind()
    expected = attend(query.double(), key.double(), value.double(), dim**-0.5, Visibility(), "eager")
    output = attend(query.cuda(), key.cuda(), value.cuda(), dim**-0.5, Visibility())
    assert relative_error(output, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("name", CONFIGS)
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


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_never_waits_for_the_gpu(name, padded):
    """All steps, those that compress too, run with host synchronisation made an error."""
    model = tiny_llama().cuda()
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
@pytest.mark.parametrize("name", CONFIGS)
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
    with patched(model, LoCoCoConfig(64, block_size=64, prefill_chunk_size=chunk)), torch.no_grad():
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
