"""Any exception as the answer that OpenAI's clients understand.

Owns the form of an error's body, its type by its status, and how a mistake in a request is told: the parameter's name
as OpenAI writes it and one sentence. Knows nothing of routes and of who raises what.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from liveweight.errors import GenerationCancelled, InvalidInput, LiveweightError
from liveweight.ledger.records import plain

Answer = tuple[int, dict[str, Any], dict[str, str]]  # status, body, headers

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {404: "not_found", 405: "method_not_allowed", 415: "unsupported_media_type"}
_PLACES = ("body", "query", "path", "header", "cookie")  # where FastAPI says that a parameter was

# Parameters that are known and refused: what there is to say besides "invalid".
_REFUSED = {
    "tools": "This model calls no tools.",
    "tool_choice": "This model calls no tools.",
    "tool_calls": "This model calls no tools.",
    "functions": "This model calls no functions.",
    "function_call": "This model calls no functions.",
    "response_format": "This model answers in plain text only.",
    "modalities": "This model answers in plain text only.",
    "audio": "This model answers in plain text only.",
    "web_search_options": "This model searches nothing.",
    "logit_bias": "Single tokens cannot be favoured here.",
    "frequency_penalty": "Repetition is not penalised here, so only 0 is accepted.",
    "presence_penalty": "Repetition is not penalised here, so only 0 is accepted.",
    "echo": "The prompt is not repeated here.",
    "suffix": "Text is continued here, not filled in.",
    "best_of": "Answers are not ranked here.",
}


def answer_to(error: BaseException) -> Answer:
    """The status, the body and the headers that answer an exception.

    The body is OpenAI's `{"error": {"message", "type", "param", "code"}}`, with the hint and the details of our own
    errors in it. What nobody foresaw is a 500 that says nothing of its inside.
    """
    if isinstance(error, LiveweightError):
        return _of_ours(error)
    if isinstance(error, RequestValidationError):
        return _of_mistakes(error.errors())
    if isinstance(error, HTTPException):
        told = body(error.status_code, str(error.detail), code=_CODES.get(error.status_code))
        return error.status_code, told, dict(error.headers or {})
    if isinstance(error, ClientDisconnect):
        return _of_ours(GenerationCancelled("The client went away."))
    return 500, body(500, "The server failed at this request.", hint="Its log says more.", code="internal_error"), {}


def body(
    status: int,
    message: str,
    *,
    hint: str = "",
    param: str | None = None,
    code: str | None = None,
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """An error's body."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    told = {"message": f"{message} {hint}".strip(), "type": kind, "param": param, "code": code}
    return {"error": told | {"hint": hint, "details": dict(details or {})}}


def _of_ours(error: LiveweightError) -> Answer:
    status, code, details = error.http_status, error.code, dict(error.details)
    headers = {}
    if isinstance(error, InvalidInput) and {"tokens", "context"} <= details.keys():
        code = "context_length_exceeded"
    if "retry_after" in details:
        headers["retry-after"] = str(max(1, math.ceil(details["retry_after"])))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    param = details.pop("param", None)
    told = {name: _json(value) for name, value in details.items()}
    return status, body(status, error.message, hint=error.hint, param=param, code=code, details=told), headers


def _json(value: Any) -> Any:
    try:
        return plain(value)
    except InvalidInput:
        return str(value)


def _of_mistakes(errors: Sequence[Any]) -> Answer:
    """The first mistake in a request, as pydantic found it."""
    first = errors[0]
    path = list(first["loc"])
    if path and path[0] in _PLACES:
        path = path[1:]
    kind, said = str(first["type"]), str(first["msg"])
    if kind == "json_invalid":
        # Where the text breaks off is part of what pydantic says; FastAPI puts it into the path.
        why = first.get("ctx", {}).get("error", said)
        return 400, body(400, f"The body is not JSON: {why}.", code="invalid_json"), {}
    param = _written(path)
    shown = f"'{param}'" if param else "the body"
    refused = next((_REFUSED[part] for part in reversed(path) if part in _REFUSED), "")
    if "content" in path and path[-1] == "type":
        refused = "This model reads text only."
    if kind == "missing":
        message, code = f"Missing required parameter: {shown}.", "missing_required_parameter"
    elif refused:
        message, code = f"Unsupported value for {shown}.", "unsupported_value"
    else:
        message = f"Invalid value for {shown}: {said}."
        code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return 400, body(400, message, hint=refused if code == "unsupported_value" else "", param=param, code=code), {}


def _written(path: Sequence[str | int]) -> str | None:
    """`messages[0].content`; which form of a union was meant is left out."""
    name = ""
    for part in path:
        if isinstance(part, int):
            name += f"[{part}]"
        elif not part.startswith("("):
            name += f".{part}" if name else part
    return name or None
