import dataclasses
import gzip
import json
import sys
import tempfile
from pathlib import Path

import datasets
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered_words import WORDS, text_of, word_tokenizer, write_lines
from tokenizers import processors
from transformers import default_data_collator

from lococo.data import documents as reading
from lococo.data import windows as data
from lococo.data.documents import SUFFIXES, check_sources, documents
from lococo.data.windows import DEFAULT_DATASET, DataConfig, is_heldout, prepare


def many_texts(count=60, words=40, seed=0):
    numbers = torch.randint(WORDS, (count, words), generator=torch.Generator().manual_seed(seed))
    return [text_of(row) for row in numbers.tolist()]


def config(*sources, **changes):
    return DataConfig(
        **{"sources": tuple(map(str, sources)), "length": 8, "num_windows": 10, "num_heldout": 3, **changes}
    )


def read(*sources, **options):
    return documents(list(map(str, sources)), **options)


def rows(windows):
    return [tuple(row) for row in windows.ids.tolist()]


def cut(ids, length, most=None):
    return [tuple(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)][:most]


numbers = st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=40)


@settings(max_examples=25, deadline=None)
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


@settings(max_examples=25, deadline=None)
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


@settings(max_examples=10, deadline=None)
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
    assert data.fingerprint(wish, word_tokenizer()) == data.fingerprint(wish, tokenizer)
    before = data.fingerprint(wish, tokenizer)
    write_lines(path, many_texts(seed=1))
    prints += [before, data.fingerprint(wish, tokenizer)]
    assert len(set(prints)) == len(changes) + 4


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


def write_as(path, texts):
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode()
    half = len(lines) // 2
    if path.name.endswith(".txt"):
        path.write_text(texts[0], encoding="utf-8")
    elif path.name.endswith(".parquet"):
        datasets.Dataset.from_list([{"text": text} for text in texts]).to_parquet(path)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines[:half]) + gzip.compress(lines[half:]))
    elif path.name.endswith(".zst"):
        path.write_bytes(zstandard.compress(lines[:half]) + zstandard.compress(lines[half:]))
    else:
        path.write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\n"))
    return path


@pytest.mark.parametrize("name", [f"a{suffix}" for suffix in SUFFIXES])
def test_every_kind_of_file_gives_its_texts(tmp_path, name):
    texts = ["one\u2028two\x85three\nfour", "größer", "三"]
    found = [document["text"] for document in read(write_as(tmp_path / name, texts))]
    assert found == (texts[:1] if name == "a.txt" else texts)


def test_a_long_text_file_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "TEXT_PART", 10)
    (tmp_path / "a.txt").write_text("0123456789" * 3 + "rest")
    assert [d["text"] for d in read(tmp_path / "a.txt")] == ["0123456789"] * 3 + ["rest"]


def test_a_folder_means_all_its_files_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "STREAMS", 2)
    for name in "abcde":
        write_lines(tmp_path / name / "x.jsonl", [f"{name}{index}" for index in range(3)])
    (tmp_path / "notes.md").write_text("not data")
    found = list(read(tmp_path))
    assert sorted(d["text"] for d in found) == [f"{name}{index}" for name in "abcde" for index in range(3)]
    assert all(d["domain"] == d["text"][0] for d in found)
    assert [d["text"] for d in found][:4] == ["a0", "c0", "a1", "c1"]


def test_sources_take_turns_until_each_has_ended(tmp_path):
    paths = [
        write_lines(tmp_path / f"{n}.jsonl", [f"{n}{i}" for i in range(count)]) for n, count in (("a", 2), ("b", 4))
    ]
    assert [d["text"] for d in read(*paths)] == ["a0", "b0", "a1", "b1", "b2", "b3"]


@pytest.mark.parametrize(
    ("fields", "domain"),
    [
        ({}, "folder"),
        ({"domain": "news"}, "news"),
        ({"meta": {"redpajama_set_name": "RedPajamaC4"}}, "RedPajamaC4"),
        ({"meta": '{"redpajama_set_name": "RedPajamaC4"}'}, "RedPajamaC4"),
        ({"meta": "{'url': 'x'}"}, "folder"),
        ({"meta": "[1]", "domain": None}, "folder"),
    ],
)
def test_domain_comes_from_the_document_or_its_place(tmp_path, fields, domain):
    path = write_lines(tmp_path / "folder" / "a.jsonl", ["text"], **fields)
    assert [document["domain"] for document in read(path)] == [domain]


def test_documents_without_text_are_left_out_and_broken_surrogates_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": null}\n{"text": " \\n"}\n{"text": "a\\ud800b"}\n')
    assert [document["text"] for document in read(path)] == ["a?b"]


