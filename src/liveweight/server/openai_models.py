"""What OpenAI's clients are answered, as OpenAPI describes it.

Owns the form of each answer, errors too. These classes are for the description and for tests: on the way out
dictionaries are faster, and `openai_bodies` writes them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TopLogprob(_Answer):
    """A token that was likely, and how likely."""

    token: str = Field(description="The token; bytes that are no text by themselves are written as \\xNN.")
    logprob: float = Field(description="Its log-probability under the model, in nats, whatever the temperature is.")
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of the answer, and what else was likely."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Answer):
    """The log-probabilities of an answer's tokens. The token that ends the reply is none of them."""

    content: list[TokenLogprob]
    refusal: None


class CompletionLogprobs(_Answer):
    """The log-probabilities of a text's tokens, list by list."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int] = Field(description="Where each token begins in the choice's text, in characters.")


class Usage(_Answer):
    """What was read and made. The token that ends a reply is not counted; those of a stop word are."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChoiceVersions(_Answer):
    """Which weights made a choice, and the reply that it is in the ledger."""

    index: int
    id: str | None = Field(description="The reply's id here, by which feedback can name it.")
    reply: str | None = Field(description="The reply's id in the ledger; null for a completion, which is not kept.")
    versions: list[str] = Field(description="Every version of the weights that made a token of it, in order.")
    spans_versions: bool


class Extension(_Answer):
    """What liveweight says besides: the weights changed while it was answering, or they did not."""

    reply: str | None = Field(description="The first choice's id in the ledger.")
    versions: list[str]
    spans_versions: bool
    choices: list[ChoiceVersions]


class ChatAnswer(_Answer):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Answer):
    """One answer."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionChoice(_Answer):
    """One text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class _Completed(_Answer):
    id: str
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str = Field(description="The version of the weights that made the last token.")
    usage: Usage
    liveweight: Extension


_COMPLETED: dict[str, Any] = {
    "id": "chatcmpl-5f3759df5f3759df5f3759df",
    "created": 1767225600,
    "model": "smollm2",
    "system_fingerprint": "v3:0123456789ab",
    "usage": {"prompt_tokens": 37, "completion_tokens": 2, "total_tokens": 39},
    "liveweight": {
        "reply": "r12",
        "versions": ["v3:0123456789ab"],
        "spans_versions": False,
        "choices": [
            {
                "index": 0,
                "id": "chatcmpl-5f3759df5f3759df5f3759df",
                "reply": "r12",
                "versions": ["v3:0123456789ab"],
                "spans_versions": False,
            }
        ],
    },
}
_CHAT = _COMPLETED | {
    "object": "chat.completion",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hanoi.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
}


class ChatCompletion(_Completed):
    """The whole answer to a chat."""

    model_config = ConfigDict(json_schema_extra={"examples": [_CHAT]})

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Completion(_Completed):
    """The whole continuation of a text, or of several; a prompt's choices lie side by side."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ModelFacts(_Answer):
    """What liveweight says of a model besides."""

    version: str = Field(description="The version that the weights are in now.")
    context: int = Field(description="Tokens that prompt and answer may have together; 0 where nothing says so.")
    hash: str = Field(description="sha256 of the base's tensors.")


class ModelCard(_Answer):
    """A model that can be asked."""

    id: str
    object: Literal["model"]
    created: int = Field(description="When the server began to serve it, in seconds since 1970.")
    owned_by: Literal["liveweight"]
    liveweight: ModelFacts


class ModelList(_Answer):
    """The models that can be asked: the one that is served."""

    object: Literal["list"]
    data: list[ModelCard]


class ErrorDetail(_Answer):
    """What was wrong."""

    message: str
    type: str = Field(description="The kind of error: invalid_request_error, rate_limit_error, server_error, …")
    param: str | None = Field(description="The parameter that is meant, such as `messages[0].content`.")
    code: str | None = Field(description="The error for machines, such as `model_not_found`.")
    hint: str = Field(description="The way out, as the message ends with it.")
    details: dict[str, Any] = Field(description="More for machines, by error.")


class ErrorBody(_Answer):
    """Every error's body."""

    error: ErrorDetail
