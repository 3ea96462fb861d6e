"""The fixed set of questions and texts on which the guard looks for collateral damage.

Owns what a probe is, where probes are read from, how a set is named by a hash, and which few probes are nearest to a
question. Does not know of models, of what they answer, or of budgets: a probe has no right answer, because the guard
compares a changed model with the unchanged one and not with the truth.

A probe file holds one JSON object a line, in one of three forms (`id` and `kind` may be left out):

    {"id": "fact-001", "kind": "fact", "prompt": "What is the capital of Canada?"}
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]}
    {"text": "Plain text on which the perplexity is measured."}
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Literal, cast

from liveweight.engines.base import Message, Role
from liveweight.errors import InvalidInput
from liveweight.line_files import read_lines

ProbeForm = Literal["prompt", "messages", "text"]

TEXT_KIND = "text"
DEFAULT_CHAT_KIND = "chat"
BUILT_IN = "probes.jsonl"
CHARACTER_NGRAMS = (2, 3, 4)  # short ones serve scripts that put no spaces between words
# Of the probes that `screen` returns, one in so many (one at least) is kept for kinds that the nearest ones left out.
SPREAD_SHARE = 3

_FORMS: tuple[ProbeForm, ...] = ("prompt", "messages", "text")
_ROLES = ("system", "user", "assistant")
_WAY_OUT = 'Each line is one JSON object such as {"prompt": "What is the capital of Canada?"} or {"text": "..."}.'
_WORD = re.compile(r"[\w\u0900-\u0dff\u0e00-\u0e7f]+")  # Indic and Thai vowel signs are not \w


@dataclass(frozen=True)
class Probe:
    """One thing to look at: a chat that ends with a user's turn, or a plain text. Exactly one of the two is given."""

    id: str
    kind: str
    messages: tuple[Message, ...] = ()
    text: str = ""

    def __post_init__(self) -> None:
        """Refuse a probe that is neither a chat nor a text, or both.

        Raises:
            InvalidInput: naming the probe.
        """
        if bool(self.messages) == bool(self.text):
            raise InvalidInput(
                f"Probe {self.id!r} must have either messages or a text.", hint="Give exactly one of the two."
            )
        if self.messages and self.messages[-1].role != "user":
            raise InvalidInput(
                f"The chat of probe {self.id!r} ends with a turn of the {self.messages[-1].role}.",
                hint="Let its last message be the user's, so that there is something to answer.",
            )

    @property
    def is_chat(self) -> bool:
        """Whether the model is asked to answer it."""
        return bool(self.messages)

    @property
    def question(self) -> str:
        """The last user turn of a chat, or the text itself."""
        return self.messages[-1].content if self.messages else self.text

    @cached_property
    def hash(self) -> str:
        """Sha256 (hex) of what the model reads; the id and the kind are names and leave it alone."""
        if self.messages:
            return _sha256({"messages": [[message.role, message.content] for message in self.messages]})
        return _sha256({"text": self.text})

    def asks(self, question: str) -> bool:
        """Whether it asks just this, but for case, spacing and punctuation.

        A change on a question must not be blamed for changing the answer to that same question.
        """
        return self.is_chat and normalised(self.question) == normalised(question)


