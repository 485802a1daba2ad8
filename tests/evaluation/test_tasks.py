"""Few-shot tasks: what is asked, what is read once, and that the scores are those of lm-eval."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from task_lines import LINES, arc, arc_of_the_hub, race, triviaqa, winogrande, words, write_rows
from tiny import tiny_llama
from words import WORDS, word_tokenizer

import lococo
from experiments.task_files.few_shot import write_task
from lococo.cli.main import main
from lococo.evaluation.few_shot import FewShotTask, Prompt, document_of, parse_task, read_tasks
from lococo.evaluation.harness import LoCoCoLM, PrefixLM
from lococo.evaluation.prefixes import KEPT, PrefixReader
from lococo.evaluation.tasks import evaluate_tasks
from lococo.methods import plan_runs
from lococo.metrics import mean_of_items_interval
from lococo.results.journal import Journal

CONFIG = lococo.LoCoCoConfig(12, block_size=8, kernel_size=5, gate_init=0.3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder of task files."""
    folder = tmp_path_factory.mktemp("data")
    for name, (line, scored, examples) in LINES.items():
        (folder / name).mkdir()
        write_rows(folder / name / scored, [line(index) for index in range(6 if examples else 10)])
        if examples:
            write_rows(folder / name / examples, [line(index) for index in range(20, 26)])
    (folder / "tasks").mkdir()
    for name in (*LINES, "race_questions"):
        write_task(name, folder, folder / "tasks", shots=4)
    return folder / "tasks"


def few_shot(name, shots, data, seed=0):
    (task,) = read_tasks([f"{name}:{shots}"], data, seed)
    return task


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "<s>"  # lm-eval ends an answer there
    return tokenizer


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


# Scores


@pytest.mark.parametrize("name", [name for name in LINES if name != "triviaqa"])
@pytest.mark.parametrize("model", [tiny_llama, open_model], ids=["full", "patched"])
def test_scores_with_shared_beginnings_are_those_of_lm_eval(data, tokenizer, name, model):
    ours, theirs = PrefixLM(model(), tokenizer=tokenizer), HFLM(model(), tokenizer=tokenizer, backend="causal")
    requests = requests_of(data, name, 6, ours)
    assert min(len(ours.tok_encode(request.args[0])) for request in requests) > CONFIG.capacity
    assert_same(ours.loglikelihood(copies(requests)), theirs.loglikelihood(copies(requests)))
    assert ours.reader.tokens_read < tokens_of(requests, ours) / 2


def tokens_of(requests, lm):
    """Tokens of the different prompts."""
    return sum(len(lm.tok_encode(prompt)) for prompt in {request.args[0] for request in requests})


def test_enough_slots_score_as_the_model_without_any(data, tokenizer):
    ours = LoCoCoLM(tiny_llama(), tokenizer=tokenizer, num_slots=256, block_size=8)
    theirs = HFLM(tiny_llama(), tokenizer=tokenizer, backend="causal")
    for name in ("arc_easy", "winogrande"):
        requests = requests_of(data, name, 4, ours)
        assert_same(ours.loglikelihood(copies(requests)), theirs.loglikelihood(copies(requests)))
    requests = short_answers(requests_of(data, "triviaqa", 4, ours))
    assert ours.generate_until(copies(requests)) == theirs.generate_until(copies(requests))


def test_few_slots_score_otherwise(data, tokenizer):
    ours = PrefixLM(open_model(), tokenizer=tokenizer)
    theirs = HFLM(tiny_llama(), tokenizer=tokenizer, backend="causal")
    requests = requests_of(data, "arc_easy", 4, ours)
    pairs = zip(ours.loglikelihood(copies(requests)), theirs.loglikelihood(copies(requests)), strict=True)
    assert max(abs(one - other) for (one, _), (other, _) in pairs) > 0.1


@pytest.mark.parametrize("model", [tiny_llama, open_model], ids=["full", "patched"])
def test_answers_with_shared_beginnings_are_those_of_lm_eval(data, tokenizer, model):
    ours, theirs = PrefixLM(model(), tokenizer=tokenizer), HFLM(model(), tokenizer=tokenizer, backend="causal")
    requests = short_answers(requests_of(data, "triviaqa", 4, ours))
    answers = ours.generate_until(copies(requests))
    assert answers == theirs.generate_until(copies(requests))
    assert len(set(answers)) > 1
    assert ours.reader.tokens_read < tokens_of(requests, ours) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", [tiny_llama, open_model], ids=["full", "patched"])
