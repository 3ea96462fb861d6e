"""What a steering is told: what is wished for and its opposite, as a person has them, made into tokens.

Owns the forms that both sides may come in (two words, pairs, two sets, files of them). Knows nothing of directions or
of what is done with the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liveweight.engines.base import Message
from liveweight.engines.chat_format import ChatFormat
from liveweight.errors import InvalidInput
from liveweight.line_files import read_lines

Chat = str | Sequence[Message | Mapping[str, str]]  # a question, or a chat; its last turn may be the model's answer
Pair = tuple[Chat, Chat]  # what is wished for, its opposite

CARRIERS = 24  # neutral prompts that two words are put behind

_FORMS = (
    'Each line is a JSON object with "question", "answer_matching_behavior" and "answer_not_matching_behavior", '
    'or with "positive" and "negative".'
)
_SIDE_FORMS = 'Each line is a question, a JSON string, or an object with "prompt" (and "answer") or with "messages".'


@dataclass(frozen=True)
class Example:
    """A prompt, whole with its template, and the answer that is given to it; () where only the prompt is known."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sides:
    """Examples of what is wished for and of its opposite. Raises InvalidInput where a side is empty.

    `paired`: example i of one side differs from example i of the other in nothing but what is wished for.
    """

    name: str
    toward: tuple[Example, ...]
    away: tuple[Example, ...]
    paired: bool

    def __post_init__(self) -> None:
        """Refuse what has no two sides."""
        for side, examples in (("toward", self.toward), ("away", self.away)):
            if not examples:
                raise InvalidInput(f"{self.name}: the side {side!r} has no example.", hint="Give one at least.")
        kinds = {bool(example.answer) for example in (*self.toward, *self.away)}
        if len(kinds) > 1:
            raise InvalidInput(
                f"{self.name}: some examples hold an answer and some only a prompt.",
                hint="Give all of them an answer, or none: they are read at different places.",
            )

    @property
    def answered(self) -> bool:
        """Whether the examples are prompts with their answers."""
        return bool(self.toward[0].answer)

    def split(self, every: int = 3) -> tuple[Sides, Sides]:
        """One to find directions on and one to choose among them: each `every`-th example; the same where too few."""
        if min(len(self.toward), len(self.away)) < every:
            return self, self
        parts = []
        for held in (False, True):
            toward, away = (
                tuple(example for place, example in enumerate(side) if (place % every == every - 1) == held)
                for side in (self.toward, self.away)
            )
            parts.append(Sides(self.name, toward, away, self.paired))
        return parts[0], parts[1]


