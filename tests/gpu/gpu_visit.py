"""One short visit to a GPU: stages in order of importance, each with its own time limit, log and result file.

Run by ``make gpu``, and on a CPU at tiny sizes by ``make gpu-dry``. It needs no more than torch, Transformers, Triton
and pytest, and downloads nothing: all weights are random.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from lococo.results.tables import beside, write_result

ROOT = Path(__file__).parents[2]
PASSED, FAILED, STOPPED, LEFT_OUT, NOT_ASKED = "passed", "failed", "stopped", "not reached", "not asked for"
GRACE = 8  # seconds before the end of a stage's time at which it is interrupted, so that it can write what it has
METHODS = ("full", "streaming", "h2o", "lococo-uncalibrated")


@dataclasses.dataclass(frozen=True)
class Size:
    """How large everything is."""

    shape: str
    num_slots: int
    decode_lengths: tuple[int, ...]
    decode_batches: tuple[int, ...]
    prefill_lengths: tuple[int, ...]
    prefill_batches: tuple[int, ...]
    repeats: int
    recorded_steps: int
    head_dims: tuple[int, ...]


SIZES = {
    "cuda": Size("llama-3.1-8b", 512, (4096, 32768), (1, 16), (4096, 32768), (1, 2), 3, 60, (128, 64, 80, 256)),
    "cpu": Size("tiny", 16, (32, 64), (1, 2), (32, 64), (1, 2), 1, 20, (64, 80)),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A process of its own.

    Attributes
    ----------
    letter : str
        Asks for it; two stages may share one.
    seconds : float
        After which it is ended.
    reserve : float
        Of them for the start and the end of a stage that has a time limit of its own, the rest.
    is_needed : bool
        Whether nothing after it is worth while if it fails.
    """

    letter: str
    name: str
    what: str
    seconds: float
    reserve: float = 0
    is_needed: bool = False


STAGES = (
    Stage("a", "recorded", "recorded steps equal launched ones, and leave nothing", 130, is_needed=True),
    Stage("b", "tests", "tests/gpu/test_gpu.py by groups", 155, is_needed=True),
    Stage("c", "kernels", "compiled kernels against float64", 95, reserve=25),
    Stage("d", "decode", "decoding against full, H2O and the sliding window", 140, reserve=40),
    Stage("d", "prefill", "reading against full, H2O and the sliding window", 105, reserve=40),
    Stage("e", "score", "scoring of heavy hitters", 75, reserve=40),
)


def command_of(stage, size, device, output):
    """The process of a stage."""
    ends = ["--time-limit", f"{max(1, stage.seconds - stage.reserve):g}"]
    to = ["--device", device, "--output", str(output)]
    python = [sys.executable]
    if stage.name == "recorded":
        return [*python, "tests/gpu/gpu_recorded.py", *to, "--steps", str(size.recorded_steps)]
    if stage.name == "tests":
        return [*python, "tests/gpu/gpu_tests.py", *to]
    if stage.name == "kernels":
        return [*python, "tests/gpu/gpu_kernels.py", *to, *ends, "--head-dims", *map(str, size.head_dims)]
    grid = ["--shape", size.shape, "--num-slots", str(size.num_slots), "--block-size", str(size.num_slots)]
    grid += ["--methods", ",".join(METHODS), "--repeats", str(size.repeats), "--no-counts", *ends]
    if stage.name == "score":
        grid += ["--batches", *map(str, size.decode_batches)]
    else:
        for option in ("lengths", "batches"):
            grid += [f"--{option}", *map(str, getattr(size, f"{stage.name}_{option}"))]
    return [*python, "-m", "experiments.benchmarks", stage.name, *to, *grid]


def environment(device):
    """That of every stage: this library, no network, no plugins of pytest's that happen to be there."""
    path = [str(ROOT), str(ROOT / "tests"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    extra = {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    extra |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if torch.device(device).type == "cpu":
        extra |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | extra


def run(command, seconds, log, env):
    """Run a command for so many seconds at most.

    Returns its exit status, None if it was stopped. It is interrupted ``GRACE`` seconds before the end, so that it can
    write what it has; at the end it is killed with all that it started.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        print("$", shlex.join(command), file=file, flush=True)
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=env,
            start_new_session=True,
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # ignored in the background
        )
        try:
            return process.wait(max(seconds - GRACE, seconds / 2))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(GRACE, seconds / 2))
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def said(output, log):
    """What a stage's result file says in a word, or the last line of its log."""
    path = beside(output, ".json")
    if not path.is_file():
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:300]
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    if "outcome" not in rows[0]:
        skipped = sum(row["skipped"] is not None for row in rows)
        rest = ", no time for the rest" * beside(output, ".partial.jsonl").is_file()
        return f"{len(rows) - skipped} cells measured, {skipped} too large{rest}"
    outcomes = [row["outcome"] for row in rows]
    return ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes))


