"""Requests under way: what each asks of its generation, and whether there is still someone to answer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from fastapi import HTTPException

from lococo.serving.asked import before

CLIENT_CLOSED_REQUEST = 499


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
