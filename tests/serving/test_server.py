"""The server, asked by OpenAI's client over loopback."""

import asyncio
import concurrent.futures
import contextlib
import gc
import json
import logging
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.error
import urllib.request

import openai
import pytest
from tiny import tiny_llama
from words import WORDS, Characters, word_tokenizer

import lococo
from lococo.serving.asked import before
from lococo.serving.manager import ReadingManager, _Stream, text_positions
from lococo.serving.reader import PromptReader
from lococo.serving.requests import Request
from lococo.serving.server import Server

CONFIG = lococo.LoCoCoConfig(64, block_size=64, gate_init=0.4)
POSITIONS = 20_000
NAME = "tiny"
TOOL = {"type": "function", "function": {"name": "w1", "description": "w2", "parameters": {"type": "object"}}}
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


TWO_ANSWERS = '{"num_return_sequences": 2, "do_sample": true}'


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
        ({"temperature": [1]}, openai.BadRequestError, "temperature: .* got \\[1\\]"),
        ({"max_tokens": [1]}, openai.BadRequestError, "max_tokens: .* got \\[1\\]"),
        ({"seed": 2**70}, openai.BadRequestError, "seed: .* got 1180591620717411303424"),
        ({"n": 2}, openai.BadRequestError, "n is not served: leave out n=2"),
        ({"logprobs": 0}, openai.BadRequestError, "logprobs is not served"),
        ({"echo": True}, openai.BadRequestError, "echo is not served"),
        ({"suffix": "w2"}, openai.BadRequestError, "suffix is not served"),
        (
            {"extra_body": {"generation_config": TWO_ANSWERS}},
            openai.BadRequestError,
            "one answer is",
        ),
        ({"extra_body": {"generation_config": "{"}}, openai.BadRequestError, "Expecting property name"),
        ({"extra_body": {"generation_config": "[]"}}, openai.BadRequestError, "generation_config: .* a JSON object"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_requests_are_told_what_is_wrong(served, asked, error, said, stream):
    with pytest.raises(error, match=said):
        served.complete(**{"prompt": "w1", "stream": stream, **asked})


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("completions", {"prompt": "w1 \ud83d"}),
        ("completions", {"prompt": "w1", "stop": ["\ud83d"]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "w1 \ud83d"}]}),
    ],
)
def test_a_text_that_was_cut_inside_a_character_is_refused(served, path, asked):
    """As JavaScript cuts it; OpenAI's client for Python would not send it."""
    request = urllib.request.Request(
        f"{served.url}/{path}", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 400
    assert "'\\ud83d' is half a character" in json.load(refused.value)["error"]["message"]


def test_what_asks_for_nothing_changes_nothing(served):
    """As clients write it that send every field."""
    nothing = dict(
        n=1, presence_penalty=0, frequency_penalty=0.0, stop=[], logit_bias={}, top_p=1, user="one", seed=None
    )
    legacy = dict(best_of=1, echo=False, suffix=None)
    assert served.complete("w1 w2", **nothing, **legacy).choices[0].text == served.expected("w1 w2")
    chat = dict(
        logprobs=False, response_format={"type": "text"}, tool_choice="none", modalities=["text"], tools=[TOOL]
    )
    answer = served.chat("w1 w2", **nothing, **chat, store=False, stream_options=None, reasoning_effort=None)
    assert answer.choices[0].message.content == served.expected(as_prompt("w1 w2"))


@pytest.mark.parametrize("kind", ["chat", "complete"])
def test_a_bias_is_added_to_a_tokens_logits(served, kind):
    answer = getattr(served, kind)("w1 w2", logit_bias={"9": 100}, max_tokens=3).choices[0]
    assert (answer.message.content if kind == "chat" else answer.text) == "w6 w6 w6"


def test_a_probability_alone_asks_for_drawing(served):
    answers = {served.complete("w1 w2", top_p=0.999, seed=seed).choices[0].text for seed in range(4)}
    assert len(answers) > 1
    assert served.complete("w1 w2", top_p=0.999, temperature=0).choices[0].text == served.expected("w1 w2")


def test_a_seed_is_its_requests_alone(served):
    """What others draw afterwards is not what they drew after the same seed before."""
    others = set()
    for _ in range(3):
        served.complete("w1 w2", temperature=1.0, seed=3)
        others.add(served.complete("w1 w2", temperature=1.0, max_tokens=12).choices[0].text)
    assert len(others) == 3


@pytest.mark.parametrize("max_tokens", [4, 12])
@pytest.mark.parametrize("kind", ["chat", "complete"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_string(served, kind, stream, max_tokens):
    content = "w1 w2 w3"
    words = served.expected(as_prompt(content) if kind == "chat" else content, 12).split()
    stop = ["<none>", " ".join(words[2:4])]  # over two tokens: the first of them must wait
    assert stop[1] not in " ".join(words[:3])
    answer = getattr(served, kind)(content, stop=stop, max_tokens=max_tokens, stream=stream)
    chunks = list(answer) if stream else [answer]
    choices = [chunk.choices[0] for chunk in chunks]
    if kind == "chat":
        said = [(each.delta if stream else each.message).content or "" for each in choices]
    else:
        said = [each.text for each in choices]
    assert "".join(said) == " ".join(words[:2]) + " "
    assert (choices[-1].finish_reason, chunks[-1].usage.completion_tokens) == ("stop", 4)


@pytest.mark.parametrize("stop", ["w1", ["w1"]])
def test_a_stop_string_in_the_prompt_ends_nothing(served, stop):
    prompt = "w2 w1"
    assert not {"w1", *(f"w1{digit}" for digit in range(10))} & set(served.expected(prompt).split())
    assert served.complete(prompt, stop=stop).choices[0].text == served.expected(prompt)


@pytest.mark.parametrize("pieces", ["a|bc|ab|d|", "abab|ab|c!", "a|b", "x|ab|abc|a", "|", "ab|a|b|c", "abca|bc"])
def test_a_stream_is_its_text_before_a_stop_string_however_it_is_cut(pieces):
    request, queue = Request(stops=("abc", "bd")), asyncio.Queue()
    for piece in [*pieces.split("|"), None]:
        queue.put_nowait(piece)
    stream, told = _Stream(queue, request), []
    while (piece := stream.get_nowait()) is not None:
        told.append(piece)
    whole = pieces.replace("|", "")
    assert "".join(told) == before(whole, request.stops) and "" not in told
    assert request.is_stopped == any(stop in whole for stop in request.stops)


class Thought(str):
    """Text of another kind, as later releases of Transformers have it."""


def test_what_is_thought_and_what_is_said_are_not_mixed():
    request, queue = Request(stops=("abc",)), asyncio.Queue()
    for piece in (Thought("xab"), "c", "y", None):
        queue.put_nowait(piece)
    stream = _Stream(queue, request)
    told = [stream.get_nowait() for _ in range(5)]
    assert told == ["x", "ab", "c", "y", None]
    assert [type(each) for each in told[:4]] == [Thought, Thought, str, str]


def test_an_error_in_a_stream_is_json_whatever_it_says(served, monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError('a "word"\nand another')

    monkeypatch.setattr(served.reader, "generate", failing)
    with pytest.raises(openai.APIError) as error:
        list(served.complete("w1 w2", stream=True))
    assert error.value.body == 'a "word"\nand another'


def test_a_stream_has_an_end(served):
    asked = json.dumps({"prompt": "w1 w2", "stream": True, "max_tokens": 2}).encode()
    request = urllib.request.Request(f"{served.url}/completions", asked, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        *chunks, end = answer.read().decode().split("\n\n")[:-1]
    assert end == "data: [DONE]" and all(json.loads(chunk[6:])["choices"] for chunk in chunks)


def test_a_generation_config_of_the_clients_own_is_bounded_too(served):
    answer = served.complete("w1 w2", max_tokens=None, extra_body={"generation_config": '{"max_length": 7}'})
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (5, "length")
    whole = {"generation_config": '{"return_dict_in_generate": true, "use_cache": false}'}
    assert served.complete("w1 w2", extra_body=whole).choices[0].text == served.expected("w1 w2")


def test_a_tokenizer_that_has_more_than_ids_is_served(served, monkeypatch):
    expected = served.expected("w1 w2")
    monkeypatch.setattr(served.tokenizer, "model_input_names", ["input_ids", "token_type_ids", "attention_mask"])
    assert served.complete("w1 w2").choices[0].text == expected


def test_a_name_may_look_like_a_file(served):
    other = Server("org/model:q4.gguf", served.model, served.tokenizer, served.manager)
    assert not other.started


def test_a_tokenizer_that_cannot_stream_is_refused(served):
    with pytest.raises(ValueError, match="Characters is no fast tokenizer"):
        Server(NAME, served.model, Characters(), served.manager)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages is missing or empty"),
        ([{"role": "tool", "content": "w1"}], "there are no tools"),
        ("w1", "messages must be a list, got 'w1'"),
        ([{"content": "w1"}], "messages.0. must have a role"),
        ([{"role": "user", "content": 5}], "the text of messages.0. must be a string, got 5"),
        ([{"role": "user", "content": [{"type": "text"}]}], "the text of messages.0. must be a string, got None"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "w1"}, {"type": "image_url", "image_url": "x"}]}],
            "messages.0. must hold text alone, got a part of type 'image_url'",
        ),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "messages.0. must have tool_calls of functions with a"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}],
            "messages.0. must have tool_calls of functions",
        ),
        ([{"role": "assistant", "tool_calls": "w1"}], "messages.0. must have tool_calls of functions with a name"),
    ],
)
def test_wrong_conversations_are_told_what_is_wrong(served, messages, said):
    with pytest.raises(openai.BadRequestError, match=said):
        served.chat("", messages=messages)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format is not served"),
        ({"logprobs": True}, "logprobs is not served"),
        ({"tools": [TOOL]}, "the chat template of this model has no place for tools"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice is not served"),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": False}}}, "the chat template, which has no tokenize"),
        ({"extra_body": {"chat_template_kwargs": {"messages": []}}}, "the chat template, which has no messages"),
        ({"extra_body": {"chat_template_kwargs": 5}}, "chat_template_kwargs: .* got 5"),
    ],
)
def test_what_no_chat_has_is_told(served, asked, said):
    with pytest.raises(openai.BadRequestError, match=said):
        served.chat("w1", **asked)


def test_parts_of_text_are_text(served):
    parts = [{"type": "text", "text": "w1 w2"}, {"type": "text", "text": "w3"}]
    answer = served.chat("", messages=[{"role": "system", "content": "w9"}, {"role": "user", "content": parts}])
    assert answer.choices[0].message.content == served.expected("<s> w9 <s> w1 w2 w3 w60 ")


def test_no_route_but_the_two_is_served(served):
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
    ids = served.tokenizer(text(300, 1), return_tensors="pt")
    one = lococo.cache_bytes(served.alone.generate(**ids, max_new_tokens=2, return_dict_in_generate=True))
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