def hub(monkeypatch, answers):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        answer = answers[len(calls) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def hub_rows(count):
    table = datasets.Dataset.from_list([{"body": f"t{index}", "meta": "{}"} for index in range(count)])
    return table.to_iterable_dataset(num_shards=3)


def test_a_hub_dataset_is_streamed_from_all_its_shards(monkeypatch):
    calls = hub(monkeypatch, [hub_rows(6)])
    found = list(read(DEFAULT_DATASET, text_column="body", split="validation"))
    assert calls == [((DEFAULT_DATASET,), {"split": "validation", "streaming": True})]
    assert [document["text"] for document in found] == ["t0", "t2", "t4", "t1", "t3", "t5"]
    assert {document["domain"] for document in found} == {"RedPajama-Data-1T-Sample"}


def test_a_configuration_of_a_hub_dataset_is_named_behind_a_colon(monkeypatch):
    calls = hub(monkeypatch, [hub_rows(3)])
    (first, *_) = read("org/name:en.v2", text_column="body")
    assert calls == [(("org/name", "en.v2"), {"split": "train", "streaming": True})]
    assert first["domain"] == "name:en.v2"
    hub(monkeypatch, [ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']")])
    with pytest.raises(ValueError, match="(?s)pick one among.*; name one as 'org/name:configuration'"):
        read("org/name")


def test_files_of_the_hub_are_read_where_they_are(monkeypatch):
    address = "hf://datasets/org/name/books/*.jsonl.zst"
    calls = hub(monkeypatch, [hub_rows(3)])
    assert {document["domain"] for document in read(address, text_column="body")} == {"books"}
    assert calls == [(("json",), {"data_files": address, "split": "train", "streaming": True})]


def test_a_connection_that_breaks_is_named(monkeypatch):
    def breaks():
        yield {"text": "a"}
        raise ConnectionError("reset")

    hub(monkeypatch, [datasets.IterableDataset.from_generator(breaks)])
    with pytest.raises(ValueError, match="org/name: cannot be read from the Hub: .*reset"):
        list(read("org/name"))


def test_in_order_means_file_after_file(tmp_path):
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [f"{name}{index}" for index in range(3)])
    found = list(read(tmp_path, in_order=True))
    assert [document["text"] for document in found] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert len({document["id"] for document in found}) == 6


def test_sources_are_checked_by_their_first_document(tmp_path):
    check_sources([str(write_lines(tmp_path / "a.jsonl", ["one", "two"])), "org/name"])
    with pytest.raises(ValueError, match="no column 'body'; it has 'text'"):
        check_sources([str(tmp_path / "a.jsonl")], "body")
    (tmp_path / "b.txt").write_text(" ")
    with pytest.raises(ValueError, match="b.txt: empty; expected at least one document with text"):
        check_sources([str(tmp_path / "b.txt")])
    with pytest.raises(FileNotFoundError, match="missing.jsonl: no such file or folder"):
        check_sources([str(tmp_path / "missing.jsonl")])


def test_a_hub_dataset_with_a_script_is_read_from_its_parquet_copy(monkeypatch):
    scripts = RuntimeError("Dataset scripts are no longer supported, but found x.py")
    calls = hub(monkeypatch, [scripts, hub_rows(3)])
    assert len(list(read("org/name", text_column="body"))) == 3
    assert calls[1] == (("org/name",), {"split": "train", "streaming": True, "revision": "refs/convert/parquet"})


@pytest.mark.parametrize("error", [ConnectionError("unreachable"), ValueError("bad split"), RuntimeError("other")])
def test_a_hub_dataset_that_does_not_open_is_named(monkeypatch, error):
    hub(monkeypatch, [error])
    with pytest.raises(ValueError, match=f"org/name: .* Hub dataset: {error}"):
        read("org/name")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: empty"),
        ("a.txt", b" \n", "a.txt: empty"),
        ("a.csv", b"text", "a.csv: unknown suffix; expected one of .jsonl, "),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl: line 2: invalid JSON"),
        ("a.jsonl", b"[1]", "a.jsonl: line 1: expected a JSON object, got list"),
        ("a.jsonl", b'{"body": "a", "id": 1}', "a.jsonl: line 1: no column 'text'; it has 'body', 'id'"),
        ("a.jsonl", b'{"text": 1}', "a.jsonl: line 1: column 'text' must hold text, got int"),
        ("a.jsonl", b'{"text": "a\0"}', "a.jsonl: line 1: binary data"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl: binary data or another encoding"),
        ("a.txt", b"a\0b", "a.txt: binary data"),
        ("a.txt", b"\xff\xfea\0", "a.txt: binary data or another encoding"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: "),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-9], "a.jsonl.gz: "),
        ("a.jsonl.zst", b"no zstd", "a.jsonl.zst: "),
        ("a.parquet", b"no parquet", "a.parquet: "),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        prepare(config(tmp_path / name), word_tokenizer(), tmp_path / "cache")
    assert message in str(error.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("source", ["nothing", "no/such/folder", "data/train.jsonl", "/data/x"])
def test_a_source_that_is_nowhere_is_named(tmp_path, source):
    with pytest.raises(FileNotFoundError, match=f"{source}: no such file or folder, and not a Hub dataset"):
        prepare(config(source), word_tokenizer(), tmp_path)


def test_a_folder_without_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="no file in this folder ends in .jsonl"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("source", "module"), [("a.parquet", "pyarrow.parquet"), ("a.jsonl.zst", "zstandard"), ("org/name", "datasets")]
)
def test_missing_packages_are_named(tmp_path, monkeypatch, source, module):
    (tmp_path / source).parent.mkdir(exist_ok=True)
    path = source if source == "org/name" else write_as(tmp_path / source, ["a"])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"needs the package \w+: pip install lococo\[train\]"):
        list(read(path))


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
    with pytest.raises(ValueError, match=r"10 documents were read, the longest of 3 tokens and 0 of 8 or more"):
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
    found = list(read(path))
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
        ({"length": 41}, r"of 40 tokens and 0 of 41 or more, 2 needed; choose a length of at most 40, .*\(now 0.05\)"),
        ({"boundaries": "none", "length": 700}, "the longest of 40 tokens, 800 in all; choose a smaller length"),
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
        ({"heldout_share": 1.0}, "heldout_share must .* got 1.0"),
        ({"heldout_share": 0.0}, "heldout_share must .* got 0.0 with num_heldout=3"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config("a.txt", **changes)