@dataclass(frozen=True)
class ProbeSet:
    """Probes in a fixed order."""

    probes: tuple[Probe, ...]

    def __post_init__(self) -> None:
        """Refuse two probes of one id.

        Raises:
            InvalidInput: naming the id.
        """
        for id_, times in Counter(probe.id for probe in self.probes).items():
            if times > 1:
                raise InvalidInput(f"{times} probes have the id {id_!r}.", hint="Give every probe an id of its own.")

    def __len__(self) -> int:
        return len(self.probes)

    def __iter__(self) -> Iterator[Probe]:
        return iter(self.probes)

    @property
    def chats(self) -> tuple[Probe, ...]:
        """The probes that the model answers, in order."""
        return tuple(probe for probe in self.probes if probe.is_chat)

    @property
    def texts(self) -> tuple[Probe, ...]:
        """The probes on which the perplexity is measured, in order."""
        return tuple(probe for probe in self.probes if not probe.is_chat)

    @property
    def kinds(self) -> dict[str, int]:
        """How many probes there are of each kind, in order of first appearance."""
        return dict(Counter(probe.kind for probe in self.probes))

    @cached_property
    def hash(self) -> str:
        """Sha256 (hex) of the whole content in its order: ids, kinds, messages and texts."""
        return _sha256([[probe.id, probe.kind, probe.hash] for probe in self.probes])

    def screen(self, query: str, count: int) -> list[Probe]:
        """The chats nearest to a question in their wording, and some of other kinds; at most `count` of them.

        Nearness is the cosine of TF-IDF vectors over words and over 2- to 4-grams of characters within words. About
        one place in three goes to the nearest probe of a kind not yet chosen, since damage is not always done next
        door. The order is: nearest first, then the spread. Chats that ask the query itself are left out. The same
        query on the same set gives the same list always.

        Args:
            query: any text in any language, usually the question whose answer is about to change.
            count: how many probes are wished for; all that there are, where that is fewer.

        Raises:
            InvalidInput: if `count` is negative.

        Source:
            Salton and Buckley 1988, "Term-weighting approaches in automatic text retrieval".
        """
        if count < 0:
            raise InvalidInput(f"Cannot screen with {count} probes.", hint="Give a count of 0 or more.")
        vector = self._index.vector(query)
        scored = [
            (-_dot(vector, known), place, probe)  # ties go to the earlier probe
            for place, (probe, known) in enumerate(zip(self.chats, self._index.vectors, strict=True))
            if not probe.asks(query)
        ]
        ranked = [probe for _, _, probe in sorted(scored, key=lambda entry: entry[:2])]
        spread = max(1, count // SPREAD_SHARE) if count > 1 else 0
        chosen = ranked[: count - spread]
        rest = ranked[len(chosen) :]
        while rest and len(chosen) < count:
            times = Counter(probe.kind for probe in chosen)
            following = min(rest, key=lambda probe: times[probe.kind])  # min keeps the nearest among equals
            chosen.append(following)
            rest.remove(following)
        return chosen

    @cached_property
    def _index(self) -> _Index:
        return _Index.of([probe.question for probe in self.chats])


def load_probes(path: Path | None = None) -> ProbeSet:
    """The built-in probe set, or a person's own from a JSON Lines file (UTF-8; blank lines are skipped).

    Raises:
        InvalidInput: naming the file and the line, if the file cannot be read, is empty, or a line is no probe.
    """
    hint = "Give the path of a readable JSON Lines file, or leave it out for the built-in probes."
    with resources.as_file(resources.files("liveweight.guard") / BUILT_IN) as built_in:
        lines = read_lines(path or built_in, hint)
    name = str(path or BUILT_IN)
    probes: list[Probe] = []
    first_line: dict[str, int] = {}
    for number, line in lines:
        probe = _parse(line, name, number)
        if probe.id in first_line:
            raise _unusable(name, number, f"the id {probe.id!r} was already used on line {first_line[probe.id]}")
        first_line[probe.id] = number
        probes.append(probe)
    if not probes:
        raise InvalidInput(f"The probe file {name} holds no probe.", hint=_WAY_OUT)
    return ProbeSet(tuple(probes))


def normalised(text: str) -> str:
    """The words of a text in lower case with single spaces between: what is left when form is set aside."""
    return " ".join(_words(text))


@dataclass(frozen=True)
class _Index:
    """Unit TF-IDF vectors of the known questions; vectors are sparse maps from feature to weight."""

    rarity: Mapping[str, float]  # inverse document frequency of each feature
    unseen: float  # that of a feature no question has
    vectors: tuple[Mapping[str, float], ...]

    @classmethod
    def of(cls, questions: list[str]) -> _Index:
        """Count the features of all questions, then weigh each question's own."""
        counts = [_features(question) for question in questions]
        documents = Counter(feature for features in counts for feature in features)
        rarity = {feature: math.log((1 + len(questions)) / times) for feature, times in documents.items()}
        unseen = math.log(1 + len(questions))
        return cls(rarity, unseen, tuple(_weighed(features, rarity, unseen) for features in counts))

    def vector(self, text: str) -> Mapping[str, float]:
        """The unit vector of any text."""
        return _weighed(_features(text), self.rarity, self.unseen)


def _weighed(features: Counter[str], rarity: Mapping[str, float], unseen: float) -> dict[str, float]:
    weights = {name: (1 + math.log(times)) * rarity.get(name, unseen) for name, times in features.items()}
    length = math.sqrt(math.fsum(weight * weight for weight in weights.values()))
    return {name: weight / length for name, weight in weights.items()} if length else {}


def _dot(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    # fsum is exact, so the result doesn't hang on the order of the features.
    return math.fsum(weight * other[feature] for feature, weight in one.items() if feature in other)


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _features(text: str) -> Counter[str]:
    features: Counter[str] = Counter()
    for word in _words(text):
        features["=" + word] += 1  # the mark keeps whole words apart from n-grams
        padded = f" {word} "
        for size in CHARACTER_NGRAMS:
            features.update(padded[start : start + size] for start in range(len(padded) - size + 1))
    return features


def _sha256(value: object) -> str:
    canonical = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def _unusable(name: str, number: int, reason: str) -> InvalidInput:
    return InvalidInput(f"{name}, line {number}: {reason}.", hint=_WAY_OUT, file=name, line=number)


def _parse(line: str, name: str, number: int) -> Probe:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise _unusable(name, number, f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise _unusable(name, number, "brackets nested too deeply") from error
    if not isinstance(item, dict):
        raise _unusable(name, number, f"a JSON object is needed, not {line.strip()[:40]!r}")
    unknown = sorted(set(item) - {"id", "kind", *_FORMS})
    if unknown:
        raise _unusable(name, number, f"unknown key {unknown[0]!r}")
    given = [form for form in _FORMS if form in item]
    if len(given) != 1:
        what = "none of them" if not given else " and ".join(given)
        raise _unusable(name, number, f"exactly one of prompt, messages and text is needed, and here is {what}")
    form = given[0]
    id_ = _string(item.get("id", f"line-{number:04d}"), "id", name, number)
    kind = _string(item.get("kind", TEXT_KIND if form == "text" else DEFAULT_CHAT_KIND), "kind", name, number)
    if (kind == TEXT_KIND) != (form == "text"):
        raise _unusable(name, number, f"the kind {kind!r} does not go with {form!r}")
    if form == "text":
        return Probe(id_, kind, text=_string(item["text"], "text", name, number))
    if form == "prompt":
        return Probe(id_, kind, messages=(Message("user", _string(item["prompt"], "prompt", name, number)),))
    messages = _messages(item["messages"], name, number)
    if messages[-1].role != "user":
        raise _unusable(name, number, f"the last message is the {messages[-1].role}'s; it must be the user's")
    return Probe(id_, kind, messages=messages)


def _string(value: object, key: str, name: str, number: int) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _unusable(name, number, f"{key!r} must be a string that is not empty, not {value!r}")
    return value


def _messages(value: object, name: str, number: int) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _unusable(name, number, "'messages' must be a list with at least one message")
    messages: list[Message] = []
    for turn in value:
        if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
            raise _unusable(name, number, f"a message has just a role and a content, not {turn!r}")
        if turn["role"] not in _ROLES:
            raise _unusable(name, number, f"the role {turn['role']!r} is none of {', '.join(_ROLES)}")
        messages.append(Message(cast("Role", turn["role"]), _string(turn["content"], "content", name, number)))
    return tuple(messages)
