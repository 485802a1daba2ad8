import json
import math

import pytest
import torch
from tiny import tiny_ids, tiny_llama

import lococo
from lococo import LoCoCoConfig, patched
from lococo.evaluation import perplexity, ppl_table, token_nlls, windows
from lococo.evaluation.methods import plan_runs
from lococo.evaluation.results import Journal, markdown_table


class Characters:
    """A tokenizer: one token per character."""

    def __call__(self, text, return_tensors=None):
        ids = [ord(character) % 63 + 1 for character in text]
        return type("Encoding", (), {"input_ids": torch.tensor([ids]) if return_tensors else ids})


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
    monkeypatch.setattr("lococo.evaluation.likelihood.CHUNK", chunk)
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
    [([], "texts is empty"), (["abc"], "pass the model's tokenizer"), ([tiny_ids(1, 1)], "first")],
)
def test_bad_texts_are_refused(model, texts, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, texts)


def test_windows_share_no_token_and_visit_every_document_first():
    documents = [{"text": "a" * 25, "id": "a"}, {"text": "b" * 9, "id": "b"}, {"text": "c" * 10, "id": "c"}]
    found = list(windows(documents, Characters(), length=10))
    assert [window.document for window in found] == ["a@0", "c@0", "a@1"]
    assert all(window.ids.shape == (1, 10) for window in found)
    assert len(list(windows(documents, Characters(), length=10, limit=2))) == 2


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "books" / "heldout.jsonl"
    path.parent.mkdir()
    lines = [
        {"id": str(index), "text": "".join(chr(97 + (index * 7 + i * i) % 26) for i in range(90))} for index in (1, 2)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def run(model, corpus, output, methods=("full", "h2o", "h2o-slot", "lococo-uncalibrated"), length=40, **changes):
    runs = plan_runs(methods, budgets=[12], block_size=8, heads=changes.pop("heads", ()))
    texts = ppl_table.read_windows([corpus], Characters(), length, limit=3, first=20, **changes)
    return ppl_table.run(model, texts, runs, first=20, output=output, command="command")


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
    texts = list(windows(ppl_table.read_documents(corpus), Characters(), 40, 3))
    expected = torch.stack([token_nlls(model, window.ids, 20).mean() for window in texts]).mean().item()
    assert full == pytest.approx(expected)
    assert (tmp_path / "out" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "perplexity.md").read_text().count("\n") == len(rows) + 4


def test_killed_run_goes_on_where_it_stopped(model, corpus, tmp_path, monkeypatch):
    expected = run(model, corpus, tmp_path / "whole")
    calls = []

    def counted(*args):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(args)
        return token_nlls(*args)

    monkeypatch.setattr(ppl_table, "token_nlls", counted)
    with pytest.raises(KeyboardInterrupt):
        run(model, corpus, tmp_path / "cut")
    assert not (tmp_path / "cut.json").exists()
    with (tmp_path / "cut.partial.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    again = []
    monkeypatch.setattr(ppl_table, "token_nlls", lambda *args: again.append(args) or token_nlls(*args))
    assert run(model, corpus, tmp_path / "cut") == expected
    assert len(calls) + len(again) == 4 * 3
    assert not (tmp_path / "cut.partial.jsonl").exists()


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
        texts = ppl_table.read_windows([corpus], Characters(), 40, limit=3, first=20)
        expected = torch.cat([token_nlls(model, window.ids, 20) for window in texts]).mean().item()
    rows = run(model, corpus, tmp_path / "x", heads=[str(tmp_path / "heads")])
    (ours,) = [row for row in rows if row["method"] == "lococo" and row["domain"] == "books"]
    assert (ours["num_slots"], ours["nll"]) == (12, pytest.approx(expected))
    assert ours["gap_ratio"] is not None
    with pytest.raises(ValueError, match="block_size=8, compare them at that size"):
        plan_runs(["full"], [12], 16, [str(tmp_path / "heads")])


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("a.jsonl", '{"no": 1}'), ("a.txt", ""), ("a.csv", "x")])
def test_files_without_texts_are_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        ppl_table.read_documents(tmp_path / name)


def test_journal_measures_each_key_once(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    assert [journal.measure(("a", 1), lambda: 2), journal.measure(("a", 1), lambda: 3)] == [2, 2]
    assert Journal(tmp_path / "j.jsonl").measure(("a", 1), lambda: 4) == 2


def test_markdown_table():
    table = markdown_table([{"method": "full", "nll": 3.14159, "slots": None}])
    assert table == "| method | nll | slots |\n| --- | --- | --- |\n| full | 3.142 |  |\n"
