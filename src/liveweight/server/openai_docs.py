"""How OpenAPI tells of OpenAI's routes: bodies, answers, and an example of each.

Owns these descriptions. The bodies are described here, not by the routes' signatures, because a route reads its body
itself: after it has seen the key, and in one step from bytes to the request.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from liveweight.server.openai_errors import body
from liveweight.server.openai_models import ErrorBody
from liveweight.server.openai_requests import ChatRequest, CompletionRequest

Responses = dict[int | str, dict[str, Any]]

_MEANT: dict[int, tuple[str, dict[str, Any]]] = {
    400: (
        "The request cannot be used; `param` names what is wrong.",
        body(
            400,
            "Unsupported value for 'tools'.",
            hint="This model calls no tools.",
            param="tools",
            code="unsupported_value",
        ),
    ),
    401: (
        "No key was sent, or an unknown one.",
        body(401, "No key was sent.", hint="Send `Authorization: Bearer KEY`.", code="unauthorized"),
    ),
    403: ("This key may not do that, or a page of another origin called.", body(403, "Forbidden.", code="forbidden")),
    404: (
        "There is no such thing here, or another model is served.",
        body(404, "The model 'gpt-5' is not served here.", code="model_not_found"),
    ),
    408: ("The request did not arrive in time.", body(408, "The request took too long.", code="request_timeout")),
    409: (
        "The model, the change or the key is not in a state for that.",
        body(409, "c3 is off already.", code="state_conflict"),
    ),
    413: ("The request is too large.", body(413, "The request is too large.", code="too_large")),
    415: ("The body is not JSON.", body(415, "The body must be JSON.", code="unsupported_media_type")),
    429: ("Too much is waiting, or this key asks too often.", body(429, "Try again later.", code="queue_full")),
    500: ("Something that nobody foresaw.", body(500, "The server failed at this request.", code="internal_error")),
    501: ("This model cannot do that.", body(501, "This model cannot do that.", code="unsupported")),
    507: ("The disk is full.", body(507, "The ledger cannot grow.", code="no_space")),
    503: (
        "The ledger cannot be reached, or the server is stopping.",
        body(503, "The ledger cannot be reached.", code="ledger_unavailable"),
    ),
}
_WAIT = {
    "retry-after": {"description": "After how many seconds to try again.", "schema": {"type": "integer", "minimum": 1}}
}


def refusals(*more: int) -> Responses:
    """What any route may answer instead of what was asked for, and some more statuses."""
    found: Responses = {}
    for status in sorted({400, 401, 403, 408, 413, 429, 500, 503, *more}):
        meant, example = _MEANT[status]
        found[status] = {
            "model": ErrorBody,
            "description": meant,
            "content": {"application/json": {"example": example}},
        }
    found[429]["headers"] = _WAIT
    return found


def _event(choice: str, more: str = "") -> str:
    return (
        'data: {"id":"chatcmpl-5f3759df5f3759df5f3759df","object":"chat.completion.chunk","created":1767225600,'
        f'"model":"smollm2","system_fingerprint":"v3:0123456789ab","choices":[{choice}]{more}}}\n\n'
    )


_STREAM = (
    _event('{"index":0,"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null}')
    + _event('{"index":0,"delta":{"content":"Hanoi"},"logprobs":null,"finish_reason":null}')
    + _event(
        '{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}',
        ',"liveweight":{"reply":"r12","versions":["v3:0123456789ab"],"spans_versions":false,"choices":[]}',
    )
    + "data: [DONE]\n\n"
)


_DATA = "A chunk as JSON, an error's body where the answer breaks off, or `[DONE]` behind the last chunk."


def answers(told: str) -> Responses:
    """What a route that generates may answer: as a whole, as a stream, or not at all."""
    # As FastAPI describes events: `itemSchema` is OpenAPI 3.2's.
    event = {"type": "object", "properties": {"data": {"type": "string", "description": _DATA}}, "required": ["data"]}
    content = {"text/event-stream": {"itemSchema": event, "example": _STREAM}}
    return {200: {"description": f"{told} With `stream`, its chunks.", "content": content}, **refusals(404, 415)}


def takes(request: type[BaseModel]) -> dict[str, Any]:
    """A route's body, for `openapi_extra`."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(request)}}}}


def _inlined(model: type[BaseModel]) -> dict[str, Any]:
    """A model's schema with what it refers to in place: FastAPI collects only what signatures name."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return [whole(part) for part in value]
        if not isinstance(value, dict):
            return value
        named = value.get("$ref")
        found = {name: whole(part) for name, part in value.items() if name != "$ref"}
        return found if named is None else whole(parts[named.rpartition("/")[2]]) | found

    inlined: dict[str, Any] = whole(schema)
    return inlined


# Described here too, because FastAPI would promise an answer to a bad one that is never given.
MODEL_ID: dict[str, Any] = {
    "parameters": [
        {
            "name": "id",
            "in": "path",
            "required": True,
            "description": "The model's name.",
            "schema": {"type": "string", "minLength": 1, "examples": ["smollm2"]},
        }
    ]
}
CHAT_BODY = takes(ChatRequest)
COMPLETION_BODY = takes(CompletionRequest)
