"""Figures in the README are those of the result files."""

import functools
import json
import re
from pathlib import Path
from unittest import mock

import torch
from tiny import tiny_ids, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, GenerationMixin, LlamaForCausalLM

import lococo

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_quoted_tables_stand_in_the_result_files():
    tables = re.findall(r"<!-- rows of (\S+); .*-->\n((?:\|.*\n)+)", README)
    assert tables
    for file, quoted in tables:
        rows, measured = quoted.splitlines(), (ROOT / file).read_text(encoding="utf-8").splitlines()
        assert len(rows) > 4
        assert not [row for row in rows if row not in measured]


def test_the_python_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch):
    """Block after block, as a reader would, with a tiny model, and its words, in the place of a large one."""
    pages = [README, (ROOT / "docs/using.md").read_text(encoding="utf-8")]
    blocks = [block for page in pages for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)]
    book = tiny_ids(1, 90)
    texts = [book, book, torch.cat([book, tiny_ids(1, 9, seed=1)], dim=1)]  # the book, twice, and with a question
    tokenizer = mock.Mock(
        side_effect=[BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)}) for ids in texts]
    )
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: tiny_llama())
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    monkeypatch.setattr(LlamaForCausalLM, "generate", functools.partialmethod(_answer, book))
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("A book.")
    lococo.save_heads(lococo.patch_model(tiny_llama(), lococo.LoCoCoConfig(16, block_size=8)), "folder-or-hub-id")
    names = {"tokenizer": tokenizer, "book": "", "question": ""}
    ran = [block for block in blocks if "load_extended" not in block]
    assert len(ran) == 3
    for block in ran:
        exec(block, names)
    assert Path("book.safetensors").is_file()


def _answer(model, book, *args, **kwargs):
    return GenerationMixin.generate(model, **{"input_ids": book, **kwargs, "max_new_tokens": 2})


def test_every_link_and_picture_exists():
    for page in (ROOT / "README.md", ROOT / "docs/results/README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} names {target}"


def test_every_result_names_its_command_and_no_machine_path():
    files = sorted((ROOT / "docs/results").glob("*.json"))
    assert files
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        assert {"command", "commit", "date", "device", "versions", "rows"} <= content.keys()
        assert content["command"].startswith(("lococo ", "python examples/", "python -m experiments."))
        assert not re.search(r"(^|[ '\"=])/", content["command"]), file
        assert content["rows"]
