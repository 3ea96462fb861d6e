"""OpenAI's routes with OpenAI's own client, against a real server around a tiny model."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from liveweight.adjustments import Active, Adjustment, ScaleNeurons
from liveweight.engines.base import Message
from liveweight.engines.batching import Batcher, TokenStream
from liveweight.engines.generation import Generation
from liveweight.server.openai_models import ChatCompletion, Completion, ErrorBody
from tests.server.serving import Served, serving
from tests.tiny_workspace import OTHER, QUESTION

CHAT: list[Any] = [{"role": "user", "content": QUESTION}]
LONG = 900  # tokens, more than any test waits for


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("server"), rows=4, waiting=8) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{served.url}/v1", timeout=60) as found:
        yield found


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch, served: Served) -> None:
    """Let no reply end by itself."""
    monkeypatch.setattr(served.service.live.engine.format, "end_tokens", frozenset())


def spoken(served: Served, question: str = QUESTION, **sampling: Any) -> str:
    """What the engine says when it is asked without a server."""
    engine = served.service.live.engine
    tokens = engine.generate([Message("user", question)], served.service.live.sampling(**sampling))
    return "".join(token.text for token in tokens)


def chat_body(served: Served, **more: Any) -> dict[str, Any]:
    return {"model": served.model, "messages": CHAT} | more


def events(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream, which is framed exactly so."""
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(part.startswith("data: {") and "\n" not in part for part in parts[:-2])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def extension(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer.model_extra["liveweight"]
    return found


# ------------------------------------------------------------------------------------------------------- chats


def test_an_answer_is_what_the_engine_says_and_is_remembered_under_its_id(
    served: Served, client: openai.OpenAI
) -> None:
    answer = client.chat.completions.create(model=served.model, messages=CHAT)
    assert answer.choices[0].message.content == spoken(served)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.id.startswith("chatcmpl-") and len(answer.id) == len("chatcmpl-") + 24
    assert answer.system_fingerprint == str(served.service.live.engine.version)
    reply = served.service.live.reply(answer.id)
    assert reply.text == spoken(served).strip()
    assert extension(answer) == {
        "reply": reply.label,
        "versions": [answer.system_fingerprint],
        "spans_versions": False,
        "choices": [
            {
                "index": 0,
                "id": answer.id,
                "reply": reply.label,
                "versions": [answer.system_fingerprint],
                "spans_versions": False,
            }
        ],
    }
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(reply.prompt_token_ids)
    assert answer.usage.completion_tokens == len(reply.tokens) == 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6


def test_the_settings_say_what_a_request_leaves_out_and_null_leaves_it_out_too(served: Served) -> None:
    body = chat_body(served, max_tokens=None, temperature=None, n=None, stream=None, stop=None, seed=None, tools=None)
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body).json()
    ChatCompletion.model_validate(answer)
    assert answer["usage"]["completion_tokens"] == served.service.settings.generation.max_tokens
    assert answer["choices"][0]["message"]["content"] == spoken(served)


def test_a_reply_that_ends_by_itself_says_stop_and_its_end_is_not_counted(
    served: Served, client: openai.OpenAI
) -> None:
    answer = client.chat.completions.create(model=served.model, messages=CHAT, max_tokens=LONG)
    reply = served.service.live.reply(answer.id)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(reply.tokens) - 1
    assert reply.tokens[-1] in served.service.live.engine.format.end_tokens


def test_a_stream_brings_the_same_answer_piece_by_piece(served: Served, client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=served.model, messages=CHAT, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == spoken(served)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.system_fingerprint for chunk in chunks} == {str(served.service.live.engine.version)}
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    assert extension(chunks[-1])["reply"] == served.service.live.reply(chunks[0].id).label
    assert all("liveweight" not in (chunk.model_extra or {}) for chunk in chunks[:-1])


def test_a_stream_ends_with_the_usage_where_that_is_asked_for(served: Served, http: httpx.Client) -> None:
    body = chat_body(served, stream=True, stream_options={"include_usage": True})
    chunks = events(http.post("/chat/completions", json=body).text)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {"prompt_tokens": 12, "completion_tokens": 6, "total_tokens": 18}
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks[:-1])
    assert chunks[-1]["liveweight"]["reply"].startswith("r")
    without = events(http.post("/chat/completions", json=chat_body(served, stream=True)).text)
    assert all("usage" not in chunk for chunk in without)