class Visit:
    """The stages of a visit, and the summary ``gpu``, which is written anew after each of them.

    Parameters
    ----------
    results : Path
        Folder of the result files. What it says of stages that are not asked for is kept in the summary.
    stages : sequence of Stage
        Those asked for.
    """

    def __init__(self, results, device, stages, command):
        self.results, self.device, self.stages, self.command = results, device, stages, command
        self.size, self.env = SIZES[torch.device(device).type], environment(device)
        self.rows = {stage.name: self.row(stage, NOT_ASKED) for stage in STAGES}
        self.rows |= {stage.name: self.row(stage, LEFT_OUT) for stage in stages}
        asked = {stage.name for stage in stages}
        with contextlib.suppress(OSError, ValueError):
            before = json.loads(beside(results / "gpu", ".json").read_text(encoding="utf-8"))
            self.rows |= {row["name"]: row for row in before["rows"] if row["name"] not in asked}

    def row(self, stage, outcome, seconds=None, detail=""):
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(" ", "seconds")
        output = self.output(stage)
        return {
            "stage": stage.letter,
            "name": stage.name,
            "what": stage.what,
            "outcome": outcome,
            "seconds": seconds,
            "limit": stage.seconds,
            "detail": detail,
            "result": f"{output.name}.json" if beside(output, ".json").is_file() else None,
            "ended": None if seconds is None else now,
        }

    def output(self, stage):
        return self.results / f"gpu_{stage.name}"

    def run(self):
        """Run the stages. Returns whether all of them passed."""
        for stage in self.stages:
            for ending in (".json", ".md", ".png", ".partial.jsonl", ".log"):
                beside(self.output(stage), ending).unlink(missing_ok=True)
        for stage in self.stages:
            self.write()
            row = self.rows[stage.name] = self.run_stage(stage)
            print("{stage}  {name:9} {outcome:8} {seconds:6.1f} s of {limit:g}  {detail}".format(**row), flush=True)
            if stage.is_needed and row["outcome"] != PASSED:
                print(f"nothing after stage {stage.letter} is worth while: see {beside(self.output(stage), '.log')}")
                break
        self.write()
        return all(self.rows[stage.name]["outcome"] == PASSED for stage in self.stages)

    def run_stage(self, stage):
        output, start = self.output(stage), time.monotonic()
        log = beside(output, ".log")
        status = run(command_of(stage, self.size, self.device, output), stage.seconds, log, self.env)
        seconds = round(time.monotonic() - start, 1)
        outcome = STOPPED if status is None else FAILED
        if status == 0 and beside(output, ".json").is_file():
            outcome = PASSED
        return self.row(stage, outcome, seconds, said(output, log))

    def write(self):
        write_result(
            self.results / "gpu",
            self.command,
            self.device,
            list(self.rows.values()),
            columns=["stage", "what", "outcome", "seconds", "limit", "detail", "result", "ended"],
        )


def chosen(letters, limits):
    """The stages of letters or names, in their own order, with time limits of the form ``name=seconds``."""
    known = {stage.name for stage in STAGES} | {stage.letter for stage in STAGES}
    unknown = set(letters) - known
    if unknown:
        raise ValueError(f"unknown stage {min(unknown)!r}: choose from {', '.join(sorted(known))}")
    seconds = {}
    for limit in limits:
        name, _, value = limit.partition("=")
        if name not in {stage.name for stage in STAGES} or not value.isdecimal():
            raise ValueError(f"--seconds must be of the form decode=100, got {limit!r}")
        seconds[name] = int(value)
    stages = [stage for stage in STAGES if stage.letter in letters or stage.name in letters]
    return [dataclasses.replace(stage, seconds=seconds.get(stage.name, stage.seconds)) for stage in stages]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="(default: %(default)s)")
    parser.add_argument(
        "--results", type=Path, default=Path("docs/results"), help="folder, from the repository's root on"
    )
    parser.add_argument("--stages", nargs="+", default=list("abcde"), help="letters or names (default: all)")
    parser.add_argument("--seconds", action="append", default=[], metavar="NAME=N", help="time limit of a stage")
    options = parser.parse_args(arguments)
    try:
        stages = chosen(options.stages, options.seconds)
    except ValueError as error:
        parser.error(str(error))
    if torch.device(options.device).type not in SIZES:
        parser.error(f"--device must be cuda or cpu, got {options.device}")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs is ended, too
    os.chdir(ROOT)
    command = shlex.join(["python", "tests/gpu/gpu_visit.py", *(sys.argv[1:] if arguments is None else arguments)])
    return int(not Visit(options.results, options.device, stages, command).run())


if __name__ == "__main__":
    sys.exit(main())
