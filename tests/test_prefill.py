"""How much of a long prompt is read at once: by the free memory, and without a trace in what comes out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_ids, tiny_llama

from experiments.benchmarks.counters import HeldBytes
from experiments.benchmarks.roofline import Sizes
from lococo import LoCoCoConfig, patched, prefill
from lococo.models import find_family
from lococo.prefill import FREE_SHARE, chunk_by_memory, chunk_size, decoder_token_bytes, free_memory

M, B = 16, 8
CONFIG = LoCoCoConfig(M, block_size=B, gate_init=0.5, init_std=0.5)
LENGTH = 101
TOKEN_BYTES = 4 * (4 * 32 + 3 * 48)  # of a tiny_llama


@pytest.mark.parametrize(
    ("free", "per_token", "block", "most", "expected"),
    [
        (None, 100, 8, 64, 64),
        (10**9, 100, 8, 64, 64),
        (10**9, 100, 8, 63, 56),
        (100 * 33 / FREE_SHARE, 100, 8, 64, 32),
        (100 * 31 / FREE_SHARE, 100, 8, 64, 24),
        (100 * 7 / FREE_SHARE, 100, 8, 64, 8),
        (0, 100, 8, 64, 8),
        (10**9, 100, 512, 64, 512),
        (None, 100, 8, 0, 8),
    ],
)
def test_a_chunk_takes_its_share_of_the_free_memory(free, per_token, block, most, expected):
    assert chunk_size(free, per_token, block, most) == expected


BYTES, SIZES = st.integers(0, 10**12), st.integers(1, 10**6)


@given(free=BYTES, more=BYTES, per_token=SIZES, block=SIZES, most=st.integers(0, 10**5))
def test_chunks_are_whole_blocks_within_bounds_and_grow_with_the_memory(free, more, per_token, block, most):
    tokens = chunk_size(free, per_token, block, most)
    assert tokens % block == 0 and block <= tokens <= max(block, most)
    assert tokens <= chunk_size(free + more, per_token, block, most) <= chunk_size(None, per_token, block, most)
    assert tokens == block or tokens * per_token <= FREE_SHARE * free


def prefill_widths(model, monkeypatch, free, batch=2, length=LENGTH, chunk=None, **arguments):
    """Widths read by the first layer, and the output, with so many bytes free."""
    monkeypatch.setattr(prefill, "free_memory", lambda device: free)
    torch.manual_seed(0)
    with patched(model, CONFIG, prefill_chunk_size=chunk), torch.no_grad():
        widths = []
        hook = model.model.layers[0].register_forward_hook(lambda _, args, output: widths.append(args[0].shape[1]))
        output = model(tiny_ids(batch, length), **arguments)
        hook.remove()
    return widths, output


@pytest.mark.parametrize("arguments", [{}, {"use_cache": False}, {"logits_to_keep": 1}, {"logits_to_keep": 30}])
def test_little_memory_gives_the_same_logits_as_plenty(monkeypatch, arguments):
    model = tiny_llama()
    plenty, expected = prefill_widths(model, monkeypatch, 10**9, **arguments)
    three, some = prefill_widths(model, monkeypatch, 3 * B * 2 * TOKEN_BYTES / FREE_SHARE, **arguments)
    one, least = prefill_widths(model, monkeypatch, 0, **arguments)
    assert plenty == [LENGTH] and three[:2] == [3 * B] * 2 and one[:8] == [B] * 8
    assert sum(three) == sum(one) == LENGTH
    torch.testing.assert_close(some.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(least.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_memory_that_changes_on_the_way_changes_no_chunk(monkeypatch):
    left = iter([3 * B * 2 * TOKEN_BYTES / FREE_SHARE])
    monkeypatch.setattr(prefill, "free_memory", lambda device: next(left))
    with patched(tiny_llama(), CONFIG) as model, torch.no_grad():
        model(tiny_ids(2, LENGTH))
    assert next(left, None) is None


def test_a_given_size_is_kept_and_the_device_is_not_asked(monkeypatch):
    widths, _ = prefill_widths(tiny_llama(), monkeypatch, 0, chunk=20)
    assert widths == [20] * 5 + [1]


def test_decoding_and_training_ask_for_no_memory(monkeypatch):
    def asked(device):
        raise AssertionError("asked")

    model = tiny_llama()
    with patched(model, CONFIG):
        monkeypatch.setattr(prefill, "free_memory", asked)
        model(tiny_ids(2, LENGTH)).logits.sum().backward()
        with torch.no_grad():
            cache = model(tiny_ids(2, B), use_cache=True).past_key_values
            for _ in range(2 * B):
                model(tiny_ids(2, 1), past_key_values=cache)
            model(tiny_ids(2, LENGTH), output_hidden_states=True)


def test_all_rows_and_processes_count(monkeypatch):
    family = find_family(tiny_llama())
    monkeypatch.setattr(prefill, "MOST_TOKENS", {"cpu": 64})
    monkeypatch.setattr(prefill, "free_memory", lambda device: 48 * TOKEN_BYTES / FREE_SHARE)
    assert [chunk_by_memory(family, B, tiny_ids(batch)) for batch in (1, 2, 3, 4, 100)] == [48, 24, 16, 8, 8]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert [chunk_by_memory(family, B, tiny_ids(batch)) for batch in (1, 2, 100)] == [64, 32, 8]


def test_layers_that_are_offloaded_read_by_the_memory_where_the_tokens_are(monkeypatch):
    asked = []
    monkeypatch.setattr(prefill, "free_memory", asked.append)
    assert chunk_by_memory(find_family(tiny_llama().to("meta")), B, tiny_ids()) == prefill.MOST_TOKENS["cpu"]
    assert asked == [torch.device("cpu")]


def test_the_system_tells_its_free_memory(monkeypatch):
    assert free_memory(torch.device("cpu")) > 2**20
    assert free_memory(torch.device("meta")) is None
    monkeypatch.setattr(prefill.importlib.util, "find_spec", lambda name: None)
    assert free_memory(torch.device("cpu")) is None


@pytest.mark.parametrize("overrides", [{}, {"intermediate_size": 16}, {"num_key_value_heads": 4}])
def test_the_count_is_what_a_token_really_takes(overrides):
    model = tiny_llama(**overrides)
    peaks = []
    with patched(model, LoCoCoConfig(M, block_size=B), prefill_chunk_size=10**6), torch.no_grad():
        for length in (512, 1024):
            with HeldBytes() as held:
                model(tiny_ids(1, length), logits_to_keep=1)
            peaks.append(held.peak)
    counted = Sizes.of(tiny_llama(**overrides)).token_bytes
    assert counted == decoder_token_bytes(find_family(model))
    assert counted <= (peaks[1] - peaks[0]) / 512 <= 1.1 * counted