def test_answers_in_padded_batches_are_those_of_one_prompt_at_a_time(tokenizer, model, dtype):
    prompts = [words(*range(start, start * 7 + length)) for start, length in ((1, 20), (3, 55), (2, 33), (5, 4))]
    settings = {"until": [WORDS[5], "\n"], "max_gen_toks": 20, "do_sample": False}
    asked = [Instance("generate_until", {}, (prompt, settings), 0) for prompt in prompts]
    alone = PrefixLM(model().to(dtype), tokenizer=tokenizer).generate_until(copies(asked))
    together = PrefixLM(model().to(dtype), tokenizer=tokenizer, batch_size=3)
    assert together.generate_until(copies(asked)) == alone
    assert len(set(alone)) > 1
    assert together.reader.tokens_read == tokens_of(asked, together)


def test_answers_end_at_the_stop_strings_of_the_task(tokenizer):
    model = tiny_llama()
    lm, prompt = PrefixLM(model, tokenizer=tokenizer), words(*range(9))
    settings = {"until": ["\n"], "max_gen_toks": 30, "do_sample": False}
    (whole,) = lm.generate_until([Instance("generate_until", {}, (prompt, settings), 0)])
    stop = whole.split()[4]
    first = whole.split().index(stop)
    read = lengths_read(model)
    (cut,) = lm.generate_until([Instance("generate_until", {}, (prompt, settings | {"until": [stop]}), 0)])
    assert cut.split() == whole.split()[:first]
    assert read.count(1) <= first + 2


def test_rolling_likelihoods_are_those_of_lm_eval(tokenizer):
    ours, theirs = PrefixLM(open_model(), tokenizer=tokenizer), HFLM(open_model(), tokenizer=tokenizer)
    asked = [Instance("loglikelihood_rolling", {}, (words(*range(0, 300, step)),), 0) for step in (3, 7)]
    assert ours.loglikelihood_rolling(asked) == pytest.approx(theirs.loglikelihood_rolling(asked), abs=1e-3)


def lengths_read(model):
    """Tokens of each call of the model from now on."""
    read = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append((args or [kwargs.get("input_ids")])[0].shape[1]), with_kwargs=True
    )
    return read


def test_examples_before_every_question_are_read_once():
    model = tiny_llama()
    read, reader = lengths_read(model), PrefixReader(model)
    examples = [1 + index * index % 60 for index in range(50)]
    prompts = [[*examples, 10 + question, 5, 6] for question in range(4)]
    reader.expect(prompt[:-1] for prompt in prompts)
    for prompt in prompts:
        reader.score(prompt, [[7, 8], [9]])
        assert list(map(len, reader.kept)) == ([50] if prompt is not prompts[-1] else [])
    assert read == [50, *4 * [2, 2]]
    assert reader.tokens_read == 50 + 4 * 3


def naive_reading(prompts):
    """Tokens that must be read if whatever begins a prompt and was read before is known."""
    known = set()
    for prompt in prompts:
        known |= {tuple(prompt[:end]) for end in range(1, len(prompt) + 1)}
    return len(known)


def test_examples_documents_and_questions_are_each_read_once():
    """Documents after common examples, questions about each of them, and prompts of other examples."""
    number = iter(range(10**6))

    def text(length):
        return [1 + next(number) ** 2 % 61 for _ in range(length)]

    examples, prompts = text(40), []
    for _ in range(3):
        document = examples + text(40)
        prompts += [document + [question] + text(5) for question in (1, 2, 3)]
    prompts += [text(40) for _ in range(2)]
    prompts.sort()
    model = tiny_llama()
    plain, reader = PrefixReader(model), PrefixReader(model)
    reader.expect(prompts)
    for prompt in prompts:
        expected, cache = plain.read(prompt), reader.read(prompt)
        for one, other in zip(cache.layers, expected.layers, strict=True):
            torch.testing.assert_close(one.keys, other.keys)
            torch.testing.assert_close(one.values, other.values)
    assert plain.tokens_read == sum(map(len, prompts))
    assert naive_reading(prompts) <= reader.tokens_read <= naive_reading(prompts) + 32 * len(prompts)
    assert reader.tokens_read < plain.tokens_read / 2
    assert not reader.kept


@pytest.mark.parametrize("seed", range(4))
def test_beginnings_within_beginnings_are_read_as_whole_prompts(seed):
    chosen = random.Random(seed)
    prompts = [[]]
    for _ in range(6):  # each goes on in one or two ways, some of them short
        prompts = [
            prompt + [1 + chosen.randrange(61) for _ in range(chosen.choice((3, 35, 50)))]
            for prompt in prompts
            for _ in range(chosen.choice((1, 2)))
        ]
    prompts.sort()
    model = open_model()
    plain, reader = PrefixReader(model), PrefixReader(model)
    reader.expect(prompts)
    continuations = [[5, 6], [7]]
    for prompt in prompts:
        assert_same(reader.score([*prompt, 4], continuations), plain.score([*prompt, 4], continuations), atol=1e-4)
        assert len(reader.kept) <= KEPT
    assert reader.tokens_read <= plain.tokens_read
    assert len(prompts) == 1 or reader.tokens_read < plain.tokens_read


