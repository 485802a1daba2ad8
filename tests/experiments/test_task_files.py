"""Task files of lm-eval from local files: what a line says, what cannot be scored, and what is asked in the end."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.utils import apply_template
from task_lines import LINES, arc, write_rows
from tiny import tiny_llama
from words import word_tokenizer

from experiments.task_files import generated, longbench, makers
from experiments.task_files.__main__ import main
from experiments.task_files.few_shot import FILES, local_splits
from lococo.evaluation.few_shot import read_tasks
from lococo.evaluation.harness import PrefixLM

SHARED = Path(__file__).parents[3] / "shared/data/eval"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("arc_easy", {"gold": 4}, "the answer is 4 of 4 choices"),
        ("arc_easy", {"gold": None}, "the answer is None of 4 choices"),
        ("arc_challenge", {"answerKey": "A"}, "the answer is 'A', the choices are 1, 2, 3, 4"),
        ("hellaswag", {"label": ""}, "the answer is '' of 4 choices"),
        ("winogrande", {"answer": ""}, "the answer is '', expected '1' or '2'"),
        ("winogrande", {"sentence": "w1 w2"}, "no gap"),
        ("race", {"answers": ["B", "E"]}, "the answer is 'E' of 4 options"),
        ("race", {"answers": ["B"]}, "cannot be scored"),
        ("race", {"answers": [], "questions": [], "options": []}, "there is no question"),
        ("triviaqa", {"answer": {"aliases": []}}, "aliases are"),
        ("triviaqa", {"answer": {"value": "w1"}}, "it has no 'aliases'"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(tmp_path, name, change, message):
    line, scored, _ = LINES[name]
    (tmp_path / name).mkdir()
    write_rows(tmp_path / name / scored, [line(1), {**line(2), **change}])
    with pytest.raises(ValueError, match=r"row 2 cannot be scored: ") as error:
        local_splits(name, 0, tmp_path)
    assert message in str(error.value) and scored in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("", "no row"), ("{", "not JSON"), ("[]", "no row"), ("3", "row 1")])
def test_files_without_rows_are_named(tmp_path, text, message):
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "arc_easy" / "test.json").write_text(text)
    with pytest.raises(ValueError, match=f"test.json.*{message}"):
        local_splits("arc_easy", 0, tmp_path)


def test_two_files_for_one_split_are_named(tmp_path):
    (tmp_path / "arc_easy").mkdir()
    for name in ("test.json", "test_2.jsonl"):
        (tmp_path / "arc_easy" / name).write_text(json.dumps([arc(1)]))
    with pytest.raises(FileNotFoundError, match="found test.json, test_2.jsonl"):
        local_splits("arc_easy", 0, tmp_path)


def test_the_last_items_are_examples_where_no_file_has_them(tmp_path):
    (tmp_path / "triviaqa").mkdir()
    line, scored, _ = LINES["triviaqa"]
    write_rows(tmp_path / "triviaqa" / scored, [line(index) for index in range(6)])
    splits = local_splits("triviaqa", 2, tmp_path)
    assert [len(splits[name]) for name in ("validation", "train")] == [4, 2]
    with pytest.raises(ValueError, match="triviaqa: 6 shots leave none of the 6 items"):
        local_splits("triviaqa", 6, tmp_path)


def test_every_task_is_known():
    assert {*LINES, "race_questions"} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_real_files_can_be_asked(name):
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data/eval")
    splits = local_splits(name, 50, SHARED)
    assert len(splits["train"]) >= 50
    assert len(splits[FILES[name].split]) >= 300


# LongBench


def own_template(name):
    return longbench.template_of(f"longbench/{name.removeprefix('longbench_')}.yaml")


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@pytest.mark.parametrize("name", longbench.NAMES)
@given(context=TEXTS, question=TEXTS.filter(lambda text: "\n" not in text))
def test_what_a_template_made_is_undone_to_the_letter(name, context, question):
    template = own_template(name)
    prompt = apply_template(template, {"context": context, "question": question})
    found = longbench.undo(template, prompt)
    assert apply_template(template, found) == prompt
    if "}}{{question}}" not in template:
        assert found == {"context": context, "question": question if "{{question}}" in template else ""}


@pytest.mark.parametrize("name", longbench.NAMES)
def test_prompts_that_are_not_lm_evals_are_refused(name):
    template = own_template(name)
    prompt = apply_template(template, {"context": "Some text.", "question": "Why?"})
    ends_with_text = template.endswith("{{question}}")  # which may be any
    for changed in ["x" + prompt, prompt[:10], *([] if ends_with_text else [prompt + "\n"])]:
        with pytest.raises(longbench.OtherPrompt, match="the prompt is not lm-eval's: it begins "):
            longbench.undo(template, changed)


def test_both_forms_of_longbench_are_asked_alike(tmp_path):
    row = {"context": "w1 w2 w3.", "input": "w4 w5?", "answers": ["w6"], "all_classes": None}
    (tmp_path / "longbench").mkdir()
    (tmp_path / "longbench" / "2wikimqa.jsonl").write_text(json.dumps(row) + "\n")
    template = own_template("longbench_multifieldqa_en")
    prompt = apply_template(template, {"context": row["context"], "question": row["input"]})
    (tmp_path / "minilongbench").mkdir()
    entry = {"7": {"origin_prompt": prompt, "gold": ["w6"]}}
    (tmp_path / "minilongbench" / "MiniLongBench_multifieldqa_en.json").write_text(json.dumps(entry))
    names = ["longbench_2wikimqa", "longbench_multifieldqa_en"]
    main(["--data-dir", str(tmp_path), "--output", str(tmp_path / "out"), "--tasks", *names])
    lm = PrefixLM(tiny_llama(), tokenizer=word_tokenizer())
    for name, task in zip(names, read_tasks(names, tmp_path / "out"), strict=True):
        (question,) = task.questions()
        shown = task.prompt(lm, question)
        assert "w1 w2 w3." in shown.requests[0].args[0] and "w4 w5?" in shown.requests[0].args[0]
        assert task.figures([shown], [" W6. "]) == {("score", "none"): {0: 1}, ("qa_f1_score", "none"): {0: 1}}
        assert task.figures([shown], ["w7"])["score", "none"] == {0: 0}
        if name == "longbench_multifieldqa_en":
            assert shown.requests[0].args[0] == prompt


@pytest.mark.parametrize("name", longbench.NAMES)
def test_real_files_of_longbench_are_whole_or_left_out(name):
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data/eval")
    try:
        rows = longbench.local_rows(name, own_template(name), SHARED)
    except (FileNotFoundError, longbench.OtherPrompt):
        return
    assert all(row["context"] and row["answers"] and isinstance(row["answers"], list) for row in rows)


# Generated tasks

STORIES = """1 John went to the hallway.
2 Mary went to the garden.
3 Where is John? |hallway|1
4 John went to the kitchen.
5 Where is John?\tkitchen\t4
1 Mary went to the office.
2 Where is Mary? |office|1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files over a text of made-up sentences."""
    folder = tmp_path_factory.mktemp("generated")
    sentences = [
        f"Then w{place % 61} came to w{place * place % 61} and saw w{place * 7 % 59}." for place in range(900)
    ]
    (folder / "texts.jsonl").write_text(json.dumps({"text": " ".join(sentences)}) + "\n")
    (folder / "babi").mkdir()
    for number in range(1, 6):
        (folder / "babi" / f"qa{number}_facts_test.txt").write_text(STORIES)
    main(
        ["--data-dir", str(folder), "--haystack", str(folder / "texts.jsonl"), "--output", str(folder / "tasks")]
        + ["--tasks", *generated.NAMES]
    )
    return folder / "tasks"


def generated_task(folder, name, samples=3, lengths=(1024,), **told):
    metadata = {"max_seq_lengths": list(lengths), "num_samples": samples, **told}
    (task,) = read_tasks([name], folder, metadata=metadata, load_tokenizer=word_tokenizer)
    return task


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_1", "ruler_vt"])
def test_rulers_tasks_have_its_lengths_and_its_metric(folder, name):
    task = generated_task(folder, name, lengths=(1024, 1536))
    assert task.revision == "1.0"
    tokenizer, questions = word_tokenizer(), task.questions()
    assert [question["max_length"] for question in questions] == 3 * [1024] + 3 * [1536]
    prompts = [task.prompt(PrefixLM(tiny_llama(), tokenizer=tokenizer), question) for question in questions]
    for question, prompt in zip(questions, prompts, strict=True):
        text, settings = prompt.requests[0].args
        assert text.endswith(question["gen_prefix"])
        assert len(tokenizer(question["input"]).input_ids) + settings["max_gen_toks"] <= question["max_length"]
        assert all(value in text for value in question["outputs"])
    right = [" ".join(question["outputs"]) for question in questions]
    figures = task.figures(prompts, [*right[:5], "none of it"])
    assert figures == {("1024", "none"): {0: 1, 1: 1, 2: 1}, ("1536", "none"): {3: 1, 4: 1, 5: 0}}


def test_several_questions_are_asked_about_one_text_that_is_read_once(folder):
    task = generated_task(folder, "niah_questions", samples=2, questions=5)
    questions = task.questions()
    assert [question["document_id"] for question in questions] == 5 * ["1024 0"] + 5 * ["1024 1"]
    for group in (questions[:5], questions[5:]):
        texts = {question["input"].split("\nWhat is the special magic number for ")[0] for question in group}
        assert len(texts) == 1 and len({question["outputs"][0] for question in group}) == 5
        for question in group:
            key, number = re.search(r"for (\S+) mentioned", question["input"])[1], question["outputs"][0]
            assert f"One of the special magic numbers for {key} is: {number}." in next(iter(texts))
            assert question["gen_prefix"].endswith(f"for {key} mentioned in the provided text is")
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "<s>"  # lm-eval ends an answer there
    lm = PrefixLM(tiny_llama(), tokenizer=tokenizer)
    prompts = [task.prompt(lm, question) for question in questions]
    for prompt in prompts:
        prompt.requests[0].args[1]["max_gen_toks"] = 3
    lm.generate_until([prompt.requests[0] for prompt in prompts])
    asked = [lm.tok_encode(prompt.requests[0].args[0]) for prompt in prompts]
    least = len({tuple(ids[:end]) for ids in asked for end in range(1, len(ids) + 1)})
    assert least <= lm.reader.tokens_read <= least + 10 * 32 < sum(map(len, asked)) / 3


@pytest.mark.parametrize("number", range(1, 6))
def test_facts_of_babilong_keep_their_order_among_the_sentences(folder, number):
    tokenizer = word_tokenizer()
    task = generated_task(folder, f"babilong_qa{number}", lengths=[600])
    assert (task.shots, task.revision) == (2, "0.0")
    questions = task.questions()
    assert len(questions) == 3
    for question in questions:
        assert 560 < len(tokenizer(question["input"]).input_ids) <= 600
        facts = re.findall(r"(?:John|Mary) went to the \w+\.", question["input"])
        assert facts[-1] in question["input"] and question["target"] in " ".join(facts)
        told = [f"{name} went to the {place}." for name, place in (("John", "hallway"), ("John", "kitchen"))]
        assert [fact for fact in facts if fact in told] == told[: sum(fact in told for fact in facts)]
    (facts_alone,) = generated_task(folder, f"babilong_qa{number}", samples=1, max_seq_lengths="0k").questions()
    assert set(re.split(r"(?<=\.) ", facts_alone["input"])) <= set(re.findall(r"\w+ went to the \w+\.", STORIES))


def test_the_same_seed_gives_the_same_items(folder):
    first, again = (generated_task(folder, "niah_multikey_1").questions() for _ in range(2))
    assert first == again


def test_stories_hold_the_facts_before_their_question(tmp_path):
    (tmp_path / "qa1.txt").write_text(STORIES)
    stories = makers.read_stories(tmp_path / "qa1.txt")
    assert [(len(facts), answer) for facts, _, answer in stories] == [(2, "hallway"), (3, "kitchen"), (1, "office")]


def test_what_is_missing_is_left_out_or_named(tmp_path, capsys):
    given = ["--data-dir", str(tmp_path), "--output", str(tmp_path / "out")]
    main(given)
    said = capsys.readouterr().out
    for name in (*FILES, *longbench.NAMES, *generated.NAMES):
        assert f"{name} is left out: " in said
    with pytest.raises(FileNotFoundError, match="it needs a file of texts, got --haystack None"):
        main([*given, "--tasks", "niah_single_2"])
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "A sentence."}))
    with pytest.raises(FileNotFoundError, match=r"it needs bAbI's file .*babi/qa2_\*test.txt"):
        main([*given, "--haystack", str(tmp_path / "texts.jsonl"), "--tasks", "babilong_qa2"])
