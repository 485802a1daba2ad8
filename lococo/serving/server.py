"""Transformers' server around one model that is loaded and patched already.

Its model manager, generation manager and handlers are used as they are but for what the classes here add: prompts that
are read once (``PromptReader``), limits, and generations that end with their request.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import inspect
import json
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from openai.types.completion_usage import CompletionUsage, PromptTokensDetails
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState, _StreamError

from lococo.config import LoCoCoConfig
from lococo.models import base_config
from lococo.serving.asked import before, check_messages, checked, may_go_on
from lococo.serving.reader import PromptReader

SECONDS_TO_END = 5  # for generations that are under way when the server ends: one token, or one piece of a prompt
CLIENT_CLOSED_REQUEST, UNAVAILABLE = 499, 503
MAX_TOKENS = 1024  # of an answer, where a request does not say, as in Transformers' server


@dataclasses.dataclass(eq=False)
class Request:
    """What becomes of one request.

    Attributes
    ----------
    end : HTTPException, optional
        What its generation is to end with: its client is gone, or the server is about to go.
    seed : int, optional
        Of what is drawn by chance.
    stops : tuple of str
        What its answer ends before.
    is_stopped : bool
        Whether one of them came.
    cached_tokens : int
        Tokens of its prompt that did not have to be read.
    """

    end: HTTPException | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()
    is_stopped: bool = False
    cached_tokens: int = 0

    def check(self) -> None:
        """End here if there is no one to answer."""
        if self.end is not None:
            raise self.end

    def note_reuse(self, tokens: int) -> None:
        """So many tokens did not have to be read."""
        self.cached_tokens = tokens

    def before_stop(self, text: str) -> str:
        """A text up to where the answer ends."""
        said = before(text, self.stops)
        self.is_stopped |= said != text
        return said


CURRENT: ContextVar[Request] = ContextVar("lococo_request")


class Requests:
    """ASGI middleware that knows the requests under way and notes when a client goes away, also before it hears back.

    Parameters
    ----------
    app : ASGI application
    under_way : set of Request
        Filled here.
    """

    def __init__(self, app: Any, under_way: set[Request]) -> None:
        self.app, self.under_way = app, under_way

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        """Pass one request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request, messages = Request(), asyncio.Queue[Any]()
        CURRENT.set(request)
        with self._noted(request):
            listener = asyncio.create_task(self._listen(request, receive, messages))
            try:
                await self.app(scope, messages.get, send)
            finally:
                listener.cancel()

    @contextlib.contextmanager
    def _noted(self, request: Request) -> Iterator[None]:
        self.under_way.add(request)
        try:
            yield
        finally:
            self.under_way.discard(request)

    @staticmethod
    async def _listen(request: Request, receive: Callable, messages: asyncio.Queue) -> None:
        while request.end is None:
            message = await receive()
            if message["type"] == "http.disconnect":
                request.end = HTTPException(CLIENT_CLOSED_REQUEST, "the client has closed the connection")
            messages.put_nowait(message)


