import json
import math

import numpy as np
import pytest
import torch
from tiny import patched_llama, tiny_ids, tiny_llama
from words import Characters

import lococo
from lococo import LoCoCoConfig, patched
from lococo.data.texts import Cut, read_texts, read_windows, windows
from lococo.evaluation import losses as losses_module
from lococo.evaluation import perplexity as perplexity_module
from lococo.methods import chosen_config, plan_runs
from lococo.metrics import gap_interval, gap_ratio, mean_interval, perplexity, token_nlls
from lococo.results.journal import Journal
from lococo.results.tables import markdown_table


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def by_hand(model, ids, first):
    with torch.no_grad():
        probabilities = model(ids).logits[0].double().log_softmax(-1)
    return torch.stack([-probabilities[index - 1, ids[0, index]] for index in range(first, ids.shape[1])])


@pytest.mark.parametrize("first", [1, 17])
@pytest.mark.parametrize("chunk", [2048, 7])
def test_token_nlls_equal_one_pass_by_hand(model, first, chunk, monkeypatch):
    monkeypatch.setattr("lococo.metrics.CHUNK", chunk)
    ids = tiny_ids(1, 50)
    torch.testing.assert_close(token_nlls(model, ids, first).double(), by_hand(model, ids, first), rtol=0, atol=1e-5)
    with patched(model, LoCoCoConfig.h2o(12, block_size=8)):
        compressed = by_hand(model, ids, first)
        torch.testing.assert_close(token_nlls(model, ids, first).double(), compressed, rtol=0, atol=1e-5)
    assert (compressed - by_hand(model, ids, first)).abs().max() > 1e-3