# Prompts


def test_prompts_are_those_of_lm_eval_with_the_same_examples_before_every_question(data, tokenizer):
    task = few_shot("arc_easy", 2, data, seed=1)
    lm = PrefixLM(tiny_llama(), tokenizer=tokenizer)
    items = prompts_of(task, lm, limit=3)
    prompts = [item.requests[0].args[0] for item in items]
    examples = [text.rsplit("\n\n", 1)[0] for text in prompts]
    assert len(items) == 3 and len(set(examples)) == 1 and len(set(prompts)) == 3
    possible = [f"{arc(index)['query']} {arc(index)['choices'][index % 4]}" for index in range(20, 26)]
    assert all(example in possible for example in examples[0].split("\n\n"))
    assert [prompt.rsplit("\n\n", 1)[1] for prompt in prompts] == [arc(index)["query"] for index in range(3)]
    assert [request.args[1] for request in items[2].requests] == [f" {choice}" for choice in arc(2)["choices"]]
    others = few_shot("arc_easy", 2, data, seed=0)
    assert prompts_of(others, lm, limit=1)[0].requests[0].args[0] != prompts[0]


def test_more_shots_begin_with_the_examples_of_fewer(data, tokenizer):
    lm = PrefixLM(tiny_llama(), tokenizer=tokenizer)
    few, more = (prompts_of(few_shot("hellaswag", shots, data), lm)[0].requests[0].args[0] for shots in (2, 5))
    assert more.startswith(few.rsplit("\n\n", 1)[0])


def test_race_asks_the_last_question_of_an_article(data, tokenizer):
    item = prompts_of(few_shot("race", 1, data), PrefixLM(tiny_llama(), tokenizer=tokenizer))[0]
    question = item.requests[0].args[0].split("Article: ")[-1]
    first, last = race(0)["questions"]
    assert question == f"{race(0)['article']}\n\nQuestion: {first}\nAnswer: {arc(0)['choices'][1]}\n{last}"


def test_race_questions_asks_every_question_of_an_article_as_race_asks_its_last(data, tokenizer):
    lm = PrefixLM(tiny_llama(), tokenizer=tokenizer)
    last = prompts_of(few_shot("race", 1, data), lm)
    every = prompts_of(few_shot("race_questions", 1, data), lm)
    assert len(every) == 2 * len(last)
    assert [each.requests[0].args for each in every[1::2]] == [each.requests[0].args for each in last]
    article, _, question = every[0].requests[0].args[0].split("Article: ")[-1].partition("\n\n")
    assert (article, question) == (race(0)["article"], race(0)["questions"][0])
    assert document_of(every[0].question, 0) == document_of(every[1].question, 1)


def test_winogrande_reads_both_sentences_and_scores_what_follows(data, tokenizer):
    item = prompts_of(few_shot("winogrande", 1, data), PrefixLM(tiny_llama(), tokenizer=tokenizer))[0]
    sentence, options = winogrande(0)["sentence"], [winogrande(0)[name] for name in ("option1", "option2")]
    before, after = sentence.split("_")
    assert [request.args[0].split("\n\n")[1] for request in item.requests] == [before + each for each in options]
    assert {request.args[1] for request in item.requests} == {after}


def test_triviaqa_takes_its_examples_from_the_end_and_scores_the_rest(data, tokenizer):
    lm = PrefixLM(tiny_llama(), tokenizer=tokenizer)
    task = few_shot("triviaqa", 4, data)
    items = prompts_of(task, lm)
    assert [question["question"] for question in task.questions()] == [
        triviaqa(index)["question"] for index in range(6)
    ]
    assert all(triviaqa(index)["question"] in items[0].requests[0].args[0] for index in range(6, 10))


def test_prompts_that_are_too_long_lose_whole_examples(data, tokenizer):
    lm = PrefixLM(tiny_llama(), tokenizer=tokenizer)
    whole = prompts_of(few_shot("arc_easy", 6, data), lm)[0]
    assert whole.shots == 6
    longest = max(lm.tokens_read(request.args)[1] for request in whole.requests)
    exact = PrefixLM(tiny_llama(), tokenizer=tokenizer, max_length=longest)
    assert prompts_of(few_shot("arc_easy", 6, data), exact)[0].requests[0].args == whole.requests[0].args
    shorter = PrefixLM(tiny_llama(), tokenizer=tokenizer, max_length=longest - 1)
    cut = prompts_of(few_shot("arc_easy", 6, data), shorter)[0]
    parts = whole.requests[0].args[0].split("\n\n")
    assert cut.shots == 5
    assert cut.requests[0].args[0].split("\n\n") == [*parts[:5], parts[-1]]
    assert cut.tokens == len(tokenizer(cut.requests[0].args[0]).input_ids)
    with pytest.raises(ValueError, match=r"arc_easy: a question alone has \d+ tokens, more than the 5"):
        prompts_of(few_shot("arc_easy", 6, data), PrefixLM(tiny_llama(), tokenizer=tokenizer, max_length=5))[0]


