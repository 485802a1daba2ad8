import json
import re
import shutil
import subprocess
import sys

import pytest
from words import TEXT

import lococo
from lococo.cli.main import main


def errors(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("lococo: error: ")]


@pytest.mark.parametrize("folder", ["/no/model", "./model", "models/llama/8b"])
def test_a_folder_that_is_not_there_is_named(capsys, folder):
    assert main(["generate", "--model", folder, "--prompt", "w1 w2"]) == 2
    assert f"{folder}: no such folder, and not a Hub id" in errors(capsys)[0]


def test_a_folder_without_a_model_is_named(tmp_path, capsys):
    assert main(["generate", "--model", str(tmp_path), "--prompt", "w1 w2"]) == 2
    assert f"{tmp_path}: no config.json in this folder" in errors(capsys)[0]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("tokenizer.json", None, "tokenizer"),
        ("tokenizer_config.json", b"{", "tokenizer"),
        ("config.json", b'{"model_type": "no such"}', "(tokenizer|model)"),  # whichever asks for it first
        ("model.safetensors", None, "model"),
        ("model.safetensors", b"torn", "model"),
    ],
)
def test_what_is_missing_of_a_model_is_said_in_a_line_with_its_folder(
    checkpoint, tmp_path, capsys, name, content, what
):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    assert main(["generate", "--model", str(folder), "--prompt", "w1 w2"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "lococo" in line or "okenizer" in line]
    assert re.match(f"lococo: error: {folder}: no {what} could be loaded from this folder: ", said[-1])


@pytest.mark.parametrize("command", [["generate", "--prompt-file"], ["inspect", "--data"]])
def test_texts_that_cannot_be_read_are_named(tmp_path, capsys, command):
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe")
    for name, message in (
        ("a.bin", "a.bin: binary data or another encoding"),
        ("b.txt", "b.txt: no such file"),
        ("", " is a folder; expected a text file"),
    ):
        assert main([command[0], "--model", "none", command[1], str(tmp_path / name)]) == 2
        assert message in errors(capsys)[0]


@pytest.mark.parametrize(
    ("command", "ending"),
    [(["eval", "ppl", "--data"], ""), (["inspect", "--data"], ".html"), (["bench", "memory", "--methods"], "")],
)
def test_what_cannot_be_written_is_said_before_the_model_is_loaded(tmp_path, capsys, monkeypatch, command, ending):
    monkeypatch.setattr("lococo.loading.load_model", lambda *names, **options: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text(TEXT)
    output = tmp_path / "file" / f"out{ending}"
    assert main([*command, str(tmp_path / "file"), "--model", "none", "--output", str(output)]) == 2
    assert errors(capsys) == [f"lococo: error: {output} cannot be written: {tmp_path / 'file'} is a file"]


@pytest.mark.parametrize("command", ["eval ppl", "eval tasks", "eval needles", "bench memory", "bench prefill"])
def test_nothing_is_not_compared(command, capsys):
    assert main([*command.split(), "--model", "none", "--methods", ", "]) == 2
    assert "there is nothing to compare: name methods, of full, streaming, " in errors(capsys)[0]


def test_errors_of_the_system_begin_with_the_file(tmp_path, capsys, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("lococo.data.documents.read_text", refused)
    assert main(["inspect", "--model", "none", "--data", "a.txt"]) == 2
    assert errors(capsys) == ["lococo: error: a.txt: permission denied"]


def test_what_may_be_of_the_hub_is_looked_for_there(capsys, monkeypatch):
    def not_found(name, **options):
        raise OSError(f"{name} is not a valid model identifier")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", not_found)
    assert main(["generate", "--model", "org/model", "--prompt", "w1 w2"]) == 2
    assert "org/model: no such folder, and not found on the Hub: org/model is not a valid" in errors(capsys)[0]


@pytest.mark.parametrize("slots", [["--num-slots", "16", "32"], ["--num-slots", "16", "--num-slots", "32"]])
def test_eval_ppl_writes_its_files(checkpoint, tmp_path, capsys, slots):
    (tmp_path / "poems.txt").write_text(TEXT)
    arguments = ["--data", str(tmp_path / "poems.txt"), "--length", "100", "--first", "50", *slots]
    output = tmp_path / "results" / "perplexity"
    assert (
        main(["eval", "ppl", "--model", str(checkpoint), "--block-size", "8", *arguments, "--output", str(output)])
        == 0
    )
    content = json.loads(output.with_suffix(".json").read_text())
    assert len(content["rows"]) == 2 * (1 + 2 * 4) and {row["domain"] for row in content["rows"]} == {"poems", "all"}
    assert content["command"].startswith("lococo eval ppl --model")
    said = capsys.readouterr().out
    assert said.count("\n") >= 9 and max(map(len, said.splitlines()[:-1])) <= 100
    assert f"{output}.json" in said


def test_eval_ppl_at_equal_bytes(checkpoint, tmp_path, capsys):
    (tmp_path / "poems.txt").write_text(TEXT)
    arguments = ["--model", str(checkpoint), "--data", str(tmp_path / "poems.txt"), "--length", "100", "--first", "50"]
    arguments += ["--methods", "full,h2o,h2o-slot", "--block-size", "8", "4", "--slot-bits", "16", "8"]
    assert main(["eval", "ppl", *arguments]) == 2
    assert "one --block-size is compared, several with --bytes-of, got [8, 4]" in errors(capsys)[0]
    assert main(["eval", "ppl", *arguments, "--bytes-of", "h2o:16", "--output", str(tmp_path / "fair")]) == 0
    rows = json.loads((tmp_path / "fair.json").read_text())["rows"]
    held = {row["method"]: row["bytes_per_head"] for row in rows if row["domain"] == "all"}
    fitted = {"h2o-b4", "h2o-8", "h2o-b4-8", "h2o-slot-b4", "h2o-slot-8", "h2o-slot-b4-8"}
    assert set(held) == {"full", "h2o", "h2o-slot", *fitted}
    assert held["full"] == 100 * 2 * 8 * 4 and all(0.8 < held[name] / held["h2o"] <= 1 for name in fitted)
    slots = {row["method"]: row["num_slots"] for row in rows}
    assert slots["h2o"] == slots["h2o-slot"] == 16 < slots["h2o-b4"] < slots["h2o-8"] < slots["h2o-b4-8"]
    assert len({row["gap_ratio"] is None for row in rows}) == 1, "all relate to the same H2O"
    drawn = [".png"] * (rows[0]["gap_ratio"] is not None)  # there is nothing to draw where H2O loses nothing
    assert sorted(path.suffix for path in tmp_path.glob("fair*")) == [".json", ".md", *drawn]
    said = capsys.readouterr().out
    assert "h2o-slot-b4-8" in said and "bytes" in said


def test_data_is_looked_at_before_the_model_is_loaded(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lococo.loading.load_model", lambda *names, **options: pytest.fail("the model was loaded"))
    (tmp_path / "a.jsonl").write_text('{"body": "w1 w2"}\n{"text"')
    for column, message in (("text", "a.jsonl: line 1: no column 'text'; it has 'body'"), ("body", "line 2: invalid")):
        arguments = ["--model", str(checkpoint), "--data", str(tmp_path / "a.jsonl"), "--text-column", column]
        assert main(["eval", "ppl", *arguments]) == 2
        assert message in errors(capsys)[0]
    assert main(["eval", "ppl", "--model", str(checkpoint), "--data", "missing.txt"]) == 2
    assert "missing.txt: no such file or folder, and not a Hub dataset" in errors(capsys)[0]


def test_bench_memory_shows_growth_and_no_growth(checkpoint, tmp_path):
    arguments = ["--num-slots", "16", "--block-size", "8", "--tokens", "96", "--step", "32"]
    output = tmp_path / "memory"
    assert main(["bench", "memory", "--model", str(checkpoint), *arguments, "--output", str(output)]) == 0
    rows = json.loads(output.with_suffix(".json").read_text())["rows"]
    growth = {method: [row["cache_bytes"] for row in rows if row["method"] == method] for method in ("full", "h2o")}
    per_token = 2 * 2 * 8 * 2 * 4  # layers, KV heads, head_dim, key and value, bytes of a float32
    assert growth["full"] == [32 * per_token, 64 * per_token, 96 * per_token]
    assert len(set(growth["h2o"])) == 1
    assert [row["bytes_per_head"] for row in rows if row["method"] == "full"] == [32 * 64, 64 * 64, 96 * 64]
    assert all(row["peak_bytes"] > row["cache_bytes"] for row in rows)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lococo {lococo.__version__}\n"


@pytest.mark.parametrize("module", ["lococo", "lococo.cli.main"])
def test_the_package_runs_as_a_module(module):
    result = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=False)
    assert result.stdout == f"lococo {lococo.__version__}\n", result.stderr
    wrong = subprocess.run([sys.executable, "-m", module, "measure"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr == "lococo: error: No such command 'measure'. (lococo --help shows what there is)\n"


def test_commands_need_no_package_of_an_extra():
    extras = ("accelerate", "datasets", "fastapi", "lm_eval", "matplotlib", "openai", "peft", "rouge_score", "uvicorn")
    code = f"import sys; sys.modules.update(dict.fromkeys({extras}))"
    code += "; from lococo.cli.main import main; main(['--version'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == f"lococo {lococo.__version__}\n", result.stderr
