"""What OpenAI's clients may ask for.

Owns which request is accepted (exactly what the schema says) and what every field means here. Knows nothing of routes,
of models that run, or of answers.

What would silently mean something else (tools, formats, images, penalties) is refused by its type; fields that are not
named here are ignored, as OpenAI's own server ignores `user` or `metadata`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from liveweight.engines.base import Message

MOST_CHOICES = 8
MOST_PROMPTS = 16
_SEEDS = 2**64
_COUNTS = 2**31 - 1


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 3.0 is an integer there."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _form(value: Any) -> str:
    return "(list)" if isinstance(value, list) else "(text)"


def _prompt_form(value: Any) -> str:
    if not isinstance(value, list):
        return "(text)"
    if not value or isinstance(value[0], str):
        return "(texts)"
    return "(token lists)" if isinstance(value[0], list) else "(tokens)"


def _not_true(value: bool) -> bool:
    if value:
        raise PydanticCustomError("not_false", "it can only be false")
    return value


_integral = BeforeValidator(_whole)  # behind the bounds, so that these stay in the schema
Count = Annotated[int, Field(ge=1, le=_COUNTS), _integral]
Choices = Annotated[int, Field(ge=1, le=MOST_CHOICES), _integral]
TokenId = Annotated[int, Field(ge=0, le=_COUNTS), _integral]
Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]
Nothing = Annotated[list[Any], Field(max_length=0)]
Zero = Annotated[float, Field(ge=0, le=0)]
No = Annotated[bool, Field(json_schema_extra={"const": False}), AfterValidator(_not_true)]

# What classes cannot say of themselves, said in the schema.
_VISIBLE = {"type": "string", "pattern": r"[^\s\u0000-\u001f\u0085]"}
_PART_SAID = {"properties": {"text": _VISIBLE}, "required": ["text"]}
_SOMETHING_SAID: dict[str, Any] = {
    "properties": {"content": {"anyOf": [_VISIBLE, {"type": "array", "contains": _PART_SAID}]}},
    "required": ["content"],
}
_BEST_OF_IS_N: list[Any] = [
    {"properties": {"best_of": {"type": "null"}}},
    {"properties": {"best_of": {"const": 1}, "n": {"enum": [1, None]}}, "required": ["best_of"]},
    *(
        {"properties": {"best_of": {"const": n}, "n": {"const": n}}, "required": ["best_of", "n"]}
        for n in range(2, MOST_CHOICES + 1)
    ),
]

# A tag in brackets says which form of a union was meant; errors leave it out of the parameter's name.
Stop = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[str], Field(max_length=4), Tag("(list)")], Discriminator(_form)
]


class _Request(BaseModel):
    """Taken literally: a string is no number. Fields that are not named are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TextPart(_Request):
    """A part of a message. Pictures, sound and files are refused: the model reads text."""

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[TextPart], Field(min_length=1), Tag("(list)")], Discriminator(_form)
]


class ChatMessage(_Request):
    """One turn of the chat."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="Who speaks. `developer` counts as `system`; there are no tools, so nothing comes from a `tool`."
    )
    content: Content = Field(description="What is said: a text, or text parts, which are joined by line breaks.")
    tool_calls: Nothing | None = Field(default=None, description="Refused unless empty: there are no tools.")

    def as_message(self) -> Message:
        """As an engine takes it."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(_Request):
    """What a stream brings besides the text."""

    include_usage: bool | None = Field(
        default=None, description="Whether a last chunk, without choices, brings the usage; it is null in all others."
    )


class TextFormat(_Request):
    """The only format there is."""

    type: Literal["text"]