def test_a_stream_says_that_it_is_one_and_that_nobody_may_collect_it(served: Served, http: httpx.Client) -> None:
    answer = http.post("/chat/completions", json=chat_body(served, stream=True))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert "content-length" not in answer.headers
    whole = http.post("/chat/completions", json=chat_body(served))
    assert whole.headers["content-type"] == "application/json"
    assert int(whole.headers["content-length"]) == len(whole.content)


def test_many_async_clients_get_the_same_answers_at_once(served: Served) -> None:
    async def ask(client: openai.AsyncOpenAI, streamed: bool) -> str:
        if not streamed:
            answer = await client.chat.completions.create(model=served.model, messages=CHAT)
            return answer.choices[0].message.content or ""
        stream = await client.chat.completions.create(model=served.model, messages=CHAT, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def everybody() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, bool(number % 2)) for number in range(10)))

    assert set(asyncio.run(everybody())) == {spoken(served)}


def test_each_of_several_choices_is_a_reply_of_its_own(served: Served, client: openai.OpenAI) -> None:
    how: dict[str, Any] = {"temperature": 1.0, "seed": 7}
    answer = client.chat.completions.create(model=served.model, messages=CHAT, n=3, **how)
    said = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(said)) == 3
    told = extension(answer)["choices"]
    assert told[0]["id"] == answer.id
    replies = [served.service.live.reply(each["id"]) for each in told]
    assert [reply.label for reply in replies] == [each["reply"] for each in told]
    assert [reply.text for reply in replies] == [(text or "").strip() for text in said]
    assert [reply.sampling["seed"] for reply in replies] == [7, 8, 9]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 12
    assert answer.usage.completion_tokens == sum(len(text or "") for text in said)
    alone = client.chat.completions.create(model=served.model, messages=CHAT, temperature=1.0, seed=8)
    assert alone.choices[0].message.content == said[1]

    streamed = ["", "", ""]
    ends: dict[int, str | None] = {}
    for chunk in client.chat.completions.create(model=served.model, messages=CHAT, n=3, stream=True, **how):
        for choice in chunk.choices:
            assert choice.index not in ends
            streamed[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert streamed == said
    assert sorted(ends) == [0, 1, 2]


@pytest.mark.parametrize("stop", ["w", ["zz", "w"], "wr", ["", "w"]])
def test_an_answer_ends_before_a_stop_word(served: Served, client: openai.OpenAI, stop: Any) -> None:
    assert spoken(served).startswith("8%wr")
    answer = client.chat.completions.create(model=served.model, messages=CHAT, stop=stop)
    assert answer.choices[0].message.content == "8%"
    assert answer.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(model=served.model, messages=CHAT, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "8%"


def test_the_newer_name_of_the_limit_goes_first(served: Served, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=served.model, messages=CHAT, max_tokens=5, max_completion_tokens=2)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2


def test_log_probabilities_come_with_tokens_and_bytes_the_same_in_a_stream(
    served: Served, client: openai.OpenAI
) -> None:
    how: dict[str, Any] = {"model": served.model, "messages": CHAT, "logprobs": True, "top_logprobs": 3}
    answer = client.chat.completions.create(**how)
    found = answer.choices[0].logprobs
    assert found is not None and found.content is not None
    assert "".join(entry.token for entry in found.content) == answer.choices[0].message.content
    assert all(entry.bytes == list(entry.token.encode()) for entry in found.content)
    for entry in found.content:
        likely = [other.logprob for other in entry.top_logprobs]
        assert len(likely) == 3 and likely == sorted(likely, reverse=True)
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert entry.top_logprobs[0].logprob == entry.logprob
    streamed: list[Any] = []
    for chunk in client.chat.completions.create(stream=True, **how):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content or []
    assert streamed == found.content
    none = client.chat.completions.create(model=served.model, messages=CHAT)
    assert none.choices[0].logprobs is None


def test_log_probabilities_end_where_a_stop_word_cut_the_text(served: Served, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=served.model, messages=CHAT, logprobs=True, stop="wr")
    found = answer.choices[0].logprobs
    assert found is not None and found.content is not None
    assert [entry.token for entry in found.content] == ["8", "%"]
    assert found.content[0].top_logprobs == []


def test_developers_and_text_parts_are_read_as_systems_and_texts(served: Served, client: openai.OpenAI) -> None:
    parts: list[Any] = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "what is"}, {"type": "text", "text": "zed?"}]},
    ]
    answer = client.chat.completions.create(model=served.model, messages=parts)
    turns = served.service.live.reply(answer.id).messages
    assert [(turn.role, turn.content) for turn in turns] == [("system", "be kind"), ("user", "what is\nzed?")]


