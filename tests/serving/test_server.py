"""The server, asked by OpenAI's client over loopback."""

import concurrent.futures
import contextlib
import gc
import logging
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc

import openai
import pytest
from tiny import tiny_llama
from words import WORDS, word_tokenizer

import lococo
from lococo.serving.reader import PromptReader
from lococo.serving.server import ReadingManager, Server, text_positions

CONFIG = lococo.LoCoCoConfig(64, block_size=64, gate_init=0.4)
POSITIONS = 20_000
NAME = "tiny"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('there are no tools') }}{% endif %}"
    "<s> {{ message.content }} {% endfor %}{% if add_generation_prompt %}w60 {% endif %}"
)


def text(words, seed):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def chat_tokenizer():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class Served:
    """A server of a tiny model on a thread, its client, and the same model alone."""

    def __init__(self, positions=POSITIONS):
        self.tokenizer = chat_tokenizer()
        self.model, self.alone = (
            lococo.patch_model(tiny_llama(max_position_embeddings=positions), CONFIG) for _ in range(2)
        )
        self.model.load_state_dict(self.alone.state_dict())
        self.reader = PromptReader(self.model, kept_caches=6)
        self.manager = ReadingManager(self.reader, 12_000, text_positions(self.model, CONFIG))
        self.server = Server(NAME, self.model, self.tokenizer, self.manager, port=0)
        self.thread = threading.Thread(target=self.server.serve_until_interrupted)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/v1"
        self.client = openai.OpenAI(base_url=self.url, api_key="any", max_retries=0, timeout=120)
        return self

    def __exit__(self, *error):
        self.client.close()
        self.server.should_exit = True
        self.thread.join()

    def chat(self, content, **more):
        messages = [{"role": "user", "content": content}]
        return self.client.chat.completions.create(**{"model": NAME, "messages": messages, "max_tokens": 6, **more})

    def complete(self, prompt, **more):
        return self.client.completions.create(**{"model": NAME, "prompt": prompt, "max_tokens": 6, **more})

    def expected(self, prompt, max_new_tokens=6):
        """Greedy answer of the patched model alone."""
        inputs = self.tokenizer(prompt, return_tensors="pt")
        output = self.alone.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return self.tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)

    def wait(self):
        self.manager.wait(60)


@pytest.fixture(scope="module")
def served():
    with Served() as it:
        yield it


def as_prompt(content):
    return f"<s> {content} w60 "


def reused(answer):
    return answer.usage.prompt_tokens_details.cached_tokens


def test_chat_and_completion_answer_as_generate_does(served):
    content = text(100, 1)
    answer = served.chat(content)
    assert answer.choices[0].message.content == served.expected(as_prompt(content))
    assert (answer.model, answer.choices[0].finish_reason) == (NAME, "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (102, 6)
    completed = served.complete(content)
    assert completed.choices[0].text == served.expected(content)
    assert completed.usage.total_tokens == 106
    assert [model.id for model in served.client.models.list()] == [NAME]


@contextlib.contextmanager
def held_after(model, steps):
    """An event without which a model takes no more than so many steps inside a ``with`` block, and the steps taken."""
    go_on, taken = threading.Event(), []

    def hold(*_):
        taken.append(1)
        if len(taken) > steps:
            assert go_on.wait(60)

    hook = model.lm_head.register_forward_pre_hook(hold)
    try:
        yield go_on, taken
    finally:
        go_on.set()
        hook.remove()


@pytest.mark.parametrize("kind", ["chat", "complete"])
def test_tokens_are_streamed_as_they_are_made(served, kind):
    """The first one is here while the model is kept from making the third."""
    content = text(8, 5)
    parts, usage = [], None
    with held_after(served.model, 1 + 2) as (go_on, _):  # the prompt but its last token is read in one piece
        for chunk in getattr(served, kind)(content, stream=True):
            choice = chunk.choices[0]
            part = choice.delta.content if kind == "chat" else choice.text
            parts += [part] if part else []
            usage = chunk.usage or usage
            if parts:
                go_on.set()
    assert len(parts) == 6
    assert "".join(parts) == served.expected(as_prompt(content) if kind == "chat" else content)
    assert usage.completion_tokens == 6 and reused(chunk) == 0


def test_three_questions_about_a_document_read_it_once(served):
    document = text(10_000, 3)
    for question, known in zip(("w1 w2 w3", "w4 w5", "w6 w7 w8 w9"), (0, 9_900, 10_001), strict=True):
        answer = served.chat(f"{document} {question}")
        assert answer.choices[0].message.content == served.expected(as_prompt(f"{document} {question}"))
        assert reused(answer) >= known and (known > 0 or reused(answer) < 32)


def test_a_conversation_goes_on(served):
    messages = []
    for turn in range(3):
        messages.append({"role": "user", "content": text(120, 40 + turn)})
        answer = served.chat("", messages=messages)
        prompt = served.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert answer.choices[0].message.content == served.expected(prompt)
        assert turn == 0 or reused(answer) >= 120 * turn - 64
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})


def test_clients_at_once_are_answered_as_if_alone(served):
    contents = [text(200, 5) + " " + text(4, seed) for seed in range(4)] * 3
    with concurrent.futures.ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(served.chat, contents))
    assert [each.choices[0].message.content for each in answers] == [served.expected(as_prompt(c)) for c in contents]


