"""lm-eval's model that reads what prompts share once: its scores and answers are those of lm-eval."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from asking import (
    CONFIG,
    assert_same,
    copies,
    lengths_read,
    naive_reading,
    open_model,
    requests_of,
    run,
    short_answers,
)
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from task_lines import LINES, words
from tiny import tiny_llama
from words import WORDS

import lococo
from lococo.evaluation.harness import LoCoCoLM, PrefixLM
from lococo.evaluation.prefixes import KEPT, PrefixReader

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


ROPES = {
    "longrope": {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 4.0, 16.0, 48.0]},
    "dynamic": {},
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("is_patched", [False, True], ids=["full", "patched"])
def test_texts_whose_length_changes_their_beginning_are_read_whole(tokenizer, rope, is_patched):
    """Prompts that begin alike, on both sides of the window for which rotary tables change."""
    window = {"original_max_position_embeddings": 48} if rope == "longrope" else {}
    scaling = {"rope_type": rope, "factor": 4.0, "rope_theta": 10000.0, **ROPES[rope], **window}
    prompts = [words(*range(1, 40), *range(50, 50 + more)) for more in (3, 8, 9, 30)]

    def model():
        made = tiny_llama(rope_scaling=scaling, max_position_embeddings=48)
        return lococo.patch_model(made, CONFIG) if is_patched else made

    ours = PrefixLM(model(), tokenizer=tokenizer, max_length=128)
    theirs = HFLM(model(), tokenizer=tokenizer, backend="causal", max_length=128)
    pairs = [(prompt, " " + words(end, end + 1)) for prompt in prompts for end in (5, 9)]
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    # One at a time, the longest last: a "dynamic" table stays as large as it was made for a text before.
    expected = [theirs.loglikelihood([each])[0] for each in copies(asked)]
    assert_same(ours.loglikelihood(copies(asked)), expected)
    asked = short_answers([Instance("generate_until", {}, (prompt, {}), 0) for prompt in prompts])
    expected = [theirs.generate_until([each])[0] for each in copies(asked)]
    assert ours.generate_until(copies(asked)) == expected
    assert ours.reader.tokens_read == sum(3 * len(tokenizer(prompt).input_ids) for prompt in prompts)


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