class _Generated(_Request):
    """What a chat and a completion have in common. What is left out or null comes from the server's settings."""

    model: str = Field(description="The served model's name, as `GET /v1/models` lists it.")
    stream: bool | None = Field(default=None, description="Whether tokens come one by one, as server-sent events.")
    stream_options: StreamOptions | None = Field(default=None, description="Ignored without `stream`.")
    n: Choices | None = Field(
        default=None, description="How many answers to make. Each is a reply of its own, with the seed counted up."
    )
    max_tokens: Count | None = Field(default=None, description="The most tokens to make. The context limits it too.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        default=None, description="How freely tokens are drawn; 0 always takes the likeliest."
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="Tokens are drawn from the likeliest ones of this mass."
    )
    top_k: Annotated[int, Field(ge=-1, le=_COUNTS), _integral] | None = Field(
        default=None, description="Tokens are drawn from so many of the likeliest; 0 and -1 are all. Not OpenAI's."
    )
    seed: Annotated[int, _integral] | None = Field(
        default=None, description="The same request to the same version with the same seed gets the same answer."
    )
    stop: Stop | None = Field(default=None, description="Where one of these comes, the answer ends before it.")
    frequency_penalty: Zero | None = Field(default=None, description="Refused unless 0.")
    presence_penalty: Zero | None = Field(default=None, description="Refused unless 0.")
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = Field(
        default=None, description="Refused unless empty."
    )

    @property
    def choices(self) -> int:
        """How many answers to make to each prompt."""
        return self.n or 1

    @property
    def usage_in_stream(self) -> bool:
        """Whether the stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def most_tokens(self) -> int | None:
        """The most tokens to make, where that was said."""
        return self.max_tokens

    def sampling(self, choice: int) -> dict[str, Any]:
        """How the tokens of one choice are drawn, as `LiveModel.sampling` takes it; None is left to the settings."""
        temperature, top_p = self.temperature, self.top_p
        if temperature is not None and temperature < 1e-5:
            temperature = 0.0  # as good as that, and dividing by less is more than a float holds
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return {
            "max_tokens": self.most_tokens,
            "temperature": temperature,
            "top_p": None if top_p is None else max(top_p, 1e-9),  # the likeliest token is in any mass
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "seed": None if self.seed is None else (self.seed + choice + _SEEDS // 2) % _SEEDS - _SEEDS // 2,
            "stop": tuple(word for word in stop if word) or None,
        }


class ChatRequest(_Generated):
    """A chat to go on with."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "smollm2", "messages": [{"role": "user", "content": "What is the capital of Vietnam?"}]}
            ],
            "if": {"properties": {"top_logprobs": {"type": "integer", "minimum": 1}}, "required": ["top_logprobs"]},
            "then": {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
        }
    )

    messages: list[ChatMessage] = Field(
        min_length=1,
        description="The chat so far; something must be said in it.",
        json_schema_extra={"contains": _SOMETHING_SAID},
    )
    max_completion_tokens: Count | None = Field(default=None, description="As `max_tokens`, and goes before it.")
    logprobs: bool | None = Field(default=None, description="Whether each token comes with its log-probability.")
    top_logprobs: Annotated[int, Field(ge=0, le=20), _integral] | None = Field(
        default=None, description="How many of the likeliest tokens come with each token; needs `logprobs`."
    )
    tools: Nothing | None = Field(default=None, description="Refused unless empty: the model calls no tools.")
    tool_choice: Literal["none"] | None = Field(default=None, description="Refused unless `none`.")
    functions: Nothing | None = Field(default=None, description="Refused unless empty: the model calls no functions.")
    function_call: Literal["none"] | None = Field(default=None, description="Refused unless `none`.")
    response_format: TextFormat | None = Field(default=None, description="Refused unless text.")
    modalities: list[Literal["text"]] | None = Field(default=None, description="Refused unless text.")
    audio: None = Field(default=None, description="Refused: the model does not speak.")
    web_search_options: None = Field(default=None, description="Refused: the model searches nothing.")

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and info.data.get("logprobs") is not True:
            raise PydanticCustomError("needs_logprobs", "it needs logprobs to be true")
        return value

    @property
    def most_tokens(self) -> int | None:
        """The most tokens to make, where that was said."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens come with each token; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Generated):
    """A text to go on with, without a chat template. Nothing of it is remembered."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "smollm2", "prompt": "The capital of Vietnam is", "max_tokens": 4}],
            "anyOf": _BEST_OF_IS_N,
        }
    )

    prompt: Annotated[
        Annotated[Text, Tag("(text)")]
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS), Tag("(texts)")]
        | Annotated[Tokens, Tag("(tokens)")]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS), Tag("(token lists)")],
        Discriminator(_prompt_form),
    ] = Field(description="A text, several, the token ids of one, or those of several.")
    logprobs: Annotated[int, Field(ge=0, le=5), _integral] | None = Field(
        default=None, description="How many of the likeliest tokens come with each token and its log-probability."
    )
    best_of: Choices | None = Field(default=None, description="Refused unless it is `n`.")
    echo: No | None = Field(default=None, description="Refused unless false.")
    suffix: Literal[""] | None = Field(default=None, description="Refused unless empty.")

    @field_validator("best_of")
    @classmethod
    def _is_n(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value != (info.data.get("n") or 1):
            raise PydanticCustomError("best_of", "answers are not ranked, so it can only be what n is")
        return value

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Every prompt, as texts or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens come with each token; None: no log-probabilities at all."""
        return self.logprobs
