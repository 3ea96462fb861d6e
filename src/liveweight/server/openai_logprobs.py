"""Tokens as text and bytes, and their log-probabilities as OpenAI writes them.

Owns how one token is spelt by itself (its bytes may be a piece of a character), and which log-probabilities go out with
which piece of text. Knows nothing of answers and streams.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from liveweight.engines.base import Token
from liveweight.engines.chat_format import ChatFormat

_LEAST = -9999.0  # what OpenAI writes for a token that cannot come
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes with (GPT-2's): printable ones stand for themselves."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(others)}


class Spelling:
    """One tokenizer's tokens as bytes and as text. Remembers what it has spelt; safe from several threads."""

    def __init__(self, chat_format: ChatFormat) -> None:
        """Read from the tokenizer how it writes bytes."""
        self._format = chat_format
        self.ends = chat_format.end_tokens
        tokenizer = chat_format.tokenizer
        self._added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        self._silent = frozenset(tokenizer.all_special_ids)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        steps = json.loads(decoder.__getstate__()) if decoder is not None else {}
        kinds = {step["type"] for step in steps.get("decoders", (steps,)) if step}
        self._alphabet = _alphabet() if "ByteLevel" in kinds else {}
        self._known: dict[int, tuple[str, bytes]] = {}

    def of(self, token: int) -> tuple[str, bytes]:
        """A token's text and bytes. Bytes that are no text by themselves are written as escapes."""
        found = self._known.get(token)
        if found is None:
            spelt = self._bytes(token)
            found = self._known[token] = spelt.decode("utf-8", "backslashreplace"), spelt
        return found

    def said(self, token: int) -> bytes:
        """What a token adds to a text: its bytes, or nothing where it is a special one."""
        return b"" if token in self._silent else self.of(token)[1]

    def _bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        written = self._format.tokenizer.convert_ids_to_tokens(token)
        if not isinstance(written, str):  # a place in the vocabulary that no token has
            return b""
        if self._alphabet:
            known = [self._alphabet.get(character) for character in written]
            whole = [byte for byte in known if byte is not None]
            return bytes(whole) if len(whole) == len(known) else written.encode()
        byte = _BYTE.fullmatch(written)
        return bytes([int(byte[1], 16)]) if byte is not None else written.replace("\u2581", " ").encode()


@dataclass(frozen=True)
class Placed:
    """A token, and where it begins in its choice's text."""

    token: Token
    byte: int
    character: int


class Trail:
    """The tokens of one choice whose log-probabilities are still to be told.

    Text may lag behind its tokens (within a character, or where a stop word may have begun), so a token waits until the
    text that it belongs to is out. What a stop word cut off is never told; nor is the token that ends a reply.
    """

    def __init__(self, spelling: Spelling) -> None:
        """Nothing was said yet."""
        self._spelling = spelling
        self._waiting: list[Placed] = []
        self._bytes = 0  # of all tokens
        self._characters = 0
        self._told = 0  # bytes of the text that is out
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")

    def take(self, token: Token) -> list[Placed]:
        """The tokens that go out with the text of this one."""
        ended = token.id in self._spelling.ends
        if not ended:
            self._waiting.append(Placed(token, self._bytes, self._characters))
            spelt = self._spelling.said(token.id)
            self._bytes += len(spelt)
            self._characters += len(self._decoder.decode(spelt))
        self._told += len(token.text.encode("utf-8", "surrogatepass"))
        everything = token.finish == "length" or (token.finish == "stop" and ended)
        going = len(self._waiting) if everything else sum(each.byte < self._told for each in self._waiting)
        found, self._waiting = self._waiting[:going], self._waiting[going:]
        return found


def chat_logprobs(tokens: Sequence[Placed], likeliest: int, spelling: Spelling) -> dict[str, Any]:
    """The `logprobs` of some tokens of a chat's answer."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, spelt = spelling.of(token)
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": list(spelt)}

    content = [
        entry(each.token.id, each.token.logprob)
        | {"top_logprobs": [entry(*other) for other in each.token.top[:likeliest]]}
        for each in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[Placed], likeliest: int, spelling: Spelling) -> dict[str, Any]:
    """The `logprobs` of some tokens of a completion."""
    names = [spelling.of(each.token.id)[0] for each in tokens]
    own = [max(each.token.logprob, _LEAST) for each in tokens]
    tops = None
    if likeliest:
        # As OpenAI has it, the chosen token is among them even where it is not one of the likeliest.
        tops = [
            {spelling.of(number)[0]: max(logprob, _LEAST) for number, logprob in each.token.top[:likeliest]}
            | {name: logprob}
            for each, name, logprob in zip(tokens, names, own, strict=True)
        ]
    offsets = [each.character for each in tokens]
    return {"tokens": names, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets}
