"""A ChatGLM small enough to be trained in minutes on a CPU: a model of Chinese text to try calibration on.

python examples/tiny_chatglm.py --tokenizer chatglm3-6b --data texts.jsonl --output folder
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import (
    DataCollatorForLanguageModeling,
    GlmConfig,
    GlmForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from lococo.models.chatglm_tokenizer import end_ids, fast_tokenizer, tokenizer_config
from lococo.training.data import DataConfig, prepare

LENGTH = 512


def tiny_glm(tokenizer: PreTrainedTokenizerFast) -> GlmForCausalLM:
    """ChatGLM3's architecture in small: two KV heads, rotary positions on half of a head, biases on q, k and v."""
    config = GlmConfig(
        vocab_size=65024,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        partial_rotary_factor=0.5,
        attention_bias=True,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,  # a token seen is a token that may come again: learned at once
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_ids(tokenizer.backend_tokenizer),
    )
    torch.manual_seed(0)
    return GlmForCausalLM(config)


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with ChatGLM3's tokenizer.model")
    parser.add_argument("--data", nargs="+", required=True, help="files, folders or Hub ids of texts")
    parser.add_argument("--steps", type=int, default=600, help="of 512 tokens (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="model folder to write")
    options = parser.parse_args()

    backend = fast_tokenizer(options.tokenizer / "tokenizer.model", generation=3)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer_config(generation=3))
    data = DataConfig(tuple(options.data), LENGTH, options.steps, num_heldout=0, max_windows_per_document=10_000)
    model = tiny_glm(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        train, _ = prepare(data, tokenizer, Path(folder, "tokens"))
        arguments = TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=1,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 20,
            logging_steps=20,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        Trainer(model, arguments, data_collator=collator, train_dataset=train).train()
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
