"""Task files of lm-eval from local files: what a line says, and what cannot be scored."""

import json
from pathlib import Path

import pytest
from task_lines import LINES, arc, write_rows

from experiments.task_files.few_shot import FILES, local_splits

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
    assert set(LINES) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_real_files_can_be_asked(name):
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data/eval")
    splits = local_splits(name, 50, SHARED)
    assert len(splits["train"]) >= 50
    assert len(splits[FILES[name].split]) >= 300