def test_perplexity_is_the_exponential_of_the_mean_over_all_tokens(model):
    texts = [tiny_ids(1, 50, seed=1), tiny_ids(1, 20, seed=2)]
    nlls = torch.cat([by_hand(model, ids, 1) for ids in texts])
    assert perplexity(model, texts) == pytest.approx(math.exp(nlls.mean()), rel=1e-5)
    as_text = "some text of a few words"
    ids = Characters()(as_text, return_tensors="pt").input_ids
    assert perplexity(model, as_text, Characters()) == pytest.approx(perplexity(model, [ids]))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "texts is empty"),
        (["abc"], "pass the model's tokenizer"),
        ([tiny_ids(1, 1)], "first"),
        ([tiny_ids(2, 20)], r"shape \(1, tokens\), got \(2, 20\)"),
        (tiny_ids(1, 20), r"shape \(1, tokens\), got \(20,\)"),
    ],
)
def test_bad_texts_are_refused(model, texts, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, texts)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "books" / "heldout.jsonl"
    path.parent.mkdir()
    lines = [
        {"id": str(index), "text": "".join(chr(97 + (index * 7 + i * i) % 26) for i in range(90))} for index in (1, 2)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


METHODS = ("full", "h2o", "h2o-slot", "lococo-uncalibrated")


def run(model, corpus, output, methods=METHODS, length=40, budgets=(12,), **changes):
    runs = plan_runs(methods, budgets, block_size=8, heads=changes.pop("heads", ()))
    lengths = length if isinstance(length, tuple) else (length,)
    texts = read_windows([corpus], Characters(), Cut(lengths, first=20, limit=3, **changes))
    return perplexity_module.evaluate_perplexity(model, texts, runs, first=20, output=output, command="command")


def test_table_holds_what_it_says(model, corpus, tmp_path):
    rows = run(model, corpus, tmp_path / "out" / "perplexity")
    content = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    assert content["rows"] == rows and content["command"] == "command"
    assert {row["domain"] for row in rows} == {"books", "all"}
    cell = {(row["domain"], row["method"]): row for row in rows}
    full, h2o, h2o_slot, ours = (cell["books", name]["nll"] for name in dict.fromkeys(row["method"] for row in rows))
    assert cell["books", "full"]["gap_ratio"] is None
    assert cell["books", "lococo-uncalibrated"]["gap_ratio"] == pytest.approx(
        (ours - full) / (min(h2o, h2o_slot) - full)
    )
    assert cell["books", "full"]["tokens"] == 3 * 20
    texts = list(windows(read_texts(str(corpus), Characters(), Cut((40,), first=20, limit=3)), 40, 3))
    expected = torch.stack([token_nlls(model, window.ids, 20).mean() for window in texts]).mean().item()
    assert full == pytest.approx(expected)
    assert (tmp_path / "out" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "perplexity.md").read_text().count("\n") == len(rows) + 6


def test_killed_run_goes_on_where_it_stopped(model, corpus, tmp_path, monkeypatch):
    expected = run(model, corpus, tmp_path / "whole")
    calls = []

    def counted(*args):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(args)
        return token_nlls(*args)

    monkeypatch.setattr(losses_module, "token_nlls", counted)
    with pytest.raises(KeyboardInterrupt):
        run(model, corpus, tmp_path / "cut")
    assert not (tmp_path / "cut.json").exists()
    with (tmp_path / "cut.partial.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    again = []
    monkeypatch.setattr(losses_module, "token_nlls", lambda *args: again.append(args) or token_nlls(*args))
    assert run(model, corpus, tmp_path / "cut") == expected
    assert len(calls) + len(again) == 4 * 3
    assert not (tmp_path / "cut.partial.jsonl").exists()


@pytest.mark.parametrize("change", ["name", "dtype", "first", "lengths", "nothing"])
def test_losses_of_another_model_or_of_other_windows_are_not_gone_on_with(corpus, tmp_path, monkeypatch, change):
    monkeypatch.setattr(Journal, "finish", lambda journal: None)
    counted, model = [], tiny_llama()
    monkeypatch.setattr(losses_module, "token_nlls", lambda *args: counted.append(args) or token_nlls(*args))
    for attempt in range(2):
        counted.clear()
        if attempt:
            model.name_or_path = "other" if change == "name" else model.name_or_path
            model = model.double() if change == "dtype" else model
        first = 21 if attempt and change == "first" else 20
        lengths = (30, 40) if attempt and change == "lengths" else (40,)
        windows = read_windows([corpus], Characters(), Cut(lengths, first=20, limit=2, per_document=1))
        runs = plan_runs(["full"], [12], 8)
        perplexity_module.evaluate_perplexity(model, windows, runs, first, tmp_path / "x", "command")
    assert len(counted) == (0 if change == "nothing" else 2)


def test_unknown_method_and_short_texts_are_named_before_any_work(model, corpus, tmp_path):
    with pytest.raises(ValueError, match="unknown method 'h20'"):
        run(model, corpus, tmp_path / "x", methods=["full", "h20"])
    with pytest.raises(ValueError, match="no document has 400 tokens"):
        run(model, corpus, tmp_path / "x", length=400)
    with pytest.raises(ValueError, match="no document has 95 tokens"):
        run(model, corpus, tmp_path / "x", length=400, min_length=95)
    assert list(tmp_path.iterdir()) == [corpus.parent]


def test_a_file_of_short_texts_is_measured_on_shorter_ones_if_allowed(model, corpus, tmp_path):
    rows = run(model, corpus, tmp_path / "x", methods=["full"], length=160, min_length=30)
    assert {(row["length"], row["tokens"]) for row in rows} == {(80, 2 * 60)}


def test_trained_heads_are_measured_at_their_own_budget(model, corpus, tmp_path):
    config = lococo.LoCoCoConfig(12, block_size=8, kernel_size=5, gate_init=0.5, slots_per_head=((16, 8), (9, 15)))
    with lococo.patched(model, config):
        lococo.save_heads(model, tmp_path / "heads")
        texts = read_windows([corpus], Characters(), Cut((40,), first=20, limit=3))
        expected = torch.cat([token_nlls(model, window.ids, 20) for window in texts]).mean().item()
    rows = run(model, corpus, tmp_path / "x", heads=[str(tmp_path / "heads")])
    (ours,) = [row for row in rows if row["method"] == "lococo" and row["domain"] == "books"]
    assert (ours["num_slots"], ours["nll"]) == (12, pytest.approx(expected))
    assert ours["gap_ratio"] is not None
    with pytest.raises(ValueError, match="block_size=8, compare them at that size"):
        plan_runs(["full"], [12], 16, [str(tmp_path / "heads")])


def test_what_is_not_said_is_that_of_the_heads(tmp_path):
    folders = []
    for slots, block in ((12, 8), (20, 8), (12, 5)):
        folders.append(str(tmp_path / f"{slots}-{block}"))
        lococo.save_heads(patched_llama(lococo.LoCoCoConfig(slots, block_size=block)), folders[-1])

    def planned(*args, **kwargs):
        return [(run.name, run.num_slots, run.config.block_size) for run in plan_runs(["h2o"], *args, **kwargs)]

    assert planned() == [("h2o", 512, 512)]
    assert planned([24, 600]) == [("h2o", 24, 24), ("h2o", 600, 24)]
    assert planned(heads=folders[:1]) == [("h2o", 12, 8), ("lococo", 12, 8)]
    assert planned(heads=folders[:2]) == [("h2o", 12, 8), ("h2o", 20, 8), ("lococo", 12, 8), ("lococo", 20, 8)]
    assert planned([30], heads=folders[:1]) == [("h2o", 30, 8), ("lococo", 12, 8)]
    with pytest.raises(ValueError, match="12-5 have block_size=5, compare them at that size"):
        planned(heads=folders)
    with pytest.raises(ValueError, match="12-8 have block_size=8, compare them at that size"):
        planned([12], 5, folders)


def test_heads_of_equal_slots_are_told_apart(tmp_path):
    folders = [str(tmp_path / name) for name in ("one/heads", "two/heads", "two/other", "larger")]
    for folder, slots in zip(folders, (12, 12, 12, 20), strict=True):
        lococo.save_heads(patched_llama(lococo.LoCoCoConfig(slots, block_size=8)), folder)

    def names(*chosen):
        return [run.name for run in plan_runs([], heads=[folders[each] for each in chosen])]

    assert names(0, 3) == ["lococo", "lococo"], "other slots tell them apart"
    assert names(1, 2) == ["lococo-heads", "lococo-other"]
    assert names(0, 1) == ["lococo-one/heads", "lococo-two/heads"]
    assert names(0, 0) == ["lococo"], "the same twice is one"


CHOICES = {
    "slots of heads": ({"heads": "HEADS", "num_slots": 12}, "heads have .*: leave out --num-slots$"),
    "method of heads": ({"heads": "HEADS", "method": "h2o", "block_size": 8}, "leave out --method, --block-size$"),
    "full of heads": ({"heads": "HEADS", "method": "full"}, "leave out --method$"),
    "bits of full": ({"method": "full", "slot_bits": "8"}, "no codes: leave out --slot-bits$"),
    "bits": ({"slot_bits": "7"}, "7"),
    "method": ({"method": "h20"}, "unknown method 'h20'"),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_that_another_leaves_no_room_for_is_refused(choice, tmp_path):
    chosen, message = CHOICES[choice]
    lococo.save_heads(patched_llama(lococo.LoCoCoConfig(12, block_size=8)), tmp_path / "heads")
    chosen = {name: str(tmp_path / "heads") if value == "HEADS" else value for name, value in chosen.items()}
    with pytest.raises(ValueError, match=message):
        chosen_config(**chosen, spelled=lambda name: f"--{name.replace('_', '-')}")


def test_a_choice_of_one_method(tmp_path):
    lococo.save_heads(patched_llama(lococo.LoCoCoConfig(12, block_size=8)), tmp_path / "heads")
    assert chosen_config() == lococo.LoCoCoConfig() and chosen_config("full", 12) is None
    assert chosen_config(num_slots=20) == lococo.LoCoCoConfig(20, block_size=20)
    assert chosen_config("h2o", 600, 8) == lococo.LoCoCoConfig.h2o(600, block_size=8)
    trained = chosen_config(heads=str(tmp_path / "heads"), slot_bits="8-4")
    assert trained == lococo.LoCoCoConfig(12, block_size=8, slot_bits=(8, 4))


def test_codes_are_methods_of_their_own_beside_the_full_cache_and_h2o_without(model, corpus, tmp_path):
    runs = plan_runs(["full", "h2o"], [12], 8, slot_bits=["16", "8", "8-4", "4-4"])
    bits = [run.config and run.config.slot_bits for run in runs]
    assert [run.name for run in runs] == ["full", "h2o", "h2o-8", "h2o-8-4", "h2o-4"] and bits == [
        None,
        16,
        8,
        (8, 4),
        4,
    ]
    texts = read_windows([corpus], Characters(), Cut((60,), first=20, limit=3))
    output = tmp_path / "codes"
    rows = perplexity_module.evaluate_perplexity(model, texts, runs, first=20, output=output, command="command")
    by_method = {row["method"]: row for row in rows if row["domain"] == "all"}
    assert len({row["nll"] for row in by_method.values()}) == 5
    expected = []
    for window in texts:
        with patched(model, LoCoCoConfig.h2o(12, block_size=8, slot_bits=8)):
            expected.append(by_hand(model, window.ids, 20))
    assert by_method["h2o-8"]["nll"] == pytest.approx(torch.cat(expected).mean().item(), rel=1e-6)


def test_several_lengths_and_budgets_each_have_rows_and_pictures(model, corpus, tmp_path):
    rows = run(model, corpus, tmp_path / "many", length=(30, 60), budgets=(12, 18))
    assert {(row["length"], row["num_slots"]) for row in rows} == {
        (length, slots) for length in (30, 60) for slots in (None, 12, 18)
    }
    (alone,) = [row for row in rows if (row["domain"], row["length"], row["method"]) == ("books", 60, "full")]
    short = run(model, corpus, tmp_path / "one", length=60, methods=["full"])
    assert alone["nll"] == pytest.approx(short[0]["nll"], abs=1e-9)
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"many.png", "many_slots.png", "many_length.png"}


def test_a_window_that_another_begins_with_is_not_read_by_itself(model, corpus, tmp_path, monkeypatch):
    alone = [run(model, corpus, tmp_path / "x", length=length, per_document=1) for length in (30, 50, 60)]
    read = []
    monkeypatch.setattr(losses_module, "token_nlls", lambda *args: read.append(args) or token_nlls(*args))
    rows = run(model, corpus, tmp_path / "y", length=(30, 50, 60), per_document=1)
    assert [args[1].shape for args in read] == len(METHODS) * 2 * [(1, 60)]

    def by_group(rows):
        return {(row["domain"], row["method"], row["length"]): (row["nll"], row["tokens"]) for row in rows}

    expected = by_group(sum(alone, []))
    assert by_group(rows) == {group: (pytest.approx(nll, abs=1e-6), count) for group, (nll, count) in expected.items()}


def test_sliding_measures_the_same_tokens_at_every_length(model, corpus, tmp_path):
    rows = run(model, corpus, tmp_path / "x", methods=["full"], length=(30, 60, 200), min_length=50, sliding=True)
    assert [(row["length"], row["tokens"], row["documents"]) for row in rows if row["domain"] == "all"] == [
        (30, 2 * 70, 2),
        (60, 2 * 70, 2),
        (90, 2 * 70, 2),
    ]
    (whole,) = [row["nll"] for row in rows if row["length"] == 90 and row["domain"] == "all"]
    texts = read_texts(str(corpus), Characters(), Cut((30,), first=20, limit=3))
    expected = torch.cat([token_nlls(model, torch.tensor([text.ids]), 20) for text in texts]).mean().item()
    assert whole == pytest.approx(expected)


def test_documents_of_the_same_place_in_two_files_stay_apart(model, tmp_path):
    for name, text in (("a", "abcdefgh" * 10), ("b", "zyxwvuts" * 10)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}))
    cut = Cut((40,), first=20, limit=1)
    (full,) = plan_runs(["full"], [12], 8)

    def measure(*names):
        texts = read_windows([tmp_path / f"{name}.jsonl" for name in names], Characters(), cut)
        journal = Journal(tmp_path / f"{len(names)}{names[0]}.partial.jsonl")
        return perplexity_module.perplexity_rows(model, texts, [full], 20, journal)[0]

    both = measure("a", "b")
    assert both["documents"] == 2
    assert both["nll"] == pytest.approx((measure("a")["nll"] + measure("b")["nll"]) / 2)


