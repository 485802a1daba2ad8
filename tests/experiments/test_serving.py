"""The comparison inside vLLM, without it: what a stopped run goes on with."""

import json

import pytest
from tiny import patched_llama

import lococo
from experiments import serving
from lococo import LoCoCoConfig


def test_heads_that_were_trained_anew_are_measured_anew(tmp_path, monkeypatch):
    asked = []

    def apart(work):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(work["settings"])
        return {"holds": 1, "read": 1.0, "step": float(len(asked)), "seconds": 1.0}

    monkeypatch.setattr(serving, "_apart", apart)
    folder, output = str(tmp_path / "heads"), str(tmp_path / "vllm")
    options = ["--model", "m", "--heads", folder, "--requests", "1", "--lengths", "8", "16", "--output", output]
    monkeypatch.setattr("sys.argv", ["serving", *options])
    lococo.save_heads(patched_llama(LoCoCoConfig(12, block_size=4)), folder)
    with pytest.raises(KeyboardInterrupt):
        serving.main()
    assert asked == [None, {"heads": folder}]
    lococo.save_heads(patched_llama(LoCoCoConfig(16, block_size=4)), folder)
    asked[:] = ["stock at 8"]
    monkeypatch.setattr(serving, "_apart", lambda work: asked.append(work) or {"step": float(len(asked))})
    serving.main()
    assert [work["settings"] for work in asked[1:]] == [{"heads": folder}, None, {"heads": folder}]
    rows = json.loads((tmp_path / "vllm.json").read_text())["rows"]
    assert [row["step"] for row in rows] == [1.0, 2.0, 3.0, 4.0]
