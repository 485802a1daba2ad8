"""The table of results in ``docs/results/README.md``: what there is, the command that makes it, how old it is.

python -m experiments.results_index --results docs/results

With ``--stale`` it prints the targets of ``make results`` that are to be measured: those whose files are not there, or
older than the last change of anything but documents and tests.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lococo.files import write_whole
from lococo.results.tables import PACKAGE

BEGIN, END = "<!-- results: made by python -m experiments.results_index -->", "<!-- end of results -->"
NOT_YET = "not measured yet"


@dataclasses.dataclass(frozen=True)
class Result:
    """What one target of the Makefile measures.

    Attributes
    ----------
    target : str
    files : tuple of str
        In the folder of results, without a suffix; the first stands for a row of its own in the table.
    what : str
        In a line: what is compared, on what.
    on_cpu : bool
        Whether it is one of ``make results``.
    """

    target: str
    files: tuple[str, ...]
    what: str
    on_cpu: bool = True

    def is_stale(self, folder: Path) -> bool:
        """Whether a file of it is not there, or was measured before a change of anything but documents and tests."""
        paths = [folder / f"{name}.json" for name in self.files]
        return not all(path.is_file() and _is_unchanged_since(_content(path)["commit"]) for path in paths)

    def row(self, folder: Path) -> str:
        """Its line of the table, with the oldest commit and date of its files and the time of all of them."""
        found = [path for name in self.files if (path := folder / f"{name}.json").is_file()]
        if not found:
            return f"| {', '.join(self.files)} | {self.what} | `make {self.target}` | {NOT_YET} | |\n"
        contents = [_content(path) for path in found]
        oldest = min(contents, key=lambda content: content["date"])
        links = ", ".join(f"[{path.stem}]({path.stem}.md)" for path in found)
        seconds = sum(content.get("seconds", 0) for content in contents)
        minutes = f"{max(1, round(seconds / 60))} min" if seconds else ""
        age = f"{oldest['date']}, {oldest['commit'] or 'no commit'}"
        return f"| {links} | {self.what} | `make {self.target}` | {age} | {minutes} |\n"


@functools.cache
def _is_unchanged_since(commit: str | None) -> bool:
    if commit is None or commit.endswith("-dirty"):
        return False
    others = [f":(top,exclude){name}" for name in ("docs", "tests", "*.md")]
    asked = ["git", "diff", "--quiet", "--diff-filter=a", commit, "--", ":/", *others]  # what is new changes nothing
    return subprocess.run(asked, cwd=PACKAGE, stderr=subprocess.DEVNULL).returncode == 0


def _content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


SMOLLM2, GEMMA = "SmolLM2-135M", "Gemma 3 270M"
HELDOUT = "held-out texts of six domains"
RESULTS = (
    Result(
        "perplexity",
        ("perplexity", "perplexity_recall"),
        f"loss by domain, length, method and number of slots, and of text that repeats; {SMOLLM2}, {HELDOUT}",
    ),
    Result(
        "perplexity-gemma",
        ("perplexity_gemma", "perplexity_gemma_recall"),
        f"the same for {GEMMA}, 15 of whose 18 layers have a window of 512 tokens",
    ),
    Result(
        "equal-bytes",
        ("equal_bytes", "equal_bytes_recall"),
        f"every method and format in the bytes of H2O with M = 128 in 16 bits; {SMOLLM2}, the same texts",
    ),
    Result("side-by-side", ("side_by_side",), f"kvpress and LoCoCo in one process, M = 128; {SMOLLM2}, {HELDOUT}"),
    Result(
        "tasks",
        ("tasks",),
        f"few-shot tasks of lm-eval, differences to the full cache item by item; {SMOLLM2}, M = 128",
    ),
    Result(
        "ruler",
        ("ruler",),
        f"RULER and several questions about one document, M from a half of the text to a 16th; {SMOLLM2}",
    ),
    Result(
        "long", ("long",), f"LongBench and BABILong by lm-eval's definitions, a few items each; {SMOLLM2}, M = 256"
    ),
    Result(
        "parts", ("parts",), f"trained heads without one part each, its time and bytes; {SMOLLM2}, M = 128 and 256"
    ),
    Result("extend", ("extension",), f"a demonstration: a window of 2K becomes 8K in a few steps; {SMOLLM2}"),
    Result(
        "ablate", ("ablation",), "memory size, kernel size and kinds of slots, stories260K, calibrated in 30 steps"
    ),
    Result(
        "chatglm",
        ("chatglm_zh", "chatglm_zh_recall"),
        "a tiny ChatGLM, trained here, with heads of M = 32: held-out Chinese",
    ),
    Result("agreement", ("lm_eval_agreement",), "with more slots than tokens: scores beside lm-eval's own model"),
    Result("memory", ("memory",), f"cache bytes against tokens read; {SMOLLM2}"),
    Result("memory-stream", ("memory_stream",), f"the same for a stream of 102,400 tokens; {SMOLLM2}"),
    Result("bench-prefill", ("bench_prefill_cpu",), f"time of reading 2K to 16K tokens; {SMOLLM2}, one CPU thread"),
    Result(
        "bench-decode", ("bench_decode_cpu",), f"time of a token after 512 and 8192 others; {SMOLLM2}, one CPU thread"
    ),
    Result("bench-score", ("bench_score_cpu",), f"scoring heavy hitters: time and memory; {SMOLLM2}, one CPU thread"),
    Result(
        "bench-bits",
        ("bench_bits_decode", "bench_bits_prefill"),
        f"time at equal bytes by bits; {SMOLLM2}, one CPU thread",
    ),
    Result(
        "bench-extend", ("bench_extend_cpu",), f"memory of an extension's step by window; {SMOLLM2}, one CPU thread"
    ),
    Result("bench-vllm", ("vllm",), f"vLLM with and without LoCoCo: requests held, time of a token; {SMOLLM2}"),
    Result(
        "first-minutes",
        ("first_minutes",),
        "a new user's first minutes: README's commands in a fresh clone and new environments, a transcript",
    ),
    Result("targets", ("targets",), "every figure that is wanted beside what these files say"),
    Result(
        "gpu",
        ("gpu", "gpu_recorded", "gpu_tests", "gpu_kernels", "gpu_decode", "gpu_prefill", "gpu_score"),
        "a visit of 12 minutes to a GPU: right first, then fast",
        on_cpu=False,
    ),
    Result(
        "gpu-long",
        ("perplexity_cuda", "tasks_cuda", "long_cuda", "extension_cuda", "ablation_cuda"),
        "all that takes longer on a GPU, with heads calibrated on five times as many texts",
        on_cpu=False,
    ),
    Result(
        "bench-cuda",
        tuple(f"bench_{topic}_cuda_llama-3.1-8b" for topic in ("decode", "prefill", "score", "train", "extend")),
        "speed and memory on a GPU, shapes of large models, 4K to 128K tokens",
        on_cpu=False,
    ),
)


def table(folder: Path) -> str:
    """The table of all results in a folder."""
    head = "| result | what | command | oldest | measured in |\n| --- | --- | --- | --- | --- |\n"
    return head + "".join(result.row(folder) for result in RESULTS)


def with_table(page: str, folder: Path) -> str:
    """A page with the table between its marks made anew.

    Raises
    ------
    ValueError
        If the page has no such marks.
    """
    if BEGIN not in page or END not in page:
        raise ValueError(f"the page has no place for the table: {BEGIN} ... {END}")
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{table(folder)}\n{END}", page, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table into the README of the results, or name what is to be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="(default: %(default)s)")
    parser.add_argument("--stale", action="store_true", help="print targets that are to be measured")
    options = parser.parse_args(arguments)
    folder = options.results
    if options.stale:
        print(*(each.target for each in RESULTS if each.on_cpu and each.is_stale(folder)))
        return
    page = folder / "README.md"
    write_whole(page, with_table(page.read_text(encoding="utf-8"), folder))


if __name__ == "__main__":
    main()