def test_documents_of_one_name_stay_apart_and_a_file_named_twice_counts_once(model, tmp_path):
    files = [tmp_path / folder / "books" / "heldout.jsonl" for folder in ("one", "two")]
    for path, text in zip(files, ("abcdefgh" * 10, "zyxwvuts" * 10), strict=True):
        path.parent.mkdir(parents=True)
        path.write_text(2 * (json.dumps({"id": "same", "text": text}) + "\n"))
    cut = Cut((40,), first=20, limit=2, per_document=1)
    found = read_windows([*files, files[0]], Characters(), cut)
    assert len({(window.domain, window.document) for window in found}) == len(found) == 4
    (full,) = plan_runs(["full"], [12], 8)
    rows = perplexity_module.perplexity_rows(model, found, [full], 20, Journal(tmp_path / "x.partial.jsonl"))
    assert {row["documents"] for row in rows} == {4}
    expected = [token_nlls(model, window.ids, 20).mean().item() for window in found]
    assert rows[0]["nll"] == pytest.approx(sum(expected) / 4)


def test_bytes_are_those_of_windows_as_long_as_they_are(model, tmp_path):
    """A file of short texts, measured on shorter windows."""
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "abcdefgh" * 4}))
    rows = run(model, tmp_path / "short.jsonl", tmp_path / "x", methods=["full"], length=60, min_length=30)
    assert {(row["length"], row["bytes_per_head"]) for row in rows} == {(30, 30 * 2 * 8 * 4)}


