import pytest
from calibrated import BLOCK, SHORT, SLOTS, WINDOWS
from words import write_texts

from lococo.cli.main import main


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "words.jsonl")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def run(checkpoint, texts, cache):
    """Calibrate by the command line; returns its status."""

    def call(output, *options, num_slots=SLOTS):
        arguments = ["--model", checkpoint, "--device", "cpu", "--dataset", texts, "--cache-dir", cache]
        arguments += ["--output", output, "--num-slots", num_slots, "--block-size", BLOCK, *WINDOWS, *options]
        return main(["calibrate", *map(str, arguments)])

    return call


@pytest.fixture(scope="session")
def heads(run, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("heads") / "heads"
    assert run(folder, *SHORT) == 0
    return folder
