"""What OpenAI's routes are made of, piece by piece: spelling, log-probabilities, chunks, errors, the description."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import jsonschema_rs
import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from liveweight.engines.base import Token, Version
from liveweight.engines.chat_format import ChatFormat
from liveweight.errors import (
    GenerationCancelled,
    InvalidInput,
    LedgerUnavailable,
    LiveweightError,
    ModelNotFound,
    QueueFull,
    Unauthorized,
)
from liveweight.server import openai_api
from liveweight.server.openai_bodies import ChatBody, CompletionBody
from liveweight.server.openai_errors import answer_to
from liveweight.server.openai_logprobs import Spelling, Trail, chat_logprobs, completion_logprobs
from liveweight.server.openai_models import ErrorBody
from liveweight.server.openai_requests import ChatRequest, CompletionRequest

VERSION = Version(3, "0123456789abcdef")
END = 0


def spelling(vocabulary: list[str], decoder: Any) -> Spelling:
    """Of a tokenizer with these tokens behind its end token."""
    tokenizer = Tokenizer(models.WordLevel({"<end>": END} | {word: 1 + i for i, word in enumerate(vocabulary)}))
    tokenizer.decoder = decoder
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    return Spelling(ChatFormat(wrapped, cast(Any, SimpleNamespace(generation_config=None))))


# The three bytes of the euro sign as byte-level tokens have them, and a word with its space.
EURO = spelling(["â", "Ĥ", "¬", "Ġcat", "s"], decoders.ByteLevel())


def token(number: int, text: str, finish: Any = "", version: Version = VERSION) -> Token:
    return Token(number, text, -0.5, version, finish, {}, ((number, -0.5), (5, float("-inf"))))


def test_byte_level_tokens_are_spelt_as_bytes_and_broken_characters_as_escapes() -> None:
    assert EURO.of(1) == ("\\xe2", b"\xe2")
    assert b"".join(EURO.of(number)[1] for number in (1, 2, 3)).decode() == "€"
    assert EURO.of(4) == (" cat", b" cat")
    assert EURO.of(END) == ("<end>", b"<end>")
    assert EURO.said(END) == b""
    assert EURO.of(99) == ("", b"")


def test_tokens_of_sentence_pieces_are_spelt_with_their_space_and_single_bytes() -> None:
    steps = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces = spelling(["▁cat", "<0xE2>", "é"], steps)
    assert [pieces.of(number)[1] for number in (1, 2, 3)] == [b" cat", b"\xe2", "é".encode()]


def test_log_probabilities_wait_until_their_character_is_whole() -> None:
    trail = Trail(EURO)
    assert trail.take(token(1, "")) == []
    assert trail.take(token(2, "")) == []
    told = trail.take(token(3, "€"))
    assert [each.token.id for each in told] == [1, 2, 3]
    told += trail.take(token(4, " cat"))
    assert trail.take(token(END, "", "stop")) == []
    assert completion_logprobs(told, 0, EURO)["text_offset"] == [0, 0, 0, 1]


def test_what_a_stop_word_cut_off_is_not_told() -> None:
    trail = Trail(EURO)
    assert [each.token.id for each in trail.take(token(4, " "))] == [4]  # "cat" may begin a stop word
    assert trail.take(token(5, "", "stop")) == []
    whole = Trail(EURO)
    assert whole.take(token(4, "")) == []
    assert [each.token.id for each in whole.take(token(5, " cats", "length"))] == [4, 5]


def test_a_token_that_cannot_come_has_a_log_probability_that_json_can_write() -> None:
    told = Trail(EURO).take(token(4, " cat"))
    entry = chat_logprobs(told, 2, EURO)["content"][0]
    assert [other["logprob"] for other in entry["top_logprobs"]] == [-0.5, -9999.0]
    assert completion_logprobs(told, 2, EURO)["top_logprobs"] == [{" cat": -0.5, "s": -9999.0}]


@pytest.mark.parametrize("likeliest", [None, 1])
@pytest.mark.parametrize("kind", [ChatBody, CompletionBody])
def test_chunks_written_from_prepared_pieces_are_json_whatever_the_text_is(kind: Any, likeliest: int | None) -> None:
    body = kind(["a"], 'a "model"\n', EURO, likeliest=likeliest, usage_in_stream=True, remembered=True)
    text = 'say "€"\n\\ \ud800'
    chunks = [json.loads(part[6:]) for part in body.chunk(0, token(4, text)).decode().split("\n\n")[:-1]]
    choice = chunks[-1]["choices"][0]
    assert (choice["delta"]["content"] if kind is ChatBody else choice["text"]) == text
    assert chunks[-1]["model"] == 'a "model"\n'
    assert chunks[-1]["usage"] is None
    assert chunks[-1]["system_fingerprint"] == str(VERSION)
    assert (choice["logprobs"] is None) == (likeliest is None)


def test_a_token_of_another_version_has_that_version_on_its_chunk() -> None:
    body = ChatBody(["a"], "m", EURO, likeliest=None, usage_in_stream=False, remembered=True)
    later = Version(4, "fedcba9876543210")
    body.chunk(0, token(4, " cat"))
    assert json.loads(body.chunk(0, token(5, "s", version=later))[6:])["system_fingerprint"] == str(later)
    body.chunk(0, token(5, "s"))
    body.chunk(0, token(END, "", "stop", version=later))
    last = json.loads(body.over(0, "r1", 5, last=True).split(b"\n\n")[0][6:])
    assert last["liveweight"]["versions"] == [str(VERSION), str(later)]
    assert last["system_fingerprint"] == str(later)


def test_a_reply_that_was_stopped_by_somebody_else_is_no_whole_answer() -> None:
    body = ChatBody(["a"], "m", EURO, likeliest=None, usage_in_stream=False, remembered=True)
    body.collect(0, token(4, " cat"))
    with pytest.raises(GenerationCancelled):
        body.complete(0, "r1")


# -------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (InvalidInput("No."), 400, "invalid_request_error", "invalid_input"),
        (InvalidInput("Long.", tokens=9, context=8), 400, "invalid_request_error", "context_length_exceeded"),
        (Unauthorized("Who?"), 401, "authentication_error", "unauthorized"),
        (ModelNotFound("No."), 404, "invalid_request_error", "model_not_found"),
        (QueueFull("Full."), 429, "rate_limit_error", "queue_full"),
        (LedgerUnavailable("Gone."), 503, "server_error", "ledger_unavailable"),
        (LiveweightError("Hm."), 500, "server_error", "liveweight_error"),
        (HTTPException(404), 404, "invalid_request_error", "not_found"),
        (HTTPException(418), 418, "invalid_request_error", None),
        (KeyError("secret"), 500, "server_error", "internal_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_every_exception_has_its_status_and_type(error: Exception, status: int, kind: str, code: str | None) -> None:
    found, body, _ = answer_to(error)
    detail = ErrorBody.model_validate(body).error
    assert (found, detail.type, detail.code) == (status, kind, code)
    assert "secret" not in json.dumps(body)


def test_an_error_says_its_way_out_its_details_and_when_to_come_back() -> None:
    _, body, headers = answer_to(QueueFull("Full.", hint="Wait.", retry_after=2.3, where={1, 2}, who=object))
    assert headers == {"retry-after": "3"}
    assert body["error"]["message"] == "Full. Wait."
    assert body["error"]["hint"] == "Wait."
    assert body["error"]["details"]["retry_after"] == 2.3
    json.dumps(body)
    assert answer_to(Unauthorized("Who?"))[2] == {"www-authenticate": "Bearer"}
    assert answer_to(HTTPException(405, headers={"allow": "GET"}))[2] == {"allow": "GET"}


def test_a_mistake_is_named_where_fastapi_found_it() -> None:
    error = RequestValidationError([{"type": "int_parsing", "loc": ("query", "limit"), "msg": "Not a number"}])
    status, body, _ = answer_to(error)
    assert (status, body["error"]["param"], body["error"]["code"]) == (400, "limit", "invalid_value")
    broken = RequestValidationError([{"type": "json_invalid", "loc": ("body", 3), "msg": "x", "ctx": {"error": "y"}}])
    assert answer_to(broken)[1]["error"]["message"] == "The body is not JSON: y."


# --------------------------------------------------------------------------------------------------- description


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    app = FastAPI()
    app.include_router(openai_api.router)
    return app.openapi()


ROUTES = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}


def described(document: dict[str, Any], path: str) -> dict[str, Any]:
    """The schema of a route's body."""
    found: dict[str, Any] = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return found


