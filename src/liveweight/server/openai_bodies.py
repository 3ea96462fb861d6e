"""Answers written out: whole ones, and chunk by chunk.

Owns the bytes that go to the client, for chats and for completions, and what is counted and collected of each choice on
the way. The text of a token is the only part of a chunk that is made anew each time. Knows nothing of threads, of
connections, or of how a request was asked.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from liveweight.engines.base import Token, Version
from liveweight.errors import GenerationCancelled
from liveweight.server.openai_logprobs import Placed, Spelling, Trail, chat_logprobs, completion_logprobs

DONE = b"data: [DONE]\n\n"


def as_json(value: Any) -> bytes:
    """A value as JSON, in ASCII: a broken character of a model's is no reason to break an answer."""
    return json.dumps(value, separators=(",", ":")).encode()


def as_event(value: Any) -> bytes:
    """A value as a server-sent event."""
    return b"data: " + as_json(value) + b"\n\n"


@dataclass
class Choice:
    """One choice in the making."""

    index: int
    public_id: str | None  # None where the reply is not remembered
    trail: Trail
    begun: bool = False
    tokens: int = 0  # made; the one that ends a reply is not counted, as it is no part of the answer
    finish: str = ""
    versions: list[str] = field(default_factory=list)  # in the order of their first tokens
    reply: str | None = None  # its id in the ledger, once it is there
    texts: list[str] = field(default_factory=list)
    entries: list[Placed] = field(default_factory=list)  # whose log-probabilities are told

    def told(self) -> dict[str, Any]:
        """What liveweight says of it."""
        return {
            "index": self.index,
            "id": self.public_id,
            "reply": self.reply,
            "versions": self.versions,
            "spans_versions": len(self.versions) > 1,
        }


class Body(ABC):
    """The answer to one request, as a whole or chunk by chunk. Tokens are given to it as they come."""

    kind: ClassVar[str]  # what a whole answer is called
    chunk_kind: ClassVar[str]
    before_text: ClassVar[bytes]  # of a chunk, within its choice
    after_text: ClassVar[bytes]

    def __init__(
        self,
        ids: Sequence[str],
        model: str,
        spelling: Spelling,
        *,
        likeliest: int | None,
        usage_in_stream: bool,
        remembered: bool,
    ) -> None:
        """One choice for each id; the first id is the answer's too. `likeliest` None: without log-probabilities."""
        self.id, self.model, self.created = ids[0], model, int(time.time())
        self.choices = [Choice(place, id if remembered else None, Trail(spelling)) for place, id in enumerate(ids)]
        self._spelling, self._likeliest, self._usage_in_stream = spelling, likeliest, usage_in_stream
        self._version: Version | None = None  # of the last token
        self._fingerprint = ""  # the same as text
        self._heads: dict[tuple[int, str], bytes] = {}
        end = b',"finish_reason":null}]' + (b',"usage":null}\n\n' if usage_in_stream else b"}\n\n")
        self._tail = self.after_text + b',"logprobs":null' + end
        self._end = end

    # ---------------------------------------------------------------------------------------------- chunk by chunk

    def chunk(self, index: int, token: Token) -> bytes:
        """A token of a choice as a chunk; nothing where it brings nothing to tell."""
        choice = self.choices[index]
        entries = self._take(choice, token)
        opening = b"" if choice.begun else self.opening(choice)
        choice.begun = True
        text = token.text
        if not text and not entries:
            return opening
        head = self._heads.get((index, self._fingerprint)) or self._head(index)
        if self._likeliest is None:
            return opening + head + json.dumps(text).encode() + self._tail
        logprobs = b',"logprobs":' + as_json(self.logprobs(entries, self._likeliest))
        return opening + head + json.dumps(text).encode() + self.after_text + logprobs + self._end

    def over(self, index: int, reply: str | None, prompt_tokens: int, *, last: bool) -> bytes:
        """The end of a choice, and behind the last one the end of everything."""
        self.complete(index, reply)
        told = self._told([self.last_choice(self.choices[index])])
        if self._usage_in_stream:
            usage = self._told([]) | {"usage": self._usage(prompt_tokens), "liveweight": self._extension()}
            return as_event(told | {"usage": None}) + (as_event(usage) + DONE if last else b"")
        return as_event(told | {"liveweight": self._extension()}) + DONE if last else as_event(told)

    # ---------------------------------------------------------------------------------------------------- as a whole

    def collect(self, index: int, token: Token) -> None:
        """Keep a token of a choice."""
        choice = self.choices[index]
        choice.entries += self._take(choice, token)
        choice.texts.append(token.text)

    def complete(self, index: int, reply: str | None) -> None:
        """A choice is over, and is this reply in the ledger. Raises GenerationCancelled where it was stopped."""
        choice = self.choices[index]
        if not choice.finish:
            raise GenerationCancelled("The reply was stopped before its end.")
        choice.reply = reply

    def whole(self, prompt_tokens: int) -> bytes:
        """The whole answer."""
        told = self._told([self.choice(choice) for choice in self.choices]) | {"object": self.kind}
        return as_json(told | {"usage": self._usage(prompt_tokens), "liveweight": self._extension()})

    # --------------------------------------------------------------------------------------------- by kind of answer

    @abstractmethod
    def opening(self, choice: Choice) -> bytes:
        """What is sent before a choice's first text."""

    @abstractmethod
    def last_choice(self, choice: Choice) -> dict[str, Any]:
        """The choice of a choice's last chunk."""

    @abstractmethod
    def choice(self, choice: Choice) -> dict[str, Any]:
        """A choice of the whole answer."""

    @abstractmethod
    def logprobs(self, tokens: Sequence[Placed], likeliest: int) -> dict[str, Any]:
        """The log-probabilities of some tokens."""

    # -------------------------------------------------------------------------------------------------------- inside

    def _take(self, choice: Choice, token: Token) -> list[Placed]:
        if token.version is not self._version:
            self._version, self._fingerprint = token.version, str(token.version)
        if self._fingerprint not in choice.versions:
            choice.versions.append(self._fingerprint)
        choice.tokens += not (token.finish and token.id in self._spelling.ends)
        choice.finish = token.finish
        return [] if self._likeliest is None else choice.trail.take(token)

    def _told(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.chunk_kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
        }

    def _head(self, index: int) -> bytes:
        """A chunk up to the text of this choice, under the present version."""
        begun = as_event(self._told([])).removesuffix(b"]}\n\n")
        head = begun + b'{"index":%d,' % index + self.before_text
        self._heads[index, self._fingerprint] = head
        return head

    def _usage(self, prompt_tokens: int) -> dict[str, int]:
        made = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": made,
            "total_tokens": prompt_tokens + made,
        }

    def _extension(self) -> dict[str, Any]:
        versions = list(dict.fromkeys(version for choice in self.choices for version in choice.versions))
        return {
            "reply": self.choices[0].reply,
            "versions": versions,
            "spans_versions": len(versions) > 1,
            "choices": [choice.told() for choice in self.choices],
        }

    def _all_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        return None if self._likeliest is None else self.logprobs(choice.entries, self._likeliest)


