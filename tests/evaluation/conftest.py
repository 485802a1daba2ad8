"""Task files of made-up words, and their tokenizer."""

import pytest
from task_lines import LINES, write_rows
from words import word_tokenizer

from experiments.task_files.few_shot import write_task


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


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "<s>"  # lm-eval ends an answer there
    return tokenizer
