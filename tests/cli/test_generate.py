"""The command ``lococo generate``: texts, questions, sampling, and documents kept in a file."""

import datetime
import io
import itertools
import shutil

import pytest
import torch
from tiny import tiny_ids, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from words import TEXT, WORDS, word_tokenizer

import lococo
from lococo.cli.main import main
from lococo.compat import with_cache
from lococo.document import Document, SavedDocument, save_document
from lococo.generation import read_and_answer, read_beginning

METHOD = ["--num-slots", "16", "--block-size", "8", "--max-new-tokens", "6"]


def read_by(arguments):
    """Options of the method, but for heads, which have slots and blocks of their own."""
    return METHOD[4:] if "--heads" in arguments else METHOD


CONFIG = lococo.LoCoCoConfig(16, block_size=8)
QUESTIONS = ["w3 w9", "w17", "w40 w41 w42 w2"]
DRAWN = ["--do-sample", "--temperature", "1.7", "--top-p", "0.9", "--top-k", "30", "--seed", "5"]
TEMPLATE = (
    "w0 {% for message in messages %}{{ message.content }} w60 {% endfor %}{% if add_generation_prompt %}w1{% endif %}"
)


def figures(output):
    return {line[:15].strip(): line[16:] for line in output.splitlines() if line[:15].strip() and len(line) > 16}


def errors(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("lococo: error: ")]


def typed(data):
    """Standard input that holds these bytes."""
    return io.TextIOWrapper(io.BytesIO(data))


