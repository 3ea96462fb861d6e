"""The page: the same loop as everywhere, for a browser.

Owns putting the pages onto the server's application. It calls the service in process, never over HTTP; only this
package knows NiceGUI, of which a process has one: a second `mount` in it, as in tests, takes the pages over.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from nicegui import app as pages
from nicegui import core, ui
from starlette.routing import Match, Mount
from starlette.types import Scope

from liveweight.web.board import Board
from liveweight.web.frame import Frame
from liveweight.web.visitors import Visitors, login_address

if TYPE_CHECKING:
    from liveweight.server.service import Service

_PATIENCE = 30.0  # seconds that a page may take to begin
_RECONNECT = 10.0  # seconds that a browser may be away before its page is forgotten
_PATHS = ("/", "/changes", "/neurons", "/health", "/arena", "/favicon.ico")
_FOLDERS = ("/_nicegui/", "/_nicegui_ws/")


def mount(app: FastAPI, service: Service) -> None:
    """Serve the page at /, beside whatever `app` serves already; its lifespan is the page's. Blocks while it reads."""
    board, visitors = Board(service), Visitors(service)
    app.include_router(visitors.router())
    _routes(board, visitors)
    # What an earlier application of this process had added; it cannot be added to once it has run.
    pages.middleware_stack = None
    pages.user_middleware.clear()
    pages.config.quasar_config["loadingBar"]["skipHijack"] = True  # the pages show their own progress
    core.sio.eio.cors_allowed_origins = _own_origin
    ui.run_with(
        app,
        title="liveweight",
        favicon="⚖️",
        dark=None,
        language="en-US",
        reconnect_timeout=_RECONNECT,
        tailwind=False,
        show_welcome_message=False,
    )
    app.router.routes[-1] = _Pages("", app=pages)
    _follow(app, board)


def _own_origin(origin: str | None, environ: Mapping[str, Any]) -> bool:
    """Whether a script that connects came from this very server."""
    return origin is None or urlsplit(origin).netloc == environ.get("HTTP_HOST")


class _Pages(Mount):
    """The page's own addresses and no others: what the API does not know stays the API's to refuse."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Whether a request is for the page."""
        path = scope.get("path", "")
        if path in _PATHS or path.startswith(_FOLDERS):
            return super().matches(scope)
        return Match.NONE, {}


def _routes(board: Board, visitors: Visitors) -> None:
    async def framed(request: Request, here: str) -> Frame | Response:
        visitor = await visitors.of(request)
        if visitor is None:
            return RedirectResponse(login_address(request), status_code=303)
        return Frame(board, visitors, visitor, request, here)

    @ui.page("/", response_timeout=_PATIENCE)
    async def chat_page(request: Request, chat: str | None = None, at: str | None = None) -> Response | None:
        from liveweight.web.chat_page import ChatPage

        frame = await framed(request, "Chat")
        if isinstance(frame, Response):
            return frame
        ChatPage(frame, chat, at)
        return None

    @ui.page("/changes", response_timeout=_PATIENCE)
    async def changes_page(request: Request, change: str | None = None) -> Response | None:
        from liveweight.web.changes_page import ChangesPage

        frame = await framed(request, "Changes")
        if isinstance(frame, Response):
            return frame
        ChangesPage(frame, change)
        return None

    @ui.page("/neurons", response_timeout=_PATIENCE)
    async def neurons_page(request: Request, find: str | None = None, neuron: str | None = None) -> Response | None:
        from liveweight.web.neurons_page import NeuronsPage

        frame = await framed(request, "Neurons")
        if isinstance(frame, Response):
            return frame
        NeuronsPage(frame, find, neuron)
        return None

    @ui.page("/health", response_timeout=_PATIENCE)
    async def health_page(request: Request) -> Response | None:
        from liveweight.web.health_page import HealthPage

        frame = await framed(request, "Health")
        if isinstance(frame, Response):
            return frame
        HealthPage(frame)
        return None

    @ui.page("/arena", response_timeout=_PATIENCE)
    async def arena_page(request: Request) -> Response | None:
        from liveweight.web.arena_page import ArenaPage

        frame = await framed(request, "Arena")
        if isinstance(frame, Response):
            return frame
        ArenaPage(frame)
        return None


def _follow(app: FastAPI, board: Board) -> None:
    """Let the board hear of the ledger's events while the application runs."""
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def following(application: FastAPI) -> AsyncIterator[Any]:
        async with AsyncExitStack() as stack:
            with warnings.catch_warnings():
                # NiceGUI looks through every object of the process for its server, torch's old names included.
                warnings.simplefilter("ignore", FutureWarning)
                state = await stack.enter_async_context(inner(application))
            task = asyncio.create_task(board.follow())
            try:
                yield state
            finally:
                board.close()
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    app.router.lifespan_context = following


__all__ = ["mount"]
