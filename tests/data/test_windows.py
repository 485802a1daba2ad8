import dataclasses
import json
import tempfile
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_words import WORDS, config, text_of, word_tokenizer, write_lines
from tokenizers import normalizers, processors
from transformers import default_data_collator

from lococo.data import windows as data
from lococo.data.documents import documents
from lococo.data.windows import is_heldout, prepare


def many_texts(count=60, words=40, seed=0):
    numbers = torch.randint(WORDS, (count, words), generator=torch.Generator().manual_seed(seed))
    return [text_of(row) for row in numbers.tolist()]


def rows(windows):
    return [tuple(row) for row in windows.ids.tolist()]


def cut(ids, length, most=None):
    return [tuple(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)][:most]


numbers = st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=40)


@settings(max_examples=25)
@given(st.lists(numbers, min_size=1, max_size=12), st.integers(2, 12), st.integers(1, 4), st.booleans())
def test_a_window_is_consecutive_tokens_of_one_document(docs, length, most, bos):
    tokenizer = word_tokenizer(bos)
    encoded = [tokenizer(text_of(document)).input_ids for document in docs]
    expected = [(str(i), row) for i, ids in enumerate(encoded) for row in cut(ids, length, most)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.jsonl")
        path.write_text("\n".join(json.dumps({"text": text_of(d), "domain": str(i)}) for i, d in enumerate(docs)))
        wish = config(path, length=length, num_windows=len(expected) or 1, num_heldout=0, heldout_share=0.0)
        wish = dataclasses.replace(wish, max_windows_per_document=most)
        if not expected:
            with pytest.raises(ValueError, match=f"the longest of {max(map(len, encoded))} tokens"):
                prepare(wish, tokenizer, folder)
            return
        train, heldout = prepare(wish, tokenizer, folder)
    assert sorted(zip(train.domains, rows(train), strict=True)) == sorted(expected)
    assert train.ids.dtype == torch.int32 and heldout.ids.shape == (0, length)


@settings(max_examples=25)
@given(st.lists(numbers, min_size=1, max_size=12), st.integers(2, 12), st.booleans())
def test_without_boundaries_the_windows_are_the_joined_documents(docs, length, bos):
    tokenizer = word_tokenizer(bos)
    stream, starts = [], []
    for document in docs:
        stream += [tokenizer.eos_token_id] if stream else []
        starts.append(len(stream))
        stream += tokenizer(text_of(document)).input_ids
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.jsonl")
        path.write_text("\n".join(json.dumps({"text": text_of(d), "domain": str(i)}) for i, d in enumerate(docs)))
        wish = config(path, length=length, boundaries="none", num_windows=len(stream) // length or 1, num_heldout=0)
        wish = dataclasses.replace(wish, heldout_share=0.0)
        if len(stream) < length:
            with pytest.raises(ValueError, match="not one training window"):
                prepare(wish, tokenizer, folder)
            return
        train, _ = prepare(wish, tokenizer, folder)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(wish.seed)).argsort().tolist()
    assert [rows(train)[index] for index in order] == cut(stream, length)
    for place, index in enumerate(order):
        # A separator belongs to the document that follows it.
        assert train.domains[index] == str(sum(start <= place * length + 1 for start in starts[1:]) if place else 0)


@pytest.mark.parametrize("boundaries", ["reset", "none"])
def test_held_out_windows_keep_the_order_of_the_data_and_share_no_document(tmp_path, boundaries):
    texts, tokenizer = many_texts(), word_tokenizer()
    wish = config(write_lines(tmp_path / "a.jsonl", texts), boundaries=boundaries, heldout_share=0.4)
    wish = dataclasses.replace(wish, num_windows=100, num_heldout=20, max_windows_per_document=99)
    train, heldout = prepare(wish, tokenizer, tmp_path)
    sides = {side: [t for t in texts if is_heldout(t, 0.4, wish.seed) is side] for side in (False, True)}
    encoded = {side: tokenizer(found).input_ids for side, found in sides.items()}
    if boundaries == "reset":
        expected = {side: [row for ids in found for row in cut(ids, 8)] for side, found in encoded.items()}
    else:
        joined = {side: sum(([1, *ids] for ids in found), [])[1:] for side, found in encoded.items()}
        expected = {side: cut(ids, 8) for side, ids in joined.items()}
    assert rows(heldout) == expected[True][:20]
    assert sorted(rows(train)) == sorted(expected[False][:100]) and rows(train) != expected[False][:100]


@given(st.text(), st.integers(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_holds_out_more_and_no_share_nothing(text, seed, one, other):
    low, high = sorted((one, other))
    assert is_heldout(text, low, seed) <= is_heldout(text, high, seed)
    assert not is_heldout(text, 0, seed) and is_heldout(text, 1, seed)


def test_the_share_is_kept_and_the_seed_changes_who_is_held_out():
    chosen = [{text for text in map(str, range(4000)) if is_heldout(text, 0.1, seed)} for seed in (0, 1)]
    assert all(300 < len(some) < 500 for some in chosen)
    assert len(chosen[0] & chosen[1]) < 100


@settings(max_examples=10)
@given(st.permutations(many_texts(20)))
def test_the_order_of_the_data_changes_no_side(texts):
    with tempfile.TemporaryDirectory() as folder:
        wish = config(write_lines(Path(folder, "a.jsonl"), texts), heldout_share=0.3, num_windows=9, num_heldout=9)
        train, heldout = prepare(wish, word_tokenizer(), folder)
    whole = word_tokenizer()([text for text in texts if is_heldout(text, 0.3, 0)]).input_ids
    allowed = {row for ids in whole for row in cut(ids, 8)}
    assert set(rows(heldout)) <= allowed and not set(rows(train)) & allowed


def test_the_seed_decides_the_order(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", many_texts())
    orders = []
    for turn, seed in enumerate((0, 0, 1)):
        wish = config(path, seed=seed, num_windows=100, num_heldout=0, heldout_share=0.0)
        orders.append(rows(prepare(wish, word_tokenizer(), tmp_path / str(turn))[0]))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_windows_go_through_the_trainers_collator(tmp_path):
    wish = config(write_lines(tmp_path / "a.jsonl", many_texts()))
    train, heldout = prepare(wish, word_tokenizer(), tmp_path)
    assert (len(train), len(heldout)) == (10, 3)
    batch = default_data_collator([train[0], train[1]])
    assert batch["input_ids"].dtype == torch.int64 and batch["input_ids"].tolist() == train.ids[:2].tolist()
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert len(list(torch.utils.data.DataLoader(train, batch_size=4))) == 3


def test_second_call_reads_the_cache_and_opens_no_source(tmp_path, monkeypatch):
    wish = config(write_lines(tmp_path / "books" / "a.jsonl", many_texts()))
    first = prepare(wish, word_tokenizer(), tmp_path / "cache")
    monkeypatch.setattr(data, "documents", lambda *arguments: pytest.fail("a source was opened"))
    second = prepare(wish, word_tokenizer(), tmp_path / "cache")
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.ids, other.ids) and one.domains == other.domains == ["books"] * len(one)


def test_fingerprint_covers_config_tokenizer_and_files(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", many_texts())
    wish, tokenizer = config(path), word_tokenizer()
    changes = {"length": 9, "num_windows": 11, "boundaries": "none", "seed": 1, "heldout_share": 0.1, "split": "test"}
    prints = [
        data.fingerprint(dataclasses.replace(wish, **{name: value}), tokenizer) for name, value in changes.items()
    ]
    prints += [data.fingerprint(wish, word_tokenizer(bos=True)), data.fingerprint(wish, word_tokenizer(words=98))]
    small = word_tokenizer()
    small.backend_tokenizer.normalizer = normalizers.Lowercase()
    prints.append(data.fingerprint(wish, small))
    tokenizer(["w0 w1"], truncation=True, max_length=1)  # says nothing of how texts are read
    assert data.fingerprint(wish, word_tokenizer()) == data.fingerprint(wish, tokenizer)
    before = data.fingerprint(wish, tokenizer)
    write_lines(path, many_texts(seed=1))
    prints += [before, data.fingerprint(wish, tokenizer)]
    assert len(set(prints)) == len(changes) + 5


@pytest.mark.parametrize("step", [0, 1])
def test_killed_while_writing_leaves_nothing_that_counts_as_whole(tmp_path, monkeypatch, step):
    wish, tokenizer = config(write_lines(tmp_path / "a.jsonl", many_texts())), word_tokenizer()
    expected = prepare(wish, tokenizer, tmp_path / "whole")
    write_bytes, written = Path.write_bytes, []

    def killed(path, content):
        if len(written) == step:
            write_bytes(path, content[: len(content) // 2])
            raise KeyboardInterrupt
        written.append(path)
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(wish, tokenizer, tmp_path / "cut")
    assert not (tmp_path / "cut" / data.fingerprint(wish, tokenizer)).exists()
    for one, other in zip(prepare(wish, tokenizer, tmp_path / "cut"), expected, strict=True):
        assert torch.equal(one.ids, other.ids)


def test_joining_needs_an_eos_token(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", many_texts())
    with pytest.raises(ValueError, match="the tokenizer has none"):
        prepare(config(path, boundaries="none"), word_tokenizer(eos_token=None), tmp_path)


def test_an_eos_token_of_the_tokenizers_own_is_not_doubled(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    path = write_lines(tmp_path / "a.jsonl", ["w0", "w1", "w2"])
    wish = config(path, boundaries="none", length=6, num_windows=1, num_heldout=0, heldout_share=0.0)
    assert rows(prepare(wish, tokenizer, tmp_path)[0]) == [(2, 1, 3, 1, 4, 1)]


def test_fewer_windows_than_wanted_are_used_with_a_warning_each_time(tmp_path):
    wish = config(write_lines(tmp_path / "a.jsonl", many_texts(20)), num_windows=1000, heldout_share=0.3)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"holds (\d+) training windows of 1000 wanted and 3 held-out"):
            train, heldout = prepare(wish, word_tokenizer(), tmp_path)
        assert 0 < len(train) < 100 and len(heldout) == 3


@pytest.mark.parametrize("boundaries", ["reset", "none"])
@pytest.mark.parametrize("share", [None, 1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 10])
def test_of_few_documents_one_at_least_is_on_either_side(tmp_path, boundaries, share, count):
    for seed in range(5):
        texts = many_texts(count, seed=seed)
        path = write_lines(tmp_path / f"{seed}.jsonl", texts)
        wish = config(path, boundaries=boundaries, heldout_share=share, num_windows=1, num_heldout=1, seed=seed)
        train, heldout = prepare(wish, word_tokenizer(), tmp_path)
        whole = [
            {row for start in range(40) for row in cut(ids[start:], 8)} for ids in word_tokenizer()(texts).input_ids
        ]
        sides = [
            {place for place, windows in enumerate(whole) if rows(side)[0] in windows} for side in (train, heldout)
        ]
        assert len(train) == len(heldout) == 1 and all(sides) and not sides[0] & sides[1]


def test_of_few_documents_the_share_is_held_out_where_it_can_be(tmp_path):
    texts = many_texts(10)
    wish = config(write_lines(tmp_path / "a.jsonl", texts), heldout_share=0.4, num_windows=99, num_heldout=99)
    assert 0 < sum(is_heldout(text, 0.4, 0) for text in texts) < 10
    with pytest.warns(UserWarning, match="wanted"):
        _, heldout = prepare(dataclasses.replace(wish, max_windows_per_document=99), word_tokenizer(), tmp_path)
    expected = [word_tokenizer()(text).input_ids for text in texts if is_heldout(text, 0.4, 0)]
    assert rows(heldout) == [row for ids in expected for row in cut(ids, 8)]


def test_short_documents_are_joined_until_either_side_has_a_window(tmp_path):
    texts = many_texts(10, words=3)
    paths = write_lines(tmp_path / "a.jsonl", texts)
    with pytest.raises(
        ValueError, match=r"10 documents were read, the longest of 3 tokens; choose a length of at most 3"
    ):
        prepare(config(paths), word_tokenizer(), tmp_path)
    wish = config(paths, boundaries="none", num_windows=1, num_heldout=1)
    train, heldout = prepare(wish, word_tokenizer(), tmp_path)
    assert len(train) == len(heldout) == 1


def test_documents_in_files_of_their_own_are_few_together(tmp_path):
    texts = many_texts(4)
    for place, text in enumerate(texts):
        (tmp_path / f"{place}.txt").write_text(text)
    sources = [tmp_path / f"{place}.txt" for place in range(4)]
    with pytest.warns(UserWarning, match="wanted"):
        train, heldout = prepare(config(*sources, heldout_share=1e-9), word_tokenizer(), tmp_path)
    assert len(train) == 9 and len(heldout) == 1, "every source gives as many"


def test_a_single_document_is_refused(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", many_texts(1))
    with pytest.raises(
        ValueError, match="1 document was read, and 2 are needed: one to learn from, another to measure"
    ):
        prepare(config(path), word_tokenizer(), tmp_path)
    with pytest.warns(UserWarning, match="holds 4 training windows of 10 wanted"):
        train, _ = prepare(config(path, num_heldout=0), word_tokenizer(), tmp_path)
    assert len(train) == 4


def test_documents_that_are_the_same_are_counted_but_not_apart(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", many_texts(1) * 3)
    with pytest.raises(ValueError, match="3 documents were read, 1 different one among them, and 2 are needed"):
        prepare(config(path), word_tokenizer(), tmp_path)
    path = write_lines(tmp_path / "b.jsonl", many_texts(2) * 3)
    with pytest.raises(ValueError, match="6 documents were read, 2 different ones among them, the longest of"):
        prepare(config(path, length=1000), word_tokenizer(), tmp_path)


# Documents that are no files


def test_names_of_sources_stay_names(tmp_path):
    blank = write_lines(tmp_path / "my texts" / "a b.jsonl", ["one"])
    for names in (["a.jsonl"], [blank], [str(blank.parent)], ["org/name", "x y.txt"], [Path("nowhere")]):
        assert data.as_sources(names, tmp_path / "cache") == tuple(map(str, names))
    assert data.as_sources("org/name", tmp_path / "cache") == ("org/name",)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", ["texts", "rows", "generator", "dataset", "chinese"])
def test_documents_are_kept_in_a_file_that_is_the_source(tmp_path, kind):
    texts = ["三" * 300] if kind == "chinese" else ["one two", "three four\n"]
    given = [{"text": text, "domain": "news"} for text in texts] if kind in ("rows", "dataset") else texts
    given = datasets.Dataset.from_list(given) if kind == "dataset" else given
    (path,) = data.as_sources((each for each in given) if kind == "generator" else given, tmp_path)
    found = list(documents([str(path)]))
    assert [document["text"] for document in found] == texts
    assert {document["domain"] for document in found} == {"news" if kind in ("rows", "dataset") else "documents"}
    assert data.as_sources(list(given), tmp_path) == (path,)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [Path(path)]


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ([], ValueError, "dataset is empty"),
        (["a.txt", "one two"], ValueError, "dataset holds 1 names of sources, such as 'a.txt', beside documents"),
        ([1], TypeError, "dataset must hold names of sources, or texts or mappings, got int"),
        (None, TypeError, "dataset must be a Hub id, a file or a folder, several of them, or documents, got None"),
        (3, TypeError, "dataset must be .*, got 3"),
        (b"text", TypeError, "dataset must be .*, got b'text'"),
        ({"text": "one two"}, TypeError, "got one mapping of 'text': give a list of documents"),
    ],
)
def test_data_of_other_kinds_is_refused(tmp_path, dataset, error, message):
    with pytest.raises(error, match=message):
        data.as_sources(dataset, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 50}, "not one training window of 50 tokens: 20 documents were read, the longest of 40 tokens"),
        (
            {"length": 41},
            r"of 40 tokens; choose a length of at most 40, .*heldout_share \(now 0.05\)",
        ),
        ({"boundaries": "none", "length": 700}, "the longest of 40 tokens; choose a length of at most 400"),
    ],
)
def test_no_window_says_what_was_read_and_what_to_change(tmp_path, changes, message):
    wish = config(write_lines(tmp_path / "a.jsonl", many_texts(20)), **changes)
    with pytest.raises(ValueError, match=message):
        prepare(wish, word_tokenizer(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, r"sources must be .* got \(\)"),
        ({"sources": "a.txt"}, "sources must be .* got 'a.txt'"),
        ({"length": 1}, "length must be a whole number of at least 2, got 1"),
        ({"length": 8.0}, "length must be a whole number of at least 2, got 8.0"),
        ({"num_windows": 0}, "num_windows must be .* at least 1, got 0"),
        ({"num_heldout": -1}, "num_heldout must be .* at least 0, got -1"),
        ({"max_windows_per_document": 0}, "max_windows_per_document must be .* at least 1, got 0"),
        ({"boundaries": "cross"}, "boundaries must be 'reset' or 'none', got 'cross'"),
        ({"num_windows": True}, "num_windows must be .* at least 1, got True"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"text_column": None}, "text_column must be a name, got None"),
        ({"split": 1}, "split must be a name, got 1"),
        ({"heldout_share": "a"}, "heldout_share must .* got 'a'"),
        ({"heldout_share": 1.0}, "heldout_share must .* got 1.0"),
        ({"heldout_share": 0.0}, "heldout_share must .* got 0.0 with num_heldout=3"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config("a.txt", **changes)
