"""One reply in the making: from logits to the next token and to its text.

Owns what was read and said so far, how a token is drawn, where a stop word ends the text, and what of the text can be
told already. Knows nothing of models, of caches, or of when weights change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from liveweight.engines.base import Sampling, Token, Version
from liveweight.engines.chat_format import ChatFormat, TextStream
from liveweight.errors import InvalidInput

_COLD = 1e-5  # a temperature below this one is 0: no sum over the vocabulary would hold its powers


class Generation:
    """What was read and said, and how it goes on."""

    def __init__(self, chat_format: ChatFormat, prompt: Sequence[int], sampling: Sampling, context: int) -> None:
        """Begin behind `prompt`, in a model that takes `context` tokens (0: any number).

        Raises InvalidInput for a prompt that is empty or too long.
        """
        if context and len(prompt) >= context:
            raise InvalidInput(
                f"The prompt has {len(prompt)} tokens, and the model's context has {context}.",
                hint="Shorten the chat, or begin a new one.",
                tokens=len(prompt),
                context=context,
            )
        if not prompt:
            raise InvalidInput("The prompt has no tokens.", hint="Give some text.")
        self.ids = list(prompt)
        self.prompt_length = len(self.ids)
        self.sampling = sampling
        self._most = min(sampling.max_tokens, context - len(self.ids)) if context else sampling.max_tokens
        self._ends = chat_format.end_tokens
        self._made = 0
        self._text = TextStream(chat_format)
        self._held = ""  # may be the beginning of a stop word
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    @property
    def over(self) -> bool:
        """Whether not even one more token may be made."""
        return self._made >= self._most

    def draw(self, logits: Tensor, version: Version, values: Mapping[str, Tensor] | None = None) -> Token:
        """The next token of (vocabulary,) logits that weights of this version gave; it is now one of `ids`."""
        logprobs = logits.float().log_softmax(-1)
        token = chosen(logprobs, self.sampling, self._random)
        top: tuple[tuple[int, float], ...] = ()
        if self.sampling.top_logprobs:
            found = logprobs.topk(min(self.sampling.top_logprobs, len(logprobs)))
            top = tuple(zip(found.indices.tolist(), found.values.tolist(), strict=True))
        self.ids.append(token)
        self._made += 1
        ended = token in self._ends
        text, stopped = self._told("" if ended else self._text.push(token))
        finish: Literal["", "stop", "length"] = "stop" if ended or stopped else "length" if self.over else ""
        if finish and not stopped:
            text, self._held = text + self._held, ""
        return Token(token, text, float(logprobs[token]), version, finish, values or {}, top)

    def _told(self, new: str) -> tuple[str, bool]:
        """What can be told now, and whether a stop word has come."""
        words = [word for word in self.sampling.stop if word]
        said = self._held + new
        places = [place for word in words if (place := said.find(word)) >= 0]
        if places:
            self._held = ""
            return said[: min(places)], True
        keep = max((_begun(said, word) for word in words), default=0)
        self._held = said[len(said) - keep :]
        return said[: len(said) - keep], False


def _begun(text: str, word: str) -> int:
    """How many characters at the end of a text are a beginning of a word."""
    return next((size for size in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:size])), 0)


def chosen(logprobs: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token of (vocabulary,) log-probabilities."""
    if sampling.temperature < _COLD:
        return int(logprobs.argmax())
    scaled = (logprobs / sampling.temperature).softmax(-1).cpu()
    if sampling.top_k:
        floor = scaled.topk(min(sampling.top_k, len(scaled))).values[-1]
        scaled = torch.where(scaled < floor, 0.0, scaled)
    if sampling.top_p < 1.0:
        ordered, order = scaled.sort(descending=True)
        # A token stays while the likelier ones before it have not filled the mass yet.
        drop = (ordered.cumsum(0) - ordered) / ordered.sum() >= sampling.top_p
        drop[0] = False
        scaled[order[drop]] = 0.0
    return int(torch.multinomial(scaled, 1, generator=generator))
