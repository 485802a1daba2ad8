"""A real model of which most layers have a sliding window: Gemma 3 270M, fetched once into .demo."""

import pydoc_data.topics
import sys
from pathlib import Path

import pytest
import torch

from lococo import LoCoCoConfig, cache_bytes, patched, perplexity
from lococo.loading import load_model

ROOT = Path(__file__).parents[2]
HEADS = ROOT / "examples/heads/gemma3-270m-128"
WINDOW, LENGTH = 512, 1536

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gemma():
    sys.path.insert(0, str(ROOT / "examples"))
    from fetch_gemma3 import GGUF_FILE, fetch

    folder = fetch(ROOT / ".demo/gemma3-270m").parent
    return load_model(str(folder), gguf_file=GGUF_FILE, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def manual(gemma):
    """(1, 1536) tokens of Python's own manual."""
    _, tokenizer = gemma
    return tokenizer(pydoc_data.topics.topics["specialnames"], return_tensors="pt").input_ids[:, :LENGTH]


@torch.no_grad()
def test_enough_slots_give_the_full_model_and_its_windows_no_more_than_they_see(gemma, manual):
    model, _ = gemma
    full = model(manual, use_cache=True, logits_to_keep=64)
    with patched(model, LoCoCoConfig(LENGTH, block_size=128)):
        read = model(manual, use_cache=True, logits_to_keep=64)
    torch.testing.assert_close(read.logits, full.logits, rtol=0, atol=2e-3)  # of logits up to 40
    sizes = {layer.entries.keys.shape[1] for layer in read.past_key_values.layers}
    assert sizes == {WINDOW - 1 + 128, LENGTH + 128}
    assert cache_bytes(read.past_key_values) < 1.3 * cache_bytes(full.past_key_values)


@torch.no_grad()
def test_text_in_pieces_is_read_alike(gemma, manual):
    model, _ = gemma
    with patched(model, LoCoCoConfig.streaming_llm(256, block_size=128, positions="absolute")):
        whole, cache, parts = model(manual, logits_to_keep=700).logits, None, []
        for part in manual.split([836, 1, 300, 399], dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts[1:], dim=1), whole, rtol=0, atol=2e-3)


def test_shipped_heads_are_better_than_h2o_in_no_more_memory(gemma, manual):
    model, _ = gemma
    losses, sizes = {}, {}
    for name, options in {
        "full": None,
        "h2o": dict(config=LoCoCoConfig.h2o(128, block_size=128)),
        "heads": dict(heads=HEADS),
    }.items():
        if options is None:
            losses[name] = perplexity(model, [manual], first=512)
            continue
        with patched(model, **options), torch.no_grad():
            losses[name] = perplexity(model, [manual], first=512)
            sizes[name] = model(manual[:, :1], use_cache=True).past_key_values.nbytes
    assert losses["full"] < losses["heads"] < losses["h2o"]
    assert sizes["heads"] < 1.08 * sizes["h2o"], "but for the three numbers that a score foresees"
