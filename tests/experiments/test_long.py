import json

import pytest
import torch
from tiny import tiny_llama
from words import TEXT, word_tokenizer

from experiments.long import __main__ as command
from experiments.long import answers as long_answers
from experiments.long.items import Item, Task
from experiments.long.prompts import Prompts
from lococo import LoCoCoConfig
from lococo.methods import Run, as_method
from lococo.results.journal import Journal

RUNS = [Run("full", None), Run("h2o", LoCoCoConfig.h2o(12, block_size=8))]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def prompts():
    return Prompts(word_tokenizer())


def questions(*after, options=()):
    return tuple(Item("w1 w2 ", TEXT, f" w3 {each}", ("w9",), options) for each in after)


def given(model, prompts, task, run, path, monkeypatch, items=None):
    """Answers as they are, not scored."""
    kept = []
    metric = long_answers.METRICS[task.metric]
    keep = type(metric)(lambda answer, item: kept.append(answer) or [0.0], metric.by_likelihood)
    monkeypatch.setitem(long_answers.METRICS, task.metric, keep)
    with as_method(model, run.config):
        list(long_answers.answers(model, prompts, task, items or task.items, run, Journal(path)))
    monkeypatch.undo()
    return kept


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_questions_about_one_document_are_answered_as_if_alone(model, prompts, run, tmp_path, monkeypatch):
    task = Task("t", "f1", 6, questions("w4", "w5 w6", "w7"))
    reads = []
    read = long_answers.read_tokens
    monkeypatch.setattr(
        long_answers, "read_tokens", lambda *args, **kw: reads.append(args[1].shape[1]) or read(*args, **kw)
    )
    with as_method(model, run.config):
        list(long_answers.answers(model, prompts, task, task.items, run, Journal(tmp_path / "counted")))
    assert reads == [203]
    monkeypatch.undo()
    together = given(model, prompts, task, run, tmp_path / "a", monkeypatch)
    for item, answer in zip(task.items, together, strict=True):
        ids = torch.tensor([prompts.ids(item)])
        with as_method(model, run.config):
            expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert answer == prompts.tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
@pytest.mark.parametrize("count", [1, 2])
def test_options_have_the_likelihood_of_one_pass(model, prompts, run, count, tmp_path, monkeypatch):
    task = Task("t", "accuracy", 6, questions("w4", "w5", options=("w8", "w9 w10", "w9"))[:count])
    found = given(model, prompts, task, run, tmp_path / "a", monkeypatch)
    for item, likelihoods in zip(task.items, found, strict=True):
        for option, likelihood in zip(item.options, likelihoods, strict=True):
            ids, first = torch.tensor([prompts.ids(item, option)]), len(prompts.ids(item))
            with as_method(model, run.config), torch.no_grad():
                logits = model(ids).logits[0].log_softmax(-1)
            expected = sum(logits[place - 1, ids[0, place]].item() for place in range(first, ids.shape[1]))
            assert likelihood == pytest.approx(expected / len(option), abs=1e-4)


def test_killed_run_answers_the_rest_only(model, prompts, tmp_path, monkeypatch):
    task = Task("t", "f1", 4, questions("w4", "w5", "w6"))
    path = tmp_path / "journal"
    first = given(model, prompts, task, RUNS[0], path, monkeypatch, items=task.items[:2])
    asked = []
    answer = long_answers.read_and_answer
    monkeypatch.setattr(long_answers, "read_and_answer", lambda *args, **kw: asked.append(1) or answer(*args, **kw))
    journal = Journal(path)
    figures = list(long_answers.answers(model, prompts, task, task.items, RUNS[0], journal))
    assert (len(first), len(asked), len(figures)) == (2, 1, 3)


def test_answers_of_another_model_are_not_taken_over(model, prompts, tmp_path, monkeypatch):
    task = Task("t", "f1", 4, questions("w4"))
    path, asked = tmp_path / "journal", []
    given(model, prompts, task, RUNS[0], path, monkeypatch)
    monkeypatch.setattr(long_answers, "_text", lambda *args: asked.append(1) or "")
    for name, times in [(model.name_or_path, 0), ("another", 1)]:
        monkeypatch.setattr(model, "name_or_path", name)
        list(long_answers.answers(model, prompts, task, task.items, RUNS[0], Journal(path)))
        assert len(asked) == times


def test_only_the_first_line_counts_after_examples(model, prompts, tmp_path, monkeypatch):
    task = Task("t", "f1", 4, questions("w4"), first_line=True)
    monkeypatch.setattr(long_answers, "_text", lambda *args: "\nw9\nw8 w7")
    assert list(long_answers.answers(model, prompts, task, task.items, RUNS[0], Journal(tmp_path / "j"))) == [[1.0]]


