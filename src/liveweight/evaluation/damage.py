"""What else a change moved, measured on data that neither methods nor the guard know.

Owns three meters, each of which keeps what the base model did and compares the weights of now with it: answers that
should stay, the KL on neutral instructions, and the perplexity of plain text. They read and never write. The guard has
its own probes and its own meter; these are for judging the guard, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from liveweight.engines.base import Message, ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from liveweight.evaluation.answers import first_sentence, is_right, same_first_sentence
from liveweight.evaluation.generation import generate_batch

_ROWS = 25  # sequences of one batch: its logits are (rows · tokens, vocabulary)


@dataclass(frozen=True)
class Kept:
    """A question whose answer should stay: the tokens that were answered, and what counts as right."""

    question: str
    reply: tuple[int, ...]
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Neighbours:
    """How many answers stayed."""

    count: int
    unchanged: int  # the first sentence is the same, word for word
    right: int  # the first sentence still holds a right answer
    changed: tuple[str, ...]  # the questions whose first sentence is another


class NeighbourMeter:
    """Asks the same questions again and again.

    A first sentence whose every token is still the likeliest, teacher-forced, is what greedy decoding would give; only
    the others are generated anew.
    """

    def __init__(self, engine: TransformersEngine, kept: Sequence[Kept], max_tokens: int = 24) -> None:
        """`max_tokens` is how long the replies may be that changed."""
        if not kept:
            raise InvalidInput("There are no answers to watch.", hint="Give one or more.")
        self.engine, self._kept, self._max_tokens = engine, tuple(kept), max_tokens
        self._items = [
            ScoreItem(tuple(engine.encode([Message("user", each.question)])), self._sentence(each.reply))
            for each in self._kept
        ]

    def _sentence(self, reply: tuple[int, ...]) -> tuple[int, ...]:
        """The first sentence's tokens, and the one that ends it where that is no mark of its own."""
        decode = self.engine.format.decode
        sentence = first_sentence(decode(reply))
        taken = next((n for n in range(1, len(reply)) if len(decode(reply[:n]).strip()) >= len(sentence)), len(reply))
        return reply[: taken + (not sentence.endswith((".", "!", "?")))]

    def measure(self) -> Neighbours:
        """Under the weights of now."""
        decode = self.engine.format.decode
        scores = self.engine.score(self._items)
        doubtful = [index for index, score in enumerate(scores) if not score.greedy]
        said = generate_batch(self.engine, [self._items[index].prompt for index in doubtful], self._max_tokens)
        changed, wrong = [], 0
        for index, ids in zip(doubtful, said, strict=True):
            kept, text = self._kept[index], decode(ids)
            if same_first_sentence(text, decode(kept.reply)):
                continue
            changed.append(kept.question)
            wrong += not is_right(text, kept.answers)
        count = len(self._kept)
        return Neighbours(count, count - len(changed), count - wrong, tuple(changed))


class KLMeter:
    """KL(base ‖ now) in nats a token over the first tokens of the base's own greedy answers, teacher-forced.

    Keeps the base's log-probabilities in memory: questions x tokens x vocabulary x 4 bytes.
    """

    def __init__(self, engine: TransformersEngine, questions: Sequence[str], tokens: int = 8) -> None:
        """Make the references under the engine's present weights, which should be the base's."""
        if not questions:
            raise InvalidInput("There are no questions to measure on.", hint="Give one or more.")
        self.engine = engine
        prompts = [engine.encode([Message("user", question)]) for question in questions]
        self._rows = list(zip(prompts, generate_batch(engine, prompts, tokens), strict=True))
        self._base = [self._logprobs(start) for start in range(0, len(self._rows), _ROWS)]

    def _logprobs(self, start: int) -> list[Tensor]:
        """Of one batch: a (T, vocabulary) a row, where each token of the base's answer is predicted."""
        batch = self._rows[start : start + _ROWS]
        engine = self.engine
        with engine.gate.step(), torch.inference_mode():
            replay = engine.record([p + r for p, r in batch], [len(p) - 1 for p, _ in batch])
            return [
                engine.unembed(replay.final[row, : len(reply)]).float().log_softmax(-1)
                for row, (_, reply) in enumerate(batch)
            ]

    def measure(self) -> list[float]:
        """Each question's mean KL over its tokens, under the weights of now."""
        found: list[float] = []
        for number, base in enumerate(self._base):
            for before, now in zip(base, self._logprobs(number * _ROWS), strict=True):
                found.append(float((before.exp() * (before - now)).sum(-1).mean()))
        return found


class PerplexityMeter:
    """The perplexity of a fixed slice of plain text, in windows that do not overlap."""

    def __init__(self, engine: TransformersEngine, text: str, *, tokens: int = 4096, window: int = 512) -> None:
        """Take the first `tokens` tokens of `text`; the engine's present weights are the reference."""
        # A token is rarely longer than eight characters, so that a long file need not be tokenised whole.
        ids = engine.format.encode_text(text[: tokens * 8])[:tokens]
        begin = engine.format.before_text
        self._items = [
            ScoreItem((*begin, *ids[start : start + 2]), tuple(ids[start + 2 : start + window]))
            for start in range(0, len(ids) - 2, window)
        ]
        if not self._items:
            raise InvalidInput("The text is too short to measure its perplexity.", hint="Give three words or more.")
        self.engine = engine
        self.base = self.measure()

    def measure(self) -> float:
        """The exponential of the mean negative log-likelihood a token, under the weights of now."""
        total, count = 0.0, 0
        for item in self._items:  # one by one: a window's logits are a hundred megabytes
            score = self.engine.score([item])[0]
            total -= score.total
            count += len(score.tokens)
        return math.exp(total / count)

    def ratio(self) -> float:
        """The perplexity of now over the reference's."""
        return self.measure() / self.base