class OneModel(ModelManager):
    """The model manager of a server whose model is there already, under a name of its own.

    Parameters
    ----------
    name : str
        What clients call it.
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    """

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.force_model, self.model_timeout = name, -1

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as it is."""
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        """Model and tokenizer.

        Raises
        ------
        HTTPException
            404, if another model is asked for.
        """
        if model_id_and_revision != self.force_model:
            raise HTTPException(404, f"there is no model {model_id_and_revision!r} here, only {self.force_model!r}")
        return super().load_model_and_processor(model_id_and_revision, *args, **kwargs)

    def list_models(self, cache_dir: str | None = None) -> list[dict]:
        """The model alone, as OpenAI's API lists it."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "lococo"}]

    get_gen_models = list_models  # as the server of 5.8 calls it

    def _load_model(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        return self.model

    def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
        return self.tokenizer


class ReadingManager(GenerateManager):
    """Generates one answer after another on one thread, with a reader that has read beginnings before.

    Parameters
    ----------
    reader : PromptReader
    max_prompt_tokens : int, optional
        Longest prompt that is taken.
    positions : int, optional
        Longest text, answer included, that the model knows positions for.
    """

    def __init__(
        self, reader: PromptReader, max_prompt_tokens: int | None = None, positions: int | None = None
    ) -> None:
        super().__init__()
        self.reader, self.max_prompt_tokens, self.positions = reader, max_prompt_tokens, positions

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any):
        """Start a generation whose tokens are streamed."""
        self._fit(inputs["input_ids"].shape[1], gen_config)
        ids, request = {"input_ids": inputs["input_ids"]}, CURRENT.get()
        queue, streamer = super().generate_streaming(self._reading(), processor, ids, gen_config, *args, **kwargs)
        return _Stream(queue, request), streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ):
        """Wait for a whole answer."""
        self._fit(inputs["input_ids"].shape[1], gen_config)
        ids = {"input_ids": inputs["input_ids"]}
        return await super().generate_non_streaming(self._reading(), processor, ids, gen_config, *args, **kwargs)

    def wait(self, seconds: float) -> None:
        """Wait until all that has been asked for is done, so long at most."""
        with contextlib.suppress(concurrent.futures.TimeoutError):
            self.submit(int).result(timeout=seconds)

    def _fit(self, tokens: int, config: GenerationConfig) -> None:
        """Refuse a prompt that is too long, and end the answer with the model's positions."""
        if tokens == 0:
            raise HTTPException(400, "the prompt is empty")
        if self.max_prompt_tokens is not None and tokens > self.max_prompt_tokens:
            raise HTTPException(
                400,
                f"the prompt has {tokens} tokens, this server takes {self.max_prompt_tokens} (--max-prompt-tokens)",
            )
        if self.positions is not None and tokens >= self.positions:
            raise HTTPException(400, f"the prompt has {tokens} tokens, the model {self.positions} positions")
        if config.max_new_tokens is None:
            config.max_new_tokens = MAX_TOKENS if config.max_length is None else config.max_length - tokens
        if config.max_new_tokens < 1:
            raise HTTPException(400, f"max_tokens must be at least 1, got {config.max_new_tokens}")
        if self.positions is not None:
            config.max_new_tokens = min(config.max_new_tokens, self.positions - tokens)

    def _reading(self) -> Any:
        """What stands for the model in one generation."""
        return SimpleNamespace(generate=functools.partial(self._generate, CURRENT.get()))

    def _generate(self, request: Request, input_ids: torch.Tensor, tokenizer: Any, **kwargs: Any) -> torch.Tensor:
        if request.stops:
            kwargs["stopping_criteria"] = [_Stops(request.stops, tokenizer, input_ids.shape[1])]
        with _seeded(request.seed, input_ids.device):
            return self.reader.generate(
                input_ids, check=request.check, on_reuse=request.note_reuse, tokenizer=tokenizer, **kwargs
            )


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """What is drawn inside the block is what a seed says; what others draw afterwards is left to chance."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


class _Stops(StoppingCriteria):
    """Ends an answer whose text has one of these strings in it."""

    def __init__(self, stops: Collection[str], tokenizer: Any, prompt_tokens: int) -> None:
        self._stops, self._tokenizer, self._prompt_tokens = stops, tokenizer, prompt_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> Any:
        """(rows,), which rows are complete."""
        texts = self._tokenizer.batch_decode(input_ids[:, self._prompt_tokens :], skip_special_tokens=True)
        is_stopped = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(is_stopped, device=input_ids.device)


class _Stream:
    """The queue of an answer's pieces up to a stop string: what may begin one waits for the next piece."""

    def __init__(self, queue: asyncio.Queue, request: Request) -> None:
        self._queue, self._request = queue, request
        self._held: Any = ""
        self._ready: collections.deque[Any] = collections.deque()

    async def get(self) -> Any:
        """The next piece."""
        while not self._ready:
            self._take(await self._queue.get())
        return self._ready.popleft()

    def get_nowait(self) -> Any:
        """The next piece, if it is there."""
        while not self._ready:
            self._take(self._queue.get_nowait())
        return self._ready.popleft()

    def _take(self, piece: Any) -> None:
        if type(piece) is not type(self._held):  # text of another kind, an error, or the end
            self._ready.extend([self._held] if self._held else [])
            self._held = type(piece)() if isinstance(piece, str) else ""
        if isinstance(piece, _StreamError):
            piece = _StreamError(json.dumps(piece.msg)[1:-1])  # it is written between quotes
        if not isinstance(piece, str):
            self._ready.append(piece)
        elif not self._request.is_stopped:
            kind = type(piece)
            said = self._request.before_stop(self._held + piece)
            end = len(said) - (0 if self._request.is_stopped else may_go_on(said, self._request.stops))
            self._ready.extend([kind(said[:end])] if end else [])
            self._held = kind("" if self._request.is_stopped else said[end:])