def test_every_route_tells_what_it_is_for_and_every_status(document: dict[str, Any]) -> None:
    common = {"200", "400", "401", "403", "408", "413", "429", "500", "503"}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["description"]
            more = {"404", "415"} if path in ROUTES else {"404"} if "{" in path else set()
            assert set(operation["responses"]) == common | more
            for answer in operation["responses"].values():
                assert answer["description"] and answer["content"]


BASE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"model": "m", "prompt": "x"},
}
ONE_FIELD: list[dict[str, Any]] = [
    {name: value}
    for name, values in {
        "temperature": (0, 2, 2.1, -1, "1", True, None, []),
        "top_p": (0, 1, 1.1, None),
        "n": (1, 8, 9, 0, 1.0, 1.5, True, "1"),
        "seed": (-(2**63), 2**63 - 1, 2**64, -(10**100), 0.5),
        "max_tokens": (1, 0, 2**31 - 1, 2**31, 3.0),
        "stop": ("a", "", [], ["a"] * 4, ["a"] * 5, [1], 1, {}),
        "stream": (True, 0, "true", None),
        "stream_options": ({}, {"include_usage": True}, {"include_usage": "x"}, [], {"more": 1}),
        "logprobs": (True, False, 0, 5, 6, "x", 2.0),
        "top_logprobs": (0, 1, 21, None),
        "frequency_penalty": (0, 0.0, 1, None),
        "logit_bias": ({}, {"1": 1}, None, []),
        "tools": ([], [{}], None, {}),
        "tool_choice": ("none", "auto", None, {}),
        "response_format": ({"type": "text"}, {"type": "json_object"}, {}, None),
        "modalities": (["text"], ["audio"], [], None),
        "audio": (None, {}),
        "echo": (False, True, 0, None),
        "suffix": ("", "x", None),
        "prompt": ("", [], ["a"], [1], [[1]], [[]], [-1], [1, "a"], ["a", 1], [[1], "a"], 5, None, [1.0]),
        "messages": ([], [{}], "x", [{"role": "user", "content": []}], [{"role": "nobody", "content": "x"}]),
        "model": ("", None, 5),
        "whatever": (1, None, {"x": []}),
    }.items()
    for value in values
] + [{"logprobs": True, "top_logprobs": 3}, {"logprobs": False, "top_logprobs": 3}, {"top_logprobs": 3}]
ONE_FIELD += [{"best_of": 1}, {"best_of": 2}, {"best_of": 2, "n": 2}, {"best_of": 1, "n": None}, {"best_of": 3, "n": 2}]


@pytest.mark.parametrize("more", ONE_FIELD, ids=lambda more: json.dumps(more)[:60])
@pytest.mark.parametrize("path", ROUTES)
def test_the_schema_accepts_exactly_what_the_route_accepts(
    document: dict[str, Any], path: str, more: dict[str, Any]
) -> None:
    body = BASE[path] | more
    try:
        ROUTES[path].model_validate_json(json.dumps(body))
        accepted = True
    except ValidationError:
        accepted = False
    assert jsonschema_rs.is_valid(described(document, path), body) is accepted


@pytest.mark.parametrize("path", ROUTES)
def test_the_examples_are_requests(document: dict[str, Any], path: str) -> None:
    schema = described(document, path)
    assert schema["examples"]
    for example in schema["examples"]:
        ROUTES[path].model_validate_json(json.dumps(example))


def test_a_tiny_temperature_is_none_at_all_and_seeds_stay_within_bounds() -> None:
    request = ChatRequest.model_validate(BASE["/v1/chat/completions"] | {"temperature": 1e-30, "seed": 2**63 - 1})
    assert request.sampling(0)["temperature"] == 0.0
    assert [request.sampling(choice)["seed"] for choice in (0, 1)] == [2**63 - 1, -(2**63)]
