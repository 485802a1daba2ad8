"""Needles: where they stand, that they are asked for, and what is written of the answers."""

import json
import random
import re

import pytest
from tiny import tiny_llama
from words import word_tokenizer

from lococo.cli.main import main
from lococo.evaluation import needles as needles_module
from lococo.evaluation.needles import MAX_NEW_TOKENS, Filler, evaluate_needles, largest, make_needles
from lococo.methods import plan_runs


class Letters:
    """A tokenizer of four letters a token, that remembers what it was given."""

    chat_template = None

    def __init__(self):
        self.texts = {}

    def __call__(self, text, add_special_tokens=True):
        pieces = re.findall(r"\w{1,4}|[^\w\s]", text)
        ids = [sum(map(ord, piece)) for piece in pieces]
        self.texts[tuple(ids)] = text
        return type("Encoding", (), {"input_ids": ids})


def made(lengths=(700,), **options):
    """Needles, and the prompts they were made of."""
    tokenizer = Letters()
    found = make_needles(tokenizer, Filler(), lengths, **options)
    return found, [tokenizer.texts[tuple(each.ids[0].tolist())] for each in found]


@pytest.mark.parametrize("distractors", [0, 3])
def test_a_needle_stands_at_its_depth_between_sentences_and_is_asked_for(distractors):
    needles, prompts = made((700, 3000), depths=5, distractors=distractors)
    assert [(each.length, each.depth) for each in needles] == [
        (length, depth / 4) for length in (700, 3000) for depth in range(5)
    ]
    for needle, prompt in zip(needles, prompts, strict=True):
        assert needle.length - 16 <= needle.ids.shape[1] + MAX_NEW_TOKENS <= needle.length
        _, text, question = prompt.split("\n\n")
        hidden = dict(re.findall(r"The secret number of (\S+) is (\d+)\.", text))
        assert len(hidden) == 1 + distractors
        assert hidden[re.search(r"number of (\S+), as", question).group(1)] == needle.answer
        place = text.index(re.search(rf"The secret number of \S+ is {needle.answer}", text).group())
        assert place / len(text) == pytest.approx(needle.depth, abs=0.15 if needle.length == 700 else 0.08)
        assert not place or needle.depth == 1 or text[place - 2] == "."


def test_a_seed_gives_the_same_needles_and_another_seed_others():
    answers = [[each.answer for each in made(seed=seed, depths=2, items=3)[0]] for seed in (0, 0, 1)]
    assert answers[0] == answers[1] != answers[2] and len(set(answers[0])) == 6


def test_a_length_that_is_named_twice_is_asked_about_once():
    found = [each.ids.tolist() for each in made((900, 700, 900), depths=2, items=2)[0]]
    assert found == [each.ids.tolist() for each in made((900, 700), depths=2, items=2)[0]]


def test_the_largest_that_fits_is_found():
    for limit in (3, 63, 64, 65, 1000):
        assert largest(lambda size: size, lambda size: size, 1, limit) == limit
    with pytest.raises(ValueError, match="a length of 4 tokens is too short: this task needs 5"):
        largest(lambda size: size, lambda size: size + 4, 1, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lengths=(40,)), "a length of 40 tokens is too short: this task needs"),
        (dict(depths=0), "depths must be at least 1, got 0"),
        (dict(items=0), "items must be at least 1, got 0"),
        (dict(distractors=-1), "distractors must be at least 0, got -1"),
        (dict(chat=True), "--chat needs a tokenizer with a chat template"),
    ],
)
def test_what_cannot_be_asked_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_found_is_what_the_answers_hold_and_a_killed_run_goes_on(tmp_path, monkeypatch):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "w0 {{ messages[0].content }} w60 "
    needles = make_needles(tokenizer, Filler(["w1 w2. w3 w4."]), [300], depths=2, items=2, chat=True)
    assert all(tokenizer.decode(each.ids[0]).startswith("w0 ") for each in needles)
    runs, asked = plan_runs(["full", "h2o"], [16], 8), []

    def answer(model, tokenizer, needle):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(needle)
        return f"It is {needle.answer}." if needle.depth else "I forgot."

    monkeypatch.setattr(needles_module, "_answer", answer)
    with pytest.raises(KeyboardInterrupt):
        evaluate_needles(tiny_llama(), tokenizer, needles, runs, tmp_path / "needles", "lococo x")
    asked.clear()
    rows = evaluate_needles(tiny_llama(), tokenizer, needles, runs, tmp_path / "needles", "lococo x")
    assert len(asked) == 3
    assert [(row["method"], row["num_slots"], row["depth"], row["items"], row["found"]) for row in rows] == [
        (*method, depth, 2, depth) for method in (("full", None), ("h2o", 16)) for depth in (0, 1)
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"needles.json", "needles.md", "needles.png"}
    assert "| full |  |  | 19200 | 300 | 4 | 0.5 |" in (tmp_path / "needles.md").read_text()


def test_answers_in_another_type_are_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(needles_module.Journal, "finish", lambda journal: None)
    asked = []
    monkeypatch.setattr(needles_module, "_answer", lambda model, tokenizer, needle: asked.append(model.dtype) or "")
    tokenizer = word_tokenizer()
    needles = make_needles(tokenizer, Filler(["w1 w2. w3 w4."]), [300], depths=1)
    for model in (tiny_llama(), tiny_llama().double(), tiny_llama()):
        evaluate_needles(model, tokenizer, needles, plan_runs(["full"]), tmp_path / "needles", "lococo x")
    assert asked == [tiny_llama().dtype, tiny_llama().double().dtype]


def test_command(checkpoint, tmp_path, capsys):
    options = ["--methods", "full,h2o", "--num-slots", "16", "--block-size", "8", "--lengths", "200", "--depths", "2"]
    (tmp_path / "text.txt").write_text("w1 w2. w3 w4.")
    options += ["--data", str(tmp_path / "text.txt"), "--output", str(tmp_path / "needles")]
    assert main(["eval", "needles", "--model", str(checkpoint), *options]) == 0
    content = json.loads((tmp_path / "needles.json").read_text())
    assert len(content["rows"]) == 4 and content["command"].startswith("lococo eval needles --model ")
    assert (tmp_path / "needles.png").read_bytes().startswith(b"\x89PNG")
    assert "h2o" in capsys.readouterr().out
    assert "| h2o | 16 | 8 | 1744 | 200 | 2 |" in (tmp_path / "needles.md").read_text()


def test_filler_comes_from_texts_and_begins_again():
    filler = Filler(["One two three. Four five."])
    assert filler.take(7, 3) == ["Four", "five.", "One", "two", "three.", "Four", "five."]
    text = filler.hide([(0.5, "Here."), (0.5, "There.")], 5, random.Random(0))
    assert sorted(text.replace("Here. There. ", "").split()) == sorted(filler.words)
