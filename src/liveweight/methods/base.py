"""What a method is given and what it gives back.

Owns the case (who asked what, what was answered, what is wished for, and the contexts a mend has to hold in) and the
shape of a method. Knows no method by name: the registry in `methods/__init__.py` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from liveweight.adjustments import Adjustment
from liveweight.engines.base import Message
from liveweight.engines.transformers import TransformersEngine
from liveweight.settings import MethodSettings

CaseKind = Literal["fix", "bad", "good"]
Answered = tuple[tuple[int, ...], tuple[int, ...]]  # the tokens of a prompt and of an answer to it


@dataclass(frozen=True)
class Context:
    """One way the question may come, and what the model should answer to it.

    It comes as a chat, or as a plain `text` that the model goes on with. `key` is where in the target the answer
    proper lies, behind its opening ("The capital of Angola is"): first token, and one past the last.
    """

    messages: tuple[Message, ...]
    prompt: tuple[int, ...]  # the whole prompt's tokens, template included
    target: tuple[int, ...]  # the answer to be given, as the model would write it right after the prompt
    key: tuple[int, int] = (0, 0)
    text: str = ""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and target."""
        return self.prompt + self.target


@dataclass(frozen=True)
class Case:
    """A judged answer, and everything a method may use to mend it.

    `contexts[0]` is the question as it was asked; `messages` are empty where that was a plain text to go on with. In a
    `fix` the targets hold the wished answer; in a `bad` they hold the model's own next best answer; in a `good` the
    answer that was given. Targets may differ: where the model opens its answer to another wording otherwise, the target
    follows that opening.
    """

    kind: CaseKind
    messages: tuple[Message, ...]
    answer: str  # the judged reply
    answer_tokens: tuple[int, ...]
    wanted: str  # the sentence to be said instead (or again)
    contexts: tuple[Context, ...]
    subject: str | None  # what the question is about, where it can be told
    others: tuple[Context, ...] = ()  # the same question about other things: to be left alone
    about: tuple[Context, ...] = ()  # other questions, about this thing and about others: to be left alone too
    previous: tuple[Answered, ...] = ()  # earlier changes' and protected answers
    broken: tuple[Answered, ...] = ()  # those of them that a first try would change
    careful: bool = False  # whether a first try would change too much that the case does not know of
    led_to: bool = False  # whether something else brings how the answer begins, and a method has to go on with it

    @property
    def key(self) -> tuple[int, int]:
        """Where in the first context's target the answer proper lies."""
        return self.contexts[0].key

    @property
    def question(self) -> str:
        """The last thing the person said, or the text to go on with."""
        if not self.messages:
            return self.contexts[0].text
        return next((m.content for m in reversed(self.messages) if m.role == "user"), self.messages[-1].content)


class Method(Protocol):
    """Proposes an adjustment; never writes. Raises NoMendFound, or Unsupported where the model does not allow it."""

    def __call__(self, engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
        """Propose an adjustment for a case."""
        ...


Joint = Callable[[Sequence[int]], Adjustment]  # the change for some of the cases, by number, without another search
Together = Callable[[TransformersEngine, Iterable[Case], MethodSettings], Joint]
Accept = Callable[[Adjustment], bool]  # whether a proposal works and stays in budget: what the ladder asks


@dataclass(frozen=True)
class Described:
    """A method and what a person should know before choosing it."""

    name: str
    propose: Method
    summary: str
    kinds: tuple[CaseKind, ...]
    together: Together | None = None  # one search for many cases, taken as they come
    tunes: tuple[str, ...] = ()  # the settings that it listens to and that are worth a search
    depth: float | None = None  # where it works when no layer is set, from 0 to 1
    by_subject: bool = False  # whether it needs to know what a question is about
    refits: bool = False  # whether it fits against `Case.broken`, and otherwise where the case says careful
