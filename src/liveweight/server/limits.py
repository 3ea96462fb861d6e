"""What a request may be before anybody looks into it: its size, its time, where it comes from.

Owns two pieces of middleware and the connections' patience: a body that is too large is refused with 413, one that does
not arrive with 408, a page of another origin with 403, and a connection whose request never becomes whole is closed.
Knows nothing of routes or keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from liveweight.errors import Forbidden, LiveweightError, RequestTimeout, TooLarge
from liveweight.server.access import is_loopback
from liveweight.server.errors import respond

_SAFE = ("GET", "HEAD", "OPTIONS")


class Bodies:
    """Reads each request's body whole before the application sees it, within a size and a time."""

    def __init__(self, app: ASGIApp, *, most: int, seconds: float) -> None:
        """Let `most` bytes through, that arrive within `seconds`."""
        self._app, self._most, self._seconds = app, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._body(scope, receive)
        except LiveweightError as error:
            await respond(error)(scope, receive, send)
            return
        if body is None:
            return  # the client went away
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, again, send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        told = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if told.isdigit() and int(told) > self._most:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._most:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise RequestTimeout(
                f"The request did not arrive within {self._seconds:g} seconds.", hint="Send it again, all at once."
            ) from None

    def _too_large(self) -> TooLarge:
        return TooLarge(f"The request is larger than {self._most} bytes.", hint="Send less at a time.")


class Origins:
    """Keeps pages of other sites from calling a server on the reader's own machine.

    A request that changes something and names another origin is refused, and, where the server listens on this machine
    only, every request that calls it by another name (so that no foreign name can be pointed at it).
    """

    def __init__(self, app: ASGIApp, *, host: str, allowed: Sequence[str], names: Sequence[str] = ()) -> None:
        """`allowed` are the origins, besides the server's own, that may call; `names` its names besides localhost."""
        self._app, self._local, self._allowed = app, is_loopback(host), frozenset(allowed)
        self._names = frozenset(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] in ("http", "websocket"):
            error = self._refusal(scope)
            if error is not None and scope["type"] == "http":
                await respond(error)(scope, receive, send)
                return
            if error is not None:
                await receive()
                await send({"type": "websocket.close", "code": 1008, "reason": "another origin"})
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> LiveweightError | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        name = urlsplit(f"//{host}").hostname if _is_host(host) else None
        if self._local and (name is None or not (is_loopback(name) or name in self._names)):
            return Forbidden(
                f"This server is not called {host!r:.100}.",
                hint="Call it 127.0.0.1 or localhost, or add the name to the setting server.names.",
            )
        origin = headers.get(b"origin")
        if origin is None or origin in self._allowed or _place(origin) == host:
            return None
        if scope["type"] == "http" and scope["method"] in _SAFE:
            return None  # without CORS headers its script cannot read the answer
        return Forbidden(f"Pages of {origin!r:.100} may not call this server.", hint="See the setting server.origins.")


def _place(origin: str) -> str:
    """Host and port of an origin; nothing where it is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _is_host(host: str) -> bool:
    try:
        return bool(urlsplit(f"//{host}").hostname)
    except ValueError:
        return False


class PatientProtocol(H11Protocol):
    """HTTP connections that are closed when a request's head does not arrive within some seconds."""

    seconds = 15.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """Begin to wait for a head."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Read some bytes, and stop or go on waiting."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._deadline is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._deadline = self.loop.call_later(self.seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        # A websocket's connection has been handed on to another protocol, which knows when it is over.
        mine = self.transport.get_protocol() is self
        if mine and not self.transport.is_closing():
            self.transport.close()
