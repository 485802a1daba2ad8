"""What tests of tasks ask, and of which model."""

import pytest
import torch
from lm_eval.api.instance import Instance
from tiny import tiny_llama
from words import WORDS

import lococo
from lococo.evaluation.few_shot import read_tasks
from lococo.evaluation.tasks import evaluate_tasks
from lococo.methods import plan_runs

CONFIG = lococo.LoCoCoConfig(12, block_size=8, kernel_size=5, gate_init=0.3)


def few_shot(name, shots, data, seed=0):
    (task,) = read_tasks([f"{name}:{shots}"], data, seed)
    return task


def open_model():
    """A model whose heads blend."""
    model = lococo.patch_model(tiny_llama(), CONFIG)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lococo_head" in name and "gate" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def requests_of(data, name, shots, lm):
    return [request for prompt in prompts_of(few_shot(name, shots, data), lm) for request in prompt.requests]


def prompts_of(task, lm, limit=None):
    return [task.prompt(lm, question) for question in task.questions(limit)]


def short_answers(requests):
    for request in requests:
        request.arguments = (request.args[0], {"until": [WORDS[5], "\n"], "max_gen_toks": 20, "do_sample": False})
    return requests


def copies(requests):
    return [Instance(each.request_type, each.doc, each.arguments, each.idx) for each in requests]


def assert_same(scores, expected, atol=1e-5):
    assert len(scores) == len(expected) > 0
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert [value for value, _ in scores] == pytest.approx([value for value, _ in expected], abs=atol)


GENERATOR = """
import random
import datasets
from transformers import AutoTokenizer

def generate(tokenizer, max_seq_lengths, **others):
    ids = AutoTokenizer.from_pretrained(tokenizer)("w1 w2 w3").input_ids
    rows = [
        {"input": length * "w1 ", "ids": ids, "drawn": random.random(), "max_length": length, "context": "one"}
        for length in max_seq_lengths
    ]
    return {"test": datasets.Dataset.from_list(rows)}

def process_results(question, answers):
    lengths = {"4096": -1.0}
    return {**lengths, str(question["max_length"]): float(len(answers[0]) % 2)}
"""
GENERATED = """
task: made
test_split: test
output_type: generate_until
generation_kwargs: {max_gen_toks: 5, until: []}
doc_to_text: "{{input.strip()}}"
doc_to_target: "{{input}}"
gen_prefix: w5
custom_dataset: !function generator.generate
process_results: !function generator.process_results
metadata: {version: 3}
"""


def run(data, tokenizer, output, names=("arc_easy:2", "winogrande:3", "triviaqa:1"), methods=("full", "h2o"), **more):
    tasks = read_tasks(names, data)
    return evaluate_tasks(
        tiny_llama(), tokenizer, tasks, plan_runs(methods, [12], 8), output, "lococo x", limit=4, **more
    )


def naive_reading(prompts):
    """Tokens that must be read if whatever begins a prompt and was read before is known."""
    known = set()
    for prompt in prompts:
        known |= {tuple(prompt[:end]) for end in range(1, len(prompt) + 1)}
    return len(known)


def lengths_read(model):
    """Tokens of each call of the model from now on."""
    read = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append((args or [kwargs.get("input_ids")])[0].shape[1]), with_kwargs=True
    )
    return read
