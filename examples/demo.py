"""Read a long text with a model's full cache, with H2O and with calibrated LoCoCo heads, and ask a question about it.

python examples/demo.py --tokens 8000 --num-slots 256
"""

import argparse
import pydoc_data.topics
from pathlib import Path

import torch
from fetch_smollm2 import GGUF_FILE, fetch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging

from lococo.generation import prompt_ids, read_and_answer
from lococo.heads import read_heads_config
from lococo.methods import Run, as_method, method_config

QUESTION = "In one sentence: which programming language is this text about, and what does the text explain?"

HEADS = Path(__file__).parent / "heads"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens", type=int, default=8000, help="tokens of the text, 8192 at most (default: %(default)s)"
    )
    parser.add_argument("--num-slots", type=int, default=256, choices=[128, 256], help="(default: %(default)s)")
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

    heads = HEADS / f"smollm2-135m-{options.num_slots}"
    config = read_heads_config(heads)
    h2o = method_config("h2o", options.num_slots, config.block_size)
    for run in (Run("full", None), Run("h2o", h2o), Run("lococo", config, str(heads))):
        print(f"\n--- {run.name}")
        with as_method(model, run.config, run.heads):
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            reading = read_and_answer(model, ids, max_new_tokens=48, streamer=streamer, do_sample=False)
        print(reading.summary())


if __name__ == "__main__":
    main()
