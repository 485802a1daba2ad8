"""Texts of token ids, and the command that extends the tiny model on them."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lococo.cli.main import main

WORDS = ["<pad>", "w1", "</s>", *(f"w{index}" for index in range(3, 64))]


def id_tokenizer():
    """Words are the ids 0 to 63."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=WORDS[2], pad_token=WORDS[0])


def write_documents(path, rows):
    """A file of documents with these ids."""
    documents = ({"text": " ".join(WORDS[index] for index in row)} for row in rows)
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def command(checkpoint, text, folder, *more):
    """The exit status of ``lococo extend``."""
    given = ["extend", "--model", checkpoint, "--dataset", text, "--output", folder / "out", "--cache-dir", folder]
    quick = ["--num-slots", 16, "--block-size", 8, "--steps", 2, "--windows-per-step", 1]
    return main([str(word) for word in [*given, *quick, *more]])