@pytest.mark.parametrize("change", [{"seed": 1}, {"rope_theta": 100.0}], ids=["weights", "config"])
def test_losses_of_another_model_in_the_same_place_are_not_gone_on_with(corpus, tmp_path, monkeypatch, change):
    monkeypatch.setattr(Journal, "finish", lambda journal: None)
    first, other = tiny_llama(), tiny_llama(**change)
    assert first.name_or_path == other.name_or_path
    found = [run(model, corpus, tmp_path / "x", methods=["full"])[0]["nll"] for model in (first, other, first)]
    assert found[0] == found[2] and abs(found[0] - found[1]) > 1e-3


def test_budgets_that_hold_the_whole_text_have_no_gap_ratio(model, corpus, tmp_path):
    rows = run(model, corpus, tmp_path / "x", budgets=(200,), methods=["full", "h2o", "lococo-uncalibrated"])
    assert all(row["gap_ratio"] is row["gap_low"] is row["gap_high"] is None for row in rows)


def test_gap_ratio_needs_a_loss_of_h2o_and_of_its_best_variant():
    assert gap_ratio(1.5, 1.0, [2.0, 3.0]) == 0.5 and isinstance(gap_ratio(np.float64(1.5), 1.0, [2.0]), float)
    for baselines in ([1.0], [0.5], [2.0, 1.0], [2.0, 0.9], [1.0 + 1e-6], [math.nan]):
        assert gap_ratio(1.5, 1.0, baselines) is None
    assert gap_ratio(1.5, math.nan, [2.0]) is None


