"""Read a text far beyond a model's window with its full cache, with H2O and with LoCoCo, and ask a question about it.

python examples/demo.py --tokens 16384 --num-slots 256
"""

import argparse
import pydoc_data.topics
from pathlib import Path

import torch
from fetch_smollm2 import GGUF_FILE, fetch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging

from lococo.cli import prompt_ids
from lococo.evaluation.methods import as_method, method_config
from lococo.generation import read_and_answer

QUESTION = "In one sentence: which programming language is this text about, and what does the text explain?"

# Positions inside the cache: the text is longer than the 8192 positions that the model was trained for.
METHODS = ("full", "h2o-slot", "lococo-uncalibrated-slot")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of the text (default: %(default)s)")
    parser.add_argument("--num-slots", type=int, default=256, help="slots per layer (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(".demo/smollm2-135m"), help="where the model is kept")
    options = parser.parse_args()

    logging.set_verbosity_error()
    fetch(options.folder)
    tokenizer = AutoTokenizer.from_pretrained(options.folder, gguf_file=GGUF_FILE)
    model = AutoModelForCausalLM.from_pretrained(options.folder, gguf_file=GGUF_FILE, dtype=torch.float32).eval()

    # Python's own manual is on every machine; a few tokens less leave room for the question.
    text = "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    ids = prompt_ids(tokenizer, text, QUESTION, options.tokens - 64)
    print(f"{ids.shape[1]:,} tokens of the Python manual, then: {QUESTION}")

    for method in METHODS:
        print(f"\n--- {method}")
        with as_method(model, method_config(method, options.num_slots, block_size=min(options.num_slots, 256))):
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            reading = read_and_answer(model, ids, max_new_tokens=48, streamer=streamer, do_sample=False)
        print(reading.summary())


if __name__ == "__main__":
    main()
