"""Codes of keys and values, beside a naive computation, and of what is hard to code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import naive_rounded

from lococo import LoCoCoConfig
from lococo.compression.codes import Codec, decode, encode, measure_range, num_groups, round_to_codes
from lococo.compression.entries import Entries

GROUP = {8: 64, 4: 32}


def rounded(vectors, bits):
    span = measure_range(vectors, bits)
    codes = encode(vectors, span, bits)
    return codes, span, decode(codes, span, bits, vectors.shape[-1], vectors.dtype)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [1, 2, 7, 31, 32, 33, 64, 65, 67, 80, 96, 128, 200])
def test_rounded_numbers_are_those_of_the_naive_computation(size, bits):
    torch.manual_seed(size)
    vectors = torch.randn(3, 5, size, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 300.0])[:, None, None]
    codes, span, found = rounded(vectors, bits)
    expected = torch.stack([naive_rounded(vector, bits) for vector in vectors.flatten(0, 1)]).view_as(vectors)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert codes.shape[-1] == (size if bits == 8 else -(-size // 2)) and codes.dtype == torch.uint8
    assert span.shape[-1] == 2 * num_groups(size, bits) == 2 * -(-size // GROUP[bits]) and span.dtype == torch.float16
    assert (found - vectors).abs().max() <= 0.51 * span.float().max() + 1e-3 * vectors.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(
    numbers=st.lists(st.floats(-1000, 1000, width=16), min_size=6, max_size=6),
    bits=st.sampled_from([8, 4]),
)
@settings(max_examples=100)
def test_what_was_decoded_has_the_codes_it_had(dtype, numbers, bits):
    vectors = torch.tensor([numbers]).to(dtype)
    codes, span, found = rounded(vectors, bits)
    if dtype in (torch.float64, torch.float32):
        assert torch.equal(encode(found, span, bits), codes)
        assert torch.equal(decode(codes, span, bits, 6, dtype), found)
    # In half precision neighbouring codes may be the same number: the number stays.
    again = decode(encode(found, span, bits), span, bits, 6, dtype)
    torch.testing.assert_close(again.float(), found.float(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_hard_to_code(bits):
    constant = torch.full((1, 40), -3.14159)
    torch.testing.assert_close(rounded(constant, bits)[2], constant, rtol=1e-3, atol=0)
    assert torch.equal(rounded(torch.zeros(2, 40), bits)[2], torch.zeros(2, 40))
    tiny = torch.linspace(0, 1e-7, 40)[None]
    assert (rounded(tiny, bits)[2] - tiny).abs().max() <= 1e-7
    for bad in (float("nan"), float("inf"), -float("inf"), 1e8, -1e6):  # float16 cannot hold the last
        vectors = torch.randn(2, 40)
        vectors[0, 3] = bad
        found = rounded(vectors, bits)[2]
        assert not found[0, : min(40, GROUP[bits])].isfinite().any(), "hidden"
        assert found[1].isfinite().all()
    large = torch.tensor([[60000.0, -60000.0, 1.0]])
    assert (rounded(large, bits)[2] - large).abs().max() <= 120000 / (2**bits - 1)


def test_gradients_pass_through():
    codec = Codec((8, 4), (6, 6), (torch.float64, torch.float64))
    keys = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    for found, span in codec.rounded(keys, keys):
        assert not span.requires_grad and (found - keys).abs().max() > 1e-4
        (gradient,) = torch.autograd.grad((found * torch.arange(6.0)).sum(), keys)
        assert torch.equal(gradient, torch.arange(6.0).double().expand(2, 6))
    both = Codec((8, 8), (6, 6), codec.dtypes).rounded(keys, keys.detach())  # of one type and shape: at once
    assert torch.equal(torch.autograd.grad(both[0][0].sum(), keys)[0], torch.ones(2, 6).double())
    assert Codec((16, 8), (6, 6), codec.dtypes).rounded(keys, keys)[0] == (keys, None)
    assert Codec((16, 8), (6, 6), codec.dtypes).rounded_keys(keys) == (keys, None)


@pytest.mark.parametrize("sizes", [(40, 40), (40, 24)])
@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (8, 4), (16, 8)])
def test_what_is_rounded_is_what_is_coded(bits, sizes):
    codec = Codec(bits, sizes, (torch.float32, torch.float32))
    vectors = [torch.randn(2, 3, size) for size in sizes]
    vectors[1][0, 0, 3], vectors[0][1] = float("nan"), 2.5
    for which, (numbers, coded) in enumerate(zip(codec.rounded(*vectors), codec.coded(*vectors), strict=True)):
        if bits[which] == 16:
            assert numbers[0] is coded[0] is vectors[which] and numbers[1] is coded[1] is None
            continue
        decoded = decode(*coded, bits[which], sizes[which], torch.float32)
        torch.testing.assert_close(decoded, numbers[0], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(coded[1], numbers[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [(8, 8), (8, 4), (16, 4), (4, 16)])
def test_entries_are_coded_and_decoded(bits):
    codec = Codec(bits, (6, 10), (torch.float32, torch.float32))
    entries = codec.with_ranges(Entries(torch.randn(2, 3, 6), torch.randn(2, 3, 10), rotated=torch.randn(2, 3, 6)))
    for name, which in (("keys", 0), ("values", 1), ("rotated", 0)):
        assert (getattr(entries, f"{name}_range") is None) == (bits[which] == 16)
        if bits[which] != 16:
            tensor, span = round_to_codes(getattr(entries, name), bits[which])
            setattr(entries, name, tensor)
            setattr(entries, f"{name}_range", span)
    coded = codec.encoded(entries)
    assert [coded.keys.dtype == torch.uint8, coded.values.dtype == torch.uint8] == [each != 16 for each in bits]
    decoded = codec.decoded(coded)
    for name in ("keys", "values", "rotated"):
        assert torch.equal(getattr(decoded, name), getattr(entries, name))


@pytest.mark.parametrize("bits", [0, 2, 32, 8.0, True, "8", None, (8,), (8, 8, 8), (8, 3), (True, 8)])
def test_bits_that_there_are_not_are_refused(bits):
    with pytest.raises(ValueError, match="slot_bits must be 16, 8 or 4, or two of them, of keys and of values; got"):
        LoCoCoConfig(16, slot_bits=bits)


def test_bits_come_back_from_json():
    assert LoCoCoConfig.from_dict(LoCoCoConfig(16, slot_bits=(8, 4)).to_dict()).slot_bits == (8, 4)
    assert LoCoCoConfig(16, slot_bits=[8, 4]).bits == (8, 4) and LoCoCoConfig(16, slot_bits=8).bits == (8, 8)
    assert LoCoCoConfig(16).bits == (16, 16)