def test_unknown_fields_are_ignored(served: Served, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=served.model,
        messages=CHAT,
        user="somebody",
        metadata={"a": "b"},
        store=False,
        extra_body={"no_such_field": [1], "tool_choice": "none", "tools": [], "logit_bias": {}},
    )
    assert answer.choices[0].message.content == spoken(served)


@pytest.mark.usefixtures("endless")
def test_a_reply_that_spans_a_change_says_so_and_names_the_last_version(served: Served, client: openai.OpenAI) -> None:
    engine = served.service.live.engine
    before = engine.state
    first = str(engine.version)
    scaled = Adjustment(name="x", method="x", ops=(ScaleNeurons(layer=0, neurons=(1,), factors=(0.0,)),))
    stream = client.chat.completions.create(model=served.model, messages=CHAT, max_tokens=LONG, stream=True)
    chunks = [next(stream)]
    try:
        second = str(engine.become((*before, Active(scaled, 1.0))))
        chunks += list(stream)
    finally:
        engine.become(before)
    assert first != second
    told = extension(chunks[-1])
    assert told["versions"] == [first, second]
    assert told["spans_versions"] is True
    assert chunks[0].system_fingerprint == first
    assert chunks[-1].system_fingerprint == second
    marks = [chunk.system_fingerprint for chunk in chunks]
    assert marks == sorted(marks, key=[first, second].index)
    assert served.service.live.reply(chunks[0].id).versions == (first, second)


# --------------------------------------------------------------------------------------------------- completions


def test_a_text_is_continued_in_every_form_and_not_remembered(served: Served, client: openai.OpenAI) -> None:
    engine = served.service.live.engine
    ids = engine.format.encode_text("the cat", special=True)
    wanted = "".join(token.text for token in engine.continue_from(ids, served.service.live.sampling()))
    count = len(served.service.live.replies())
    prompts: list[Any] = ["the cat", ids, ["the cat", "who"], [ids, ids]]
    for prompt in prompts:
        answer = client.completions.create(model=served.model, prompt=prompt)
        assert answer.choices[0].text == wanted
        assert answer.id.startswith("cmpl-")
        assert extension(answer)["reply"] is None
    assert len(answer.choices) == 2
    assert answer.choices[1].text == wanted
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2 * len(ids)
    stream = client.completions.create(model=served.model, prompt="the cat", stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == wanted
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len(served.service.live.replies()) == count


def test_choices_of_a_prompt_lie_side_by_side_and_a_prompt_is_counted_once(
    served: Served, client: openai.OpenAI
) -> None:
    how: dict[str, Any] = {"model": served.model, "temperature": 1.0, "seed": 3, "max_tokens": 4}
    answer = client.completions.create(prompt=["the cat", "who"], n=2, best_of=2, **how)
    first = client.completions.create(prompt="the cat", n=2, **how)
    other = client.completions.create(prompt="who", n=2, **how)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [choice.text for choice in (*first.choices, *other.choices)]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("the cat") + len("who")
    Completion.model_validate(answer.model_dump(exclude_unset=True))


def test_log_probabilities_of_a_text_are_lists_with_the_chosen_token_among_the_likely(
    served: Served, client: openai.OpenAI
) -> None:
    how: dict[str, Any] = {"model": served.model, "prompt": "the cat", "temperature": 2.0, "seed": 5, "logprobs": 2}
    choice = client.completions.create(**how).choices[0]
    found = choice.logprobs
    assert found is not None and found.tokens is not None and found.top_logprobs is not None
    assert found.token_logprobs is not None and found.text_offset is not None
    for token, logprob, top, offset in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset, strict=True
    ):
        assert token == "<pad>" or choice.text[offset] == token
        assert top[token] == logprob
        assert 2 <= len(top) <= 3
    plain = client.completions.create(**(how | {"logprobs": 0})).choices[0].logprobs
    assert plain is not None and plain.tokens == found.tokens
    assert plain.top_logprobs is None


# -------------------------------------------------------------------------------------------------------- models


