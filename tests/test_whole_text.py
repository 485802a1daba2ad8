"""Rotary tables that depend on the length of the whole text, whatever the pieces it is read in."""

import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from tiny import SIZES, tiny_ids, tiny_llama
from torch.nn.functional import cross_entropy
from training_worker import head_trainer
from transformers import Phi3Config, Phi3ForCausalLM

import lococo
from lococo import LoCoCoConfig
from lococo.compat import RELEASE
from lococo.generation import read_and_answer, read_tokens
from lococo.metrics import token_nlls
from lococo.models import length_dependent_rotaries
from lococo.training.objectives import Distill, NextToken
from lococo.whole_text import reading_pieces

BOUNDARY = 32
ROPES = {
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 4.0, 16.0, 48.0],
        "original_max_position_embeddings": BOUNDARY,
        "rope_theta": 10000.0,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
}

# Phi-3 takes the factor from its lengths, and before Transformers 5 no name but these three.
PHI3_ROPE = {key: value for key, value in ROPES["longrope"].items() if key != "factor"}
if RELEASE < (5, 0):
    PHI3_ROPE = {"type": "longrope", **{key: PHI3_ROPE[key] for key in ("short_factor", "long_factor")}}


def llama(rope):
    return tiny_llama(rope_scaling=dict(ROPES[rope]), max_position_embeddings=BOUNDARY, attn_implementation="eager")


def phi3(rope):
    torch.manual_seed(0)
    config = Phi3Config(
        **{**SIZES, "max_position_embeddings": 128},
        original_max_position_embeddings=BOUNDARY,
        rope_scaling=PHI3_ROPE,
        attn_implementation="eager",
    )
    return Phi3ForCausalLM(config).eval()


MODELS = {
    "llama-longrope": (llama, "longrope"),
    "llama-dynamic": (llama, "dynamic"),
    "phi3-longrope": (phi3, "longrope"),
}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name):
    make, rope = MODELS[name]
    return make(rope)


def large(model, chunk=None):
    """Patched with room for the whole text."""
    return lococo.patch_model(model, LoCoCoConfig(128, block_size=16), prefill_chunk_size=chunk)


def assert_close(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=2e-5)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@every_model
def test_only_such_tables_are_looked_after(name):
    assert length_dependent_rotaries(build(name))
    assert not length_dependent_rotaries(tiny_llama(rope_scaling={"rope_type": "linear", "factor": 2.0}))


@every_model
@pytest.mark.parametrize("chunk", [1, 7, 16, 33, 64])
@pytest.mark.parametrize("length", [20, BOUNDARY, BOUNDARY + 1, 61])
def test_enough_slots_give_the_full_model_in_any_pieces(name, length, chunk):
    ids = tiny_ids(2, length)
    full = build(name)(ids).logits
    assert_close(large(build(name), chunk)(ids).logits, full)


@every_model
def test_padded_rows_too(name):
    ids, mask = tiny_ids(2, 61), torch.ones(2, 61, dtype=torch.long)
    mask[0, :17] = 0
    positions = (mask.cumsum(dim=-1) - 1).clamp_min(0)
    full = build(name)(ids, attention_mask=mask, position_ids=positions).logits
    for given in ({}, {"position_ids": positions}):
        got = large(build(name), 9)(ids, attention_mask=mask, **given).logits
        assert_close(got[mask.bool()], full[mask.bool()])


@every_model
def test_compressed_texts_do_not_depend_on_the_pieces(name):
    ids, results = tiny_ids(1, 90), []
    for chunk in (128, 8, 13):
        model = lococo.patch_model(build(name), LoCoCoConfig(16, block_size=8), prefill_chunk_size=chunk)
        results.append(model(ids).logits)
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


@every_model
@pytest.mark.parametrize("is_patched", [False, True])
def test_losses_of_a_long_text_are_those_of_the_text_read_at_once(name, is_patched, monkeypatch):
    monkeypatch.setattr("lococo.metrics.CHUNK", 16)
    ids = tiny_ids(1, 61)
    expected = cross_entropy(build(name)(ids[:, :-1]).logits[0], ids[0, 1:], reduction="none")
    model = large(build(name)) if is_patched else build(name)
    assert_close(token_nlls(model, ids), expected)


@every_model
@pytest.mark.parametrize("prompt", [10, BOUNDARY - 4, BOUNDARY + 4])
def test_steps_over_the_boundary_are_those_of_the_unpatched_model(name, prompt):
    full, model = build(name), large(build(name), 7)
    ids, caches = tiny_ids(1, 61), [None, None]
    for part in ids.split([prompt, *[1] * (61 - prompt)], dim=1):
        outputs = [full(part, past_key_values=caches[0], use_cache=True), model(part, past_key_values=caches[1])]
        caches = [output.past_key_values for output in outputs]
        assert_close(outputs[1].logits, outputs[0].logits)