@pytest.fixture(scope="module")
def chatty(checkpoint, tmp_path_factory):
    """Folder of the tiny model with a tokenizer that has a chat template."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("chatty") / "model")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def ran(chatty, capsys):
    """What the command prints with these arguments."""

    def run(*arguments):
        status = main(["generate", "--model", str(chatty), *read_by(arguments), *map(str, arguments)])
        output = capsys.readouterr()
        assert status == 0, output.err
        return output.out

    return run


def answers(output, count):
    """The answers that were printed, in order."""
    printed = output.split("\n\ntokens read")[0].splitlines()
    return [line for line in printed if not line.startswith("> ")] if count > 1 else printed


@pytest.mark.parametrize(("method", "slots"), [("lococo-uncalibrated", 16), ("h2o", 16), ("full", None)])
def test_generate_reads_and_reports(checkpoint, tmp_path, capsys, method, slots):
    (tmp_path / "text.txt").write_text(TEXT)
    status = main(
        ["generate", "--model", str(checkpoint), "--prompt-file", str(tmp_path / "text.txt"), "--method", method]
        + ["--num-slots", "16", "--block-size", "8", "--max-new-tokens", "5"]
    )
    output = capsys.readouterr().out
    assert status == 0
    reported = figures(output)
    assert reported["tokens read"] == ("200 (16 slots per layer)" if slots else "200 (every token kept)")
    assert ("100.0%" in reported["cache"]) == (slots is None)
    assert "5 tokens" in reported["answering"]
    assert any(word in output for word in WORDS)


def test_generate_answers_like_the_library(checkpoint, capsys):
    main(["generate", "--model", str(checkpoint), "--prompt", TEXT, "--num-slots", "16", "--max-new-tokens", "5"])
    printed = capsys.readouterr().out.splitlines()[0].split()
    model, tokenizer = tiny_llama(), word_tokenizer()
    with lococo.patched(model, lococo.LoCoCoConfig(16, block_size=16)):
        ids = tokenizer(TEXT, return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert printed == tokenizer.decode(output[0, 200:], skip_special_tokens=True).split()


def test_generate_holds_codes_and_says_what_it_holds(checkpoint, tmp_path, capsys):
    heads = lococo.save_heads(lococo.patch_model(tiny_llama(), lococo.LoCoCoConfig(16, block_size=8)), tmp_path / "h")
    said = {}
    for bits in ("16", "8", "8-4"):
        for how in (["--num-slots", "16", "--block-size", "8"], ["--heads", str(heads)]):
            arguments = ["--prompt", TEXT, "--max-new-tokens", "5", "--slot-bits", bits, *how]
            assert main(["generate", "--model", str(checkpoint), *arguments]) == 0
            said[bits, how[0]] = figures(capsys.readouterr().out)["cache"]
    assert len(set(said.values())) == 3 and said["8", "--heads"] == said["8", "--num-slots"]


def test_generate_with_heads(checkpoint, tmp_path, capsys):
    model = lococo.patch_model(tiny_llama(), lococo.LoCoCoConfig(16, block_size=8, gate_init=0.5))
    lococo.save_heads(model, tmp_path / "heads")
    status = main(["generate", "--model", str(checkpoint), "--prompt", TEXT, "--heads", str(tmp_path / "heads")])
    assert status == 0 and "(16 slots per layer)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-file", "missing.txt"], "missing.txt: no such file"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", ""], "Option '--prompt' requires an argument"),
        ([], "either --prompt-file or --prompt, or on standard input"),
        (["--prompt-file", "-"], "either --prompt-file or --prompt, or on standard input"),
        (["--prompt", "w1", "--prompt-file", "text.txt"], "either --prompt-file or --prompt"),
        (["--prompt", "w1 w2", "--num-slots", "0"], "num_slots must be an integer of at least 1, got 0"),
        (["--prompt", "w1 w2", "--slot-bits", "8:4"], "slot bits must be written as 8, or as 8-4 for keys and values"),
        (["--prompt", "w1 w2", "--slot-bits", "5"], "slot_bits must be 16, 8 or 4, or two of them"),
        (["--prompt", "w1 w2", "--heads", "missing"], "missing"),
        (["--prompt", "w1 w2", "--method", "h20"], "unknown method 'h20': choose from full, streaming, "),
        (["--prompt", "w1 w2", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["--prompt", "w1", "--temperature", "2", "--seed", "1"], "--temperature, --seed changes what is drawn"),
        (["--prompt", "w1", "--do-sample", "--temperature", "0"], "--temperature must be above 0, got 0.0"),
        (["--prompt", "w1", "--do-sample", "--temperature", "nan"], "--temperature must be above 0, got nan"),
        (["--prompt", "w1", "--do-sample", "--top-p", "1.5"], "--top-p must lie above 0, and be 1 at most, got 1.5"),
        (["--prompt", "w1", "--do-sample", "--top-k", "-1"], "Invalid value for '--top-k'"),
        (["--prompt", "w1", "--method", "full", "--save-cache", "a"], "the full cache is not written to a file"),
        (["--load-cache", "missing", "--question", "w1"], "missing does not exist"),
        (["--load-cache", "missing"], "--load-cache needs a --question"),
        (
            ["--load-cache", "a", "--question", "w1", "--prompt", "w2", "--no-chat"],
            "--load-cache has a text that was read: leave out --prompt, --no-chat",
        ),
        (["--prompt", "w1 w2", "--device", "tpu9"], "--device must be cpu, cuda, cuda:1, ..., got 'tpu9'"),
        (["--prompt", "w1 w2", "--dtype", "float"], "--dtype"),
    ],
)
def test_bad_input_is_one_line_and_status_2(checkpoint, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("sys.stdin", typed(b""))
    if message == "--dtype":
        arguments, message = [*arguments[:-1], "float99"], "--dtype must be float32, bfloat16, ..., got 'float99'"
    assert main(["generate", "--model", str(checkpoint), *arguments]) == 2
    (error,) = errors(capsys)
    assert message in error


def test_a_question_comes_after_the_text_in_the_chat_template():
    tokenizer = word_tokenizer()
    plain = Document.of(tokenizer, "w1 w2 w3")
    assert tokenizer.decode(plain.prompt("w7")[0]) == "w1 w2 w3 w7" and not plain.is_chat
    tokenizer.chat_template = TEMPLATE
    chat = Document.of(tokenizer, "w1 w2 w3", max_tokens=2)
    assert tokenizer.decode(chat.prompt("w7")[0]) == "w0 w1 w2 w7 w60 w1"
    assert tokenizer.decode(chat.ids[0]) == "w0 w1 w2"
    left = Document.of(tokenizer, "w1 w2 w3", is_chat=False)
    assert torch.equal(left.prompt("w7"), plain.prompt("w7"))


def byte_tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    of_bytes = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    of_bytes.pre_tokenizer, of_bytes.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=of_bytes)


@pytest.mark.parametrize("max_tokens", range(1, 17))
def test_a_text_is_cut_between_characters(max_tokens):
    text = "a\u00e9\u20ac b\U0001f600, c ."
    whole = [text[:end] for end in range(len(text) + 1) if len(text[:end].encode()) <= max_tokens]
    assert Document.of(byte_tokenizer(), text, max_tokens).text == whole[-1]


def test_words_that_are_special_tokens_stay_in_a_text_that_is_cut():
    assert Document.of(word_tokenizer(), "w1 <pad> w2 w3", 3).text == "w1 <pad> w2"


def test_a_template_that_tells_the_date_tells_that_of_the_document(tmp_path):
    tokenizer, model = word_tokenizer(), lococo.patch_model(tiny_llama(), CONFIG)
    tokenizer.chat_template = "w{{ strftime_now('%Y') | int - 2000 }} " + TEMPLATE
    document = Document(tokenizer, TEXT, True, datetime.datetime(2005, 2, 3))
    assert tokenizer.decode(document.prompt("w7")[0, :3]) == "w5 w0 w0"
    save_document(tmp_path / "text", document, read_beginning(model, document.ids)[0], model)
    loaded = SavedDocument.load(tmp_path / "text").document(model, tokenizer)
    assert torch.equal(loaded.prompt("w7"), document.prompt("w7"))
    assert tokenizer.decode(Document.of(tokenizer, TEXT).ids[0, 0]) == f"w{datetime.date.today().year - 2000}"


SAVED_WITH = [
    dict(use_cache=False),
    dict(cache_implementation="static"),
    dict(return_dict_in_generate=True),
    dict(num_beams=2),
    dict(do_sample=True, num_return_sequences=2),
]


@pytest.mark.parametrize("changes", SAVED_WITH, ids=lambda changes: "-".join(changes))
@pytest.mark.parametrize("is_patched", [True, False])
def test_a_models_own_generation_config_changes_no_answer(is_patched, changes):
    model, ids = tiny_llama(), tiny_ids(1, 60)
    if is_patched:
        lococo.patch_model(model, CONFIG)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, 60:]
    model.generation_config.update(**changes)
    answer = read_and_answer(model, ids, max_new_tokens=8, do_sample=False).answer
    assert torch.equal(answer, expected)


def test_a_cache_to_go_on_with_is_not_passed_over():
    """Every token would be read into it again and again."""
    model, ids = lococo.patch_model(tiny_llama(), CONFIG), tiny_ids(1, 60)
    cache = read_beginning(model, ids[:, :40])[0]
    with pytest.raises(ValueError, match="use_cache=False, .* does not go with a cache"):
        model.generate(ids, **with_cache(model, cache), use_cache=False, max_new_tokens=2)
    assert cache.seen_tokens == 40
    static = model.generate(ids, **with_cache(model, cache), cache_implementation="static", max_new_tokens=6)
    assert torch.equal(static, model.generate(ids, max_new_tokens=6))


@pytest.mark.parametrize("options", [[], ["--no-chat"], ["--method", "full"], DRAWN], ids=" ".join)
def test_several_questions_are_answered_as_in_runs_of_their_own(ran, options):
    alone = [answers(ran("--prompt", TEXT, *options, "--question", question), 1)[0] for question in QUESTIONS]
    together = ran("--prompt", TEXT, *options, "--question", *QUESTIONS)
    assert [line[2:] for line in together.splitlines() if line.startswith("> ")] == QUESTIONS
    assert answers(together, 3) == alone and len(set(alone)) > 1
    words = 7 if "--no-chat" in options else 7 + 2 * 3 + 1  # of the questions, and of the template
    assert figures(together)["tokens read"].startswith(f"{200 + words} (")
    assert "(18 tokens)" in figures(together)["answering"]


@pytest.mark.parametrize("options", [[], ["--no-chat"], DRAWN], ids=" ".join)
def test_a_saved_text_is_answered_about_as_one_that_is_read(ran, tmp_path, options):
    read = ran("--prompt", TEXT, *options, "--question", *QUESTIONS)
    file, method = tmp_path / "new" / "text.safetensors", [each for each in options if each != "--no-chat"]
    saved = ran("--prompt", TEXT, *options, "--save-cache", file)
    assert f"{file}: what is kept of the text" in saved and figures(saved)["answering"] == "- (0 tokens)"
    assert not answers(saved, 1)[0]
    loaded = ran("--load-cache", file, *method, "--question", *QUESTIONS)
    assert answers(loaded, 3) == answers(read, 3)
    again = ran("--prompt", TEXT, *options, "--save-cache", tmp_path / "again", "--question", *QUESTIONS)
    assert answers(again, 3) == answers(read, 3)
    one, other = SavedDocument.load(file), SavedDocument.load(tmp_path / "again")
    assert one.notes == other.notes
    for layer, same in zip(one.cache.layers, other.cache.layers, strict=True):
        assert torch.equal(layer.entries.keys, same.entries.keys)
    held, full = figures(loaded)["cache"], figures(read)["cache"]
    assert held == full  # of the text and the longest question
    assert lococo.LoCoCoCache.load(file).seen_tokens == (200 if "--no-chat" in options else 201)


@pytest.mark.parametrize("is_chat", [True, False])
def test_answers_are_those_of_model_generate(chatty, ran, is_chat):
    printed = answers(ran("--prompt", TEXT, "--question", "w3 w9", *([] if is_chat else ["--no-chat"])), 1)[0]
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    content = f"{TEXT}\n\nw3 w9"
    turn = [{"role": "user", "content": content}]
    chat = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = chat["input_ids"] if is_chat else tokenizer(content, return_tensors="pt").input_ids
    with lococo.patched(AutoModelForCausalLM.from_pretrained(chatty), CONFIG) as model:
        output = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert printed == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_what_is_drawn_is_what_model_generate_draws(chatty, ran):
    ids = word_tokenizer()(TEXT, return_tensors="pt").input_ids
    named = dict(do_sample=True, temperature=1.7, top_p=0.9, top_k=30)
    drawn = set()
    for seed in ("5", "6"):
        with lococo.patched(AutoModelForCausalLM.from_pretrained(chatty), CONFIG) as model:
            torch.manual_seed(int(seed))
            output = model.generate(ids, max_new_tokens=6, **named)
        expected = word_tokenizer().decode(output[0, 200:], skip_special_tokens=True)
        assert answers(ran("--prompt", TEXT, *DRAWN[:-1], seed), 1)[0] == expected
        drawn.add(expected)
    assert len(drawn) == 2


@pytest.mark.parametrize("option", [[], ["--prompt-file", "-"]], ids=["piped", "-"])
def test_a_text_comes_from_standard_input(ran, monkeypatch, option):
    monkeypatch.setattr("sys.stdin", typed(b"\xef\xbb\xbf" + TEXT.replace(" ", "\r\n").encode()))
    assert answers(ran(*option, "--question", "w3"), 1) == answers(ran("--prompt", TEXT, "--question", "w3"), 1)


def test_what_is_no_text_on_standard_input_is_named(monkeypatch, capsys):
    for data in (b"\xff\xfe", b"w1\0"):
        monkeypatch.setattr("sys.stdin", typed(data))
        assert main(["generate", "--model", "none"]) == 2
        assert "standard input: binary data" in errors(capsys)[0]


@pytest.mark.parametrize("option", ["--prompt", "--question"])
def test_words_in_another_encoding_are_named(capsys, option):
    texts = {"--prompt": "w1", "--question": "w2", option: "m\udcfcde"}  # Latin-1, as Python hands it on
    assert main(["generate", "--model", "none", *itertools.chain(*texts.items())]) == 2
    assert f"{option}: binary data or another encoding" in errors(capsys)[0]


@pytest.fixture(scope="module")
def saved(chatty, tmp_path_factory):
    """Files of a text: one without trained heads, one with."""
    folder = tmp_path_factory.mktemp("saved")
    for number in range(2):
        model = tiny_llama()
        torch.manual_seed(number)
        lococo.patch_model(model, lococo.LoCoCoConfig(16, block_size=8, gate_init=0.5))
        lococo.save_heads(model, folder / f"heads-{number}")
    for name, heads in (("plain", []), ("trained", ["--heads", str(folder / "heads-0")])):
        arguments = ["generate", "--model", str(chatty), "--prompt", TEXT, *read_by(heads), *heads]
        assert main([*arguments, "--save-cache", str(folder / name)]) == 0
    return folder


def test_a_text_read_with_trained_heads_is_loaded_with_them(ran, saved):
    heads = ["--heads", saved / "heads-0", "--question", "w3 w9"]
    assert answers(ran("--load-cache", saved / "trained", *heads), 1) == answers(ran("--prompt", TEXT, *heads), 1)


MISFITS = {
    "other slots": ("plain", ["--num-slots", "24"], "the model is patched with num_slots=24"),
    "another method": ("plain", ["--method", "h2o"], "the model is patched with"),
    "another dtype": ("plain", ["--dtype", "bfloat16"], "was read in torch.float32, the model is in torch.bfloat16"),
    "heads for none": ("plain", ["--heads", "heads-0"], "the model is patched with"),
    "other heads": ("trained", ["--heads", "heads-1"], "was read with other trained heads"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_saved_text_that_does_not_fit_is_refused(chatty, saved, capsys, monkeypatch, name):
    monkeypatch.chdir(saved)
    file, changed, message = MISFITS[name]
    arguments = ["generate", "--model", str(chatty), "--load-cache", file, "--question", "w1"]
    assert main([*arguments, *read_by(changed), *changed]) == 2
    (error,) = errors(capsys)
    assert file in error and message in error


def test_a_saved_text_of_another_model_or_tokenizer_is_refused(chatty, saved, tmp_path, capsys):
    arguments = [*METHOD, "--load-cache", str(saved / "plain"), "--question", "w1"]
    for name, change in {"weights": {"seed": 3}, "config": {"rms_norm_eps": 0.1}}.items():
        other = shutil.copytree(chatty, tmp_path / name)
        tiny_llama(**change).save_pretrained(other)
        assert main(["generate", "--model", str(other), *arguments]) == 2
        assert "was read by a model with other weights or another config" in errors(capsys)[0]
    deeper = shutil.copytree(chatty, tmp_path / "deeper")
    tiny_llama(num_hidden_layers=3).save_pretrained(deeper)
    assert main(["generate", "--model", str(deeper), *arguments]) == 2
    assert "is of another model: it has num_layers=2, this model num_layers=3" in errors(capsys)[0]
    talks = shutil.copytree(chatty, tmp_path / "talks")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("w0", "w0 w0")
    tokenizer.save_pretrained(talks)
    assert main(["generate", "--model", str(talks), *arguments]) == 2
    assert "was read with another tokenizer or chat template" in errors(capsys)[0]


def test_what_is_no_cache_is_never_replaced_by_one(ran, saved, tmp_path, capsys, monkeypatch):
    book, folder, old = tmp_path / "book.txt", tmp_path / "folder", tmp_path / "old"
    book.write_text(TEXT)
    folder.mkdir()
    shutil.copy(saved / "trained", old)
    ran("--prompt", "w1 w2 w3", "--save-cache", old)
    assert SavedDocument.load(old).notes["text"] == "w1 w2 w3"
    monkeypatch.setattr("lococo.loading.load_model", lambda *names, **options: pytest.fail("the model was loaded"))
    for output, message in ((book, "which holds no cache: give another name"), (folder, "it is a folder")):
        arguments = ["--prompt-file", str(book), "--save-cache", str(output)]
        assert main(["generate", "--model", "none", *METHOD, *arguments]) == 2
        assert message in errors(capsys)[0]
    assert book.read_text() == TEXT and not list(folder.iterdir())


def test_a_file_without_a_whole_text_is_refused_before_the_model_is_loaded(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lococo.loading.load_model", lambda *names, **options: pytest.fail("the model was loaded"))
    lococo.LoCoCoCache.load(saved / "plain").save(tmp_path / "cache")
    (tmp_path / "torn").write_bytes((saved / "plain").read_bytes()[:-9])
    for name, message in (("cache", "holds a cache without its text"), ("torn", "is no whole file")):
        arguments = ["--load-cache", str(tmp_path / name), "--question", "w1"]
        assert main(["generate", "--model", "none", *METHOD, *arguments]) == 2
        assert f"{name} {message}" in errors(capsys)[0]