def text_positions(model: PreTrainedModel, config: LoCoCoConfig | None) -> int | None:
    """Longest text, in tokens, that a model patched with a config knows positions for; None: any length."""
    if config is not None and config.positions == "slot":
        return None
    return getattr(base_config(model).get_text_config(), "max_position_embeddings", None)


class OneState(GenerationState):
    """The generation state of a server with one model: one manager, never continuous batching."""

    def __init__(self, manager: ReadingManager) -> None:
        super().__init__()
        self._manager = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        """The manager."""
        return self._manager


TEXTS = ("text", "content", "reasoning_content")  # of a choice or its message


class _Handler:
    """What is added to Transformers' handlers: refusals with a status, sampling as asked, tokens that were cached."""

    needs: str  # what a request cannot be without

    async def handle_request(self, body: dict, request_id: str) -> Any:
        """Answer, or say what is wrong with the request."""
        if not body.get(self.needs):
            raise HTTPException(400, f"{self.needs} is missing or empty")
        try:
            asked = checked(body)
            self._check(asked)
            return await super().handle_request(asked, request_id)  # type: ignore[misc]
        except (ValueError, TemplateError) as error:
            raise HTTPException(400, str(error)) from error

    def _check(self, asked: dict) -> None:
        """Refuse more."""

    def _resolve_model(self, body: dict) -> Any:
        manager: OneModel = self.model_manager  # type: ignore[attr-defined]
        name: Any = body.get("model") or manager.force_model
        return name, *manager.load_model_and_processor(name)

    def _build_generation_config(self, body: dict, *args: Any, **kwargs: Any) -> GenerationConfig:
        request, stop = CURRENT.get(), body.pop("stop", ())
        # Set where the tokens are drawn: other requests may be at it now.
        request.seed = body.pop("seed", None)
        request.stops = tuple(filter(None, [stop] if isinstance(stop, str) else stop))
        config = super()._build_generation_config(body, *args, **kwargs)  # type: ignore[misc]
        if (config.num_return_sequences or 1) > 1:
            raise ValueError(f"one answer is served, got num_return_sequences={config.num_return_sequences}")
        if body.get("temperature", body.get("top_p", 1) < 1):
            config.do_sample = True
        if "logit_bias" in body:
            config.sequence_bias = {(token,): bias for token, bias in body["logit_bias"].items()}
        config.return_dict_in_generate, config.use_cache = False, True
        return config

    def _build_chunk_sse(self, *args: Any, usage: CompletionUsage | None = None, **kwargs: Any) -> str:
        if usage is not None:
            usage.prompt_tokens_details = PromptTokensDetails(cached_tokens=CURRENT.get().cached_tokens)
        if kwargs.get("finish_reason") == "length" and CURRENT.get().is_stopped:
            kwargs["finish_reason"] = "stop"
        return super()._build_chunk_sse(*args, usage=usage, **kwargs)  # type: ignore[misc]

    def _streaming(self, *args: Any, **kwargs: Any) -> StreamingResponse:
        response = super()._streaming(*args, **kwargs)  # type: ignore[misc]
        response.body_iterator = _with_end(response.body_iterator)
        return response

    async def _non_streaming(self, *args: Any, **kwargs: Any) -> JSONResponse:
        response = await super()._non_streaming(*args, **kwargs)  # type: ignore[misc]
        answer, request = json.loads(response.body), CURRENT.get()
        answer["usage"]["prompt_tokens_details"] = {"cached_tokens": request.cached_tokens}
        (choice,) = answer["choices"]
        said = choice.get("message", choice)
        said.update({name: request.before_stop(said[name]) for name in TEXTS if said.get(name)})
        if choice["finish_reason"] == "length" and request.is_stopped:
            choice["finish_reason"] = "stop"
        return JSONResponse(answer)


