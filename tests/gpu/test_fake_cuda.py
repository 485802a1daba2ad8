"""Decoding on simulated GPUs: the logits of the CPU, every tensor where it belongs, and a host that never waits."""

from unittest import mock

import pytest
import torch
from configs import CONFIGS, FEW, few_quick
from fake_cuda import DeviceAssert, DeviceMismatch, FakeCuda, inner
from families import FAMILIES, build
from tiny import patched_llama, tiny_ids
from transformers.modeling_outputs import CausalLMOutputWithPast

import lococo
from lococo import cuda_graphs as graphs

pytestmark = [
    pytest.mark.cuda_build,
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a build of torch for CUDA: make test-cuda-build"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU: test_gpu.py"),
]

TOLERANCE = dict(rtol=0, atol=1e-4)
PROMPT, LENGTH, ROWS = 24, 45, 2


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def text(is_padded=False):
    """Ids and mask of two rows."""
    ids, mask = tiny_ids(ROWS, LENGTH), torch.ones(ROWS, LENGTH, dtype=torch.long)
    if is_padded:
        mask[0, :5] = 0
    return ids, mask


def launched():
    """No recordings."""
    return mock.patch.dict(graphs.RECORDERS, clear=True)


def recorded():
    """A recording that runs Python again, so that what a step launches around it can be watched."""

    def record(function):
        output = CausalLMOutputWithPast(logits=torch.zeros(ROWS, 1, 64, device="cuda"))
        return lambda: output.logits.copy_(function().logits), output

    return mock.patch.dict(graphs.RECORDERS, {"cuda": record})


def on_one(name):
    return "cuda:0"


def on_two(name):
    """The device of a module where the last layer, and what comes after it, lie on a second GPU."""
    is_there = name.startswith(("model.layers.1", "model.norm", "lm_head"))
    return "cuda:1" if is_there else "cuda:0"


def move_inputs(module, args, kwargs):
    """What accelerate's hooks do: tensors go to the device of the module they are for."""
    device = next(module.parameters()).device

    def move(value):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return tuple(map(move, value)) if isinstance(value, tuple) else value

    return tuple(map(move, args)), {name: move(value) for name, value in kwargs.items()}


def split(model):
    """The model, ready for two devices."""
    for module in (model.model.layers[1], model.model.norm, model.lm_head):
        module.register_forward_pre_hook(move_inputs, with_kwargs=True)
    return model


def step(model, ids, mask, cache, column):
    """The logits of a token and the cache, as ``generate`` asks for them."""
    columns = slice(column, column + 1)
    output = model.__call__(
        input_ids=ids[:, columns], attention_mask=mask[:, : column + 1], past_key_values=cache, use_cache=True
    )
    return output.logits, output.past_key_values


def decode(model, ids, mask, prompt=PROMPT, before_steps=lambda: None):
    """Logits of all columns, those after the prompt step by step."""
    output = model(ids[:, :prompt], attention_mask=mask[:, :prompt], use_cache=True)
    parts, cache = [output.logits], output.past_key_values
    before_steps()
    for column in range(prompt, ids.shape[1]):
        logits, cache = step(model, ids, mask, cache, column)
        parts.append(logits)
    return torch.cat([inner(part) for part in parts], dim=1)


def decode_on_both(model, ids, mask, prompt=PROMPT, device_of=on_one):
    """Logits on the CPU, on simulated devices, and what the host waited for in steps there. The model stays there."""
    expected = decode(model, ids, mask, prompt)
    with FakeCuda() as gpu:
        gpu.put_model(model, device_of)
        logits = decode(model, gpu.put(ids), gpu.put(mask), prompt, before_steps=gpu.waits.clear)
    return expected[mask.bool()], logits[mask.bool()], gpu.waits


def assert_decodes_as_on_the_cpu(model, is_padded=False, prompt=PROMPT, device_of=on_one):
    expected, logits, waits = decode_on_both(model, *text(is_padded), prompt, device_of)
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    assert not waits


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", few_quick())
def test_decoding_on_one_device(name, is_padded):
    with launched():
        assert_decodes_as_on_the_cpu(patched_llama(CONFIGS[name]), is_padded)


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", FEW)
def test_recorded_decoding(name, is_padded):
    with recorded():
        expected, logits, waits = decode_on_both(patched_llama(CONFIGS[name]), *text(is_padded))
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    assert len(waits) <= 1  # a new recording may be looked at once


@pytest.mark.slow
@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ["open", "open-slot"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "Llama"])
def test_decoding_of_families(family, name, is_padded):
    torch.manual_seed(1)
    with launched():
        assert_decodes_as_on_the_cpu(lococo.patch_model(build(family), CONFIGS[name]), is_padded)


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", few_quick())
def test_decoding_on_two_devices(name, is_padded):
    """The step that would be recorded, if a model on two devices could be, follows the end of a block."""
    block, before = CONFIGS[name].block_size, graphs.STEPS_BEFORE_RECORDING
    prompt = next(length for length in range(PROMPT, LENGTH) if (length + before) % block == 0)
    assert_decodes_as_on_the_cpu(split(patched_llama(CONFIGS[name])), is_padded, prompt, on_two)


@pytest.mark.parametrize("name", FEW)
def test_half_precision_on_two_devices_is_close_to_the_cpu(name):
    model = split(patched_llama(CONFIGS[name]).bfloat16())
    expected, logits, waits = decode_on_both(model, *text(is_padded=True), device_of=on_two)
    assert not waits
    assert logits.dtype == torch.bfloat16
    # Heavy hitters that lie close may swap places; on average the logits must not move.
    assert (logits - expected).abs().mean() < 0.03 * expected.abs().mean() + 0.03


