"""Transformers' server around one model that is loaded and patched already.

Its model manager, generation state and handlers are used as they are but for what the classes here add: requests that
are checked, sampling as asked, tokens that were not read again, and generations that end with the server.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections.abc import AsyncGenerator
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from openai.types.completion_usage import CompletionUsage, PromptTokensDetails
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from lococo.serving.asked import check_messages, checked
from lococo.serving.manager import ReadingManager
from lococo.serving.requests import CURRENT, Request, Requests

SECONDS_TO_END = 5  # for generations that are under way when the server ends: one token, or one piece of a prompt
UNAVAILABLE = 503
RENDERED = ("conversations", "messages")  # what Transformers calls a conversation on its way to the template
TEXTS = ("text", "content", "reasoning_content")  # of a choice or its message


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


class OneState(GenerationState):
    """The generation state of a server with one model: one manager, never continuous batching."""

    def __init__(self, manager: ReadingManager) -> None:
        super().__init__()
        self._manager = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        """The manager."""
        return self._manager


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
        known = {*inspect.signature(apply).parameters, *RENDERED}
        taken = known & asked.get("chat_template_kwargs", {}).keys()
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
