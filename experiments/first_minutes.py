"""A new user's first minutes: README's commands in a fresh clone and new environments, with their times.

python -m experiments.first_minutes --output docs/results/first_minutes

The packages come from wherever pip finds them here; ``TORCH`` in the environment names the build of torch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.common import command_of
from lococo.files import check_output, write_whole
from lococo.results.tables import PACKAGE, beside, write_result

MODEL = ".demo/smollm2-135m"
ON_MODEL = f"--model {MODEL} --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf"
HEADS = "--heads examples/heads/smollm2-135m-256"
# Of the environment this runs in, and nothing that a new user would not have.
NOT_A_USERS = ("PYTHON", "VIRTUAL_ENV", "HF_", "OMP_", "MAKE", "MFLAGS", "COLUMNS")
AS_SHOWN = {"COLUMNS": "110", "PIP_QUIET": "2"}  # a terminal of that width; what pip says of its mirrors left out
LINES = 18
QUICKSTART = "quickstart.py"
ASKED = (
    """curl -s localhost:8017/v1/chat/completions -H 'Content-Type: application/json' -d """
    """'{"messages": [{"role": "user", "content": "In one word: the capital of France?"}], "max_tokens": 12}'"""
)


@dataclasses.dataclass(frozen=True)
class Step:
    """One thing that a user does.

    Attributes
    ----------
    why : str
        In a few words.
    command : str
        For bash, in the clone. What it leaves running ends with it.
    """

    why: str
    command: str


def steps(torch: str) -> list[Step]:
    """What README tells a new user to do, with the model that the demo has fetched."""
    return [
        Step("The demo: environment, model, a text of 8000 tokens by three methods", f"make demo TORCH={torch}"),
        Step(
            "An environment of one's own",
            f"python3 -m venv own && own/bin/pip install -q {torch} && own/bin/pip install -q '.[gguf,eval,serve]'",
        ),
        Step("README's Python, with the demo's model and CHANGELOG.md as the book", f"own/bin/python {QUICKSTART}"),
        Step(
            "A text and two questions, read once",
            f"own/bin/lococo generate {ON_MODEL} {HEADS} --prompt-file docs/serving.md --max-new-tokens 24 "
            '--question "On which address does the server listen?" "In one sentence, what is this text about?"',
        ),
        Step(
            "The same behind an API",
            f"own/bin/lococo serve {ON_MODEL} {HEADS} --port 8017 2> /dev/null &\n"
            f"curl -s --retry 90 --retry-connrefused --retry-delay 1 localhost:8017/health > /dev/null\n{ASKED}",
        ),
        Step(
            "What a cache takes, by the text's length",
            f"own/bin/lococo bench memory {ON_MODEL} --methods full,h2o {HEADS} --tokens 4096 --step 2048",
        ),
    ]


def clone(folder: Path) -> float:
    """A clone of the last commit in an empty folder, with README's example as a file; the seconds that it took."""
    started = time.perf_counter()
    subprocess.run(["git", "clone", "-q", PACKAGE.parent, folder], check=True)
    seconds = time.perf_counter() - started
    (example,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    own = {
        r'"meta-llama/[^"]*", dtype': f'"{MODEL}", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype',
        r'"meta-llama/[^"]*"\)': f'"{MODEL}", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")',
        r', device_map="auto"': "",
        r"book\.txt": "CHANGELOG.md",
    }
    for pattern, replacement in own.items():
        example, found = re.subn(pattern, replacement, example)
        if not found:
            raise ValueError(f"README's example has no {pattern}")
    (folder / QUICKSTART).write_text(example, encoding="utf-8")
    return seconds


def run(step: Step, folder: Path) -> tuple[float, str]:
    """Seconds that a step takes, and the last lines of what it prints.

    Raises
    ------
    RuntimeError
        If it fails.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(NOT_A_USERS)}
    environment |= AS_SHOWN
    started = time.perf_counter()
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            ["bash", "-c", f"set -e\n{step.command}"],
            cwd=folder,
            env=environment,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = process.wait()
        seconds = time.perf_counter() - started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        printed.seek(0)
        output = printed.read().decode("utf-8", errors="replace")
    if code:
        raise RuntimeError(f"{step.command!r} ended with {code}:\n{output}")
    return seconds, shown(output, folder)


def shown(output: str, folder: Path) -> str:
    """The last lines of an output as a terminal shows them at its end, without names of this machine."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output).replace(f"{folder}/", "")
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    lines = [line for line in lines if line]
    return "\n".join([*(["..."] if len(lines) > LINES else []), *lines[-LINES:]])


def transcript(done: Sequence[tuple[Step, float, str]]) -> str:
    """Markdown of all steps: why, command, output, seconds."""
    parts = []
    for step, seconds, output in done:
        prompt = "".join(f"$ {line}\n" for line in step.command.splitlines())
        parts.append(f"\n{step.why}: **{seconds:.0f} s**\n\n```text\n{prompt}{output}\n```\n")
    return "".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Clone, do it all, write the transcript."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("first_minutes"), help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    output = check_output(options.output)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent).resolve() / "lococo"
        done = [(Step("The project", "git clone URL lococo && cd lococo"), clone(folder), "")]
        for step in steps(os.environ.get("TORCH", "torch")):
            print(step.command, flush=True)
            done.append((step, *run(step, folder)))
        write(output, command_of("first_minutes", arguments), done)


def write(output: Path, command: str, done: Sequence[tuple[Step, float, str]]) -> None:
    """The times as a result, and below its table the transcript."""
    rows = [{"what": step.why, "command": step.command, "seconds": round(seconds, 1)} for step, seconds, _ in done]
    total = sum(row["seconds"] for row in rows)
    how = f"{total:.0f} seconds in all, two new environments included."
    table = [{"what": row["what"], "seconds": row["seconds"]} for row in rows]
    write_result(output, command, "cpu", rows, table=table, how=how, seconds=total)
    page = beside(output, ".md")
    write_whole(page, page.read_text(encoding="utf-8") + transcript(done))


if __name__ == "__main__":
    main()
