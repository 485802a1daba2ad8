"""Wheel and sdist as a user meets them: installed alone, then with every extra."""

import subprocess
import sys
import tarfile
import zipfile

import extended
import pytest
from calibrated import BLOCK, SHORT, SLOTS, WINDOWS
from documented import ROOT, extras
from task_lines import LINES, write_rows
from tiny_chatglm import chatglm_fields, random_tensors, write_checkpoint
from words import TEXT, write_texts

import lococo
from experiments.task_files.few_shot import write_task

# Extras that are not installed here, and who does.
ELSEWHERE = {
    "dev": "what these tests run in (make test)",
    "docs": "make docs",
    "serve": "tests/serving: a server does not end by itself",
    "flash": "is compiled for a GPU, where make gpu has it",
    "vllm": "make test-vllm, in a build for CPUs",
}
IN_PYTHON_ALONE = "import socket\nsocket.socket.connect = None  # whoever asks the network fails\n"
USE = """
from pathlib import Path
import torch
import lococo

config: lococo.LoCoCoConfig = lococo.LoCoCoConfig(num_slots={slots}, block_size=8)
def read(model: torch.nn.Module) -> Path:
    with lococo.patched(model, config):
        pass
    return lococo.save_heads(model, "heads")
"""


def members(wheel):
    with zipfile.ZipFile(wheel) as file:
        return {member.filename: member.CRC for member in file.infolist()}


def test_the_wheel_has_the_package_whole_and_nothing_else(wheel):
    tracked = subprocess.run(["git", "ls-files", "lococo"], cwd=ROOT, capture_output=True, text=True, check=True)
    held = {name for name in members(wheel) if not name.startswith(f"lococo-{lococo.__version__}.dist-info/")}
    assert held == set(tracked.stdout.splitlines())
    assert held >= {"lococo/py.typed", "lococo/inspection/page.html", "lococo/training/deepspeed_zero2.json"}


def test_sdist_and_tree_make_the_same_wheel(dist, wheel, tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    (of_tree,) = tmp_path.glob("*.whl")
    assert members(of_tree) == members(wheel)  # python -m build made that one of the sdist
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        held = {name.split("/", 1)[1] for name in file.getnames()}
    assert held >= {"README.md", "CHANGELOG.md", "LICENSE", "docs/api.md", "tests/test_docs.py", "examples/demo.py"}


def test_metadata_can_be_shown_by_an_index(dist):
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


def test_it_is_imported_without_network_and_without_extras(bare):
    code = "import lococo, importlib.metadata\nprint(lococo.__file__, importlib.metadata.version('lococo'))\n"
    ran = bare.run("-c", IN_PYTHON_ALONE + code)
    place, version = ran.stdout.split()
    assert "site-packages" in place and version == lococo.__version__
    training = ("calibrate", "extend_context", "load_extended", "merge_extended")
    code = f"import lococo\nfor name in set(lococo.__all__) - set({training}):\n    getattr(lococo, name)\n"
    bare.run("-c", IN_PYTHON_ALONE + code)
    for name in training:
        refused = bare.run("-c", f"import lococo; lococo.{name}", check=False)
        assert "pip install lococo[train]" in refused.stderr


def test_help_is_shown_before_torch_is_loaded(bare):
    code = "import sys; from lococo.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert "calibrate" in bare.run("-c", code).stdout
    assert bare.lococo("--help").stdout == bare.run("-m", "lococo", "--help").stdout
    assert bare.lococo("--version").stdout == f"lococo {lococo.__version__}\n"


def test_it_reads_and_answers_without_extras(bare, checkpoint):
    ran = bare.lococo("generate", "--model", checkpoint, "--prompt", TEXT, "--num-slots", 16, "--max-new-tokens", 3)
    assert "(16 slots per layer)" in ran.stdout
    (bare.folder / "book.txt").write_text(TEXT)
    bare.lococo("inspect", "--model", checkpoint, "--data", "book.txt", "--num-slots", 16)
    assert (bare.folder / "slots.html").is_file()


@pytest.mark.parametrize(("slots", "status"), [("16", 0), ("'many'", 1)])
def test_its_types_are_seen(bare, slots, status):
    (bare.folder / "use.py").write_text(USE.format(slots=slots))
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(bare.python), "use.py"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=bare.folder)
    assert ran.returncode == status, ran.stdout
    assert status == 0 or 'incompatible type "str"; expected "int"' in ran.stdout