def test_the_one_model_is_listed_and_found_by_its_name(served: Served, client: openai.OpenAI) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == [served.model]
    assert "/" in served.model
    found = client.models.retrieve(served.model)
    assert found == listed[0]
    assert found.owned_by == "liveweight"
    assert extension(found)["version"] == str(served.service.live.engine.version)


def test_another_model_is_not_found(served: Served, client: openai.OpenAI) -> None:
    asks: list[Callable[[], object]] = [
        lambda: client.models.retrieve("gpt-5"),
        lambda: client.chat.completions.create(model="gpt-5", messages=CHAT),
        lambda: client.completions.create(model="gpt-5", prompt="x"),
    ]
    for ask in asks:
        with pytest.raises(openai.NotFoundError, match="'gpt-5' is not served here") as caught:
            ask()
        assert caught.value.code == "model_not_found"
        assert caught.value.type == "invalid_request_error"


# -------------------------------------------------------------------------------------------------------- errors

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"presence_penalty": -1}, "presence_penalty"),
    ({"modalities": ["text", "audio"]}, "modalities[1]"),
    ({"audio": {"voice": "x", "format": "mp3"}}, "audio"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
]
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 2.5}, "temperature", "invalid_value"),
    ({"temperature": "1"}, "temperature", "invalid_type"),
    ({"top_p": -0.1}, "top_p", "invalid_value"),
    ({"n": 9}, "n", "invalid_value"),
    ({"n": True}, "n", "invalid_type"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_completion_tokens": 1.5}, "max_completion_tokens", "invalid_type"),
    ({"seed": 0.5}, "seed", "invalid_type"),
    ({"stop": ["a"] * 5}, "stop", "invalid_value"),
    ({"stop": [1]}, "stop[0]", "invalid_type"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_type"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "hello"}, "messages", "invalid_type"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_type"),
    ({"messages": [{"role": "user", "content": " "}]}, "messages", "invalid_input"),
    ({"messages": [{"role": "user", "content": "a" * 1100}]}, "messages", "context_length_exceeded"),
    ({"model": None}, "model", "invalid_type"),
]
WRONG_TEXTS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": [1, "a"]}, "prompt[1]", "invalid_type"),
    ({"prompt": [[1], []]}, "prompt[1]", "invalid_value"),
    ({"prompt": {}}, "prompt", "invalid_type"),
    ({"prompt": [61]}, "prompt", "invalid_input"),
    ({"prompt": ["a"] * 17}, "prompt", "invalid_value"),
    ({"prompt": "a" * 1100}, "prompt", "context_length_exceeded"),
    ({"echo": True}, "echo", "unsupported_value"),
    ({"suffix": "x"}, "suffix", "unsupported_value"),
    ({"best_of": 3, "n": 2}, "best_of", "unsupported_value"),
    ({"logprobs": 6}, "logprobs", "invalid_value"),
    ({"logprobs": True}, "logprobs", "invalid_type"),
]


def refusal(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error in an answer, which has OpenAI's form and status."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    return ErrorBody.model_validate_json(answer.content).model_dump()["error"]


@pytest.mark.parametrize(("more", "param"), REFUSED, ids=[param for _, param in REFUSED])
def test_what_would_silently_mean_something_else_is_refused_by_name(
    served: Served, client: openai.OpenAI, more: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**(chat_body(served) | {"extra_body": more}))
    assert (caught.value.param, caught.value.code) == (param, "unsupported_value")
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(("more", "param", "code"), WRONG, ids=[str(more)[:40] for more, _, _ in WRONG])
@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_that_cannot_be_used_is_a_400_that_names_the_parameter(
    served: Served, http: httpx.Client, more: dict[str, Any], param: str, code: str, stream: bool
) -> None:
    error = refusal(http.post("/chat/completions", json=chat_body(served) | {"stream": stream} | more))
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(("more", "param", "code"), WRONG_TEXTS, ids=[str(more)[:40] for more, _, _ in WRONG_TEXTS])
def test_a_text_that_cannot_be_used_is_a_400_that_names_the_parameter(
    served: Served, http: httpx.Client, more: dict[str, Any], param: str, code: str
) -> None:
    body = {"model": served.model, "prompt": "x"} | more
    error = refusal(http.post("/completions", json=body))
    assert (error["param"], error["code"]) == (param, code)


def test_what_is_missing_is_named(http: httpx.Client, served: Served) -> None:
    assert refusal(http.post("/chat/completions", json={"messages": CHAT}))["param"] == "model"
    error = refusal(http.post("/completions", json={"model": served.model}))
    assert (error["param"], error["code"]) == ("prompt", "missing_required_parameter")


@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"nonsense", b'{"model": "\xff"}', b'{"model": "\\ud800"}', b"[" * 100_000, b'{"seed": ' + b"9" * 9999],
    ids=["empty", "cut off", "no JSON", "no UTF-8", "half a character", "too deep", "too long a number"],
)
def test_a_body_that_is_not_json_is_a_400(http: httpx.Client, path: str, content: bytes) -> None:
    answer = http.post(path, content=content, headers={"content-type": "application/json"})
    error = refusal(answer)
    assert (error["param"], error["code"]) == (None, "invalid_json")


