"""What the pages show is true: commands are those there are, Python runs, figures are those of the result files."""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import extended
import pytest
from documented import PAGES, ROOT, UNCHECKED, blocks, extras, option_names, problem, shell_lines, spans
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, LlamaForCausalLM
from words import TEXT, word_tokenizer, write_texts

import lococo
from lococo.cli.main import main

ALL_PAGES = sorted([*PAGES, *(ROOT / "docs").glob("*/**/*.md")])
COMMANDS = [(page.name, line) for page in PAGES for line in shell_lines(page)]
PROGRAMS = ("lococo", "make", "pip", "python", "accelerate", *UNCHECKED)

# Python that needs what is not here, by what it imports; it is compiled all the same.
NOT_RUN = {"vllm": "vLLM pins a torch of its own: make test-vllm does the same in an engine"}
# Options of other programs.
NOT_OURS = {"--attention-backend": "vllm", "--attention-config.backend_per_kind": "vllm", "--kv-cache-dtype": "vllm"}
# Commands that take seconds on a tiny model, and what keeps them as short.
QUICK = {
    "generate": ["--max-new-tokens", "4"],
    "inspect": [],
    "eval ppl": ["--length", "64", "--first", "16", "--documents", "2"],
    "bench memory": ["--tokens", "256", "--step", "128"],
}


@pytest.fixture(scope="session")
def desk(tmp_path_factory, checkpoint):
    """A folder with what commands and Python of the pages read, under the names that they have there."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "book.txt").write_text(TEXT)
    for name in ("texts.jsonl", "heldout.jsonl", "train.jsonl", "books.jsonl"):
        write_texts(folder / name, count=12)
    of_calibrate = lococo.LoCoCoConfig(256, block_size=256)  # --num-slots 256, as the pages have it
    heads = lococo.save_heads(lococo.patch_model(tiny_llama(), of_calibrate), folder / "heads")
    for name in ("my-heads", "folder-or-hub-id"):
        shutil.copytree(heads, folder / name)
    text = extended.write_documents(folder / "ids.jsonl", [[1, *range(3, 60)]] * 4)
    assert extended.command(checkpoint, text, folder, "--factor", "2", "--original-length", "16") == 0
    (folder / "out").rename(folder / "longer")
    model = folder / "MODEL"
    shutil.copytree(checkpoint, model)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    tokenizer.save_pretrained(model)
    return folder


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_every_command_is_one_there_is(page, line):
    assert problem(line) is None


def test_commands_in_the_text_are_such_that_there_are():
    wrong = []
    for page in PAGES:
        for span in spans(page):
            if span.split()[0] in PROGRAMS and " " in span and (said := problem(f"{span} ...")):
                wrong += [] if said.endswith("requires an argument.") else [f"{page.name}: {said}"]  # its name alone
    assert not wrong


def test_options_in_the_text_are_such_that_there_are():
    for page in PAGES:
        unknown = {re.split("[ =]", span)[0] for span in spans(page) if span.startswith("--")} - option_names()
        unknown -= NOT_OURS.keys()
        if unknown:
            modules = set(re.findall(r"python -m (experiments[.\w]*)", page.read_text(encoding="utf-8")))
            assert not unknown - {name for module in modules for name in _options_of(module)}, page.name


def _options_of(module):
    shown = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", "TERM": "dumb"},
    )
    return re.findall(r"--[a-z][\w-]*", shown.stdout)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lococo generate --model MODEL --prompt w1 --slots 9", "No such option: --slots"),
        ("lococo generate --prompt w1 --num-slots 9", "Missing option '--model'"),
        ("lococo eval ppl --model MODEL --num-slots many", "'--num-slots': "),
        ("lococo eval everything --model MODEL", "no command 'everything'"),
        ("lococo calibrate --model MODEL ... --setps 9", "No such option: --setps"),
        pytest.param("python -m lococo.evaluation.harness run --modle lococo", "--modle", marks=pytest.mark.slow),
        ("python -m experiments.task_files ... --output-dir x", "--output-dir"),
        ("accelerate launch -m lococo extend --fdsp ...", "No such option: --fdsp"),
        ("make measure", "no target 'measure'"),
        ("make demo TOURCH=torch", "knows no TOURCH"),
        ('pip install "lococo[gpu]"', "no extra ['gpu']"),
        ("cd lococo && make measure", "no target 'measure'"),
        ('vllm serve MODEL --additional-config \'{"lococo": {"slots": 9}}\'', "slots"),
        ("curl localhost -d '{\"model\": }'", "curl"),
        ("measure --everything", "nothing checks the command 'measure'"),
    ],
)
def test_what_is_wrong_with_a_command_is_found(line, said):
    assert said in (problem(line) or "")


def test_every_reason_not_to_check_is_needed():
    assert {shlex.split(line, comments=True)[0] for _, line in COMMANDS} >= UNCHECKED.keys()
    imported = {name for page in PAGES for block in blocks(page, "python") for name in _imports(block)}
    assert imported >= NOT_RUN.keys()
    named = {re.split("[ =]", span)[0] for page in PAGES for span in spans(page)}
    assert named >= NOT_OURS.keys()


def test_quick_commands_run_on_a_tiny_model(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    ran = set()
    for _, line in COMMANDS:
        words = shlex.split(line, comments=True)
        name = next((name for name in QUICK if words[: 1 + len(name.split())] == ["lococo", *name.split()]), None)
        if name is None or "MODEL" not in words or "..." in words or (name == "eval ppl" and "--data" not in words):
            continue
        assert main([*words[1:], *QUICK[name], "--dtype", "float32"]) == 0, (line, capsys.readouterr().err)
        ran.add(name)
    assert "generate" in ran


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_python_of_a_page_runs_as_it_stands(page, desk, tmp_path, monkeypatch):
    """Block after block, as a reader would, with a tiny model and its words in the place of a large one."""
    shutil.copytree(desk, tmp_path / "desk")
    monkeypatch.chdir(tmp_path / "desk")
    tokenizer = AutoTokenizer.from_pretrained("MODEL")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: tiny_llama())
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    monkeypatch.setattr(LlamaForCausalLM, "generate", functools.partialmethod(_answer, tokenizer))
    names = {"model": tiny_llama(), "tokenizer": tokenizer, "book": TEXT, "question": " w7 w8"}
    for block in blocks(page, "python"):
        code = compile(block, page.name, "exec")
        if not _imports(block) & NOT_RUN.keys():
            exec(code, names)


def _imports(block):
    return set(re.findall(r"^\s*(?:from|import) (\w+)", block, flags=re.MULTILINE))


def _answer(model, tokenizer, *args, **kwargs):
    """Two tokens; of the tokenizer's words where a page says no more than three dots."""
    if args == (...,):
        args = (tokenizer(TEXT, return_tensors="pt").input_ids[:, :90],)
    kwargs.pop("streamer", None)
    return GenerationMixin.generate(model, *args, **{**kwargs, "max_new_tokens": 2})


