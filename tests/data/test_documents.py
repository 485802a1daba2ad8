"""Documents of files, folders and the Hub."""

import gzip
import json
import sys

import datasets
import pytest
import zstandard
from numbered_words import config, word_tokenizer, write_lines

from lococo.data import documents as reading
from lococo.data.documents import SUFFIXES, check_sources, documents, read_text
from lococo.data.windows import DEFAULT_DATASET, as_sources, prepare


def read(*sources, **options):
    return documents(list(map(str, sources)), **options)


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


@pytest.mark.parametrize("name", [f"a{suffix}" for suffix in SUFFIXES])
def test_suffixes_may_be_in_capitals(tmp_path, name):
    written = write_as(tmp_path / name, ["one", "two"])
    path = written.rename(tmp_path / "Read Me").rename(tmp_path / f"B{written.name[1:].upper()}")
    expected = [("one", "B" if name == "a.txt" else tmp_path.name)]
    for source in (path, tmp_path):
        assert [(each["text"], each["domain"]) for each in read(source)][:1] == expected
    assert as_sources([str(path)], tmp_path) == (str(path),)


def test_a_text_file_is_read_whatever_it_is_called(tmp_path):
    (tmp_path / "notes").write_bytes("\ufeffgrößer\r\n".encode())
    assert read_text(tmp_path / "notes") == "größer\n"
    (tmp_path / "latin").write_bytes(b"gr\xf6\xdfer")
    (tmp_path / "zeros").write_bytes(b"a\0")
    for name, error, message in (
        ("latin", ValueError, "latin: binary data or another encoding; expected UTF-8 text"),
        ("zeros", ValueError, "zeros: binary data"),
        ("missing", FileNotFoundError, "missing: no such file"),
        ("", IsADirectoryError, "is a folder; expected a text file"),
    ):
        with pytest.raises(error, match=message):
            read_text(tmp_path / name)


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


def cut_after(lines):
    """A .zst file whose writer handed on these lines and got no further."""
    compressor = zstandard.ZstdCompressor().compressobj()
    return compressor.compress(lines) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: empty"),
        ("a.txt", b" \n", "a.txt: empty"),
        ("a.csv", b"text", "a.csv: unknown suffix; expected one of .jsonl, "),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl: line 2: invalid JSON: Expecting value at character 9"),
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
        ("a.jsonl.zst", zstandard.compress(b'{"text": "a"}\n')[:-1], "a.jsonl.zst: "),
        ("a.jsonl.zst", cut_after(b'{"text": "a"}\n'), "a.jsonl.zst: line 1: compressed file ended"),
        ("a.parquet", b"no parquet", "a.parquet: "),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        prepare(config(tmp_path / name), word_tokenizer(), tmp_path / "cache")
    assert message in str(error.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "source", ["nothing", "no/such/folder", "data/train.jsonl", "data/train.TXT", "/data/x", "org/name:", "größe/a"]
)
def test_a_source_that_is_nowhere_is_named(tmp_path, source):
    with pytest.raises(FileNotFoundError, match=f"{source}: no such file or folder, and not a Hub dataset"):
        prepare(config(source), word_tokenizer(), tmp_path)


def test_no_name_is_not_this_folder(tmp_path, monkeypatch):
    write_lines(tmp_path / "a.jsonl", ["one"])
    monkeypatch.chdir(tmp_path)
    assert [document["text"] for document in read(".")] == ["one"]
    with pytest.raises(ValueError, match="the name of a source of text is empty"):
        read("")
    with pytest.raises(ValueError, match="is empty"):
        check_sources([""])


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