@pytest.mark.parametrize("name", FEW)
def test_rows_are_reordered_between_steps(name):
    model, (ids, mask) = patched_llama(CONFIGS[name]), text()
    order = torch.tensor([1, 1])
    changed = torch.cat([ids[order, : PROMPT + 5], ids[:, PROMPT + 5 :]], dim=1)
    expected = model(changed).logits[:, PROMPT + 5 :]
    with FakeCuda() as gpu, launched():
        gpu.put_model(model)
        ids, mask, order = gpu.put(ids), gpu.put(mask), gpu.put(order)
        cache = model(ids[:, :PROMPT], use_cache=True).past_key_values
        gpu.waits.clear()
        parts = []
        for column in range(PROMPT, LENGTH):
            if column == PROMPT + 5:
                cache.reorder_cache(order)
            logits, cache = step(model, ids, mask, cache, column)
            parts.append(logits.inner)
    torch.testing.assert_close(torch.cat(parts[5:], dim=1), expected, **TOLERANCE)
    assert not gpu.waits


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("is_split", [False, True], ids=["one-device", "two-devices"])
@pytest.mark.parametrize("padding", [(1, 0), (0, 4), (9, 1)], ids=str)
def test_padding_on_the_right_reaches_a_last_chunk_of_one_token(padding, is_split, name):
    """Nothing may be asserted on the device of what is no step of decoding; later tokens follow the padding."""
    device_of = on_two if is_split else on_one
    model = patched_llama(CONFIGS[name], prefill_chunk_size=8)
    ids, mask = (tensor[:, :30] for tensor in text())
    for row, amount in enumerate(padding):
        mask[row, 17 - amount : 17] = 0

    with launched():
        expected, logits, _ = decode_on_both(split(model) if is_split else model, ids, mask, 17, device_of)
    torch.testing.assert_close(logits, expected, **TOLERANCE)


@pytest.mark.parametrize("name", FEW)
def test_the_host_waits_no_more_often_for_a_longer_prompt(name):
    model = patched_llama(CONFIGS[name], prefill_chunk_size=8)
    waits = []
    with FakeCuda() as gpu:
        gpu.put_model(model)
        for length in (32, 32, 80):
            gpu.waits.clear()
            model(gpu.put(tiny_ids(1, length)), use_cache=True)
            waits.append(len(gpu.waits))
    assert waits[1] == waits[2]  # after the first prompt, which looks at the gates


# What the simulation is for: without these rules it would find nothing.


def test_tensors_of_two_devices_do_not_go_together():
    with FakeCuda():
        here, there = torch.ones(3, device="cuda"), torch.ones(3, device="cuda:1")
        assert (here.is_cuda, here.device.index, there.device.index) == (True, 0, 1)
        with pytest.raises(DeviceMismatch, match="cuda:0.*cuda:1"):
            here + there
        with pytest.raises(DeviceMismatch, match="cpu.*cuda:0"):
            here * torch.ones(3)
        with pytest.raises(DeviceMismatch, match="cuda:0.*cuda:1"):
            here[torch.zeros(1, dtype=torch.long, device="cuda:1")]
        assert (here + there.to("cuda:0") * torch.tensor(2.0)).inner.tolist() == [3.0, 3.0, 3.0]


def test_views_share_their_memory():
    with FakeCuda():
        table = torch.zeros(2, 3, device="cuda")
        row = table[1]
        row += 5
        row.view(3, 1)[:2].mul_(2)
        assert table.inner.tolist() == [[0.0, 0.0, 0.0], [10.0, 10.0, 5.0]]


WAITS = {
    "item": lambda there: there[0].item(),
    "truth": lambda there: bool((there > 0).all()),
    "download": lambda there: there.cpu(),
    "tolist": lambda there: there.tolist(),
    "mask": lambda there: there[there > 1],
    "nonzero": lambda there: there.nonzero(),
    "index on the host": lambda there: there[torch.tensor([1])],
    "upload": lambda there: torch.ones(3).to("cuda"),
    "upload that does not wait, from memory that is not pinned": lambda there: torch.ones(3).to(
        "cuda", non_blocking=True
    ),
    "upload that waits, from pinned memory": lambda there: torch.ones(3).pin_memory().to("cuda"),
    "new tensor": lambda there: torch.tensor([1.0], device="cuda"),
    "copy": lambda there: there.copy_(torch.zeros(3)),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_what_the_host_waits_for_is_listed(wait):
    with FakeCuda() as gpu:
        there = torch.arange(3.0, device="cuda")
        assert not gpu.waits
        wait(there)
        assert gpu.waits


def test_what_the_host_need_not_wait_for_is_not_listed():
    with FakeCuda() as gpu:
        there = torch.arange(3.0, device="cuda")
        there.copy_(torch.zeros(3).pin_memory(), non_blocking=True)
        there += torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        there[torch.zeros(1, dtype=torch.long, device="cuda")] = 2.0
        there.masked_fill_(there > 1, 0.0).to("cuda:1")
        torch._assert_async((there < 2).all())
        assert not gpu.waits


def test_a_failed_assertion_on_the_device_is_an_error():
    with FakeCuda(), pytest.raises(DeviceAssert):
        torch._assert_async(torch.zeros((), dtype=torch.bool, device="cuda"))


def test_nothing_is_left_changed():
    owners = (torch.cuda, torch.backends.cuda, lococo.kernels.attention)
    before = [dict(vars(owner)) for owner in owners]
    with FakeCuda():
        assert torch.cuda.get_device_capability() == (9, 0)
        torch.ones(2, device="cuda")
    assert [dict(vars(owner)) for owner in owners] == before
    with pytest.raises(Exception, match="NVIDIA|CUDA"):
        torch.ones(2, device="cuda")
