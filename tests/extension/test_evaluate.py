"""The table of extended models says what they lose, on the same tokens at every length."""

import json
import math
import shutil

import pytest
import torch
from extended import command, write_documents
from tiny import tiny_ids
from transformers import AutoModelForCausalLM

import lococo
from lococo.cli.main import main
from lococo.extension.evaluate import by_length

LENGTHS = [32, 64]


@pytest.fixture
def heldout(tmp_path):
    (tmp_path / "essays").mkdir()
    rows = [*tiny_ids(2, 70, seed=8).tolist(), tiny_ids(1, 30, seed=9)[0].tolist()]
    return write_documents(tmp_path / "essays" / "heldout.jsonl", rows)


def evaluate(checkpoint, heldout, output, *more):
    given = ["eval", "extended", "--model", checkpoint, "--data", heldout, "--output", output, "--device", "cpu"]
    words = [*given, "--lengths", *LENGTHS, "--first", 8, "--documents", 2, "--num-slots", 16, "--block-size", 8]
    return main([str(word) for word in [*words, *more]])


def naive_nll(model, rows, length):
    """Tokens 8 to 63 of each row, in windows that overlap by 8."""
    losses = []
    for row in rows:
        for start in range(0, 64 - 8, length - 8):
            window = row[start : min(start + length, 64)]
            with torch.no_grad():
                said = model(window[None]).logits[0].log_softmax(dim=-1)
            losses += [-said[place - 1, window[place]].item() for place in range(8, len(window))]
    assert len(losses) == 2 * 56
    return math.fsum(losses) / len(losses)


def test_figures_are_those_of_the_loaded_models(checkpoint, text, heldout, tmp_path):
    folders = []
    for method in ("lococo", "full"):
        assert command(checkpoint, text, tmp_path, "--factor", 4, "--method", method) == 0
        folders.append((tmp_path / "out").rename(tmp_path / f"{method}-4"))
    output = tmp_path / "extension"
    assert evaluate(checkpoint, heldout, output, "--extensions", *folders) == 0
    result = json.loads(output.with_suffix(".json").read_text())
    rows = {(row["method"], row["trained"], row["domain"], row["length"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 4 * 2 * 2
    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    slots = lococo.LoCoCoConfig(16, block_size=8, positions="slot")
    models = {
        ("full", None): plain,
        ("lococo-4", 64): lococo.load_extended(checkpoint, folders[0]),
        ("full-4", 64): lococo.load_extended(checkpoint, folders[1]),
    }
    ids = tiny_ids(2, 70, seed=8)
    for (method, trained), model in models.items():
        for length in LENGTHS:
            for domain in ("all", "essays"):
                row = rows[method, trained, domain, length]
                assert row["nll"] == pytest.approx(naive_nll(model, ids, length), abs=2e-5), (method, trained, length)
                assert row["ppl"] == pytest.approx(math.exp(row["nll"]))
                assert (row["documents"], row["tokens"]) == (2, 112)
    with lococo.patched(plain, slots):
        found = rows["lococo-uncalibrated-slot", None, "all", 64]["nll"]
        assert found == pytest.approx(naive_nll(plain, ids, 64), abs=2e-5)
    assert result["rows"][0]["num_slots"] is None
    table = output.with_suffix(".md").read_text()
    assert "| domain | trained | method | num_slots | 32 | 64 |" in table
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial.jsonl"))


def test_rows_of_one_name_are_refused(checkpoint, text, heldout, tmp_path, capsys):
    assert command(checkpoint, text, tmp_path, "--factor", 4) == 0
    other = shutil.copytree(tmp_path / "out", tmp_path / "other" / "out")
    assert evaluate(checkpoint, heldout, tmp_path / "result", "--extensions", tmp_path / "out", other) == 2
    assert "--extensions must have different names, got out, out" in capsys.readouterr().err


def test_a_killed_run_goes_on(checkpoint, text, heldout, tmp_path, monkeypatch):
    assert command(checkpoint, text, tmp_path, "--factor", 4) == 0
    given = ["--extensions", tmp_path / "out", "--methods", "full"]
    assert evaluate(checkpoint, heldout, tmp_path / "whole", *given) == 0
    from lococo.evaluation import losses as extended

    counted, real = [], extended.token_nlls

    def measured(*arguments):
        counted.append(1)
        if len(counted) == 7:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(extended, "token_nlls", measured)
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, heldout, tmp_path / "killed", *given)
    assert evaluate(checkpoint, heldout, tmp_path / "killed", *given) == 0
    windows = 2 * (3 + 1) * 2  # documents, windows of 32 and of 64, models
    assert len(counted) == windows + 1
    whole, killed = (json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in ("whole", "killed"))
    assert killed == whole


def test_table_has_a_column_per_length():
    common = {"domain": "all", "trained": None, "method": "full", "num_slots": None}
    rows = [{**common, "length": 32, "ppl": 3.0}, {**common, "length": 64, "ppl": 2.0}]
    assert by_length([*rows, {**rows[0], "trained": 64, "ppl": 1.0}]) == [
        {**common, "32": 3.0, "64": 2.0},
        {**common, "trained": 64, "32": 1.0},
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--extensions", "nowhere"], "extension.json does not exist"),
        (["--methods", "fast"], "unknown method 'fast'"),
        (["--lengths", "4"], "--first must lie between 1 and 3"),
        (["--lengths", "900"], "heldout.jsonl: no document has 900 tokens"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_bad_input_is_refused(words, message, checkpoint, heldout, tmp_path, capsys):
    assert evaluate(checkpoint, heldout, tmp_path / "result", *words) == 2
    assert message in capsys.readouterr().err