async def _with_end(chunks: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """A stream with the end that OpenAI's API has."""
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            yield chunk
    yield "data: [DONE]\n\n"


class _Chat(_Handler, ChatCompletionHandler):
    needs = "messages"

    def _check(self, asked: dict) -> None:
        check_messages(asked["messages"])
        apply = self.model_manager.tokenizer.apply_chat_template  # type: ignore[attr-defined]
        taken = inspect.signature(apply).parameters.keys() & asked.get("chat_template_kwargs", {}).keys()
        if taken:
            raise ValueError(f"chat_template_kwargs go to the chat template, which has no {', '.join(sorted(taken))}")
        if tools := asked.get("tools"):
            write = functools.partial(apply, [{"role": "user", "content": "?"}], tokenize=False)
            if write(tools=tools) == write():
                raise ValueError("the chat template of this model has no place for tools")

    @staticmethod
    def get_processor_inputs_from_messages(messages: Any, *args: Any, **kwargs: Any) -> list[dict]:
        """Messages as the template takes them."""
        try:
            return ChatCompletionHandler.get_processor_inputs_from_messages(messages, *args, **kwargs)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"messages are not written as OpenAI's API has them: {error!r}") from error


class _Completion(_Handler, CompletionHandler):
    needs = "prompt"


class _NotServed:
    async def handle_request(self, *args: Any) -> Any:
        raise HTTPException(404, "lococo serve answers /v1/chat/completions and /v1/completions")


class Server(uvicorn.Server):
    """A server that ends the generations under way when it ends.

    Parameters
    ----------
    name : str
        What clients call the model.
    model : transformers.PreTrainedModel
        Loaded, and patched or not; it must stay so.
    tokenizer : transformers.PreTrainedTokenizerBase
    manager : ReadingManager
        Of the same model.
    host, port
        Where to listen.

    Raises
    ------
    ValueError
        If the tokenizer is not one of the package ``tokenizers``, which streams need.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        manager: ReadingManager,
        host: str = "127.0.0.1",
        port: int = 8000,
    ) -> None:
        if not hasattr(tokenizer, "_tokenizer"):
            raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer: the server cannot stream its tokens")
        self._manager = manager
        self.under_way: set[Request] = set()
        app = _application(OneModel(name, model, tokenizer), OneState(manager))
        app.add_middleware(Requests, under_way=self.under_way)
        app.add_exception_handler(HTTPException, _openai_error)
        super().__init__(uvicorn.Config(app, host=host, port=port, timeout_graceful_shutdown=SECONDS_TO_END))

    def serve_until_interrupted(self) -> None:
        """Serve until Ctrl-C, or until ``should_exit`` is set."""
        with contextlib.suppress(KeyboardInterrupt):
            self.run()
        self._manager.wait(SECONDS_TO_END)

    async def shutdown(self, *args: Any, **kwargs: Any) -> None:
        """End every request that is under way, then the server."""
        for request in self.under_way:
            request.end = HTTPException(UNAVAILABLE, "the server is shutting down")
        await super().shutdown(*args, **kwargs)


async def _openai_error(_: Any, error: Any) -> JSONResponse:
    """A refusal in the words of OpenAI's API, whose clients show the message."""
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    told = {"message": error.detail, "type": kind, "param": None, "code": error.status_code}
    return JSONResponse({"error": told}, error.status_code)


def _application(models: OneModel, state: OneState) -> FastAPI:
    """Transformers' application, whichever handlers a release gives it."""
    parts: dict[str, Any] = {
        "model_manager": models,
        "generation_state": state,
        "chat_handler": _Chat(models, state),
        "completion_handler": _Completion(models, state),
    }
    taken = inspect.signature(build_server).parameters
    others = {name: _NotServed() for name in taken if name.endswith("_handler") and name not in parts}
    return build_server(**parts, **others)  # type: ignore[arg-type]