def test_the_reference_has_every_name():
    shown = re.findall(r"^::: lococo\.(\w+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(shown) == sorted(set(lococo.__all__) - {"__version__"})


def test_errors_name_extras_that_there_are():
    named = {
        name
        for file in (ROOT / "lococo").rglob("*.py")
        for name in re.findall(r"pip install '?lococo\[(\w+)\]", file.read_text(encoding="utf-8"))
    }
    assert named and named <= extras().keys()


def test_quoted_tables_stand_in_the_result_files():
    quoted = [
        table
        for page in PAGES
        for table in re.findall(r"<!-- rows of (\S+); .*-->\n((?:\|.*\n)+)", page.read_text(encoding="utf-8"))
    ]
    assert quoted
    for file, table in quoted:
        rows, measured = table.splitlines(), (ROOT / file).read_text(encoding="utf-8").splitlines()
        assert len(rows) > 4
        assert not [row for row in rows if row not in measured]


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_picture_exists(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_result_names_its_command_and_no_machine_path():
    files = sorted((ROOT / "docs/results").glob("*.json"))
    assert files
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        assert {"command", "commit", "date", "device", "versions", "rows"} <= content.keys()
        assert content["command"].startswith(("lococo ", "python examples/", "python -m experiments."))
        assert not re.search(r"(^|[ '\"=])/", content["command"]), file
        assert content["rows"]
