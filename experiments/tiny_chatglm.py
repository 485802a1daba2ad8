"""A ChatGLM small enough to be trained on a CPU in minutes: a model of Chinese text to try calibration on.

python -m experiments.tiny_chatglm --tokenizer chatglm3-6b --data texts.jsonl --output folder
"""

import argparse
import math
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import IterableDataset
from transformers import GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from lococo.data.documents import documents
from lococo.models.chatglm.tokenizer import end_ids, fast_tokenizer, tokenizer_config

TOKENS_PER_STEP = 4096
LENGTH = 512
REPEATED_LENGTH = 64
NEGATIVES = 2048


def tiny_glm(tokenizer: PreTrainedTokenizerFast) -> GlmForCausalLM:
    """ChatGLM3's architecture in small: two KV heads, rotary positions on half of a head, biases on q, k and v."""
    config = GlmConfig(
        vocab_size=65024,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        partial_rotary_factor=0.5,
        attention_bias=True,
        rms_norm_eps=1e-5,
        initializer_range=0.05,
        tie_word_embeddings=True,  # a token seen is a token that may come again: learned at once
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_ids(tokenizer.backend_tokenizer),
    )
    torch.manual_seed(0)
    return GlmForCausalLM(config)


class Lessons(IterableDataset):
    """First random tokens that come again and again, which teach to look back; then stretches of the texts."""

    def __init__(self, documents: list[list[int]], steps: int, repeated: int) -> None:
        self.documents = [document for document in documents if len(document) >= LENGTH]
        self.vocabulary = sorted({token for document in documents for token in document})
        self.steps, self.repeated = steps, repeated

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        chance = random.Random(0)
        for step in range(self.steps):
            draw, length = (self._repeated, REPEATED_LENGTH) if step < self.repeated else (self._stretch, LENGTH)
            yield {"input_ids": torch.tensor([draw(chance) for _ in range(TOKENS_PER_STEP // length)])}

    def _repeated(self, chance: random.Random) -> list[int]:
        tokens = chance.choices(self.vocabulary, k=chance.randrange(4, 24))
        return (tokens * REPEATED_LENGTH)[:REPEATED_LENGTH]

    def _stretch(self, chance: random.Random) -> list[int]:
        document = chance.choices(self.documents, weights=list(map(len, self.documents)))[0]
        start = chance.randrange(len(document) - LENGTH + 1)
        return document[start : start + LENGTH]


class SampledLossTrainer(Trainer):
    """Next-token loss over a step's own tokens and a sample of the others that occur (Jean et al. 2015).

    The whole vocabulary would take most of the time.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """See ``Trainer``."""
        ids = inputs["input_ids"]
        hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
        present = ids.unique()
        others = torch.tensor(self.train_dataset.vocabulary, device=ids.device)
        others = others[~torch.isin(others, present)]
        sample = others[torch.randperm(len(others), device=ids.device)[:NEGATIVES]]
        logits = hidden @ model.lm_head.weight[torch.cat([present, sample])].T
        logits[..., len(present) :] += math.log(len(others) / len(sample))  # each stands for so many
        labels = torch.searchsorted(present, ids[:, 1:].contiguous())
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with ChatGLM3's tokenizer.model")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help=".jsonl or .txt files of texts")
    parser.add_argument("--steps", type=int, default=700, help=f"of {TOKENS_PER_STEP} tokens (default: %(default)s)")
    parser.add_argument("--repeated", type=int, default=250, help="first steps, on random tokens that come again")
    parser.add_argument("--output", type=Path, required=True, help="model folder to write")
    options = parser.parse_args()

    backend = fast_tokenizer(options.tokenizer / "tokenizer.model", generation=3)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer_config(generation=3))
    texts = [document["text"] for document in documents(list(map(str, options.data)), in_order=True)]
    lessons = Lessons(tokenizer(texts).input_ids, options.steps, options.repeated)
    model = tiny_glm(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=1,
            learning_rate=2e-3,
            adam_beta2=0.98,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            logging_steps=25,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        )
        SampledLossTrainer(model, arguments, train_dataset=lessons, data_collator=lambda windows: windows[0]).train()
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