# Transformers 4 reads the text again without a causal mask when Phi-3 comes to the boundary: ours does not.
PROMPTS = [(name, prompt) for name in MODELS for prompt in (10, BOUNDARY - 4, BOUNDARY + 4)]
PROMPTS = [each for each in PROMPTS if RELEASE >= (5, 0) or each[0] != "phi3-longrope" or each[1] > BOUNDARY]


@pytest.mark.parametrize(("name", "prompt"), PROMPTS)
def test_generate_over_the_boundary_is_that_of_the_unpatched_model(name, prompt):
    """Phi-3 reads its text again when it comes to the boundary."""
    options = dict(max_new_tokens=24, do_sample=False, return_dict_in_generate=True, output_logits=True)
    expected = build(name).generate(tiny_ids(1, prompt), **options)
    got = large(build(name), 7).generate(tiny_ids(1, prompt), **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert_close(torch.stack(got.logits), torch.stack(expected.logits))


@every_model
def test_a_prompt_read_with_a_progress_bar_is_read_as_one(name):
    prompt = tiny_ids(1, 50)
    options = dict(max_new_tokens=8, do_sample=False, progress=False)
    whole = build(name).generate(prompt, max_new_tokens=8, do_sample=False)[0, 50:]
    for model in (build(name), large(build(name))):
        assert torch.equal(read_and_answer(model, prompt, chunk=9, **options).answer, whole)
    cache = read_tokens(large(build(name)), prompt[:, :20], chunk=6, length=50)
    assert cache.seen_tokens == 20


@every_model
def test_pieces_of_a_text_that_the_caller_cuts(name):
    ids = tiny_ids(1, 61)
    full = build(name)(ids).logits
    model, cache, logits = large(build(name)), None, []
    with reading_pieces(model, 60):
        for part in ids.split([5, 20, 36], dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    assert_close(torch.cat(logits, dim=1), full)


@every_model
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("piece", [0, 3, 8])
def test_a_forward_that_fails_leaves_nothing_behind(name, error, piece):
    """In the first piece, in the middle, and in the last, where an interrupt skips all that comes after a forward."""
    model, calls = large(build(name), 7), []

    def fail(module, args):
        calls.append(module)
        if len(calls) > piece:
            raise error

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        model(tiny_ids(1, 61))
    handle.remove()
    assert_close(model(tiny_ids(1, 20)).logits, build(name)(tiny_ids(1, 20)).logits)


@every_model
@pytest.mark.parametrize("objective", [NextToken(backprop_tokens=9), Distill(backprop_tokens=20)])
def test_windows_are_trained_on_as_one_text(name, objective, tmp_path):
    """The model with its full cache beside it, too: with enough slots there is nothing to learn."""
    model = large(build(name))
    trainer = head_trainer(model, tmp_path, objective)
    trainer.current_gradient_accumulation_steps = 1
    with torch.enable_grad():
        loss = trainer.training_step(trainer.model, {"input_ids": tiny_ids(1, 64)})
    ids = tiny_ids(1, 64)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(build(name)(ids[:, :-1]).logits[0], ids[0, 1:])
    if isinstance(objective, Distill):  # nothing to learn from the full cache
        expected = torch.zeros_like(expected)
    torch.testing.assert_close(loss, expected, rtol=0, atol=2e-5)
    assert model.model.lococo_patch.thread.last_position is None


@every_model
def test_threads_read_texts_of_their_own(name):
    """A server's: each with another length, in pieces, at once."""
    model = large(build(name), 5)
    texts = [tiny_ids(1, 20 + 6 * index, seed=index) for index in range(6)]
    if name == "llama-dynamic":  # Transformers' own table is one for all threads there
        texts = [tiny_ids(1, 40, seed=index) for index in range(6)]
    expected = [model(ids).logits for ids in texts]

    def read(index):
        with torch.no_grad():
            return [model(texts[index]).logits for _ in range(4)]

    # Transformers writes longrope's table into one buffer: threads are kept apart while it is made and read.
    with ThreadPoolExecutor(6) as pool, mock.patch.object(type(model.model.rotary_emb), "__call__", _one_at_a_time):
        for logits, same in zip(pool.map(read, range(6)), expected, strict=True):
            for each in logits:
                assert_close(each, same)


LOCK = threading.RLock()


def _one_at_a_time(module, *args, **kwargs):
    with LOCK:
        return torch.nn.Module.__call__(module, *args, **kwargs)
