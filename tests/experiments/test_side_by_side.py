"""The side by side with kvpress, with stand-ins for its presses: kvpress itself has an environment of its own."""

import argparse
import contextlib
import json
import sys

import numpy as np
import pytest
import torch
from tiny import tiny_ids, tiny_llama
from transformers import DynamicCache

from experiments import kvpress_presses, kvpress_table
from experiments import kvpress_side_by_side as side_by_side
from experiments.kvpress_presses import BLOCK, DENSE, READING, PressRow
from lococo import LoCoCoConfig
from lococo.compat import OUTPUT_CACHE
from lococo.data.texts import Window
from lococo.methods import Run, as_method
from lococo.metrics import mean_interval, token_nlls
from lococo.results.journal import Journal

BLOCK_TOKENS, SLOTS, LENGTH = 8, 8, 40


class KeepEnds:
    """Keeps the first two tokens and the last others."""

    def __init__(self, kept=SLOTS):
        self.kept = kept

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        assert attentions is None and hidden_states.shape[1] == kwargs["hidden_states"].shape[1]
        places = self.places(keys.shape[2])
        return keys[:, :, places], values[:, :, places]

    def places(self, entries):
        return [*range(2), *range(max(2, entries - self.kept + 2), entries)]


class KeepLoudest:
    """Keeps the entries of the largest attention, which it needs."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        received = attentions.sum(2).view(*keys.shape[:2], -1, keys.shape[2]).sum(2)
        places = received.topk(SLOTS).indices[..., None].expand(-1, -1, -1, keys.shape[-1])
        return keys.gather(2, places), values.gather(2, places)


class WhileReading(KeepEnds):
    """A context manager of the model, as kvpress's DecodingPress is."""

    @contextlib.contextmanager
    def __call__(self, model):
        def hook(module, args, kwargs, output):
            layer = kwargs[OUTPUT_CACHE].layers[module.layer_idx]
            places = self.places(layer.keys.shape[2])
            layer.keys, layer.values = layer.keys[:, :, places], layer.values[:, :, places]

        hooks = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
        try:
            yield
        finally:
            for each in hooks:
                each.remove()


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def ids():
    return tiny_ids(length=LENGTH + 1)


def masked_nlls(model, ids, visible):
    """Loss of the tokens after the first with only the pairs of (query, key) that ``visible`` allows; no cache."""
    mask = torch.full(visible.shape, torch.finfo(torch.float32).min).masked_fill(visible, 0)[None, None]
    with torch.no_grad():
        logits = model(ids[:, :-1], attention_mask=mask).logits[0]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


def test_ratio_keeps_exactly_what_is_wanted():
    wrong = [
        (kept, entries)
        for entries in range(2, 400)
        for kept in range(1, entries)
        if int(entries * (1 - kvpress_presses.ratio_keeping(kept, entries))) != kept
    ]
    assert not wrong


def test_after_a_prefill_only_the_kept_entries_are_seen(model, ids):
    start = LENGTH - BLOCK_TOKENS
    rows = [PressRow("ends", DENSE, KeepEnds()), PressRow("loud", DENSE, KeepLoudest(), needs_attentions=True)]
    nlls = kvpress_presses.nlls_after_prefill(model, rows, None, ids, start, SLOTS)
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    visible[start:, 2 : start - SLOTS + 2] = False
    torch.testing.assert_close(nlls["ends"], masked_nlls(model, ids, visible)[-BLOCK_TOKENS:])
    assert (nlls["loud"] - nlls["ends"]).abs().max() > 1e-3
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.model.layers[0].self_attn, "rotary_emb")


def test_presses_in_one_prefill_do_not_touch_each_other(model, ids):
    start = LENGTH - BLOCK_TOKENS
    rows = [PressRow("loud", DENSE, KeepLoudest(), needs_attentions=True), PressRow("ends", BLOCK, KeepEnds())]
    together = kvpress_presses.nlls_after_prefill(model, rows, None, ids, start, SLOTS)
    for row in rows:
        alone = kvpress_presses.nlls_after_prefill(model, [row], None, ids, start, SLOTS)
        torch.testing.assert_close(alone[row.name], together[row.name])


def test_enough_entries_are_the_full_cache(model, ids):
    start, full = LENGTH - BLOCK_TOKENS, token_nlls(model, ids)
    after = kvpress_presses.nlls_after_prefill(
        model, [PressRow("ends", DENSE, KeepEnds(start))], None, ids, start, start
    )
    torch.testing.assert_close(after["ends"], full[-BLOCK_TOKENS:])
    row = PressRow("ends", READING, WhileReading(LENGTH))
    torch.testing.assert_close(kvpress_presses.nlls_while_reading(model, row, ids, BLOCK_TOKENS, LENGTH), full)


