"""What is lost on tokens that repeat, by how far back they stood."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from tiny import tiny_ids, tiny_llama

from lococo.data.texts import Cut, Text, Window
from lococo.evaluation.losses import measure_losses
from lococo.evaluation.perplexity import evaluate_perplexity
from lococo.evaluation.recall import _by_format, recall_rows
from lococo.evaluation.repeats import NEAREST, NGRAM, by_distance, repeat_distances
from lococo.methods import plan_runs
from lococo.metrics import mean_interval, token_nlls
from lococo.results.journal import Journal

FIRST = 40
VOCABULARY = tiny_llama().config.vocab_size


def naive_distance(ids, place, ngram):
    """By search from the place backwards."""
    if place < ngram - 1:
        return 0
    for before in range(place - 1, ngram - 2, -1):
        if ids[before - ngram + 1 : before + 1] == ids[place - ngram + 1 : place + 1]:
            return place - before
    return 0


@pytest.mark.parametrize("ngram", [1, 2, 4])
@pytest.mark.parametrize("vocabulary", [2, 9])
def test_distances_equal_a_naive_search(ngram, vocabulary):
    ids = torch.randint(vocabulary, (300,), generator=torch.Generator().manual_seed(ngram)).tolist()
    found = repeat_distances(ids, ngram)
    assert found.tolist() == [naive_distance(ids, place, ngram) for place in range(len(ids))]
    assert found.any()


def test_a_text_that_repeats_itself_does_so_at_its_length():
    ids = tiny_ids(1, 100)[0].tolist()
    expected = [0] * (100 + NGRAM - 1) + [100] * (100 - NGRAM + 1)
    assert len(set(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))) == 97, "this text must not repeat by chance"
    assert repeat_distances(ids + ids).tolist() == expected


def repeating(seed, length=500, back=150):
    """A text of which many stretches stood from some to twice as many tokens before."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, VOCABULARY, back).tolist()
    while len(ids) < length:
        start = len(ids) - int(rng.integers(back // 3, back))
        ids += ids[start : start + 12] + rng.integers(3, VOCABULARY, 5).tolist()
    return ids[:length]


def test_losses_by_distance_equal_naive_sums():
    ids = repeating(0)
    nlls = torch.rand(len(ids) - FIRST)
    expected = defaultdict(lambda: [0.0, 0])
    for place in range(FIRST, len(ids)):
        distance = naive_distance(ids, place, NGRAM)
        if distance >= NEAREST:
            edge = max(2**power for power in range(20) if 2**power <= distance)
            expected[edge][0] += nlls[place - FIRST].item()
            expected[edge][1] += 1
    assert set(expected) == {64, 128}
    found = by_distance(nlls, ids)
    assert found == {edge: (pytest.approx(nll), tokens) for edge, (nll, tokens) in expected.items()}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def texts():
    seeds = [("a", 2), ("a", 3), ("b", 4), ("b", 5)]
    return [Window(domain, str(seed), 0, torch.tensor([repeating(seed)]), 500) for domain, seed in seeds]


def test_rows_equal_means_by_hand_and_are_what_the_full_cache_does_not_lose(model, tmp_path):
    runs = plan_runs(["full", "h2o"], [24, 512], 8)
    windows = texts()
    losses = measure_losses(model, windows, runs, FIRST, Journal(tmp_path / "j"), by_repeat=True)
    rows = {(row["domain"], row["method"], row["num_slots"], row["distance"]): row for row in recall_rows(losses)}
    assert {key[3] for key in rows} == {64, 128}
    enough = [row for key, row in rows.items() if key[2] == 512]
    assert enough and all(abs(row["lost"]) < 1e-5 for row in enough), "with a slot for every token nothing is lost"
    full, h2o = [], []
    for window in windows:
        ids = window.ids[0].tolist()
        chosen = [128 <= naive_distance(ids, place, NGRAM) < 256 for place in range(FIRST, 500)]
        full.append(token_nlls(model, window.ids, FIRST)[chosen].double())
        with runs[1].applied(model):
            h2o.append(token_nlls(model, window.ids, FIRST)[chosen].double())
    row = rows["all", "h2o", 24, 128]
    lost = torch.cat(h2o) - torch.cat(full)
    assert row["tokens"] == len(lost) and row["documents"] == 4
    assert row["lost"] == pytest.approx(lost.mean().item(), abs=1e-6) and abs(row["lost"]) > 1e-3
    sums = np.array([(one - other).sum().item() for one, other in zip(h2o, full, strict=True)])
    counts = np.array([len(one) for one in h2o])
    assert (row["lost_low"], row["lost_high"]) == pytest.approx(mean_interval(sums, counts), abs=1e-6)
    assert rows["a", "h2o", 24, 128]["nll"] == pytest.approx(torch.cat(h2o[:2]).mean().item(), abs=1e-6)


@pytest.mark.parametrize("sliding", [False, True])
def test_no_token_counts_twice_where_windows_of_several_lengths_overlap(model, tmp_path, sliding):
    """A window of 100 tokens that begins in the middle of one of 400 counts what that one counts."""
    documents = [Text("a", "long", repeating(2, 1000)), Text("a", "short", repeating(3, 130))]
    least = 130 if sliding else None
    cut = Cut((100, 400), FIRST, 9, min_length=least, sliding=sliding)
    windows = cut.windows("a.txt", documents)
    runs = plan_runs(["full"])
    losses = measure_losses(model, windows, runs, FIRST, Journal(tmp_path / "j"), read_once=True, by_repeat=True)
    places = defaultdict(list)  # of each token the window of most tokens before which it counts
    for window in sorted(windows, key=lambda window: -window.ids.shape[1]):
        ids = window.ids[0].tolist()
        for place in range(FIRST, len(ids)):
            places[window.document, window.start + place].append(naive_distance(ids, place, NGRAM))
    expected = sum(distances[0] >= NEAREST for distances in places.values())
    found = {group: measured.table[1].sum() for group, measured in losses[runs[0]].items()}
    assert sum(tokens for (_, domain), tokens in found.items() if domain == "all") == expected > 0


def test_the_command_writes_it_beside_the_perplexity(model, tmp_path):
    runs = plan_runs(["full", "streaming", "h2o"], [24], 8)
    evaluate_perplexity(model, texts(), runs, FIRST, tmp_path / "ppl", "command")
    rows = json.loads((tmp_path / "ppl_recall.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"full", "streaming", "h2o"}
    assert all(row["lost"] == 0 for row in rows if row["method"] == "full")
    assert (tmp_path / "ppl_recall.png").read_bytes().startswith(b"\x89PNG")
    assert "| all | h2o | 24 |" in (tmp_path / "ppl_recall.md").read_text()
    different = [Window("a", "b", 0, torch.arange(3, 60)[None], 57)]
    evaluate_perplexity(model, different, runs, FIRST, tmp_path / "once", "command")
    assert {path.name for path in tmp_path.glob("once*")} == {"once.json", "once.md", "once.png"}
    alone = [run for run in runs if run.name == "h2o"]
    evaluate_perplexity(model, texts(), alone, FIRST, tmp_path / "alone", "command")
    rows = json.loads((tmp_path / "alone_recall.json").read_text())["rows"]
    assert all(row["lost"] is row["lost_low"] is None and row["nll"] > 0 for row in rows)
    assert not (tmp_path / "alone_recall.png").exists()


def test_at_equal_bytes_a_panel_has_the_methods_of_a_format():
    """Each of them has a number of slots of its own there; a folder of heads may be called as a format is."""
    told = [
        ("h2o", 128, 128, "16"),
        ("h2o-slot-b64-8-4", 304, 64, "8-4"),
        ("lococo-8", 176, 64, "8"),
        ("lococo-8", 352, 64, "8"),
        ("lococo-mine-8", 176, 64, "16"),
    ]
    rows = [{"method": name, "num_slots": slots, "block_size": size} for name, slots, size, _ in told]
    bits = {name: each for name, _, _, each in told}
    panels = {title: list(lines) for title, lines in _by_format(rows, bits).items()}
    assert panels == {
        "16 bits, blocks of 128": ["h2o"],
        "8-4 bits, blocks of 64": ["h2o-slot"],
        "8 bits, blocks of 64": ["lococo 176", "lococo 352"],
        "16 bits, blocks of 64": ["lococo-mine-8"],
    }