def synthetic(rng, documents):
    """Losses of full, H2O, its variant and a method whose true gap ratio is 0.6, with noise they share and not."""
    tokens = rng.integers(500, 3000, documents)
    full = rng.normal(2.5, 0.6, documents)
    lost = rng.gamma(6, 0.05, documents)
    noise = rng.normal(0, 0.03, (3, documents))
    h2o, variant, method = full + lost + noise[0], full + 1.5 * lost + noise[1], full + 0.6 * lost + noise[2]
    return tokens * np.stack([method, full, h2o, variant]), tokens


def test_gap_interval_equals_a_naive_bootstrap():
    losses, tokens = synthetic(np.random.default_rng(1), 7)
    low, high = gap_interval(losses[0], losses[1], losses[2:], tokens, resamples=300)
    draws = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), size=300)
    ratios = []
    for counts in draws:
        drawn = [document for document, count in enumerate(counts) for _ in range(count)]
        means = [sum(loss[each] for each in drawn) / sum(tokens[each] for each in drawn) for loss in losses]
        ratios.append(gap_ratio(means[0], means[1], means[2:]))
    assert (low, high) == pytest.approx((np.quantile(ratios, 0.025), np.quantile(ratios, 0.975)))


def test_mean_interval_equals_a_naive_bootstrap():
    rng = np.random.default_rng(3)
    counts = rng.integers(1, 40, 6)
    sums = counts * rng.normal(0.2, 1, 6)
    draws = np.random.default_rng(0).multinomial(6, np.full(6, 1 / 6), size=300)
    means = []
    for times in draws:
        drawn = [group for group, count in enumerate(times) for _ in range(count)]
        means.append(sum(sums[each] for each in drawn) / sum(counts[each] for each in drawn))
    assert mean_interval(sums, counts, 300) == pytest.approx((np.quantile(means, 0.025), np.quantile(means, 0.975)))
    assert mean_interval(sums[:1], counts[:1]) is None
    assert mean_interval(np.array([1.0, 0.0]), np.array([2, 0])) is None  # both may be drawn from the second


