"""What is asked: lm-eval's prompts, the same examples before every question, as many as fit."""

import json

import pytest
from asking import (
    GENERATED,
    GENERATOR,
    assert_same,
    copies,
    few_shot,
    open_model,
    prompts_of,
    requests_of,
)
from lm_eval.api.instance import Instance
from task_lines import arc, arc_of_the_hub, race, triviaqa, winogrande, words, write_rows
from tiny import tiny_llama
from words import word_tokenizer

from lococo.cli.main import main
from lococo.evaluation.few_shot import FewShotTask, Prompt, document_of, parse_task, read_tasks
from lococo.evaluation.harness import PrefixLM

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
    tokenizer.chat_template = "{% for each in messages %}<{{ each.role }}> {{ each.content }} {% endfor %}w60"
    (task,) = read_tasks(["arc_easy:2"], data, chat=True)
    lm = PrefixLM(tiny_llama(), tokenizer=tokenizer)
    prompt = prompts_of(task, lm, limit=1)[0].requests[0].args[0]
    plain = prompts_of(few_shot("arc_easy", 2, data), lm, limit=1)[0].requests[0].args[0]
    *turns, end = prompt.split()
    roles = [turn for turn in turns if turn.startswith("<")]
    assert roles == [*2 * ["<user>", "<assistant>"], "<user>"] and end == "w60"  # lm_eval's own way with a template
    assert [turn for turn in turns if turn not in roles] == plain.split()


def test_lm_eval_itself_is_told_of_prompts_that_are_too_long(data, tokenizer):
    requests = requests_of(data, "arc_easy", 4, PrefixLM(tiny_llama(), tokenizer=tokenizer))
    with pytest.raises(ValueError, match=r"have \d+ tokens, max_length is 30"):
        PrefixLM(tiny_llama(), tokenizer=tokenizer, max_length=30).loglikelihood(copies(requests))
    asked = [Instance("generate_until", {}, (words(*range(10)), {"until": ["\n"]}), 0)]
    with pytest.raises(ValueError, match="have 266 tokens, max_length is 265"):
        PrefixLM(tiny_llama(), tokenizer=tokenizer, max_length=265).generate_until(asked)


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