def test_the_middle_of_the_document_is_cut(prompts):
    (item,) = questions("w4")
    shorter = prompts.cut(item, 50)
    assert len(prompts.ids(shorter)) in (49, 50)  # two words may meet
    assert (shorter.before, shorter.after) == (item.before, item.after)
    kept = shorter.document.split()
    assert kept[:20] == TEXT.split()[:20] and kept[-20:] == TEXT.split()[-20:]
    assert prompts.cut(item, 500) == item
    with pytest.raises(ValueError, match="4 tokens without its document, more than 3"):
        prompts.cut(item, 3)


def test_long_prompts_are_refused_for_full_unless_they_may_be_cut(prompts):
    task = Task("t", "f1", 10, questions("w4"))
    with pytest.raises(ValueError, match="t: a prompt has 204 tokens, and 10 for its answer make more than the 60 of"):
        command.fitting(prompts, task, RUNS, 60, None)
    assert command.fitting(prompts, task, RUNS[1:], 60, None)[False] == task.items
    for truncate, tokens in [("middle", 49), ("middle-full", 204)]:
        texts = command.fitting(prompts, task, RUNS, 60, truncate)
        assert [len(prompts.ids(texts[is_full][0])) for is_full in (True, False)] == [49, tokens]


def test_chat_template_goes_around_the_prompt():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "w0 {{ messages[0].content }} w60 "
    ids = Prompts(tokenizer, chat=True).ids(Item("w1 ", "w2", " w3", ()), "w4")
    assert tokenizer.decode(ids).split() == ["w0", "w1", "w2", "w3", "w60", "w4"]


def test_examples_and_code_are_continued_without_chat_template():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "w0 {{ messages[0].content }} w60 "
    item = Item("w1 ", "w2", " w3", (), is_continued=True)
    assert Prompts(tokenizer, chat=True).ids(item) == Prompts(tokenizer).ids(item)


def leval(folder, count=3):
    (folder / "leval").mkdir()
    line = {"input": TEXT, "instructions": [f"w{n}" for n in range(count)], "outputs": ["w9"] * count}
    (folder / "leval" / "scientific_qa.jsonl").write_text(json.dumps(line) + "\n")
    return ["--data-dir", str(folder)]


def evaluate(checkpoint, tmp_path, *arguments):
    slots = ["--num-slots", "16", "--block-size", "8", "--max-new-tokens", "3", "--methods", "full,h2o"]
    output = ["--output", str(tmp_path / "out" / "long")]
    command.main(["--model", str(checkpoint), "--device", "cpu", *slots, *output, *arguments])


def test_command_writes_rows_table_and_pictures(checkpoint, tmp_path, capsys):
    tasks = ["--tasks", "scrolls-qasper", "ruler-niah_single", "--lengths", "300", "400", "--items", "3"]
    evaluate(checkpoint, tmp_path, *tasks, *leval(tmp_path), "--limit", "2")
    content = json.loads((tmp_path / "out" / "long.json").read_text())
    assert content["command"].startswith("python -m experiments.long --model ")
    rows = content["rows"]
    assert list(rows[0]) == [
        "task",
        "source",
        "method",
        "num_slots",
        "block_size",
        "length",
        "items",
        "metric",
        "score",
        "stderr",
    ]
    assert [(row["task"], row["method"], row["items"]) for row in rows] == [
        (task, method, items)
        for method in ("full", "h2o")
        for task, items in [("scrolls-qasper", 2), ("ruler-niah_single", 3), ("ruler-niah_single", 3)]
    ]
    assert [row["length"] for row in rows[1:3]] == [300, 400]
    assert [row["source"] for row in rows[:3]] == ["leval/scientific_qa.jsonl", "generated", "generated"]
    assert len(content["needles"]) == 2 * 2 * 3 and {each["depth"] for each in content["needles"]} == {0, 0.5, 1}
    for name in ("long.png", "long_needles.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "long.md").read_text().count("\n") == len(rows) + 4
    assert not (tmp_path / "out" / "long.partial.jsonl").exists()
    assert capsys.readouterr().out.count("\n") >= len(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "qasper"], "unknown task 'qasper': choose from "),
        (["--tasks", "scrolls-quality", "--data-dir", "."], "none of scrolls/quality/validation.jsonl, leval/quality"),
        (["--tasks", "ruler", "--limit", "0"], "--limit must be at least 1, got 0"),
        (["--tasks", "babilong"], "babilong-qa1 needs bAbI's files"),
        (["--tasks", "ruler-niah_single", "--lengths", "9000"], "ruler-niah_single: a prompt has 89"),
        (["--tasks", "ruler-niah_single", "--chat"], "--chat needs a tokenizer with a chat template"),
    ],
)
def test_bad_input_is_named_before_the_model_is_loaded(checkpoint, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(command, "load", lambda options: pytest.fail("the model is loaded"))
    with pytest.raises((ValueError, OSError)) as error:
        evaluate(checkpoint, tmp_path, *arguments, "--max-length", "2048")
    assert message in str(error.value)
