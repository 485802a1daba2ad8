"""Read a long text with a model's full cache, with H2O and with calibrated LoCoCo heads, and ask a question about it.

python examples/demo.py --tokens 8000 --num-slots 256
"""

import argparse
import contextlib
import io
import pydoc_data.topics
from pathlib import Path

import torch
import transformers.utils.logging
from fetch_smollm2 import GGUF_FILE, fetch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from lococo.document import Document
from lococo.generation import read_and_answer
from lococo.heads import read_heads_config
from lococo.methods import Run, method_config

QUESTION = "In one sentence: which programming language is this text about, and what does the text explain?"
NEW_TOKENS = 32

HEADS = Path(__file__).parent / "heads"
NAMES = {"full": "full cache", "h2o": "H2O", "lococo": "LoCoCo, trained heads"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens", type=int, default=8000, help="tokens of the text, 8192 at most (default: %(default)s)"
    )
    parser.add_argument("--num-slots", type=int, default=256, choices=[128, 256], help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(".demo/smollm2-135m"), help="where the model is kept")
    options = parser.parse_args()

    console = Console(highlight=False)
    with console.status("fetching and loading SmolLM2-135M"):
        model, tokenizer = load(options.folder)
    # Python's own manual is on every machine; a few tokens less leave room for the question.
    text = "\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    prompt = Document.of(tokenizer, text, options.tokens - 64).prompt(QUESTION)
    console.print(f"{prompt.shape[1]:,} tokens of the Python manual, then: {QUESTION}")

    heads = HEADS / f"smollm2-135m-{options.num_slots}"
    config = read_heads_config(heads)
    h2o = method_config("h2o", options.num_slots, config.block_size)
    table = Table("", "answer", "cache", "reading", "per token")
    for run in (Run("full", None), Run("h2o", h2o), Run("lococo", config, str(heads))):
        with console.status(f"reading with {NAMES[run.name]}"), run.applied(model):
            generated = read_and_answer(model, prompt, max_new_tokens=NEW_TOKENS, progress=False, do_sample=False)
        table.add_row(NAMES[run.name], *cells(generated, tokenizer))
    console.print(table)


def load(folder):
    """Model and tokenizer, without what libraries say of it."""
    transformers.utils.logging.set_verbosity_error()
    fetch(folder)
    with contextlib.redirect_stderr(io.StringIO()):  # where progress bars go
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    return model.eval(), tokenizer


def cells(generated, tokenizer):
    usage = generated.usage
    answer = " ".join(tokenizer.decode(generated.answer, skip_special_tokens=True).split())
    return (
        answer if len(answer) <= 90 else f"{answer[:89]}…",
        f"{usage.cache_bytes / 2**20:.1f} MiB",
        f"{usage.prefill_seconds:.1f} s",
        f"{usage.decode_seconds / usage.new_tokens:.2f} s",
    )


if __name__ == "__main__":
    main()