@pytest.mark.parametrize("content", [b"[]", b"null", b'"text"', b"3"])
def test_json_that_is_no_object_is_a_400(http: httpx.Client, content: bytes) -> None:
    answer = http.post("/chat/completions", content=content, headers={"content-type": "application/json"})
    assert refusal(answer)["code"] == "invalid_type"


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp", ";"])
def test_a_body_of_another_kind_is_a_415(served: Served, http: httpx.Client, kind: str | None) -> None:
    content = json.dumps(chat_body(served)).encode()
    headers = {} if kind is None else {"content-type": kind}
    answer = http.post("/chat/completions", content=content, headers=headers)
    assert refusal(answer, 415)["code"] == "unsupported_media_type"


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/x+json"])
def test_json_may_be_called_by_its_longer_names(served: Served, http: httpx.Client, kind: str) -> None:
    content = json.dumps(chat_body(served)).encode()
    assert http.post("/chat/completions", content=content, headers={"content-type": kind}).status_code == 200


@pytest.mark.parametrize(
    "more", [{"temperature": 5e-324}, {"temperature": 2, "top_p": 0}, {"seed": 2**63 - 1, "n": 2}, {"seed": -(10**100)}]
)
def test_values_at_the_edge_of_what_is_accepted_are_answered(
    served: Served, http: httpx.Client, more: dict[str, Any]
) -> None:
    answer = http.post("/chat/completions", json=chat_body(served) | more)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == spoken(served)


# ---------------------------------------------------------------------------------- queues, failures and goodbyes


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Counts the streams that were begun."""
    count, submit = threading.Semaphore(0), Batcher.submit

    def counted(self: Batcher, *given: Any, **more: Any) -> TokenStream:
        stream = submit(self, *given, **more)
        count.release()
        return stream

    monkeypatch.setattr(Batcher, "submit", counted)
    return count


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Counts the streams that were told that they are over."""
    count, put = threading.Semaphore(0), TokenStream.put

    def counted(self: TokenStream, made: Any) -> None:
        put(self, made)
        if made is None or isinstance(made, BaseException):
            count.release()

    monkeypatch.setattr(TokenStream, "put", counted)
    return count


@contextmanager
def posted(served: Served, body: dict[str, Any]) -> Iterator[None]:
    """A client that asks, and goes away when the block ends without having read an answer."""
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(content)}\r\n"
    port = httpx.URL(served.url).port
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + content)
        yield


def taken(count: threading.Semaphore, times: int) -> None:
    for _ in range(times):
        assert count.acquire(timeout=60)


def test_a_full_queue_is_a_429_that_says_when_and_leaves_nothing_behind(
    served: Served, client: openai.OpenAI, submitted: threading.Semaphore, ended: threading.Semaphore
) -> None:
    batcher = served.service.batcher
    with ThreadPoolExecutor(1) as pool:
        with served.service.live.engine.gate.step():  # nothing is decoded meanwhile
            first = pool.submit(client.chat.completions.create, model=served.model, messages=CHAT, n=8)
            taken(submitted, 8)
            for stream in (False, True):
                with pytest.raises(openai.RateLimitError) as caught:
                    client.chat.completions.create(model=served.model, messages=CHAT, n=5, stream=stream)
                assert caught.value.code == "queue_full"
                assert caught.value.type == "rate_limit_error"
                assert int(caught.value.response.headers["retry-after"]) >= 1
                taken(ended, 4)  # the four of the five for which there was room
            assert batcher.waiting + batcher.running == 8
        assert len(first.result(60).choices) == 8