def of_words(chat: ChatFormat, toward: str, away: str, carriers: Sequence[Sequence[int]]) -> Sides:
    """Two words or texts, each as the answer to the same neutral prompts, so that what is the prompts' own cancels."""
    for text in (toward, away):
        if not text.strip():
            raise InvalidInput("One of the two words is empty.", hint='Give two, as in "Love - Hate".')
    if toward == away:
        raise InvalidInput(f"Both sides are {toward!r}.", hint='Give two different words, as in "Love - Hate".')
    some = carriers[:: max(1, len(carriers) // CARRIERS)][:CARRIERS]
    sides = [
        tuple(Example(tuple(prompt), tuple(chat.encode_continuation(prompt, text))) for prompt in some)
        for text in (toward, away)
    ]
    return Sides(f"{toward} - {away}", sides[0], sides[1], True)


def of_pairs(chat: ChatFormat, pairs: Sequence[Pair], name: str = "pairs") -> Sides:
    """Pairs of (wished for, its opposite)."""
    toward, away = (tuple(example_of(chat, pair[side]) for pair in pairs) for side in (0, 1))
    return Sides(name, toward, away, True)


def of_sets(chat: ChatFormat, toward: Sequence[Chat], away: Sequence[Chat], name: str = "two sets") -> Sides:
    """Two sets that need not be of one size."""
    sides = [tuple(example_of(chat, each) for each in side) for side in (toward, away)]
    return Sides(name, sides[0], sides[1], False)


def example_of(chat: ChatFormat, given: Chat) -> Example:
    """A question or a chat as tokens; where the model has the last word, that is the answer."""
    if isinstance(given, str):
        return Example(tuple(chat.encode([Message("user", given)])))
    turns = [turn if isinstance(turn, Message) else _message(turn) for turn in given]
    if not turns or turns[-1].role != "assistant":
        return Example(tuple(chat.encode(turns)))
    prompt = tuple(chat.encode(turns[:-1]))
    return Example(prompt, tuple(chat.encode_continuation(prompt, turns[-1].content)))


def two_words(text: str) -> tuple[str, str]:
    """The two sides of "Love - Hate". Raises InvalidInput."""
    toward, dash, away = text.partition(" - ")
    if not dash or not toward.strip() or not away.strip():
        raise InvalidInput(f"{text!r} does not name two sides.", hint='Write them as in "Love - Hate".')
    return toward.strip(), away.strip()


def read_pairs(path: Path) -> list[Pair]:
    """Pairs from JSON lines: Anthropic's evals format, or {positive, negative}. Raises InvalidInput naming the line."""
    found: list[Pair] = []
    for number, line in _lines(path):
        item = _json(path, number, line, _FORMS)
        if not isinstance(item, dict):
            raise _unusable(path, number, f"a JSON object is needed, not {line[:40]!r}", _FORMS)
        if "question" in item:
            question = _text(path, number, item["question"], _FORMS)
            answers = [
                _text(path, number, item.get(key), _FORMS)
                for key in ("answer_matching_behavior", "answer_not_matching_behavior")
            ]
            found.append((_answered(question, answers[0]), _answered(question, answers[1])))
        elif "positive" in item and "negative" in item:
            found.append((_side(path, number, item["positive"]), _side(path, number, item["negative"])))
        else:
            raise _unusable(path, number, f"it has the keys {', '.join(map(str, item)) or 'none'}", _FORMS)
    if not found:
        raise InvalidInput(f"{path} holds no pair.", hint=_FORMS)
    return found


def read_side(path: Path) -> list[Chat]:
    """One side of two sets: plain lines, each a question, or JSON lines. Raises InvalidInput naming the line."""
    found = [
        _side(path, number, _json(path, number, line, _SIDE_FORMS) if line[0] in '{["' else line)
        for number, line in _lines(path)
    ]
    if not found:
        raise InvalidInput(f"{path} holds no line.", hint=_SIDE_FORMS)
    return found


def _answered(question: str, answer: str) -> list[Message]:
    return [Message("user", question), Message("assistant", answer)]


def _side(path: Path, number: int, value: Any) -> Chat:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, dict):
        if "messages" in value:
            return _side(path, number, value["messages"])
        if "prompt" in value:
            prompt = _text(path, number, value["prompt"], _SIDE_FORMS)
            return _answered(prompt, _text(path, number, value["answer"], _SIDE_FORMS)) if "answer" in value else prompt
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return [_message(turn) for turn in value]
    raise _unusable(path, number, f"{str(value)[:40]!r} is neither a question nor a chat", _SIDE_FORMS)


def _message(turn: Mapping[str, str]) -> Message:
    role, content = turn.get("role"), turn.get("content")
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        raise InvalidInput(
            f"{dict(turn)!r} is no turn of a chat.", hint='Write {"role": "user", "content": "…"}.', turn=dict(turn)
        )
    return Message(role, content)  # type: ignore[arg-type]


def _lines(path: Path) -> list[tuple[int, str]]:
    return [(number, line.strip()) for number, line in read_lines(path, "Give the path of a UTF-8 text file.")]


def _json(path: Path, number: int, line: str, forms: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise _unusable(path, number, f"not JSON ({error})", forms) from error


def _text(path: Path, number: int, value: Any, forms: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _unusable(path, number, f"{value!r} stands where a text is needed", forms)
    return value


def _unusable(path: Path, number: int, why: str, hint: str) -> InvalidInput:
    return InvalidInput(f"{path}, line {number}: {why}.", hint=hint, file=str(path), line=number)