@pytest.mark.parametrize("model", [tiny_llama, open_model], ids=["full", "patched"])
def test_the_middle_of_long_prompts_is_left_out_if_allowed(data, tokenizer, model):
    cut = PrefixLM(model(), tokenizer=tokenizer, max_length=40, truncate="middle")
    whole = PrefixLM(model(), tokenizer=tokenizer)
    ids = cut.tok_encode(words(*range(60)))
    answers = [cut.tok_encode(words(*numbers)) for numbers in ((1, 2), (5,))]
    kept = [*ids[:20], *ids[-19:]]
    asked = [(("", ""), ids, answer) for answer in answers]
    expected = whole._loglikelihood_tokens([(("", ""), kept, answer) for answer in answers])
    assert_same(cut._loglikelihood_tokens(asked), expected)
    settings = {"until": ["\n"], "max_gen_toks": 10, "do_sample": False}
    (answer,) = cut.generate_until([Instance("generate_until", {}, (words(*range(60)), settings), 0)])
    kept = tokenizer.decode([*ids[:15], *ids[-15:]])
    assert len(cut.tok_encode(kept)) == 30
    assert [answer] == whole.generate_until([Instance("generate_until", {}, (kept, settings), 0)])
    question = few_shot("arc_easy", 6, data).prompt(
        PrefixLM(tiny_llama(), tokenizer=tokenizer, max_length=5, truncate="middle"), arc_of_the_hub(0)
    )
    assert (question.shots, question.tokens) == (0, 5)
    with pytest.raises(ValueError, match="truncate must be middle, or not given, got 'left'"):
        PrefixLM(tiny_llama(), tokenizer=tokenizer, truncate="left")


def test_prompts_in_a_chat_template(data, tokenizer):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "w0 {{ messages[0].content }} w60"
    (task,) = read_tasks(["arc_easy:2"], data, chat=True)
    lm = PrefixLM(tiny_llama(), tokenizer=tokenizer)
    prompt = prompts_of(task, lm, limit=1)[0].requests[0].args[0]
    plain = prompts_of(few_shot("arc_easy", 2, data), lm, limit=1)[0].requests[0].args[0]
    assert prompt == f"w0 {plain} w60"


def test_lm_eval_itself_is_told_of_prompts_that_are_too_long(data, tokenizer):
    requests = requests_of(data, "arc_easy", 4, PrefixLM(tiny_llama(), tokenizer=tokenizer))
    with pytest.raises(ValueError, match=r"have \d+ tokens, max_length is 30"):
        PrefixLM(tiny_llama(), tokenizer=tokenizer, max_length=30).loglikelihood(copies(requests))
    asked = [Instance("generate_until", {}, (words(*range(10)), {"until": ["\n"]}), 0)]
    with pytest.raises(ValueError, match="have 266 tokens, max_length is 265"):
        PrefixLM(tiny_llama(), tokenizer=tokenizer, max_length=265).generate_until(asked)


# Results


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


