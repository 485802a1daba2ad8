"""Tokenizers for the tiny models, of a few words and of characters, and text."""

import json
import random

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{index}" for index in range(61)]
TEXT = " ".join(WORDS[index * index % 61] for index in range(200))


def word_tokenizer():
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "<unk>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],  # those of Llama's; some releases add token_type_ids
    )


def write_texts(path, count=240, words=90):
    """A file of documents of so many words, of two domains."""
    chosen = random.Random(3)  # the held-out ones are texts that H2O loses on
    texts = [{"text": " ".join(chosen.choices(WORDS, k=words)), "domain": f"d{i % 2}"} for i in range(count)]
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return path


class Characters:
    """A tokenizer: one token per character."""

    def __call__(self, text, return_tensors=None):
        ids = [ord(character) % 63 + 1 for character in text]
        return type("Encoding", (), {"input_ids": torch.tensor([ids]) if return_tensors else ids})
