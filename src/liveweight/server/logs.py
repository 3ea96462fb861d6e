"""What is written down of each request: its id, its route, how it ended, never what was said.

Owns the request ids, the middleware that measures answers, and the form of the log's lines (one JSON object each).
Knows nothing of what a route does.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
import uuid
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from liveweight.server.errors import respond
from liveweight.server.metrics import Metrics

_SAFE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_log = logging.getLogger("liveweight.server")
_FIELDS = ("request", "method", "route", "status", "milliseconds", "author", "client")


class Requests:
    """Gives each request an id, and counts and logs how it was answered."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        """Count with `metrics`."""
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, and look at its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        id = given if _SAFE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}".encode()
        scope.setdefault("state", {})["id"] = id.decode()
        began = time.perf_counter()
        status, first, begun = 500, None, False

        async def answered(message: Message) -> None:
            nonlocal status, first, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id)]
            elif first is None and message.get("body"):
                first = time.perf_counter() - began
            await send(message)

        try:
            await self._app(scope, receive, answered)
        except Exception as error:
            # Answered here and not by the framework, which would raise it again and so cut the connection.
            _log.error("unexpected error", exc_info=error, extra={"request": id.decode()})
            if begun:
                raise
            await respond(error)(scope, receive, answered)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", None) or "other"
            self._metrics.answered(scope["method"], route, status, seconds, first)
            author = scope["state"].get("author")
            _log.info(
                "answered",
                extra={
                    "request": id.decode(),
                    "method": scope["method"],
                    "route": route,
                    "status": status,
                    "milliseconds": round(1000 * seconds, 1),
                    "author": "" if author is None else author.name,
                    "client": (scope.get("client") or ("",))[0],
                },
            )


class JsonLines(logging.Formatter):
    """One JSON object a line. What people and the model say is left out, unless asked for."""

    def __init__(self, *, prompts: bool) -> None:
        """`prompts`: write what errors say of the values they met, and what the service tells of prompts."""
        super().__init__()
        self._prompts = prompts

    def format(self, record: logging.LogRecord) -> str:
        """A record as its line."""
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        told |= {name: value for name in _FIELDS if (value := getattr(record, name, None)) is not None}
        if self._prompts and hasattr(record, "said"):
            told["said"] = record.said
        if record.exc_info and record.exc_info[0] is not None:
            told["error"] = record.exc_info[0].__name__
            # An exception's own words may quote a prompt; where it came from does not.
            told["trace"] = (
                self.formatException(record.exc_info)
                if self._prompts
                else "".join(traceback.format_tb(record.exc_info[2]))
            )
        return json.dumps(told, ensure_ascii=False, default=str)


def log_to_stderr(*, prompts: bool, level: int = logging.INFO) -> None:
    """Write what the server and its libraries log to stderr, a line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(prompts=prompts))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("liveweight").setLevel(level)
