"""Feedback in bulk: records of what was asked, answered, and said of the answer.

Owns the form of a record, the spellings that other programs use, and reading a file of them. Knows nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from liveweight.engines.base import Message
from liveweight.errors import InvalidInput
from liveweight.line_files import read_lines

Rating = Literal["good", "bad"]

_NAMES = {
    "prompt": ("prompt", "question", "messages"),
    "answer": ("answer", "response", "completion", "output"),
    "rating": ("rating", "label", "feedback", "thumb"),
    "correction": ("correction", "corrected", "wanted", "expected"),
}
_RATINGS: dict[str, Rating] = {
    **dict.fromkeys(("good", "up", "thumbs_up", "+1", "1", "true", "like", "positive"), "good"),
    **dict.fromkeys(("bad", "down", "thumbs_down", "-1", "0", "false", "dislike", "negative"), "bad"),
}


class Lesson(BaseModel):
    """One record. A correction makes it a fix; without one the rating says whether the answer was good or bad."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    prompt: str
    answer: str | None = None  # what was answered then; None: what the model answers now is judged
    rating: Rating | None = None
    correction: str | None = None
    before: tuple[Message, ...] = ()  # the turns before the prompt, where it was asked in a chat
    number: int = 0  # of its line

    @field_validator("correction")
    @classmethod
    def _some_text(cls, text: str | None) -> str | None:
        """A blank correction is none."""
        return (text or "").strip() or None

    @property
    def chat(self) -> tuple[Message, ...]:
        """What was asked, behind what came before it."""
        return (*self.before, Message("user", self.prompt))

    @property
    def kind(self) -> Literal["fix", "bad", "good"]:
        """What it asks for."""
        return "fix" if self.correction else (self.rating or "good")


def read_lessons(path: Path) -> list[Lesson]:
    """The records of a JSON Lines file. Raises InvalidInput that names the file and the line."""
    found = [_lesson(line, number, path) for number, line in read_lines(path, "Give a JSON Lines file of feedback.")]
    if not found:
        raise InvalidInput(f"{path} holds no feedback.", hint='A line is {"prompt": "…", "correction": "…"}.')
    return found


def _lesson(line: str, number: int, path: Path) -> Lesson:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidInput(f"Line {number} of {path} is not JSON: {error}.", hint="Mend or remove it.") from error
    if not isinstance(record, Mapping):
        raise InvalidInput(f"Line {number} of {path} is not a record.", hint='A line is {"prompt": "…", …}.')
    try:
        return lesson(record, number)
    except InvalidInput as error:
        raise InvalidInput(f"Line {number} of {path}: {error.message}", hint=error.hint) from error


def _chat(turns: list[Any], answer: Any) -> dict[str, Any]:
    """What a record's messages say: the last question, what came before it, and what was answered to it."""
    try:
        said = [Message(turn["role"], turn["content"]) for turn in turns]
        asked = max(place for place, turn in enumerate(said) if turn.role == "user")
        if not all(turn.role in ("system", "user", "assistant") and isinstance(turn.content, str) for turn in said):
            raise TypeError
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            "its messages are no chat with a question.", hint='Each one is {"role": "user", "content": "…"}.'
        ) from error
    behind = [turn.content for turn in said[asked + 1 :]]
    return {
        "prompt": said[asked].content,
        "before": tuple(said[:asked]),
        "answer": answer if answer is not None or not behind else behind[0],
    }


def lesson(record: Mapping[str, Any], number: int = 0) -> Lesson:
    """One record in any of the known spellings. Raises InvalidInput."""
    values: dict[str, Any] = {}
    for name, spellings in _NAMES.items():
        values[name] = next((record[each] for each in spellings if record.get(each) is not None), None)
    if isinstance(values["prompt"], list):
        values |= _chat(values["prompt"], values["answer"])
    if values["rating"] is not None:
        key = str(values["rating"]).strip().lower()
        if key not in _RATINGS:
            raise InvalidInput(f"{values['rating']!r} is not a rating.", hint="Write good or bad.")
        values["rating"] = _RATINGS[key]
    try:
        found = Lesson(**values, number=number)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(
            f"its {where} cannot be {first['input']!r}.", hint="It needs a prompt, and a correction or a rating."
        ) from error
    if not found.prompt.strip() or not (found.correction or found.rating):
        raise InvalidInput(
            "it says neither what is right nor whether the answer was good.",
            hint="It needs a prompt, and a correction or a rating.",
        )
    return found
