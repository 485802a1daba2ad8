import json
from pathlib import Path

import pytest

from experiments.long import records
from experiments.long.metrics import METRICS
from experiments.long.sets import LONGBENCH, SCROLLS, SETS

DATA = Path(__file__).parents[2] / "../shared/data/eval"


def lines(*entries):
    return "\n".join(map(json.dumps, entries)) + "\n"


def test_all_sets_are_there_and_their_metrics_known():
    assert (len(SCROLLS), len(LONGBENCH), len(SETS)) == (6, 21, 28)
    assert all(each.metric in METRICS for each in SETS.values())


def test_scrolls_lines_of_one_question_are_one_record():
    text = lines(*({"id": "a", "input": "Who?\n\nDoc\n\nument", "output": output} for output in ("x", " y ")))
    (record,) = records.scrolls_question(text)
    assert record == records.Record("Doc\n\nument", "Who?", ("x", "y"))


@pytest.mark.parametrize("form", ["scrolls", "leval"])
def test_choices_are_taken_apart(form):
    question = "Why?\n\n (A) one\n (B) two (2)\n (C) three\n (D) four"
    if form == "scrolls":
        found = records.scrolls_choice(
            lines({"id": "a", "input": f"{question}\n\nText\n (A) more", "output": "two (2)"})
        )
        document = "Text\n (A) more"
    else:
        found = records.leval_choice(lines({"input": "Text", "instructions": [question], "outputs": ["(B) two (2)"]}))
        document = "Text"
    assert list(found) == [records.Record(document, "Why?", ("two (2)",), ("one", "two (2)", "three", "four"))]


def test_zero_scrolls_says_where_things_stand():
    entry = {"input": "Intro\nStory\nWho?", "output": "x", "document_start_index": 6, "document_end_index": 11}
    entry |= {"query_start_index": 12, "query_end_index": 16}
    assert list(records.zero_scrolls(lines(entry))) == [records.Record("Story", "Who?", ("x",))]


def test_options_and_question_stand_after_the_document(tmp_path):
    (tmp_path / "leval").mkdir()
    question = "Why {so}?\n (A) one\n (B) two\n (C) three\n (D) four"
    entry = {"input": "Text", "instructions": [question, question], "outputs": ["(B) two", "(C) three"]}
    (tmp_path / "leval" / "quality.jsonl").write_text(lines(entry))
    task = SETS["scrolls-quality"].task("scrolls-quality", tmp_path, None, 0)
    assert len(task.items) == 2 and task.items[0].document == "Text"
    assert "Why {so}?\n(A) one\n(B) two" in task.items[0].after
    assert len(SETS["scrolls-quality"].task("scrolls-quality", tmp_path, 1, 0).items) == 1


def test_sets_with_examples_and_code_are_continued_and_say_where_they_are_from(tmp_path):
    (tmp_path / "longbench").mkdir()
    entry = {"context": "c", "input": "i", "answers": ["a"], "all_classes": ["a"]}
    continued = {f"longbench-{name}" for name in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")}
    for name in LONGBENCH:
        file = f"longbench/{name.removeprefix('longbench-')}.jsonl"
        (tmp_path / file).write_text(lines(entry))
        task = SETS[name].task(name, tmp_path, None, 0)
        assert (task.source, task.items[0].is_continued) == (file, name in continued)


ABSENT = {"scrolls-narrative_qa"} | {
    f"longbench-{name}" for name in ("hotpotqa", "musique", "trec", "passage_retrieval_en", "lcc")
}


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/eval")
@pytest.mark.parametrize("name", [name for name in SETS if name not in ABSENT])
def test_published_files_are_read(name):
    task = SETS[name].task(name, DATA, None, 0)
    for item in task.items:
        assert item.document and all(item.references)
        assert "{question}" not in item.after and "{options}" not in item.after
        if task.metric == "accuracy":
            assert len(item.options) == 4 and item.references[0] in item.options
        if task.metric == "classification":
            assert item.references[0] in item.options
