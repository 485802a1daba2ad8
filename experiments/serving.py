"""LoCoCo inside vLLM beside stock vLLM: requests that a memory holds, time of reading and of a token for many at once.

python -m experiments.serving --model folder --heads folder --output docs/results/vllm

with the Python that has vLLM. The model is in Transformers' format, or a GGUF file that is written so beside it. A
stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any

from experiments.common import command_of
from lococo.methods import heads_runs
from lococo.results.journal import Journal
from lococo.results.tables import beside, markdown_table, write_result

STOCK = "stock"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model in Transformers' format")
    parser.add_argument("--gguf-file", help="GGUF file in that folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--heads", nargs="+", default=[], help="folders of trained heads")
    parser.add_argument("--num-slots", nargs="+", type=int, default=[], help="of the default preset")
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 8, 32], help="at once")
    parser.add_argument("--lengths", nargs="+", type=int, default=[500, 4096], help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=65, help="of every answer while all requests get some")
    parser.add_argument("--memory", type=float, default=4, help="GiB for what requests hold")
    parser.add_argument("--max-tokens", type=int, default=2048, help="tokens read at once")
    parser.add_argument("--output", type=Path, default=Path("docs/results/vllm"))
    return parser.parse_args()


def main() -> None:
    """Measure every engine under every load, and write the result."""
    options = _options()
    engines: dict[str, dict[str, Any] | None] = {STOCK: None}
    engines |= {f"lococo-{Path(folder).name}": {"heads": folder} for folder in options.heads}
    identities = {f"lococo-{Path(run.heads or '').name}": run.identity() for run in heads_runs(options.heads)}
    for slots in options.num_slots:
        engines[f"lococo-uncalibrated-{slots}"] = {"num_slots": slots, "block_size": min(slots, 128)}
    journal = Journal(beside(options.output, ".partial.jsonl"))
    names = ("dtype", "memory", "max_tokens", "new_tokens")
    model = options.model if options.gguf_file is None else plain_weights(options.model, options.gguf_file)
    shape = {"model": str(model), **{name: getattr(options, name) for name in names}}
    rows = []
    for length in options.lengths:
        for count in options.requests:
            for name, settings in engines.items():
                work = {**shape, "settings": settings, "requests": count, "length": length}
                key = (name, work, identities.get(name))
                row = journal.measure(key, lambda work=work: _apart(work))  # type: ignore[misc]
                rows.append({"engine": name, "requests": count, "length": length, **row})
                print(rows[-1], flush=True)
    how = (
        f"Each row is an engine of its own with {options.memory} GiB for what requests hold, in {options.dtype}; "
        "requests come at once, their prompts are made up. holds: requests of this length at once; read: tokens per "
        f"second until all have been read; step: mean seconds of {options.new_tokens - 1} steps in which every "
        "request gets a token."
    )
    write_result(
        options.output, command_of("serving"), "cpu", rows, how=how, seconds=journal.seconds, commits=journal.commits
    )
    print(markdown_table(rows))
    journal.finish()


def plain_weights(folder: str, gguf_file: str) -> Path:
    """A GGUF file's model in Transformers' own format, in a folder beside it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = Path(folder).with_name(f"{Path(folder).name}-plain")
    if not (plain / "config.json").is_file():
        packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
        config = packed.config
        del config.quantization_config  # its weights are numbers by now
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(packed.state_dict())
        AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file).save_pretrained(plain)
        model.save_pretrained(plain)
    return plain


def _apart(work: dict[str, Any]) -> dict[str, Any]:
    """Measured in a process of its own: an engine keeps its memory until its process ends."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (json.dumps(work),))


def measure(work_json: str) -> dict[str, Any]:
    """One engine under some requests."""
    work = json.loads(work_json)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": str(work["memory"])}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    # Requests are read one after another: the first must go on until the last has begun.
    reading = -(-work["requests"] * work["length"] // work["max_tokens"])
    new_tokens = reading + work["new_tokens"]
    longest = work["length"] + new_tokens
    choice: dict[str, Any] = {}
    if work["settings"] is not None:
        choice = {"attention_backend": "CUSTOM", "additional_config": {"lococo": work["settings"]}}
    llm = LLM(
        model=work["model"],
        dtype=work["dtype"],
        enforce_eager=True,
        max_model_len=longest,
        max_num_seqs=work["requests"],
        max_num_batched_tokens=work["max_tokens"],
        enable_prefix_caching=False,
        seed=0,
        **choice,
    )
    engine = llm.llm_engine
    cache = engine.vllm_config.cache_config
    blocks = 1 if choice else -(-longest // cache.block_size)
    size = engine.model_config.get_vocab_size()
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    for index in range(work["requests"]):
        prompt = [(7919 * index + 104729 * place) % (size - 10) + 5 for place in range(work["length"])]
        engine.add_request(str(index), TokensPrompt(prompt_token_ids=prompt), sampling)
    steps: list[tuple[int, float]] = []  # requests with a first token, seconds
    started, has_begun = time.perf_counter(), set()
    read = 0.0
    while engine.has_unfinished_requests():
        before, begun = time.perf_counter(), len(has_begun)
        outputs = engine.step()
        has_begun |= {each.request_id for each in outputs}
        steps.append((begun, time.perf_counter() - before))
        if not read and len(has_begun) == work["requests"]:
            read = time.perf_counter() - started
    # All have begun, none has ended.
    whole = [seconds for begun, seconds in steps if begun == work["requests"]][: work["new_tokens"] - 1]
    return {
        "holds": cache.num_gpu_blocks // blocks,
        "read": work["requests"] * work["length"] / read,
        "step": statistics.fmean(whole),
        "seconds": time.perf_counter() - started,
    }


if __name__ == "__main__":
    main()