def test_table_holds_what_it_says(data, tokenizer, tmp_path):
    rows = run(data, tokenizer, tmp_path / "out" / "tasks", seed=0)
    content = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert content["rows"] == rows and content["command"] == "lococo x"
    assert (content["seed"], content["max_length"]) == (0, 2048)
    metrics = {"arc_easy": ["acc", "acc_norm"], "winogrande": ["acc"], "triviaqa": ["exact_match"]}
    assert [(row["task"], row["method"], row["metric"]) for row in rows] == [
        (task, method, metric) for task in metrics for method in ("full", "h2o") for metric in metrics[task]
    ]
    assert rows[1].keys() == rows[0].keys()
    lm = HFLM(tiny_llama(), tokenizer=tokenizer)
    right, tokens = 0, 0
    prompts = prompts_of(few_shot("arc_easy", 2, data), PrefixLM(tiny_llama(), tokenizer=tokenizer), limit=4)
    for index, item in enumerate(prompts):
        scores = [score for score, _ in lm.loglikelihood(copies(item.requests))]
        right += scores.index(max(scores)) == index % 4
        tokens += len(tokenizer(item.requests[0].args[0]).input_ids)
    full = rows[0]
    assert (full["score"], full["prompt_tokens"], full["items"]) == (right / 4, tokens / 4, 4)
    assert full["stderr"] == pytest.approx((right / 4 * (1 - right / 4) / 3) ** 0.5)
    assert (rows[2]["num_slots"], rows[2]["block_size"], rows[2]["shots_that_fit"]) == (12, 8, 2)
    assert (full["filter"], full["documents"]) == ("none", 4)
    assert (tmp_path / "out" / "tasks.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "tasks.md").read_text().count("\n") == len(rows) + 4


def test_tokens_read_are_told_against_those_of_the_prompts(data, tokenizer, tmp_path):
    row, *_ = run(data, tokenizer, tmp_path / "tasks", ["arc_easy:6"])
    lm = PrefixLM(tiny_llama(), tokenizer=tokenizer)
    prompts = [lm.tok_encode(each.requests[0].args[0]) for each in prompts_of(few_shot("arc_easy", 6, data), lm, 4)]
    assert row["prompt_tokens"] == sum(map(len, prompts)) / 4
    assert naive_reading(prompts) <= 4 * row["read_tokens"] < naive_reading(prompts) + 10 < 4 * row["prompt_tokens"]


def test_rows_of_lengths_are_over_their_own_items(tmp_path, tokenizer):
    (tmp_path / "generator.py").write_text(GENERATOR)
    (tmp_path / "made.yaml").write_text(GENERATED)
    lengths = {"max_seq_lengths": [40, 40, 90]}
    tasks = read_tasks(["made"], tmp_path, metadata=lengths, load_tokenizer=lambda: tokenizer)
    runs = plan_runs(["full", "h2o"], [12], 8)
    rows = evaluate_tasks(tiny_llama(), tokenizer, tasks, runs, tmp_path / "x", "x")
    assert [(row["metric"], row["items"], row["prompt_tokens"]) for row in rows] == 2 * [("40", 2, 41), ("90", 1, 91)]
    assert {row["difference"] for row in rows[2:]} <= {-1, -0.5, 0, 0.5, 1}
    assert [row["difference_low"] is None for row in rows] == [True, True, True, True]
    assert rows[0]["bytes_per_head"] < rows[1]["bytes_per_head"]
    assert rows[2]["bytes_per_head"] == rows[3]["bytes_per_head"]


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 9, 40])
def test_killed_run_goes_on_where_it_stopped(data, tokenizer, tmp_path, monkeypatch, stop_after):
    expected = run(data, tokenizer, tmp_path / "whole", seed=0)
    add, calls = Journal.add, []

    def counted(journal, key, *measured):
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(key)
        add(journal, key, *measured)

    monkeypatch.setattr(Journal, "add", counted)
    with pytest.raises(KeyboardInterrupt):
        run(data, tokenizer, tmp_path / "cut", seed=0)
    assert not (tmp_path / "cut.json").exists()
    again = []
    monkeypatch.setattr(Journal, "add", lambda *args: again.append(args[1]) or add(*args))
    found = run(data, tokenizer, tmp_path / "cut", seed=0)
    varying = {"read_tokens"}  # what was shared is read again
    assert [{key: row[key] for key in row if key not in varying} for row in found] == [
        {key: row[key] for key in row if key not in varying} for row in expected
    ]
    assert len(calls) + len(again) == 2 * 4 * (4 + 2 + 1)
    assert len({json.dumps(key) for key in (*calls, *again)}) == len(calls) + len(again)
    assert not (tmp_path / "cut.partial.jsonl").exists()


@pytest.mark.parametrize("change", ["name", "dtype", "revision", "slots", "nothing"])
def test_answers_of_another_model_or_task_are_not_gone_on_with(data, tokenizer, tmp_path, monkeypatch, change):
    monkeypatch.setattr(Journal, "finish", lambda journal: None)
    model, tasks, slots = tiny_llama(), read_tasks(["arc_easy:1"], data), 12
    for attempt in range(2):
        if attempt:
            model.config._name_or_path = "other" if change == "name" else model.config._name_or_path
            model.name_or_path = model.config._name_or_path
            model = model.double() if change == "dtype" else model
            tasks[0].task.VERSION = "other" if change == "revision" else tasks[0].task.VERSION
            slots = 13 if change == "slots" else 12
        read = lengths_read(model)
        evaluate_tasks(model, tokenizer, tasks, plan_runs(["h2o"], [slots], 8), tmp_path / "x", "x", limit=2)
    assert (len(read) > 2) is (change != "nothing")  # a token for the size of the cache


def test_right_answers_score_one(data, tokenizer):
    lm = PrefixLM(tiny_llama(), tokenizer=tokenizer)
    for name in LINES:
        task = few_shot(name, 2, data)
        prompts = prompts_of(task, lm)
        for wrong in (0, 1):
            answers = []
            for index, prompt in enumerate(prompts):
                gold = {"race": 3, "triviaqa": 0, "winogrande": index % 2}.get(name, index % 4)
                chosen = (gold + wrong) % len(prompt.requests)
                scores = [(-float(20 * (place != chosen)), False) for place in range(len(prompt.requests))]
                text = words(5, 6) if wrong else f" {words(3 * index).upper()}"
                answers += [text] if name == "triviaqa" else scores
            for (metric, filtered), figures in task.figures(prompts, answers).items():
                assert list(figures) == list(range(len(prompts)))
                assert task.score(metric, list(figures.values()))[0] == 1 - wrong, (name, metric, filtered)


