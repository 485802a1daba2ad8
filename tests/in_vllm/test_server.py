"""The OpenAI server of vLLM with LoCoCo in it, asked by OpenAI's own client."""

import concurrent.futures
import json
import os
import socket
import subprocess
import sys
import time

import openai
import pytest
from small_model import ENVIRONMENT

PLACES = 8  # requests at once, as many as there are pages
SLOTS = {"num_slots": 32, "block_size": 16}


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """A client of a running server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--model", model, "--served-model-name", "small", "--dtype", "float32", "--enforce-eager"]
    options += ["--max-model-len", "2048", "--max-num-seqs", PLACES, "--num-gpu-blocks-override", PLACES + 1]
    options += ["--attention-backend", "CUSTOM", "--additional-config", json.dumps({"lococo": SLOTS})]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--host",
        "127.0.0.1",
        "--port",
        port,
        *options,
    ]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)), env={**os.environ, **ENVIRONMENT}, stdout=file, stderr=subprocess.STDOUT
        )
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        try:
            _wait(process, client, log)
            yield client
        finally:
            process.terminate()
            process.wait(30)


def _wait(process, client, log):
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            time.sleep(0.5)
    raise TimeoutError(log.read_text()[-4000:])


def ask(client, prompt, tokens=8, **more):
    return client.completions.create(
        model="small", prompt=prompt, temperature=0, max_tokens=tokens, extra_body={"ignore_eos": True}, **more
    )


def words(count, start=0):
    return " ".join(f"w{(7 * index + start) % 60}" for index in range(count))


def test_an_answer_streams_as_it_comes_whole(server):
    whole = ask(server, words(300)).choices[0].text
    parts = [each.choices[0].text for each in ask(server, words(300), stream=True)]
    assert "".join(parts) == whole and len(parts) > 1


def test_more_requests_than_places_are_all_answered(server):
    prompts = [words(20 + 5 * index, index) for index in range(64)]
    alone = [ask(server, prompt).choices[0].text for prompt in prompts[:3]]
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda prompt: ask(server, prompt), prompts))
    assert all(answer.usage.completion_tokens == 8 for answer in answers)
    assert [answer.choices[0].text for answer in answers[:3]] == alone


def test_requests_that_are_given_up_free_their_pages(server):
    expected = ask(server, words(50)).choices[0].text
    for _ in range(2 * PLACES):
        stream = ask(server, words(100), tokens=1500, stream=True)
        next(iter(stream))
        stream.close()
    with concurrent.futures.ThreadPoolExecutor(PLACES) as pool:
        answers = list(pool.map(lambda _: ask(server, words(50)), range(PLACES)))
    assert [answer.choices[0].text for answer in answers] == [expected] * PLACES