def test_a_seed_says_what_is_drawn_whoever_else_draws(served):
    def ask(seed):
        return served.complete("w1 w2 w3", temperature=1.0, seed=seed, max_tokens=12).choices[0].text

    first = ask(1)
    with concurrent.futures.ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(ask, [1, 2, 1, 3]))
    assert answers[0] == answers[2] == first
    assert len(set(answers)) == 3
    assert served.complete("w1 w2 w3", temperature=0).choices[0].text == served.expected("w1 w2 w3")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_generation(served, stream):
    """Of the 15,000 tokens that it asked for few are made, and the next client is answered."""
    before = served.expected("w7 w8")
    with held_after(served.model, 5) as (go_on, taken):
        if stream:
            answer = served.complete("w1 w2 w3 w4", max_tokens=15_000, stream=True)
            next(iter(answer))
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                served.complete("w1 w2 w3 w4", max_tokens=15_000, timeout=1)
        while not all(request.end for request in served.server.under_way):
            time.sleep(0.01)
        go_on.set()
        served.wait()
        assert len(taken) < 10
    assert served.complete("w7 w8").choices[0].text == before


def test_what_waits_for_its_turn_may_go_away_too(served):
    with held_after(served.model, 1) as (go_on, taken), concurrent.futures.ThreadPoolExecutor(1) as clients:
        first = clients.submit(served.complete, "w1 w2 w3 w4")
        while not taken:
            time.sleep(0.01)
        with pytest.raises(openai.APITimeoutError):
            served.complete("w5 w6 w7", timeout=1)
        while not any(request.end for request in served.server.under_way):
            time.sleep(0.01)
        go_on.set()
        assert first.result().choices[0].text == served.expected("w1 w2 w3 w4")
        served.wait()
        assert len(taken) == 1 + 6


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"prompt": "w1 " * 12_001}, openai.BadRequestError, "has 12001 tokens, this server takes 12000"),
        ({"model": "gpt-4"}, openai.NotFoundError, "no model 'gpt-4' here, only 'tiny'"),
        ({"prompt": ""}, openai.BadRequestError, "prompt is missing or empty"),
        ({"prompt": "  "}, openai.BadRequestError, "the prompt is empty"),
        ({"prompt": ["w1", "w2"]}, openai.BadRequestError, "prompt must be a string"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, openai.BadRequestError, "temperature"),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(served, asked, error, said):
    with pytest.raises(error, match=said):
        served.complete(**{"prompt": "w1", **asked})


@pytest.mark.parametrize(
    ("messages", "said"),
    [([], "messages is missing or empty"), ([{"role": "tool", "content": "w1"}], "there are no tools")],
)
def test_wrong_conversations_are_told_what_is_wrong(served, messages, said):
    with pytest.raises(openai.BadRequestError, match=said):
        served.chat("", messages=messages)
    with pytest.raises(openai.NotFoundError, match="answers /v1/chat/completions and /v1/completions"):
        served.client.responses.create(model=NAME, input="w1")


def test_an_answer_ends_with_the_models_positions():
    with Served(positions=50) as small:
        answer = small.complete(text(45, 1), max_tokens=30)
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (5, "length")
        with pytest.raises(openai.BadRequestError, match="the prompt has 50 tokens, the model 50 positions"):
            small.complete(text(50, 1))
        by_slot = lococo.LoCoCoConfig(16, block_size=8, positions="slot")
        assert text_positions(small.model, by_slot) is None and text_positions(small.model, None) == 50


def test_memory_is_flat_over_200_requests(served):
    """Bytes of caches are bounded, and Python holds no more after the second hundred than after the first."""
    one = served.alone.generate(
        **served.tokenizer(text(300, 1), return_tensors="pt"), max_new_tokens=2, return_dict_in_generate=True
    ).cache.nbytes
    sizes = []
    logging.disable()  # pytest keeps what is logged
    tracemalloc.start()
    try:
        for request in range(200):
            answer = served.chat(text(150, 1000 + request), max_tokens=2, stream=request % 2 == 0)
            for _ in answer if request % 2 == 0 else ():
                pass
            if request % 100 == 99:
                served.wait()
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
        logging.disable(logging.NOTSET)
    assert len(served.reader.kept) == 6 and served.reader.nbytes <= 6 * one
    assert sizes[1] - sizes[0] < 100 * 150 * 8  # less than the ids of the prompts alone
    assert not served.server.under_way


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("busy", [False, True])
def test_ctrl_c_ends_the_command(tmp_path, busy):
    """While nothing is asked, and in the middle of a stream, whose client is told."""
    tiny_llama(max_position_embeddings=POSITIONS).save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    port = free_port()
    command = [sys.executable, "-m", "lococo", "serve", "--model", str(tmp_path), "--num-slots", "16"]
    command += ["--served-model-name", NAME, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)
        printed = []
        for line in process.stdout:
            printed.append(line)
            if "Uvicorn running" in line:
                break
        if busy:
            stream = iter(client.completions.create(model=NAME, prompt="w1 w2", max_tokens=15_000, stream=True))
            next(stream)
        process.send_signal(signal.SIGINT)
        if busy:
            with pytest.raises(openai.APIError):
                for _ in stream:
                    pass
        printed += process.stdout.readlines()
        assert process.wait(timeout=60) == 0
    assert "Traceback" not in "".join(printed) and "Finished server process" in "".join(printed)