def test_metrics_and_errors_are_those_of_lm_eval(data, tokenizer):
    """All metrics of tasks with as many examples as their definitions say, against lm-eval's own evaluation."""
    import lm_eval

    names = ["arc_easy", "hellaswag", "winogrande"]
    manager = lm_eval.tasks.TaskManager(include_path=str(data), include_defaults=False)
    theirs = lm_eval.evaluate(
        lm=HFLM(tiny_llama(), tokenizer=tokenizer, backend="causal"), task_dict=manager.load(names), bootstrap_iters=2
    )
    tasks = read_tasks(names, data)
    assert [task.shots for task in tasks] == [0, 0, 0]
    lm = PrefixLM(tiny_llama(), tokenizer=tokenizer)
    for task in tasks:
        prompts = prompts_of(task, lm)
        answers = lm.loglikelihood([request for prompt in prompts for request in prompt.requests])
        found = task.figures(prompts, answers)
        assert {metric for metric, _ in found} == set(task.task.aggregation())
        for (metric, filtered), figures in found.items():
            score, error = task.score(metric, list(figures.values()))
            expected = theirs["results"][task.name]
            assert score == pytest.approx(expected[f"{metric},{filtered}"])
            assert error == pytest.approx(expected[f"{metric}_stderr,{filtered}"])


# Differences to the full cache


def naive_interval(values, documents):
    """Every resample drawn, put together from whole documents and averaged on its own."""
    names = list(dict.fromkeys(documents))
    rng, means = np.random.default_rng(0), []
    for counts in rng.multinomial(len(names), [1 / len(names)] * len(names), size=2000):
        drawn = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
        items = [value for name in drawn for value, own in zip(values, documents, strict=True) if own == name]
        means.append(sum(items) / len(items))
    return [np.percentile(means, 2.5), np.percentile(means, 97.5)]