def test_more_answers_than_the_server_ever_takes_are_refused_and_not_put_off(
    served: Served, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match="13 answers are asked for at once, and this server takes 12"):
        client.completions.create(model=served.model, prompt=["the cat"] * 13)


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
def test_a_client_that_goes_away_while_reading_stops_its_generation(
    served: Served, http: httpx.Client, ended: threading.Semaphore, path: str
) -> None:
    body = chat_body(served, prompt="the cat", stream=True, max_tokens=LONG, n=2)
    made = served.service.batcher.tokens
    with http.stream("POST", path, json=body) as answer:
        next(answer.iter_lines())
    taken(ended, 2)
    assert served.service.batcher.running == 0
    assert served.service.batcher.tokens - made < 2 * LONG


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_while_waiting_is_forgotten(
    served: Served, submitted: threading.Semaphore, ended: threading.Semaphore, stream: bool
) -> None:
    batcher = served.service.batcher
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=f"{served.url}/v1", timeout=60) as busy:
        with served.service.live.engine.gate.step():  # nothing is decoded meanwhile
            first = pool.submit(busy.post, "/chat/completions", json=chat_body(served, n=5))
            taken(submitted, 5)  # one more than are decoded together
            with posted(served, chat_body(served, stream=stream)):
                taken(submitted, 1)
            taken(ended, 1)
            assert batcher.waiting + batcher.running == 5
            assert not first.done()
        assert first.result(60).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_said_to_a_client_that_went_away_is_kept(
    served: Served, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    draw, on = Generation.draw, threading.Event()
    take, asked = TokenStream.__next__, threading.Semaphore(0)
    live, committed = served.service.live, threading.Semaphore(0)

    def held(self: Generation, *given: Any) -> Any:
        if len(self.ids) == self.prompt_length + 3:
            assert on.wait(60)
        return draw(self, *given)

    def counted(self: TokenStream) -> Any:
        asked.release()
        return take(self)

    monkeypatch.setattr(Generation, "draw", held)
    monkeypatch.setattr(TokenStream, "__next__", counted)
    forget = live.ledger.on_commit(committed.release)
    try:
        with posted(served, chat_body(served, stream=stream)):
            taken(asked, 4)  # three tokens were taken
        taken(committed, 1)  # though the next token is still in the making
    finally:
        on.set()
        forget()
    kept = live.replies(limit=1)[0]
    assert kept.finish == "cancelled"
    assert kept.text == spoken(served)[:3]
    assert kept.public_id is not None


class Broken(RuntimeError):
    """What a model's own code may raise."""


@pytest.fixture
def breaks_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets the engine fail behind so many tokens."""
    draw = Generation.draw

    def after(tokens: int) -> None:
        left = iter([True] * tokens)

        def failing(self: Generation, *given: Any) -> Any:
            if not next(left, False):
                raise Broken("a secret of the inside")
            return draw(self, *given)

        monkeypatch.setattr(Generation, "draw", failing)

    return after


def test_a_failure_on_the_way_is_the_streams_last_event(
    served: Served, client: openai.OpenAI, http: httpx.Client, breaks_after: Callable[[int], None]
) -> None:
    breaks_after(3)
    said = []
    with pytest.raises(openai.APIError, match="The server failed") as caught:
        for chunk in client.chat.completions.create(model=served.model, messages=CHAT, stream=True):
            said.append(chunk.choices[0].delta.content)
    assert said[0] == ""
    assert not isinstance(caught.value, openai.APIStatusError)
    assert caught.value.code == "internal_error"
    breaks_after(3)
    text = http.post("/chat/completions", json=chat_body(served, stream=True)).text
    last = text.split("\n\n")[-2]
    assert text.endswith("\n\n") and "[DONE]" not in text and "secret" not in text
    assert ErrorBody.model_validate_json(last.removeprefix("data: ")).error.type == "server_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_is_a_500_that_says_nothing_of_the_inside(
    served: Served, breaks_after: Callable[[int], None], stream: bool
) -> None:
    breaks_after(0)
    error = refusal(httpx.post(f"{served.url}/v1/chat/completions", json=chat_body(served, stream=stream)), 500)
    assert error["type"] == "server_error"
    assert "secret" not in json.dumps(error)


def test_other_questions_are_answered_after_all_that(served: Served, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=served.model, messages=[{"role": "user", "content": OTHER}])
    assert answer.choices[0].message.content == spoken(served, OTHER)
    assert served.service.batcher.running == served.service.batcher.waiting == 0