def test_the_server_is_refused_without_its_extra(bare, checkpoint):
    refused = bare.lococo("serve", "--model", checkpoint, check=False)
    assert refused.returncode == 2 and "pip install lococo[serve]" in refused.stderr


def test_every_extra_is_tried():
    assert extras().keys() == {name for name, *_ in EXTRAS} | ELSEWHERE.keys()


def calibrate(folder, checkpoint):
    texts = write_texts(folder / "texts.jsonl")
    given = ["--model", checkpoint, "--dataset", texts, "--output", folder / "heads", "--cache-dir", folder]
    return [["calibrate", *given, "--num-slots", SLOTS, "--block-size", BLOCK, *WINDOWS, *SHORT]]


def extend(folder, checkpoint):
    text = extended.write_documents(folder / "ids.jsonl", [[1, *range(3, 60)]] * 4)
    given = ["--model", checkpoint, "--dataset", text, "--output", folder / "longer", "--cache-dir", folder]
    short = ["--num-slots", 16, "--block-size", 8, "--steps", 2, "--windows-per-step", 1]
    return [["extend", *given, *short, "--factor", 2, "--original-length", 16]]


def evaluate(folder, checkpoint):
    line, scored, examples = LINES["arc_easy"]
    (folder / "arc_easy").mkdir()
    write_rows(folder / "arc_easy" / scored, [line(index) for index in range(6)])
    write_rows(folder / "arc_easy" / examples, [line(index) for index in range(20, 26)])
    (folder / "tasks").mkdir()
    write_task("arc_easy", folder, folder / "tasks", shots=2)
    given = ["--model", checkpoint, "--num-slots", 16, "--methods", "full,h2o"]
    ppl = ["--data", write_texts(folder / "texts.jsonl"), "--lengths", 64, "--first", 16, "--documents", 2]
    return [
        ["eval", "tasks", *given, "--include-path", folder / "tasks", "--tasks", "arc_easy:1", "--limit", 2],
        ["eval", "ppl", *given, *ppl],
        ["bench", "memory", "--model", checkpoint, "--tokens", 64, "--step", 32, "--num-slots", 16],
    ]


def gguf(folder, checkpoint):
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    given = ["--model", ROOT / ".demo/smollm2-135m", "--gguf-file", name]  # as make demo fetches it
    return [["generate", *given, "--dtype", "bfloat16", "--prompt", "Once upon a time", "--max-new-tokens", 3]]


def convert_chatglm(folder, checkpoint):
    fields = chatglm_fields()
    return [["convert-chatglm", write_checkpoint(folder / "glm", fields, random_tensors(fields)), folder / "native"]]


EXTRAS = [
    ("train", calibrate),
    ("train", extend),
    ("eval", evaluate),
    ("gguf", gguf),
    ("chatglm", convert_chatglm),
]


@pytest.fixture(scope="session")
def with_extra(bare, wheel, tmp_path_factory):
    """The environment of an extra, made once."""
    made = {}

    def environment(extra):
        if extra not in made:
            made[extra] = bare.beside(tmp_path_factory.mktemp("environment") / extra)
            made[extra].run("-m", "pip", "install", "--quiet", f"lococo[{extra}] @ {wheel.as_uri()}")
        return made[extra]

    return environment


@pytest.mark.parametrize(("extra", "commands"), EXTRAS)
def test_an_extra_unlocks_its_commands(bare, with_extra, checkpoint, tmp_path, extra, commands):
    for words in commands(tmp_path, checkpoint):
        refused = bare.lococo(*words, check=False)
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1].startswith("lococo: error: ")
        assert f"pip install lococo[{extra}]" in refused.stderr.replace("'", "")
        with_extra(extra).run("-m", "lococo", *words)
