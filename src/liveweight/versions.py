"""The states that a model has been in, from the journal, and what it answers in each.

Owns folding the journal's lines into states and answering a prompt under two of them. Nothing stays in the model.
Blocks; knows nothing of how anything is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from liveweight.adjustments import Active, State
from liveweight.engines.base import Message
from liveweight.errors import InvalidInput
from liveweight.evidence import answer_under
from liveweight.ledger import Event, parse_id

if TYPE_CHECKING:
    from liveweight.live_model import LiveModel

_MOVES = ("active", "off", "undone", "strength", "replaced")
BASE = "base"
NOW = "now"


@dataclass(frozen=True)
class Moment:
    """The changes that were on behind one line of the journal, with their strengths."""

    event: int  # 0: before the first change
    said: str
    at: datetime | None
    on: tuple[tuple[int, float], ...]  # (change, strength), by change


def moments(events: Sequence[Event], model: str) -> list[Moment]:
    """The base, and the state behind each line of the journal that moved a change, oldest first.

    Lines of one step (a change that replaces another) are one moment.
    """
    found = [Moment(0, "the base model", None, ())]
    on: dict[int, float] = {}
    step: object = None
    for event in events:
        if event.kind not in _MOVES or event.model != model or not event.subject.startswith("c"):
            continue
        number = parse_id(event.subject, "c")
        if "to_state" not in event.details:  # a proposal that was only written down
            continue
        if event.details["to_state"] == "active":
            on[number] = float(event.details.get("to_strength", 1.0))
        else:
            on.pop(number, None)
        moment = Moment(event.id, _said(event), event.created_at, tuple(sorted(on.items())))
        same = step is not None and event.details.get("intent") == step
        if same:
            found[-1] = Moment(event.id, f"{found[-1].said}, {moment.said}", moment.at, moment.on)
        else:
            found.append(moment)
        step = event.details.get("intent")
    return found


def answers(live: LiveModel, prompt: str, chosen: Sequence[Moment | None]) -> list[str]:
    """The greedy answers to a question in each of these states; None is the state as it is now.

    Raises InvalidInput for an empty question, LedgerDamaged where a change's tensors are gone.
    """
    if not prompt.strip():
        raise InvalidInput("The question is empty.", hint="Type something to ask both versions.")
    engine = live.engine
    tokens = engine.encode([Message("user", prompt)])
    states = [engine.state if moment is None else state_at(live, moment) for moment in chosen]
    return [answer_under(engine, state, tokens)[0] for state in states]


def state_at(live: LiveModel, moment: Moment) -> State:
    """What the weights were then, from the ledger alone. Raises LedgerDamaged where a change's tensors are gone."""
    ledger = live.ledger
    positions = {record.id: record.position for record in ledger.changes(live.engine.info.hash)}
    ordered = sorted(moment.on, key=lambda pair: positions.get(pair[0], 0))
    return tuple(Active(ledger.adjustment(change), strength) for change, strength in ordered)


def _said(event: Event) -> str:
    words = {"active": "on", "undone": "undone", "off": "off", "replaced": "replaced"}
    if event.kind == "strength":
        return f"{event.subject} at strength {event.details.get('to_strength', 1.0):g}"
    return f"{event.subject} {words[event.kind]}"
