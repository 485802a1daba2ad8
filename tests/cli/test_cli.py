import json
import re
import shutil
import subprocess
import sys

import pytest
from tiny import tiny_llama
from words import TEXT, WORDS, word_tokenizer

import lococo
from lococo.cli.main import main
from lococo.generation import prompt_ids


def figures(output):
    return {line[:15].strip(): line[16:] for line in output.splitlines() if line[:15].strip() and len(line) > 16}


def errors(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("lococo: error: ")]


@pytest.mark.parametrize(("method", "slots"), [("lococo-uncalibrated", 16), ("h2o", 16), ("full", None)])
def test_generate_reads_and_reports(checkpoint, tmp_path, capsys, method, slots):
    (tmp_path / "text.txt").write_text(TEXT)
    status = main(
        ["generate", "--model", str(checkpoint), "--prompt-file", str(tmp_path / "text.txt"), "--method", method]
        + ["--num-slots", "16", "--block-size", "8", "--max-new-tokens", "5"]
    )
    output = capsys.readouterr().out
    assert status == 0
    reported = figures(output)
    assert reported["tokens read"] == ("200 (16 slots per layer)" if slots else "200 (every token kept)")
    assert ("100.0%" in reported["cache"]) == (slots is None)
    assert "5 tokens" in reported["answering"]
    assert any(word in output for word in WORDS)


def test_generate_answers_like_the_library(checkpoint, capsys):
    main(["generate", "--model", str(checkpoint), "--prompt", TEXT, "--num-slots", "16", "--max-new-tokens", "5"])
    printed = capsys.readouterr().out.splitlines()[0].split()
    model, tokenizer = tiny_llama(), word_tokenizer()
    with lococo.patched(model, lococo.LoCoCoConfig(16, block_size=16)):
        ids = tokenizer(TEXT, return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert printed == tokenizer.decode(output[0, 200:], skip_special_tokens=True).split()


def test_generate_holds_codes_and_says_what_it_holds(checkpoint, tmp_path, capsys):
    heads = lococo.save_heads(lococo.patch_model(tiny_llama(), lococo.LoCoCoConfig(16, block_size=8)), tmp_path / "h")
    said = {}
    for bits in ("16", "8", "8-4"):
        for how in (["--num-slots", "16", "--block-size", "8"], ["--heads", str(heads)]):
            arguments = ["--prompt", TEXT, "--max-new-tokens", "5", "--slot-bits", bits, *how]
            assert main(["generate", "--model", str(checkpoint), *arguments]) == 0
            said[bits, how[0]] = figures(capsys.readouterr().out)["cache"]
    assert len(set(said.values())) == 3 and said["8", "--heads"] == said["8", "--num-slots"]


def test_generate_with_heads(checkpoint, tmp_path, capsys):
    model = lococo.patch_model(tiny_llama(), lococo.LoCoCoConfig(16, block_size=8, gate_init=0.5))
    lococo.save_heads(model, tmp_path / "heads")
    status = main(["generate", "--model", str(checkpoint), "--prompt", TEXT, "--heads", str(tmp_path / "heads")])
    assert status == 0 and "(16 slots per layer)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-file", "missing.txt"], "missing.txt: no such file"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", ""], "Option '--prompt' requires an argument"),
        ([], "either --prompt-file or --prompt"),
        (["--prompt", "w1", "--prompt-file", "text.txt"], "either --prompt-file or --prompt"),
        (["--prompt", "w1 w2", "--num-slots", "0"], "num_slots must be an integer of at least 1, got 0"),
        (["--prompt", "w1 w2", "--question", "w3"], "chat template"),
        (["--prompt", "w1 w2", "--slot-bits", "8:4"], "slot bits must be written as 8, or as 8-4 for keys and values"),
        (["--prompt", "w1 w2", "--slot-bits", "5"], "slot_bits must be 16, 8 or 4, or two of them"),
        (["--prompt", "w1 w2", "--heads", "missing"], "missing"),
        (["--prompt", "w1 w2", "--method", "h20"], "unknown method 'h20': choose from full, streaming, "),
        (["--prompt", "w1 w2", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["--prompt", "w1 w2", "--device", "tpu9"], "--device must be cpu, cuda, cuda:1, ..., got 'tpu9'"),
        (["--prompt", "w1 w2", "--dtype", "float"], "--dtype"),
    ],
)
def test_bad_input_is_one_line_and_status_2(checkpoint, capsys, arguments, message):
    if message == "--dtype":
        arguments, message = [*arguments[:-1], "float99"], "--dtype must be float32, bfloat16, ..., got 'float99'"
    assert main(["generate", "--model", str(checkpoint), *arguments]) == 2
    (error,) = errors(capsys)
    assert message in error


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


def test_question_comes_after_the_text_in_chat_format():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}w0 {{ message.content }} w60 {% endfor %}"
    ids = prompt_ids(tokenizer, "w1 w2 w3", "w7", max_tokens=2)
    assert tokenizer.decode(ids[0]).split() == ["w0", "w1", "w2", "w7", "w60"]


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