def test_gap_interval_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(2), []
    for _ in range(300):
        losses, tokens = synthetic(rng, 40)
        low, high = gap_interval(losses[0], losses[1], losses[2:], tokens, resamples=400)
        assert low < high
        covered.append(low <= 0.6 <= high)
    assert 0.90 <= np.mean(covered) <= 0.98


def test_gap_interval_is_none_without_an_end():
    one = np.array([1.0])
    assert gap_interval(one, one, one[None] + 1, one) is None
    full, h2o = np.array([1.0, 1.0]), np.array([[3.0, 0.5]])
    assert gap_interval(full, full, h2o, np.ones(2)) is None


def test_windows_of_one_document_are_drawn_together(model, corpus, tmp_path):
    rows = run(model, corpus, tmp_path / "x")
    (ours,) = [row for row in rows if (row["domain"], row["method"]) == ("books", "lococo-uncalibrated")]
    assert ours["documents"] == 2 and ours["tokens"] == 3 * 20


def test_journal_measures_each_key_once(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    assert [journal.measure(("a", 1), lambda: 2), journal.measure(("a", 1), lambda: 3)] == [2, 2]
    assert Journal(tmp_path / "j.jsonl").measure(("a", 1), lambda: 4) == 2


def test_markdown_table():
    table = markdown_table([{"method": "full", "nll": 3.14159, "slots": None}])
    assert table == "| method | nll | slots |\n| --- | --- | --- |\n| full | 3.142 |  |\n"
    table = markdown_table([{"domain": "web | books\nand more", "nll": 1.0}])
    assert table.splitlines()[2] == r"| web \| books and more | 1 |", "a name neither makes columns nor ends a row"