def test_reading_in_blocks_is_our_own_reading_with_the_same_choice(model, ids):
    config = LoCoCoConfig.streaming_llm(SLOTS, num_sinks=2, block_size=BLOCK_TOKENS, positions="absolute")
    with as_method(model, config):
        ours = token_nlls(model, ids)
    row = PressRow("ends", READING, WhileReading())
    theirs = kvpress_presses.nlls_while_reading(model, row, ids, BLOCK_TOKENS, SLOTS)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kept", [SLOTS - 1, SLOTS + 1])
def test_another_number_of_entries_is_an_error(model, ids, kept):
    with pytest.raises(RuntimeError, match=rf"ends holds \[{kept}\] .* expected {SLOTS}"):
        kvpress_presses.nlls_after_prefill(model, [PressRow("ends", DENSE, KeepEnds(kept))], None, ids, 32, SLOTS)
    with pytest.raises(RuntimeError, match="expected 8"):
        row = PressRow("ends", READING, WhileReading(kept))
        kvpress_presses.nlls_while_reading(model, row, ids, BLOCK_TOKENS, SLOTS)


class MarkMiddle:
    """A context manager that leaves kvpress's marks on all but the first two and the last entries, as KVzip does."""

    def __init__(self, entries, kept=SLOTS):
        self.places = torch.tensor(sorted({*range(entries)} - {*KeepEnds(kept).places(entries)}))

    @contextlib.contextmanager
    def __call__(self, model):
        yield
        for layer in model.model.layers:
            heads = torch.arange(2).repeat_interleave(len(self.places))
            layer.self_attn.masked_key_indices = (torch.zeros_like(heads), heads, self.places.repeat(2))


def test_marked_entries_are_as_good_as_gone(model, ids):
    start = LENGTH - BLOCK_TOKENS
    rows = [PressRow("ends", DENSE, KeepEnds())]
    nlls = kvpress_presses.nlls_after_prefill(model, rows, MarkMiddle(start), ids, start, SLOTS)
    torch.testing.assert_close(nlls["kvpress-kvzip"], nlls["ends"])
    torch.testing.assert_close(token_nlls(model, ids), token_nlls(tiny_llama(), ids))  # no trace is left
    with pytest.raises(RuntimeError, match="keeps 36 entries in all, expected 8 times 4"):
        kvpress_presses.nlls_after_prefill(model, rows, MarkMiddle(start, SLOTS + 1), ids, start, SLOTS)


def test_caches_of_a_batch_are_those_of_rows_alone(model, ids):
    caches = []
    for seed in range(3):
        caches.append(DynamicCache())
        with torch.no_grad():
            model(tiny_ids(length=16, seed=seed), past_key_values=caches[-1])
    together = kvpress_presses.next_block_nlls(model, caches, ids, 32)
    for cache, row in zip(caches, together, strict=True):
        torch.testing.assert_close(kvpress_presses.next_block_nlls(model, [cache], ids, 32)[0], row)


def window(domain, document, seed=0, length=LENGTH + 1):
    return Window(domain, document, 0, tiny_ids(length=length, seed=seed), length)


def test_any_part_of_the_windows_is_balanced_over_domains():
    windows = [window(domain, str(index)) for domain in "abc" for index in range(3)]
    ordered = side_by_side.one_after_another(windows)
    assert [(each.domain, each.document) for each in ordered] == [(d, str(i)) for i in range(3) for d in "abc"]


def test_sums_are_of_the_last_block_and_of_all_but_the_first():
    nlls = torch.arange(12.0)
    assert side_by_side.sums(nlls, 4) == {"last": 8 + 9 + 10 + 11, "all": sum(range(4, 12))}
    assert side_by_side.sums(nlls[-4:], 4) == {"last": 38.0}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(side_by_side, "BLOCK_SIZE", BLOCK_TOKENS)


