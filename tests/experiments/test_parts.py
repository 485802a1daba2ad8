"""Calibrated heads without one of their parts."""

import dataclasses
import json
import sys

import pytest
import torch
from tiny import patched_llama, tiny_ids, tiny_llama
from words import write_texts

import lococo
from experiments import parts
from lococo.state import patch_of
from lococo.training.recipes import default_recipe

IDS = tiny_ids(1, 61)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Whose networks and centroids are no new ones."""
    config, _ = default_recipe(16, 8)
    model = patched_llama(dataclasses.replace(config, slots_per_head=((24, 8), (6, 26))))
    torch.manual_seed(0)
    with torch.no_grad():
        for network in patch_of(model).networks.values():
            network.output.weight.normal_()
        for head in patch_of(model).heads.values():
            head.log_scale.fill_(0.5)
    return lococo.save_heads(model, tmp_path_factory.mktemp("heads") / "heads")


@torch.no_grad()
def test_every_variant_is_the_heads_without_one_part(heads):
    model, outputs = tiny_llama(), {}
    for run in parts.parts(str(heads)):
        with run.applied(model) as patched:
            outputs[run.name] = patched(IDS).logits
            config, patch = patch_of(patched).config, patch_of(patched)
            assert bool(patch.networks) == (run.name != "without learned scores")
            assert (config.slots_per_head is None) == (run.name == "without slots per head")
            assert (config.num_fused == 0) == (run.name == "without centroids")
            scales = [head.log_scale.item() for head in patch.heads.values() if head.log_scale is not None]
            assert scales == ([0.5] * 2 if config.has_mass else [])
            for network in patch.networks.values():
                assert network.output.weight.abs().max() > 0
            assert config.bits == ((8, 8) if run.name == "in 8 bits" else (16, 16))
    assert not lococo.is_patched(model) and len(outputs) == 6
    with lococo.patched(model, heads=heads):
        assert torch.equal(outputs.pop("all parts"), whole := model(IDS).logits)
    assert all((each - whole).abs().max() > 1e-3 for each in outputs.values())


def test_the_command_writes_what_parts_are_worth(checkpoint, heads, tmp_path, monkeypatch, capsys):
    texts = write_texts(tmp_path / "words.jsonl")
    monkeypatch.setattr(parts, "FIRST", 20)
    options = [
        "--model",
        checkpoint,
        "--device",
        "cpu",
        "--data",
        texts,
        "--heads",
        heads,
        "--length",
        60,
        "--documents",
        2,
    ]
    monkeypatch.setattr(sys, "argv", ["parts", *map(str, options), "--output", str(tmp_path / "parts")])
    parts.main()
    rows = json.loads((tmp_path / "parts.json").read_text())["rows"]
    by_method = {row["method"]: row for row in rows if row["domain"] == "all"}
    assert list(by_method) == ["full", "h2o", "h2o-slot", *(run.name for run in parts.parts(str(heads)))]
    assert {row["block_size"] for row in rows} == {None, 8}, "of the heads, for what they are compared with, too"
    assert all(row["seconds"] > 0 for row in by_method.values())
    # 60 tokens of a key and a value of 8 numbers in float32.
    assert by_method["full"]["bytes_per_head"] == 60 * 2 * 8 * 4
    assert by_method["without learned scores"]["bytes_per_head"] < by_method["all parts"]["bytes_per_head"]
    assert by_method["in 8 bits"]["bytes_per_head"] < by_method["all parts"]["bytes_per_head"]
    assert by_method["h2o"]["worth"] is None and by_method["all parts"]["worth"] == 0
    for name in ("without centroids", "in 8 bits"):
        lost = by_method[name]["nll"] - by_method["all parts"]["nll"]
        assert by_method[name]["worth"] == pytest.approx(lost) and lost != 0
        assert by_method[name]["worth_low"] <= lost <= by_method[name]["worth_high"]
    assert (tmp_path / "parts.png").stat().st_size > 1000 and "without centroids" in capsys.readouterr().out
    assert not (tmp_path / "parts.partial.jsonl").exists()
