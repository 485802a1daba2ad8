"""Tasks of other kinds than the few-shot ones: empty prompts, scores that are no means, lower is better, repeats."""

import json
import math

import pytest
from lm_eval.models.huggingface import HFLM
from tiny import tiny_llama
from words import WORDS

from lococo.evaluation.few_shot import read_tasks
from lococo.evaluation.tasks import _name_of, evaluate_tasks
from lococo.methods import plan_runs

CHOICES = """
output_type: multiple_choice
doc_to_choice: "{{[one, other]}}"
doc_to_target: label
"""
ANSWERS = """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{one}}"
generation_kwargs: {until: ["w3", "w7 w9"], max_gen_toks: 6, do_sample: false}
"""
KINDS = {
    "pairs": CHOICES + 'doc_to_text: ""',
    "unconditional": CHOICES + 'doc_to_text: "{{text}}"\nmetric_list: [{metric: acc}, {metric: acc_mutual_info}]',
    "classes": CHOICES
    + 'doc_to_text: "{{text}}"\nmetric_list: [{metric: acc}, {metric: mcc}, {metric: f1, aggregation: f1}]',
    "last_word": """
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: " {{one}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "answers": ANSWERS + "metric_list: [{metric: exact_match}, {metric: ter}]",
    "repeated": ANSWERS + "repeats: 4",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files of every kind, of one file of questions."""
    folder = tmp_path_factory.mktemp("kinds")
    rows = [
        {
            "text": " ".join(WORDS[(index * place) % 61] for place in range(1, 30)),
            "one": f"{WORDS[index]} {WORDS[index + 9]}",
            "other": WORDS[3 * index],
            "label": index % 2,
        }
        for index in range(8)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = json.dumps({"test": str(folder / "rows.jsonl")})
    for name, kind in KINDS.items():
        own = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {files}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"{own}metadata: {{version: 1}}\n{kind}\n")
    return folder


def rows_of(name, folder, tokenizer, output):
    tasks, runs = read_tasks([name], folder), plan_runs(["full", "h2o"], [12], 8)
    rows = evaluate_tasks(tiny_llama(), tokenizer, tasks, runs, output / name, "x")
    return {(row["method"], row["metric"]): row for row in rows}


@pytest.mark.parametrize("name", [name for name in KINDS if name != "repeated"])
def test_scores_are_those_of_lm_eval(name, folder, tokenizer, tmp_path):
    import lm_eval

    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    lm = HFLM(tiny_llama(), tokenizer=tokenizer, backend="causal")
    theirs = lm_eval.evaluate(lm=lm, task_dict=manager.load([name]), bootstrap_iters=2)["results"][name]
    rows = rows_of(name, folder, tokenizer, tmp_path)
    expected = {key.split(",")[0] for key in theirs if "," in key and "_stderr" not in key}
    assert {metric for _, metric in rows} == expected
    for metric in expected:
        row = rows["full", metric]
        assert row["score"] == pytest.approx(theirs[f"{metric},none"], rel=1e-5), metric
        if row["stderr"] is not None:
            assert row["stderr"] == pytest.approx(theirs[f"{metric}_stderr,none"]), metric


def test_a_score_that_is_no_mean_of_items_is_compared_as_it_is(folder, tokenizer, tmp_path):
    rows = rows_of("last_word", folder, tokenizer, tmp_path)
    full, h2o = rows["full", "perplexity"], rows["h2o", "perplexity"]
    assert h2o["score"] > 1 and abs(math.log(h2o["score"] / full["score"])) > 0.01, "H2O loses something here"
    assert h2o["difference"] == pytest.approx(h2o["score"] - full["score"])
    assert h2o["difference_low"] is h2o["difference_high"] is h2o["stderr"] is full["stderr"] is None
    assert rows["h2o", "acc"]["difference_low"] is not None
    pairs = rows_of("classes", folder, tokenizer, tmp_path)
    for metric in ("mcc", "f1"):
        there, here = pairs["full", metric], pairs["h2o", metric]
        assert here["difference"] == pytest.approx(here["score"] - there["score"]), metric


def test_a_metric_that_is_better_lower_says_so(folder, tokenizer, tmp_path):
    rows = rows_of("last_word", folder, tokenizer, tmp_path)
    assert {metric: row["better"] for (_, metric), row in rows.items()} == {"perplexity": "lower", "acc": "higher"}
    assert _name_of(rows["h2o", "perplexity"]) == "last_word 0 perplexity (lower is better)"
    assert _name_of(rows["h2o", "acc"]) == "last_word 0 acc"


def test_a_task_that_asks_again_and_again_is_refused(folder):
    with pytest.raises(ValueError, match="repeated is answered 4 times by chance: here every question is asked once"):
        read_tasks(["repeated"], folder)
