"""A tokenizer whose words are numbers, and files of them."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lococo.data.windows import DataConfig

WORDS = 97


def word_tokenizer(bos=False, eos_token="</s>", words=WORDS):
    """Token 2 + n is the word "wn"; 0 and 1 are BOS and EOS."""
    vocabulary = {"<s>": 0, "</s>": 1, **{f"w{n}": 2 + n for n in range(words)}, "<unk>": 2 + words}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos_token, unk_token="<unk>", model_max_length=8
    )


def text_of(numbers):
    return " ".join(f"w{number}" for number in numbers)


def write_lines(path, texts, **fields):
    """A file of documents, with the same fields beside each text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps({"text": text, **fields}) for text in texts))
    return path


def config(*sources, **changes):
    """Few windows of eight tokens."""
    return DataConfig(
        **{"sources": tuple(map(str, sources)), "length": 8, "num_windows": 10, "num_heldout": 3, **changes}
    )
