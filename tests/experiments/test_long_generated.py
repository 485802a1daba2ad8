import random
import re
from pathlib import Path

import pytest
from words import word_tokenizer

from experiments.long.needles import RULER, babi_stories, generated_task, made_up_words
from experiments.long.prompts import Prompts
from lococo.evaluation.needles import Filler

BABI = Path(__file__).parents[2] / "../shared/data/eval/babi"
STORIES = """1 John went to the hallway.
2 Mary went to the garden.
3 Where is John? |hallway|1
4 John went to the kitchen.
5 Where is John?\tkitchen\t4
1 Mary went to the office.
2 Where is Mary? |office|1
"""


class Letters:
    """A tokenizer of four letters a token."""

    chat_template = None

    def __call__(self, text, add_special_tokens=True):
        pieces = re.findall(r"\w{1,4}|[^\w\s]", text)
        return type("Encoding", (), {"input_ids": [sum(map(ord, piece)) for piece in pieces]})


@pytest.fixture
def data_dir(tmp_path):
    (tmp_path / "babi").mkdir()
    (tmp_path / "babi" / "qa1_facts_test.txt").write_text(STORIES)
    return tmp_path


@pytest.mark.parametrize("length", [700, 3000])
@pytest.mark.parametrize("name", [*RULER, "babilong-qa1"])
def test_length_is_met_and_never_exceeded(data_dir, name, length):
    prompts = Prompts(Letters())
    task = generated_task(name, prompts, Filler(), length, 4, seed=0, data_dir=data_dir)
    for item in task.items:
        assert length - 16 <= len(prompts.ids(item)) + task.max_new_tokens <= length
    assert task.length == length


@pytest.mark.parametrize("name", [*RULER, "babilong-qa1"])
def test_a_seed_gives_the_same_items_and_another_seed_others(data_dir, name):
    def items(seed):
        return generated_task(name, Prompts(Letters()), Filler(), 900, 2, seed, data_dir).items

    first = items(3)
    assert first == items(3)
    assert first[0].document != items(4)[0].document and first[0].document != first[1].document


@pytest.mark.parametrize(
    ("name", "needles", "references"),
    [("single", 1, 1), ("multikey", 4, 1), ("multivalue", 4, 4), ("multiquery", 4, 4)],
)
def test_needles_stand_in_the_text(name, needles, references):
    (item,) = generated_task(f"ruler-niah_{name}", Prompts(Letters()), Filler(), 900, 1, seed=0).items
    told = dict(map(reversed, re.findall(r"The secret number of (\S+) is (\d+)\.", item.document)))
    assert len(told) == needles and len(item.references) == references
    assert all(told[number] in item.after for number in item.references)


def test_a_needle_stands_at_its_depth_between_sentences():
    task = generated_task("ruler-niah_single", Prompts(Letters()), Filler(), 3000, 11, seed=0)
    assert [item.depth for item in task.items] == [place / 10 for place in range(11)]
    for item in task.items:
        place = item.document.index("The secret number")
        assert place / len(item.document) == pytest.approx(item.depth, abs=0.04)
        assert not place or item.document[place - 2] == "." or item.depth == 1


def test_variables_lead_to_the_number():
    (item,) = generated_task("ruler-variable_tracking", Prompts(Letters()), Filler(), 900, 1, seed=0).items
    values = dict(re.findall(r"VAR (\w+) = (\w+)\.", item.document))
    number = re.search(r"value (\d+)", item.after).group(1)
    found = []
    for name in values:
        value = name
        while value in values:
            value = values[value]
        found += [name] if value == number else []
    assert sorted(found) == sorted(item.references) and len(found) == 5


@pytest.mark.parametrize(("name", "asked"), [("common_words", 10), ("frequent_words", 3)])
@pytest.mark.parametrize("length", [900, 3000])
def test_asked_words_are_the_most_frequent(name, asked, length):
    (item,) = generated_task(f"ruler-{name}", Prompts(Letters()), Filler(), length, 1, seed=0).items
    words = re.findall(r"[a-z]+", item.document)
    counts = {word: words.count(word) for word in set(words)}
    most = sorted(counts, key=counts.get, reverse=True)
    assert set(most[:asked]) == set(item.references)
    assert counts[most[asked - 1]] > counts[most[asked]]


def test_filler_comes_from_texts_and_begins_again():
    filler = Filler(["One two three. Four five."])
    assert filler.take(7, 3) == ["Four", "five.", "One", "two", "three.", "Four", "five."]
    text = filler.hide([(0.5, "Here."), (0.5, "There.")], 5, random.Random(0))
    assert sorted(text.replace("Here. There. ", "").split()) == sorted(filler.words)


def test_made_up_words_differ():
    assert len(set(made_up_words(5000, random.Random(0)))) == 5000


def test_too_short_lengths_and_missing_stories_are_named(tmp_path):
    with pytest.raises(ValueError, match="a length of 40 tokens is too short: this task needs"):
        generated_task("ruler-niah_single", Prompts(Letters()), Filler(), 40, 1, seed=0)
    with pytest.raises(FileNotFoundError, match=r"babilong-qa2 needs bAbI's files .*babi/qa2_\*"):
        generated_task("babilong-qa2", Prompts(Letters()), Filler(), 900, 1, 0, tmp_path)


def test_stories_hold_the_facts_before_their_question(data_dir):
    facts = [len(facts) for facts, _, _ in babi_stories(data_dir / "babi" / "qa1_facts_test.txt")]
    answers = [answer for _, _, answer in babi_stories(data_dir / "babi" / "qa1_facts_test.txt")]
    assert (facts, answers) == ([2, 3, 1], ["hallway", "kitchen", "office"])


def test_facts_keep_their_order(data_dir):
    for item in generated_task("babilong-qa1", Prompts(Letters()), Filler(), 700, 6, 0, data_dir).items:
        places = [item.document.find(f"John went to the {place}") for place in ("hallway", "kitchen")]
        if places[1] >= 0:
            assert 0 <= places[0] < places[1]
        assert item.options == ("hallway", "kitchen", "office") and item.references[0] in item.document


@pytest.mark.skipif(not BABI.is_dir(), reason="needs ../shared/data/eval")
@pytest.mark.parametrize("number", range(1, 6))
def test_published_stories_are_read(number):
    (path,) = BABI.glob(f"qa{number}_*.txt")
    stories = babi_stories(path)
    assert len(stories) == 1000
    assert all(facts and question.endswith("?") and answer.isalpha() for facts, question, answer in stories)


def test_chat_needs_a_template():
    with pytest.raises(ValueError, match="chat template"):
        Prompts(word_tokenizer(), chat=True)
