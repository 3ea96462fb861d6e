"""The values that the ledger gives and takes.

Owns the frozen records, the ids as people write them (`r12`, `c3`, `p1`, `j4`), and how any value becomes JSON. Knows
nothing of databases.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from liveweight.adjustments import Adjustment
from liveweight.errors import InvalidInput, UnknownChange, UnknownJob, UnknownReply

ChangeState = Literal["intended", "active", "off", "undone", "refused", "failed"]
Verdict = Literal["good", "bad", "fix"]
IntentStatus = Literal["open", "finished", "abandoned"]
JobStatus = Literal["queued", "running", "done", "failed", "cancelled"]
Role = Literal["chat", "editor"]
IdLetter = Literal["r", "c", "p", "j"]

_KINDS: dict[IdLetter, tuple[str, type[InvalidInput]]] = {
    "r": ("reply", UnknownReply),
    "c": ("change", UnknownChange),
    "p": ("protected answer", InvalidInput),
    "j": ("job", UnknownJob),
}


class Turnlike(Protocol):
    """Anything with a role and a content, such as an engine's message."""

    @property
    def role(self) -> str:
        """Who speaks: system, user or assistant."""

    @property
    def content(self) -> str:
        """What is said."""


class Record(BaseModel):
    """A frozen value read from the ledger; `model_dump(mode="json")` is what `--json` prints."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Turn(Record):
    """One turn of a chat as it was."""

    role: Literal["system", "user", "assistant"]
    content: str


class Spoken(Record):
    """What stands behind a chat. `messages` are the chat before it."""

    messages: tuple[Turn, ...]

    @property
    def question(self) -> str:
        """The last thing the person said."""
        return next((turn.content for turn in reversed(self.messages) if turn.role == "user"), "")


class KnownModel(Record):
    """A base checkpoint that this ledger has seen."""

    hash: str
    name: str
    source: str
    architecture: str
    created_at: datetime


class Reply(Spoken):
    """What a model answered; `details` hold what else the engine said.

    `public_id` is how an API's clients know it, `chat` the conversation that it belongs to, `after` the reply that it
    went on from.
    """

    id: int
    model: str
    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    version_number: int
    version_hash: str
    sampling: dict[str, Any]
    details: dict[str, Any]
    created_at: datetime
    public_id: str | None = None
    chat: str | None = None
    after: int | None = None

    @property
    def label(self) -> str:
        """The id as people read it."""
        return f"r{self.id}"


class Conversation(Record):
    """Replies that belong together. `title` is what the person said first, `newest` the last reply, at `at`."""

    id: str
    title: str
    newest: int
    at: datetime
    count: int


class Feedback(Record):
    """What a person said of a reply."""

    id: int
    reply: int
    verdict: Verdict
    wanted: str | None
    reason: str | None
    created_at: datetime


class Change(Record):
    """An adjustment in the ledger, without its tensors (`Ledger.adjustment` gives those).

    `made_by` is who made it, empty where nobody was named; `job` is the job that did.
    """

    id: int
    model: str
    position: int
    state: ChangeState
    strength: float
    name: str
    method: str
    adjustment_hash: str
    blob_hash: str | None
    feedback: int | None
    question: str
    wanted: str | None
    prompt_hash: str
    key_layer: int | None
    forced: bool
    replaced_by: int | None
    reason: str
    created_at: datetime
    updated_at: datetime
    made_by: str = ""
    job: int | None = None

    @property
    def label(self) -> str:
        """The id as people read it."""
        return f"c{self.id}"


class IntendedMove(Record):
    """One change's way from one state and strength to another."""

    change: int
    from_state: ChangeState
    from_strength: float
    to_state: ChangeState
    to_strength: float


class Intent(Record):
    """What is about to be done, all of it or nothing. `change` is the new change, where one is made."""

    id: int
    model: str
    change: int | None
    moves: tuple[IntendedMove, ...]
    status: IntentStatus
    reason: str
    created_at: datetime
    closed_at: datetime | None


class Release(Record):
    """A change overrules a protected answer, as long as it is on."""

    protected: int
    change: int


class ProtectedAnswer(Spoken):
    """An answer that changes must leave as it is."""

    id: int
    model: str
    answer: str
    token_ids: tuple[int, ...]
    feedback: int | None
    change: int | None
    active: bool
    created_at: datetime

    @property
    def label(self) -> str:
        """The id as people read it."""
        return f"p{self.id}"


class Event(Record):
    """One line of the journal."""

    id: int
    kind: str
    subject: str
    model: str | None
    details: dict[str, Any]
    created_at: datetime
    made_by: str = ""


