"""vLLM with LoCoCo in it, on a CPU: every engine in a process of its own."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_model import ENVIRONMENT, VOCAB
from transformers import AutoModelForCausalLM
from words import word_tokenizer

import lococo
from lococo import LoCoCoConfig
from lococo.state import patch_of

SLOTS = {"num_slots": 32, "block_size": 16}
LENGTHS = [300, 61, 1, 130]


@pytest.fixture(scope="module")
def heads(model, tmp_path_factory):
    """Heads with budgets of their own, a network whose scores matter, centroids that weigh, and codes."""
    config = LoCoCoConfig(
        32,
        16,
        1,
        20,
        3,
        score="learned",
        compressor="centroids",
        scaling="count",
        slots_per_head=((16, 48), (44, 20)),
        slot_bits=8,
    )
    patched = lococo.patch_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    torch.manual_seed(1)
    for network in patch_of(patched).networks.values():
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return lococo.save_heads(patched, tmp_path_factory.mktemp("heads") / "mine", dtype=None)


def start(work, path, **environment):
    command = [sys.executable, Path(__file__).with_name("engine.py"), json.dumps(work), path]
    return subprocess.run(
        command, env={**os.environ, **ENVIRONMENT, **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture
def run(model, tmp_path):
    def run(slots, lengths=LENGTHS, environment=(), **more):
        work = {"model": str(model), "vocab": VOCAB, "lococo": slots, "lengths": lengths, **more}
        result = start(work, tmp_path / "out.json", **dict(environment))
        assert result.returncode == 0, result.stderr[-4000:]
        return json.loads((tmp_path / "out.json").read_text())

    return run


@pytest.fixture
def refused(model, tmp_path):
    def refused(slots, lengths=(20,), **more):
        work = {"model": str(more.pop("model", model)), "vocab": VOCAB, "lococo": slots, "lengths": lengths, **more}
        result = start(work, tmp_path / "out.json")
        assert result.returncode != 0 and not (tmp_path / "out.json").exists()
        return result.stderr

    return refused


def by_transformers(model, lengths, new_tokens=12, **patch):
    """Greedy answers of the patched model, each prompt alone."""
    from engine import prompts_of

    reader = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reader = lococo.patch_model(reader, **patch) if patch else reader
    answers = []
    for ids in prompts_of({"vocab": VOCAB, "lengths": lengths}):
        ids = torch.tensor([ids])
        how = dict(do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, eos_token_id=None)
        answer = reader.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **how)
        answers.append(answer[0, ids.shape[1] :].tolist())
    return answers


def test_entry_point_is_found():
    found = importlib.metadata.entry_points(group="vllm.general_plugins")
    assert found["lococo"].load() is __import__("lococo.vllm").vllm.register


def test_stock_stays_stock_and_enough_slots_equal_it(run, model):
    stock = run(None)
    assert not stock["wrapped"] and stock["answers"] == [by_transformers(model, LENGTHS)]
    mine = run({"num_slots": 512, "block_size": 16})
    assert mine["wrapped"] and mine["answers"] == stock["answers"]


@pytest.mark.parametrize("chunk", [1, 100, 1000])  # one request at a time, or up to four
@pytest.mark.parametrize("kind", ["default", "h2o", "heads"])
def test_layers_give_what_they_give_alone(kind, chunk, run, heads):
    h2o = {"num_sinks": 0, "num_recent": 16, "num_heavy": 16, "score": "sum"}
    options = {"default": SLOTS, "h2o": {**SLOTS, **h2o}, "heads": {"heads": str(heads)}}[kind]
    found = run(
        options, records=True, options={"max_num_batched_tokens": chunk, "max_num_seqs": min(chunk, 4)}, new_tokens=30
    )
    assert len(found["wrong_by"]) == len(LENGTHS)
    assert max(found["wrong_by"].values()) <= 1e-5


def test_answers_are_those_of_transformers(run, model, heads):
    assert run(SLOTS)["answers"] == [by_transformers(model, LENGTHS, config=LoCoCoConfig(**SLOTS))]
    assert run({"heads": str(heads)})["answers"] == [by_transformers(model, LENGTHS, heads=heads)]


def test_one_page_serves_all_requests_in_turn(run):
    alone = run(SLOTS)
    # vLLM keeps one block for itself.
    assert run(SLOTS, times=2, options={"num_gpu_blocks_override": 2})["answers"] == 2 * alone["answers"]


def test_preempted_requests_answer_the_same(run, heads):
    options = {"heads": str(heads)}
    found = run(options, preempts=True)
    assert found["preempted"] >= 2 and found["answers"] == run(options)["answers"]


def test_prefix_caching_does_no_harm(run):
    found = run(SLOTS, times=2, options={"enable_prefix_caching": True})
    assert found["answers"] == 2 * run(SLOTS)["answers"]


@pytest.mark.parametrize("ranks", [2, 4])  # of two KV heads: each its own, and two of them the same
def test_tensor_parallel(ranks, run, heads):
    options = {"heads": str(heads)}
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    found = run(options, options={"tensor_parallel_size": ranks}, environment=environment)
    assert found["answers"] == run(options)["answers"]


def test_models_of_transformers_inside_vllm(run):
    assert run(SLOTS, options={"model_impl": "transformers"})["answers"] == run(SLOTS)["answers"]


def test_a_request_has_one_page_however_long(run):
    """As many requests at once as there are pages, at 100 tokens and at 8000."""
    for length in (100, 8000):
        options = {
            "num_gpu_blocks_override": 4,
            "max_model_len": 8192,
            "max_num_seqs": 3,
            "max_num_batched_tokens": 4096,
        }
        found = run(SLOTS, lengths=[length] * 3, options=options, new_tokens=2)
        assert len(found["answers"][0]) == 3


@pytest.mark.parametrize(
    ("options", "engine", "message"),
    [
        ({}, {}, "LoCoCo needs to know its slots"),
        ({"num_slot": 3}, {}, "has num_slot: known are heads, "),
        ({"num_slots": 0}, {}, "num_slots must be an integer of at least 1, got 0"),
        ({**SLOTS, "positions": "slot"}, {}, "positions must be 'absolute' in vLLM"),
        ({**SLOTS, "decode_block_size": 4}, {}, "decode_block_size=4 must be left out in vLLM"),
        ({"heads": "nowhere/at/all"}, {}, "nowhere/at/all"),
        (SLOTS, {"max_model_len": 9000}, "8192"),
        (SLOTS, {"kv_cache_dtype": "fp8"}, "leave --kv-cache-dtype fp8 out"),
        (SLOTS, {"kv_cache_dtype": "bfloat16"}, "the model's type (float32) or codes them"),
        (
            SLOTS,
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "LoCoCo: no speculative decoding",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(options, engine, message, refused):
    assert message in refused(options, options=engine)


def test_sliding_windows_are_refused_by_name(model, refused, tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    values = json.loads((model / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: values[name] for name in (*names, "num_key_value_heads", "head_dim", "max_position_embeddings")}
    MistralForCausalLM(MistralConfig(**sizes, sliding_window=64)).save_pretrained(tmp_path / "mistral")
    word_tokenizer().save_pretrained(tmp_path / "mistral")
    assert "LoCoCo in vLLM does not support sliding windows (64)" in refused(SLOTS, model=tmp_path / "mistral")


def test_layers_that_it_does_not_know_are_refused_by_name():
    """Each by the argument that vLLM gives such a layer's attention."""
    code = """
from lococo.vllm.backend import LoCoCoImpl
for name in ("alibi_slopes", "sliding_window", "kv_sharing_target_layer_name", "sinks", "anything_new"):
    try:
        LoCoCoImpl(4, 32, 1.0, 2, **{name: [0.5]})
    except ValueError as error:
        print(name, "->", error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    said = result.stdout
    for name in (
        "ALiBi",
        "sliding windows",
        "layers that share their KV",
        "attention sinks",
        "what it does not know: anything_new",
    ):
        assert f"LoCoCo in vLLM does not support {name} (" in said, said + result.stderr


def test_versions_that_were_not_tested_are_refused():
    code = "import vllm; vllm.__version__ = '0.40.1'; from lococo.vllm.backend import _check_version; _check_version()"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    assert "works inside vLLM from 0.29 on and before 0.33, this is 0.40.1" in result.stderr
