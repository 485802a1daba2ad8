import math

import pytest

from experiments.long.items import Item
from experiments.long.metrics import METRICS, aggregate


def score(metric, answer, *references, options=()):
    return METRICS[metric].score(answer, Item("", "", "", references, options))


@pytest.mark.parametrize(
    ("metric", "answer", "references", "expected"),
    [
        ("f1", "The cat, a black one!", ["black cat"], 2 * (2 / 3) * 1 / (2 / 3 + 1)),  # cat black one / black cat
        ("f1", "cat cat", ["cat"], 2 * 0.5 * 1 / 1.5),
        ("f1", "dog", ["cat", "the dog"], 1),
        ("f1", "", ["cat"], 0),
        ("f1_zh", "答案是：厦门大学", ["厦门大学。"], 2 * (4 / 7) * 1 / (4 / 7 + 1)),
        ("rouge_l", "the dog chased a cat", ["the cat chased a dog"], 3 / 5),  # the chased a
        ("rouge_l", "b", ["a", "b c"], 2 * 1 * 0.5 / 1.5),
        ("rouge_l_zh", "会议很好", ["会议好。"], 2 * (3 / 4) * 1 / (3 / 4 + 1)),
        ("count", "There are 12, no, 13", ["13"], 1 / 2),
        ("count", "none", ["13"], 0),
        ("retrieval", "Paragraph 2 or Paragraph 21", ["Paragraph 2"], 1 / 2),
        ("retrieval", "段落5", ["段落5"], 1),
        ("edit_similarity", "\n# a comment\nreturn x\nmore", ["return x"], 1),
        ("edit_similarity", "abcd", ["bcde"], 0.75),  # 2 * 3 / 8
        ("share_found", "They are 11, AB and 33.", ["11", "ab", "44", "22"], 0.5),
    ],
)
def test_scores_by_hand(metric, answer, references, expected):
    assert score(metric, answer, *references) == [pytest.approx(expected)]


@pytest.mark.parametrize(("answer", "expected"), [("Type: City", 1), ("City or Food", 1 / 2), ("Food", 0), ("?", 0)])
def test_classes(answer, expected):
    assert score("classification", answer, "City", options=("City", "Person", "Food")) == [expected]


def test_a_class_inside_the_right_ones_name_does_not_count():
    assert score("classification", "Other location", "Other location", options=("Other", "Other location")) == [1]


@pytest.mark.parametrize(
    ("answer", "expected"), [(" Kitchen. Not the garden.", 1), ("kitchen or garden", 0), ("the kitchenette", 0)]
)
def test_babilongs_answers_name_one_label(answer, expected):
    assert score("names_only", answer, "kitchen", options=("garden", "kitchen")) == [expected]


def test_choice_by_likelihood():
    item = Item("", "", "", ("b",), ("a", "b"))
    assert METRICS["accuracy"].by_likelihood
    assert [METRICS["accuracy"].score(each, item) for each in ([-2.0, -1.0], [-1.0, -2.0])] == [[1], [0]]


def test_rouge_for_scrolls_takes_stems_and_the_best_reference_for_each_type():
    # Unigrams: 2 of 2 and 3; bigrams: 1 of 1 and 2; longest common subsequence: 2 of 2 and 3.
    assert score("rouge_geometric", "cats running", "x", "the cat runs") == pytest.approx([0.8, 2 / 3, 0.8])


def test_geometric_mean_is_taken_of_the_means_over_the_set():
    figures = [[0.2, 0.1, 0.2], [0.6, 0.3, 0.4]]
    assert aggregate(figures)[0] == pytest.approx((0.4 * 0.2 * 0.3) ** (1 / 3))


def test_standard_error_is_the_usual_one_for_means():
    values = [0.0, 1.0, 1.0, 0.5]
    mean = sum(values) / 4
    usual = math.sqrt(sum((value - mean) ** 2 for value in values) / 3 / 4)
    assert aggregate([[value] for value in values]) == (pytest.approx(mean), pytest.approx(usual))
    assert aggregate([[0.5]]) == (0.5, None)


def test_longbench_example():
    """LongBench's qa_f1_score by its definition: articles and punctuation go, tokens count as often as they occur."""
    # miller | v | cassie | miller, precision 2/4; reference miller | v, recall 2/2.
    assert score("f1", "Miller v. Cassie Miller", "Miller v.") == [pytest.approx(2 * 0.5 * 1 / 1.5)]
