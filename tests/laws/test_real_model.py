"""A real model on real text: SmolLM2-135M-Instruct, fetched once into .demo."""

import copy
import json
import pydoc_data.topics
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lococo import LoCoCoConfig, patched, perplexity
from lococo.data.texts import Cut, read_windows
from lococo.evaluation.perplexity import perplexity_rows
from lococo.methods import plan_runs
from lococo.results.journal import Journal

ROOT = Path(__file__).parents[2]
TEXT = ROOT.parent / "shared/data/text"
HELDOUT = TEXT / "wikipedia/heldout.jsonl"
MATHS = TEXT / "math_latex/heldout.jsonl"
# Heads in examples/heads: with learned scores, and from before those, with blends.
SHIPPED = [(128, ""), (256, ""), (128, "-blend")]
LENGTH = 640

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2():
    sys.path.insert(0, str(ROOT / "examples"))
    from fetch_smollm2 import GGUF_FILE, fetch

    folder = fetch(ROOT / ".demo/smollm2-135m").parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32).eval()
    return model, tokenizer


@pytest.fixture(scope="module")
def manual(smollm2):
    """(1, 640) tokens of Python's own manual."""
    _, tokenizer = smollm2
    return tokenizer(pydoc_data.topics.topics["assignment"], return_tensors="pt").input_ids[:, :LENGTH]


@torch.no_grad()
def test_enough_slots_give_the_full_model(smollm2, manual):
    model, _ = smollm2
    full = model(manual).logits
    for config in (LoCoCoConfig(LENGTH, block_size=100), LoCoCoConfig.streaming_llm(LENGTH, block_size=128)):
        with patched(model, config):
            # Logits of this model reach 30, so 1e-4 are 3e-6 of them.
            torch.testing.assert_close(model(manual).logits, full, rtol=0, atol=1e-4)
    assert torch.equal(model(manual).logits, full)


def in_float64(model):
    """A copy that computes in float64. Transformers' norms round to float32, some CPUs' in another way by length."""
    model = copy.deepcopy(model).double()
    for norm in (module for module in model.modules() if isinstance(module, LlamaRMSNorm)):
        norm.forward = partial(F.rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight, eps=1e-5)
    return model


@torch.no_grad()
def test_any_split_gives_the_same_logits(smollm2, manual):
    # Of two tokens whose scores are equal but for rounding another split may keep the other.
    model = in_float64(smollm2[0])
    with patched(model, LoCoCoConfig(128, block_size=64)):
        whole, cache, parts = model(manual).logits, None, []
        for part in manual.split([1, 199, 200, 240], dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-9)


@torch.no_grad()
def test_cache_is_as_large_after_4096_tokens_as_after_1024(smollm2, manual):
    model, _ = smollm2
    sizes, cache = [], None
    with patched(model, LoCoCoConfig(64, block_size=64)):
        for _ in range(2):
            for _ in range(2 if not sizes else 6):
                cache = model(manual[:, :512], past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            sizes.append((cache.seen_tokens, cache.nbytes))
    assert [tokens for tokens, _ in sizes] == [1024, 4096]
    keys_and_values = 2 * 30 * 3 * 64 * 128 * 4  # layers, KV heads, head_dim, entries, bytes of a float32
    assert sizes[0][1] == sizes[1][1] <= 1.05 * keys_and_values


@pytest.mark.skipif(not HELDOUT.is_file(), reason="needs ../shared/data/text")
def test_uncalibrated_model_is_better_than_h2o_on_held_out_text(smollm2):
    model, tokenizer = smollm2
    with HELDOUT.open(encoding="utf-8") as file:
        texts = [json.loads(next(file))["text"] for _ in range(2)]
    ids = [tokenizer(text, return_tensors="pt").input_ids[:, :1536] for text in texts]

    def measure(config):
        with patched(model, config):
            return perplexity(model, ids, first=512)

    h2o = min(measure(LoCoCoConfig.h2o(128, block_size=128, positions=mode)) for mode in ("absolute", "slot"))
    assert measure(LoCoCoConfig(128, block_size=128)) < h2o


@pytest.mark.parametrize(("num_slots", "kind"), SHIPPED)
def test_shipped_heads_hold_their_budget(smollm2, manual, num_slots, kind):
    model, _ = smollm2
    with patched(model, heads=ROOT / f"examples/heads/smollm2-135m-{num_slots}{kind}"), torch.no_grad():
        cache = model(manual, use_cache=True).past_key_values
    groups = [group for layer in cache.layers for group in layer.groups]
    slots = sum(group.config.num_slots * len(group.heads) for group in groups)
    assert 0.95 * num_slots < slots / 90 <= num_slots
    entries = sum(layer.entries.keys.shape[1] for layer in cache.layers)
    assert entries == slots + 90 * 128


@pytest.mark.skipif(not MATHS.is_file(), reason="needs ../shared/data/text")
@pytest.mark.parametrize(("num_slots", "kind"), SHIPPED)
def test_shipped_heads_reproduce_their_recorded_figure(smollm2, tmp_path, num_slots, kind):
    model, tokenizer = smollm2
    results = ROOT / f"docs/results/notes/measured/calibration{kind.replace('-', '_')}.json"
    recorded = json.loads(results.read_text(encoding="utf-8"))["rows"]
    rows = {
        row["method"]: row["nll"]
        for row in recorded
        if row["domain"] == "math_latex" and row["num_slots"] in (num_slots, None)
    }
    texts = read_windows([MATHS], tokenizer, Cut((4096,), first=512, limit=2))
    (run,) = plan_runs([], [], 128, [str(ROOT / f"examples/heads/smollm2-135m-{num_slots}{kind}")])
    measured = perplexity_rows(model, texts, [run], 512, Journal(tmp_path / "journal.jsonl"))[0]["nll"]
    # Of two tokens with all but equal scores another processor's rounding may keep the other.
    assert measured == pytest.approx(rows["lococo"], abs=0.02)
    assert min(rows["h2o"], rows["h2o-slot"]) - rows["lococo"] > 0.2, "a figure that others reach too shows nothing"
