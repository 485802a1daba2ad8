"""Texts to measure on, and windows cut from them."""

import gzip
import json

import datasets
import pytest
import zstandard
from words import Characters

from lococo.data.texts import PROOF_PILE, Cut, Text, read_texts, read_windows, sliding_windows, windows


def test_windows_share_no_token_and_visit_every_document_first():
    texts = [Text("d", "a", range(25)), Text("d", "b", range(9)), Text("d", "c", range(10))]
    found = list(windows(texts, length=10))
    assert [(window.document, window.start) for window in found] == [("a", 0), ("c", 0), ("a", 10)]
    assert all(window.ids.shape == (1, 10) for window in found)
    assert len(list(windows(texts, length=10, limit=2))) == 2


@pytest.mark.parametrize(("length", "first"), [(10, 4), (10, 9), (7, 1), (40, 4)])
def test_sliding_windows_count_every_token_of_a_document_once(length, first):
    texts = [Text("d", "a", range(25)), Text("d", "b", range(100, 104)), Text("d", "c", range(200, 200 + length))]
    found = list(sliding_windows(texts, length, first))
    for text in texts:
        mine = [window.ids[0] for window in found if window.document == text.name]
        assert all(len(ids) <= length and set(ids.tolist()) <= set(text.ids) for ids in mine)
        counted = [token for ids in mine for token in ids[first:].tolist()]
        assert counted == list(text.ids[first:])


def test_windows_of_all_lengths_count_the_same_tokens():
    texts = [Text("a", "long", range(100)), Text("a", "short", range(40)), Text("a", "longer", range(200))]
    found = Cut((16, 64), 4, 2, min_length=64, sliding=True, most=64).windows("a.txt", texts)
    for length in (16, 64):
        for document in ("long", "longer"):
            alike = [each for each in found if each.length == length and each.document == document]
            assert [token for each in alike for token in each.ids[0, 4:].tolist()] == list(range(4, 64))
    with pytest.raises(ValueError, match="a.txt: no document has 300 tokens, the longest of 3 has 200"):
        Cut((300,), 4, 2, min_length=300, sliding=True, most=300).windows("a.txt", texts)


def test_windows_of_several_lengths_begin_alike_where_documents_are_long_enough():
    texts = [Text("a", "short", range(40)), Text("a", "long", range(100)), Text("a", "middle", range(50))]
    found = Cut((30, 45, 90), 4, 2).windows("a.txt", texts)
    places = [(each.length, each.document, each.start) for each in found]
    assert places == [(30, "long", 0), (30, "middle", 0), (45, "long", 0), (45, "middle", 0), (90, "long", 0)]
    found = Cut((30,), 4, 9, per_document=2).windows("a.txt", texts)
    assert [(each.document, each.start) for each in found] == [
        ("short", 0),
        ("long", 0),
        ("middle", 0),
        ("long", 30),
    ]


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("a.jsonl", '{"no": 1}'), ("a.txt", ""), ("a.csv", "x")])
def test_files_without_texts_are_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        read_texts(str(tmp_path / name), Characters(), Cut((30,), first=20, limit=3))


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (dict(lengths=(40, 20), first=20), "--first must lie between 1 and 19 for windows of 20 tokens, got 20"),
        (dict(lengths=(40, 80), first=20, min_length=30), "--min-length 30 would measure"),
        (dict(lengths=(40,), first=20, limit=0), "--documents must be at least 1, got 0"),
        (dict(lengths=(40,), first=20, per_document=0), "--windows-per-document must be at least 1.*got 0"),
        (dict(lengths=(40,), first=20, per_document=1, sliding=True), "goes without --sliding.*got 1"),
    ],
)
def test_cuts_that_measure_nothing_new_are_refused(cut, message):
    with pytest.raises(ValueError, match=message):
        Cut(**{"limit": 3, **cut})


def test_proof_pile_is_streamed_until_there_are_enough_long_documents(monkeypatch):
    asked, read = [], []

    def records():
        for index in range(10):
            read.append(index)
            yield {"text": "" if index == 0 else "x" * 10 * index, "meta": {}}

    def load_dataset(kind, **options):
        asked.append((kind, options))
        return datasets.IterableDataset.from_generator(records)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    cut = Cut((30,), first=20, limit=2)
    texts = read_texts(PROOF_PILE["arxiv"], Characters(), cut)
    assert [len(text.ids) for text in texts] == [10, 20, 30, 40]
    assert read == [0, 1, 2, 3, 4]
    ((kind, options),) = asked
    assert kind == "json" and options["streaming"]
    assert options["data_files"] == "hf://datasets/EleutherAI/proof-pile-2/arxiv/test/*.jsonl.zst"
    with pytest.raises(ValueError, match="no document has 500 tokens, the longest of 9 has 90"):
        read_windows(None, Characters(), Cut((500,), first=20, limit=2))
    cut = Cut((30, 90), first=20, limit=1)
    assert {(each.domain, each.length) for each in read_windows(None, Characters(), cut)} == {
        (domain, length) for domain in ("arxiv", "open-web-math", "algebraic-stack") for length in (30, 90)
    }


def test_no_more_of_the_hub_is_looked_at_than_said(monkeypatch):
    monkeypatch.setattr("lococo.data.texts.MOST_LOOKED_AT", 3)
    rows = datasets.Dataset.from_list([{"text": "short"}] * 5 + [{"text": "x" * 40}]).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: rows)
    with pytest.raises(ValueError, match="no document has 30 tokens, the longest of 3 has 5"):
        read_windows(["org/name:configuration"], Characters(), Cut((30,), first=20, limit=2))


def test_an_unreachable_hub_is_named(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="proof-pile-2.*does not open as a Hub dataset: no route"):
        read_windows(None, Characters(), Cut((30,), first=20, limit=2))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_texts_to_measure_on_come_in_every_kind_of_file(tmp_path, suffix):
    path = tmp_path / "books" / f"a{suffix}"
    path.parent.mkdir()
    lines = "\n".join(json.dumps({"body": "x" * length}) for length in (10, 40, 50)).encode()
    if suffix == ".parquet":
        datasets.Dataset.from_list([{"body": "x" * length} for length in (10, 40, 50)]).to_parquet(path)
    else:
        path.write_bytes(gzip.compress(lines) if suffix == ".jsonl.gz" else zstandard.compress(lines))
    found = read_windows([path.parent], Characters(), Cut((40,), first=20, limit=3), text_column="body")
    assert [(each.domain, each.ids.shape[1]) for each in found] == [("books", 40), ("books", 40)]
    assert len({each.document for each in found}) == 2


def test_documents_have_names_of_their_own(tmp_path):
    names = ["x", "x", "x (2)", "x"]
    lines = [json.dumps({"text": letter * 30, "id": name}) for letter, name in zip("abcd", names, strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = read_windows([tmp_path / "a.jsonl"], Characters(), Cut((20,), 4, 9))
    assert [window.document for window in found] == ["x", "x (2)", "x (2) (2)", "x (3)"]


def test_a_text_file_is_one_document_and_a_domain_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("lococo.data.documents.TEXT_PART", 10)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("x" * 40)
    found = read_windows([tmp_path], Characters(), Cut((40,), first=20, limit=3))
    assert [(each.domain, each.ids.shape[1]) for each in found] == [("a", 40), ("b", 40)]