def test_a_killed_run_measures_only_what_is_missing(model, tmp_path, small_blocks, monkeypatch):
    windows = [window("a", "x"), window("b", "y", seed=1)]
    runs = [Run("full", None), Run("h2o", LoCoCoConfig.h2o(SLOTS, block_size=BLOCK_TOKENS))]
    presses = [PressRow("kvpress-ends", DENSE, KeepEnds()), PressRow("kvpress-reading", READING, WhileReading())]

    def measure():
        journal = Journal(tmp_path / "journal")
        return side_by_side.measure(model, "tiny", windows, runs, presses, None, journal)

    first = measure()
    assert [*first] == ["full", "h2o", "kvpress-ends", "kvpress-reading"]
    assert all(len(rows) == 2 for rows in first.values())
    assert [row.keys() for row in first["kvpress-ends"]] == [{"last"}] * 2
    assert [row.keys() for row in first["kvpress-reading"]] == [{"last", "all"}] * 2
    lines = (tmp_path / "journal").read_text().splitlines()
    assert len(lines) == 2 * 4
    (tmp_path / "journal").write_text("\n".join(lines[:-1]) + '\n{"key": "cut')
    counted = []
    monkeypatch.setattr(side_by_side, "losses", lambda *args: counted.append("ours"))
    again = measure()
    assert again == first and not counted


def figures(last, every=None):
    return {"last": last * BLOCK_TOKENS, **({} if every is None else {"all": every * (LENGTH - BLOCK_TOKENS)})}


def test_both_sides_are_joined_over_the_same_tokens(tmp_path):
    windows = [window("a", "x"), window("a", "x", 1), window("b", "y", 2)]
    found = {
        "full": [figures(1, 1), figures(2, 2), figures(3, 3)],
        "h2o": [figures(2, 2), figures(3, 4), figures(4, 4)],
        "lococo": [figures(1.5, 1.5), figures(2.5, 2.5), figures(3.5, 3.5)],
        "kvpress-near": [figures(1.25), figures(2.25), figures(3.25)],
    }
    reads = {"full": "whole", "h2o": READING, "lococo": READING, "kvpress-near": DENSE}
    rows = kvpress_table.join(windows, found, reads, SLOTS, BLOCK_TOKENS)
    assert [row["method"] for row in rows] == ["full", "lococo", "h2o", "kvpress-near"]
    by_name = {row["method"]: row for row in rows}
    near, ours = by_name["kvpress-near"], by_name["lococo"]
    assert near["gap_ratio"] == pytest.approx(0.25) and near["minus_lococo"] == pytest.approx(-0.25)
    assert (near["low"], near["high"]) == pytest.approx((-0.25, -0.25))  # the same in every document
    assert near["ppl"] == pytest.approx(np.exp(2.25)) and near["nll_a"] == pytest.approx(1.75)
    assert near["gap_ratio_all"] is None and near["tokens_all"] is None
    assert ours["gap_ratio"] == pytest.approx(0.5) and ours["gap_ratio_all"] == pytest.approx(0.5 / (4 / 3))
    assert (ours["tokens"], ours["tokens_all"], ours["tokens_read"]) == (24, 96, 120)
    assert by_name["full"]["num_slots"] is None and near["num_slots"] == SLOTS
    assert len({tuple(row) for row in rows}) == 1
    json.dumps(rows)
    kvpress_table.plot(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_interval_holds_the_difference_and_windows_of_a_document_stay_together():
    windows = [window("a", "x"), window("a", "x", 1), window("b", "y", 2), window("b", "x", 3)]
    assert kvpress_table.by_document(windows, [1, 2, 3, 4]).tolist() == [3, 3, 4]
    generator = np.random.default_rng(0)
    tokens = np.full(40, 10.0)
    mine, other = generator.normal(30, 3, 40), generator.normal(28, 3, 40)
    low, high = mean_interval(mine - other, tokens)
    assert low < (mine - other).sum() / 400 < high
    assert (-high, -low) == pytest.approx(mean_interval(other - mine, tokens))


@pytest.mark.parametrize("length", [1000, 256, 2049])
def test_length_that_ends_inside_a_block_is_refused(length):
    with pytest.raises(ValueError, match=f"multiple of 128.*got {length}"):
        side_by_side.check_length(length, 128)


@pytest.mark.parametrize(
    "arguments, message",
    [(["--data", "missing.jsonl"], "no such file: missing.jsonl"), (["--limit", "0"], "--limit must be at least 1")],
)
def test_wrong_options_are_named(arguments, message, monkeypatch, capsys, tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    given = ["side", "--model", "m", "--heads", "h", "--data", str(tmp_path / "a.jsonl"), *arguments]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit):
        side_by_side.parse()
    assert message in capsys.readouterr().err


def test_without_kvpress_it_says_what_to_install(monkeypatch):
    options = argparse.Namespace()
    monkeypatch.setattr(side_by_side, "parse", lambda: options)
    monkeypatch.setattr(side_by_side.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="make side-by-side"):
        side_by_side.main()