class ChatBody(Body):
    """The answer to a chat."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    before_text, after_text = b'"delta":{"content":', b"}"

    def opening(self, choice: Choice) -> bytes:
        """Who speaks."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._with_usage({"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None})

    def last_choice(self, choice: Choice) -> dict[str, Any]:
        """How it ended."""
        return {"index": choice.index, "delta": {}, "logprobs": None, "finish_reason": choice.finish}

    def choice(self, choice: Choice) -> dict[str, Any]:
        """The whole message."""
        message = {"role": "assistant", "content": "".join(choice.texts), "refusal": None}
        logprobs = self._all_logprobs(choice)
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish}

    def logprobs(self, tokens: Sequence[Placed], likeliest: int) -> dict[str, Any]:
        """As chats have them."""
        return chat_logprobs(tokens, likeliest, self._spelling)

    def _with_usage(self, choice: dict[str, Any]) -> bytes:
        return as_event(self._told([choice]) | ({"usage": None} if self._usage_in_stream else {}))


class CompletionBody(Body):
    """The continuation of texts."""

    kind = chunk_kind = "text_completion"
    before_text, after_text = b'"text":', b""

    def opening(self, choice: Choice) -> bytes:
        """Nothing: text needs no introduction."""
        return b""

    def last_choice(self, choice: Choice) -> dict[str, Any]:
        """How it ended."""
        return {"index": choice.index, "text": "", "logprobs": None, "finish_reason": choice.finish}

    def choice(self, choice: Choice) -> dict[str, Any]:
        """The whole text."""
        text, logprobs = "".join(choice.texts), self._all_logprobs(choice)
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish}

    def logprobs(self, tokens: Sequence[Placed], likeliest: int) -> dict[str, Any]:
        """As completions have them."""
        return completion_logprobs(tokens, likeliest, self._spelling)