class Job(Record):
    """Longer work that was asked of a server, and what became of it.

    `error` is an error as the API prints it, with its `status`; `cancel_asked` says that a running one is to stop;
    `starts` is how often it was begun, which is more than once where the program was stopped meanwhile.
    """

    id: int
    kind: str
    status: JobStatus
    author: str
    request: dict[str, Any]
    progress: dict[str, Any] | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    idempotency_key: str | None
    cancel_asked: bool
    starts: int
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None

    @property
    def label(self) -> str:
        """The id as people read it."""
        return f"j{self.id}"

    @property
    def ended(self) -> bool:
        """Whether nothing more will become of it."""
        return self.status not in ("queued", "running")

    def as_dict(self) -> dict[str, Any]:
        """As the API and `--json` print it."""
        return {"label": self.label, **self.model_dump(mode="json")}


class ApiKey(Record):
    """A key to a server, without what makes it one: its `shown` is how it begins."""

    id: int
    name: str
    role: Role
    shown: str
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None

    @property
    def label(self) -> str:
        """The id as people read it."""
        return f"k{self.id}"

    @property
    def may_edit(self) -> bool:
        """Whether it may change the model. Every key may chat and read."""
        return self.role == "editor"

    def as_dict(self) -> dict[str, Any]:
        """As the API and `--json` print it."""
        return {"label": self.label, **self.model_dump(mode="json")}


@dataclass(frozen=True)
class Key:
    """What a layer's MLP reads when the question is asked: two questions with like keys answer alike."""

    layer: int
    vector: Tensor  # (F,)


@dataclass(frozen=True)
class Proposal:
    """What is put into the ledger: an adjustment, what it is for, and what was measured of it."""

    model: str  # hash
    adjustment: Adjustment
    question: str
    prompt_hash: str
    report: Mapping[str, Any] = field(default_factory=dict)
    wanted: str | None = None
    feedback: int | None = None
    key: Key | None = None
    strength: float = 1.0
    forced: bool = False


@dataclass(frozen=True)
class Move:
    """A wish: another state, another strength, or both. What is None stays as it is."""

    change: int
    to: Literal["active", "off", "undone"] | None = None
    strength: float | None = None


def parse_id(written: str | int, letter: IdLetter) -> int:
    """The number in `c3`, `C3`, `3` or 3. Raises UnknownChange, UnknownReply or InvalidInput when it is no id."""
    kind, error = _KINDS[letter]
    text = str(written).strip()
    match = re.fullmatch(rf"{letter}?([0-9]+)", text, re.IGNORECASE | re.ASCII)
    if match is None:
        raise error(f"{text!r} is not the id of a {kind}.", hint=f"It looks like {letter}3.", id=text)
    return int(match[1].lstrip("0")[:12] or 0)  # no ledger holds that many; a longer one is unknown all the same


def speaking_id(written: str, what: str) -> str:
    """An id that somebody else chose, as a column of 64 characters takes it. Raises InvalidInput for another."""
    if re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", written, re.ASCII) is None:
        raise InvalidInput(
            f"{written[:80]!r} cannot be {what}.", hint="Use at most 64 letters, digits, dots, colons and hyphens."
        )
    return written


def unknown_id(number: int, letter: IdLetter, nearest: int | None) -> InvalidInput:
    """The error for an id that this ledger does not hold; `nearest` is one that it does."""
    kind, error = _KINDS[letter]
    hint = f"The ledger holds no {kind} yet." if nearest is None else f"The nearest is {letter}{nearest}."
    near = None if nearest is None else f"{letter}{nearest}"
    return error(f"There is no {kind} {letter}{number}.", hint=hint, id=f"{letter}{number}", nearest=near)


def plain(value: Any) -> Any:
    """`value` as JSON takes it: dataclasses and pydantic models as objects, tuples as lists.

    Numbers that JSON lacks become the strings "NaN", "Infinity" and "-Infinity". Raises InvalidInput for the rest.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, BaseModel):
        return plain(value.model_dump())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {part.name: plain(getattr(value, part.name)) for part in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes | bytearray):
        return [plain(part) for part in value]
    if isinstance(value, Tensor):
        return plain(value.tolist())
    raise InvalidInput(
        f"A {type(value).__name__} cannot be written to the ledger.", hint="Use text, numbers, lists and mappings."
    )


def to_json(value: Any) -> str:
    """`value` as JSON text that every database takes: readable, but escaped where UTF-8 cannot hold it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as a broken token can leave behind
        return json.dumps(value, ensure_ascii=True, allow_nan=False)
    return text


def turns_as_json(messages: Sequence[Turnlike | Mapping[str, str]]) -> list[dict[str, str]]:
    """Chat turns as JSON. Raises InvalidInput for an unknown role."""
    found: list[dict[str, str]] = []
    for message in messages:
        if isinstance(message, Mapping):
            role, content = message["role"], message["content"]
        else:
            role, content = message.role, message.content
        if role not in ("system", "user", "assistant"):
            raise InvalidInput(f"No chat has the role {role!r}.", hint="Use system, user or assistant.")
        found.append({"role": role, "content": content})
    return found
