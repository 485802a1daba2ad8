"""Tables of tasks: what they hold, differences to the full cache, killed runs."""

import json

import numpy as np
import pytest
from asking import (
    GENERATED,
    GENERATOR,
    copies,
    few_shot,
    lengths_read,
    naive_reading,
    open_model,
    prompts_of,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from task_lines import LINES, words
from tiny import tiny_llama

import lococo
from lococo.cli.main import main
from lococo.evaluation import tasks
from lococo.evaluation.few_shot import document_of, read_tasks
from lococo.evaluation.harness import PrefixLM
from lococo.evaluation.tasks import _difference, evaluate_tasks
from lococo.methods import plan_runs
from lococo.metrics import mean_of_items_interval
from lococo.results.journal import Journal

# Results


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


def test_items_that_only_one_method_has_a_figure_of_are_not_compared():
    documents = {number: number for number in range(4)}
    figures, full = {0: 1.0, 1: 0.0, 2: 1.0}, {1: 1.0, 2: 1.0, 3: 0.0}
    found = _difference(lambda figures: (sum(figures) / len(figures), None), figures, full, documents)
    assert found["difference"] == -0.5 and (found["difference_low"], found["difference_high"]) == (-1, 0)


def test_documents_are_told_apart_by_what_a_question_is_about(data):
    questions = [{"context": "a", "question": "1"}, {"context": "a", "question": "2"}, {"document_id": 7}, {}, {}]
    questions += [{"context": "", "text": "b"}, {"context": "", "text": "c"}, {"context": None}, {"context": None}]
    found = [document_of(question, number) for number, question in enumerate(questions)]
    assert found[0] == found[1] and len(set(found)) == 8


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


def scored(task, method, num_slots, score):
    row = {"task": task, "shots": 0, "method": method, "num_slots": num_slots, "metric": "acc", "filter": "none"}
    return row | {"score": score, "stderr": 0.1, "difference": None, "better": "higher"}


def test_scores_by_number_of_slots_are_lines_beside_the_level_of_the_full_cache(monkeypatch):
    drawn = []
    monkeypatch.setattr(tasks, "picture", lambda grid, *_, **__: drawn.append(grid) or b"")
    rows = [
        scored(task, *each)
        for task in ("one", "two")
        for each in [("full", None, 0.9), ("h2o", 32, 0.6), ("lococo", 32, 0.8), ("h2o", 16, 0.5)]
        if (task, each[0]) != ("two", "h2o")
    ]
    tasks.picture_of(rows)
    ((first, second),) = drawn[0]
    assert (first.title, second.title) == ("one 0 acc", "two 0 acc")
    assert [(line.label, line.x, line.y) for line in first.series] == [
        ("full", None, [0.9]),
        ("h2o", [16, 32], [0.5, 0.6]),
        ("lococo", [32], [0.8]),
    ]
    assert first.series[1].low == pytest.approx([0.4, 0.5]) and list(first.ticks) == [16, 32]
    colors = [{line.label: line.style["color"] for line in panel.series} for panel in (first, second)]
    assert colors[1].items() <= colors[0].items() and len(colors[1]) == 2