@settings(max_examples=8)
@given(st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 5)), min_size=1, max_size=12))
def test_intervals_are_those_of_a_naive_bootstrap_over_documents(items):
    values, documents = zip(*items, strict=True)
    found = mean_of_items_interval(values, documents)
    if len(set(documents)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(naive_interval(values, documents), abs=1e-9)


def test_questions_about_one_document_make_wider_intervals_than_about_many():
    values = [1.0] * 8 + [-1.0] * 8
    (low, high), (one, other) = (
        mean_of_items_interval(values, documents) for documents in (range(16), [0] * 8 + [1] * 8)
    )
    assert one < low < high < other


def test_differences_are_those_of_the_same_items(data, tokenizer, tmp_path):
    rows = run(data, tokenizer, tmp_path / "x", ["arc_easy:1", "race:1"], ["full", "h2o", "streaming"])
    (task,) = read_tasks(["arc_easy:1"], data)
    figures = {}
    for one in plan_runs(["full", "h2o"], [12], 8):
        model = tiny_llama()
        with one.applied(model):
            lm = PrefixLM(model, tokenizer=tokenizer)
            prompts = prompts_of(task, lm, 4)
            answers = lm.loglikelihood([request for prompt in prompts for request in prompt.requests])
            figures[one.name] = task.figures(prompts, answers)["acc_norm", "none"]
    expected = [figures["h2o"][number] - figures["full"][number] for number in range(4)]
    full, h2o = (row for row in rows if row["metric"] == "acc_norm" and row["method"] in ("full", "h2o"))
    assert h2o["difference"] == pytest.approx(sum(expected) / 4) == pytest.approx(h2o["score"] - full["score"])
    assert [h2o["difference_low"], h2o["difference_high"]] == pytest.approx(naive_interval(expected, range(4)))
    assert full["difference"] is full["difference_low"] is full["difference_high"] is None
    alone = run(data, tokenizer, tmp_path / "y", ["arc_easy:1"], ["h2o"])
    assert {row["difference"] for row in alone} == {None}


def test_documents_are_told_apart_by_what_a_question_is_about(data):
    questions = [{"context": "a", "question": "1"}, {"context": "a", "question": "2"}, {"document_id": 7}, {}, {}]
    found = [document_of(question, number) for number, question in enumerate(questions)]
    assert found[0] == found[1] and len(set(found)) == 4


def test_command_measures_with_heads(data, checkpoint, tmp_path, capsys):
    lococo.save_heads(open_model(), tmp_path / "heads")
    status = main(
        ["eval", "tasks", "--model", str(checkpoint), "--include-path", str(data), "--tasks", "hellaswag:3", "race:2"]
        + ["--methods", "full", "--heads", str(tmp_path / "heads"), "--block-size", "8", "--limit", "3"]
        + ["--output", str(tmp_path / "tasks")]
    )
    assert status == 0
    content = json.loads((tmp_path / "tasks.json").read_text())
    assert content["command"].startswith("lococo eval tasks --model ")
    found = dict.fromkeys((row["task"], row["method"], row["items"]) for row in content["rows"])
    assert list(found) == [(task, method, 3) for task in ("hellaswag", "race") for method in ("full", "lococo")]
    assert capsys.readouterr().out.count("\n") >= 6


# What is wrong is said before the model is loaded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "arc_eazy:3"], "unknown task 'arc_eazy': lm-eval has arc_easy"),
        (["--tasks", "arc_easy:"], "a task is NAME or NAME:SHOTS, arc_easy:4 for instance, got 'arc_easy:'"),
        (["--tasks", ":4"], "got ':4'"),
        (["--tasks", "arc_easy", "--metadata", "{4096"], "--metadata must be a JSON object"),
        (["--tasks", "arc_easy", "--metadata", "[4096]"], "got '[4096]'"),
        (["--tasks", "arc_easy", "--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["--tasks", "arc_easy:-1"], "got 'arc_easy:-1'"),
        (["--tasks", "arc_easy:7"], "arc_easy: 7 shots need as many examples, there are 6"),
        (["--tasks", "arc_easy:2", "--include-path", "nowhere"], "--include-path nowhere: no such folder"),
        (["--tasks", "arc_easy:2", "--limit", "0"], "Invalid value for '--limit'"),
        (["--tasks", "arc_easy:2", "--methods", "h20"], "unknown method 'h20'"),
        (["--tasks", "arc_easy:2", "--heads", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_one_line(data, checkpoint, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("lococo.loading.load_model", lambda *names, **options: pytest.fail("the model was loaded"))
    assert main(["eval", "tasks", "--model", str(checkpoint), "--include-path", str(data), *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lococo: ")]
    assert len(errors) == 1 and message in errors[0]


def test_without_files_and_hub_the_way_out_is_named(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(OSError, match="race cannot be had from the Hub; task files of local data: --include-path"):
        read_tasks(["race:2"])


def test_names_and_shots():
    names = ("race:2", "triviaqa:0", "niah_single_1")
    assert [parse_task(each) for each in names] == [("race", 2), ("triviaqa", 0), ("niah_single_1", None)]


@pytest.mark.parametrize("kind", ["group", "tag"])
def test_groups_and_tags_are_all_of_their_tasks(data, tmp_path, kind):
    names = ["arc_easy", "winogrande"]
    for file in data.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    if kind == "group":
        (tmp_path / "both.yaml").write_text(json.dumps({"group": "both", "task": names}))
    else:
        for name in names:
            content = {**json.loads((data / f"{name}.yaml").read_text()), "tag": ["both"]}
            (tmp_path / f"{name}.yaml").write_text(json.dumps(content))
    found = [(task.name, task.shots) for task in read_tasks(["both:3"], tmp_path)]
    assert sorted(found) == [("arc_easy", 3), ("winogrande", 3)]


class Pairs:
    """A task whose figures are pairs, which its aggregation makes a score of, and RULER's lengths."""

    OUTPUT_TYPE, task_name, VERSION = "generate_until", "pairs", 1

    def set_fewshot_seed(self, seed):
        pass

    def get_config(self, name):
        return None

    def apply_filters(self):
        for request in self._instances:
            request.filtered_resps = {"first": request.resps[0]}

    def process_results(self, question, answers):
        return {"rouge": (answers[0], question["right"]), "4096": -1.0, "1024": 0.5, "acc": -1}

    def aggregation(self):
        return {"rouge": lambda pairs: sum(one == other for one, other in pairs) / len(pairs)}


def test_figures_that_are_no_numbers_are_scored_by_the_task():
    task = FewShotTask(Pairs())
    prompts = [Prompt({"right": "a"}, [Instance("generate_until", {}, ("x", {}), 0)], 0, 1) for _ in range(2)]
    figures = task.figures(prompts, ["a", "b"])
    assert figures == {
        ("rouge", "first"): {0: ("a", "a"), 1: ("b", "a")},
        ("1024", "first"): {0: 0.5, 1: 0.5},
        ("acc", "first"): {0: -1, 1: -1},
    }
    assert task.score("rouge", list(figures["rouge", "first"].values())) == (0.5, None)
    assert task.score("1024", [0.5, 0.5]) == (0.5, 0)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("OUTPUT_TYPE", "loglikelihood_rolling", "pairs measures the perplexity of texts"),
        ("MULTIMODAL", True, "pairs asks about pictures or sounds"),
        ("UNSAFE_CODE", True, "pairs runs code that the model writes"),
    ],
)
def test_tasks_that_ask_for_more_than_a_language_model_are_refused(monkeypatch, attribute, value, message):
    monkeypatch.setattr(Pairs, attribute, value, raising=False)
    with pytest.raises(ValueError, match=message):
        FewShotTask(Pairs())


def test_examples_that_a_task_names_stay_in_its_order(tmp_path):
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, [{"input": words(index), "target": words(index + 1)} for index in range(3)])
    samples = [{"input": words(place), "target": words(place)} for place in (9, 4, 7)]
    content = {"task": "named", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}}
    content |= {"test_split": "test", "output_type": "generate_until", "num_fewshot": 2, "doc_to_text": "{{input}}"}
    content |= {"doc_to_target": "{{target}}", "fewshot_config": {"sampler": "first_n", "samples": samples}}
    (tmp_path / "named.yaml").write_text(json.dumps(content))
    (task,) = read_tasks(["named"], tmp_path, seed=5)
    assert task.shots == 2
    prompt = prompts_of(task, PrefixLM(tiny_llama(), tokenizer=word_tokenizer()), 1)[0].requests[0].args[0]
    assert prompt == f"{words(9)} {words(9)}\n\n{words(4)} {words(4)}\n\n{words(0)}"


def test_tasks_that_generate_their_data_are_told_lengths_and_tokenizer(tmp_path, tokenizer):
    (tmp_path / "generator.py").write_text(GENERATOR)
    (tmp_path / "made.yaml").write_text(GENERATED)

    def questions(seed, lengths):
        (task,) = read_tasks(
            ["made"], tmp_path, seed, metadata={"max_seq_lengths": lengths}, load_tokenizer=lambda: tokenizer
        )
        assert task.revision == "3"
        return task, task.questions()

    task, first = questions(0, [5, 6])
    assert [question["max_length"] for question in first] == [5, 6]
    assert first[0]["ids"] == tokenizer("w1 w2 w3").input_ids
    assert first == questions(0, [5, 6])[1]
    assert first[0]["drawn"] != questions(1, [5, 6])[1][0]["drawn"]
    prompt = prompts_of(task, PrefixLM(tiny_llama(), tokenizer=tokenizer), 1)[0]
    assert prompt.requests[0].args[0] == "w1 w1 w1 w1 w1 w5"


# lm-eval's own command


def test_registered_in_lm_eval_under_its_name(checkpoint):
    lm = get_model("lococo").create_from_arg_string(
        f"pretrained={checkpoint},method=h2o,num_slots=12,block_size=8", {"batch_size": 1, "device": "cpu"}
    )
    assert lococo.is_patched(lm.model)
    assert lm.model.model.lococo_patch.config == lococo.LoCoCoConfig.h2o(12, block_size=8)


def test_registered_model_takes_heads_and_refuses_unknown_methods(tokenizer, tmp_path):
    lococo.save_heads(open_model(), tmp_path / "heads")
    lm = LoCoCoLM(tiny_llama(), tokenizer=tokenizer, heads=str(tmp_path / "heads"))
    assert lm.model.model.lococo_patch.config == CONFIG
    assert not lococo.is_patched(LoCoCoLM(tiny_llama(), tokenizer=tokenizer, method="full").model)
    with pytest.raises(ValueError, match="unknown method 'h20'"):
        LoCoCoLM("nowhere", method="h20")


@pytest.mark.slow
def test_lm_evals_own_command_scores_as_ours(data, checkpoint, tokenizer, tmp_path):
    given = ["run", "--model", "lococo", "--tasks", "hellaswag", "--limit", "4", "--include_path", str(data)]
    given += ["--model_args", f"pretrained={checkpoint},method=h2o,num_slots=12,block_size=8", "--device", "cpu"]
    command = [sys.executable, "-m", "lococo.evaluation.harness", *given, "--output_path", str(tmp_path / "theirs")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "theirs").glob("**/results_*.json")
    theirs = json.loads(file.read_text())["results"]["hellaswag"]
    ours = run(data, tokenizer, tmp_path / "ours", ["hellaswag"], ["h2o"])
    assert [theirs[f"{row['metric']},none"] for row in ours] == [row["score"] for row in ours]
    assert len(ours) == 2


BLOCKED = """
import sys
import lococo, lococo.cli.main, lococo.evaluation.tasks
assert "lm_eval" not in sys.modules
sys.modules["lm_eval"] = None
sys.exit(lococo.cli.main.main(["eval", "tasks", "--model", "x"]))
"""


@pytest.mark.slow
def test_a_missing_lm_eval_is_named_and_importing_needs_none():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 2
    assert "pip install lococo[eval]" in done.stderr.splitlines()[-1]
