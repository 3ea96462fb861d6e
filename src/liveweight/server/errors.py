"""Errors as answers: one shape for every route.

Owns how an exception becomes a status, a body and headers; the body is OpenAI's, with our code, hint and details beside
it. What nobody foresaw is a 500 that says nothing of its inside; `logs.Requests` answers it so, and logs it with the
request's id.
"""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from liveweight.errors import LiveweightError
from liveweight.server.openai_errors import answer_to


def respond(error: Exception) -> JSONResponse:
    """The answer to an error."""
    status, body, headers = answer_to(error)
    return JSONResponse(body, status, headers)


def handle_errors(app: FastAPI) -> None:
    """Let an application answer errors so."""

    def known(request: Request, error: Exception) -> JSONResponse:
        return respond(error)

    for kind in (LiveweightError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, known)
