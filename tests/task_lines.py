"""Lines of few-shot tasks, as their files have them, of the words of ``words.py``."""

import json

from words import WORDS


def words(*numbers):
    return " ".join(WORDS[number % len(WORDS)] for number in numbers)


def arc(index):
    options = [words(index, 3 * index + each, *range(each)) for each in range(4)]
    return {"query": f"Question: {words(index, 5 * index, 7)}?\nAnswer:", "choices": options, "gold": index % 4}


def arc_of_the_hub(index):
    row = arc(index)
    question = row["query"][len("Question: ") : -len("\nAnswer:")]
    choices = {"text": row["choices"], "label": ["1", "2", "3", "4"]}
    return {"question": question, "choices": choices, "answerKey": str(row["gold"] + 1)}


def hellaswag(index):
    texts = {"activity_label": words(index), "ctx_a": words(index, 4, 9), "ctx_b": words(2 * index)}
    return {**texts, "endings": arc(index)["choices"], "label": str(index % 4)}


def winogrande(index):
    sentence = f"{words(index, 8, 3 * index)} _ {words(index + 1, 2)}"
    return {"sentence": sentence, "option1": words(index), "option2": words(index + 5), "answer": str(1 + index % 2)}


def race(index):
    questions = {"questions": [words(index, 3), words(4, index)], "answers": ["B", "D"]}
    return {"article": words(*range(index, index + 9)), **questions, "options": 2 * [arc(index)["choices"]]}


def triviaqa(index):
    return {"question": words(index, 11, 2 * index), "answer": {"aliases": [words(3 * index), words(index, 1)]}}


LINES = {
    "arc_easy": (arc, "test.jsonl", "train.jsonl"),
    "arc_challenge": (arc_of_the_hub, "test.jsonl", "train.json"),
    "hellaswag": (hellaswag, "validation.jsonl", "train_first1000.jsonl"),
    "winogrande": (winogrande, "validation_xl.jsonl", "train_xl_first1000.jsonl"),
    "race": (race, "dev_high_first300.jsonl", "train_high_first300.jsonl"),
    "triviaqa": (triviaqa, "validation_wikipedia_nocontext.jsonl", None),
}


def write_rows(path, rows):
    as_list = path.suffix == ".json"
    path.write_text(json.dumps(rows) if as_list else "".join(json.dumps(row) + "\n" for row in rows))
