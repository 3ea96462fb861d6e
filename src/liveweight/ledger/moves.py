"""Write-ahead: what is to happen to the weights is written before it happens, and closed after.

Owns which states a change can go through, and the three ways an intent ends: finished, abandoned, or found open after
a killed process. Knows nothing of engines and files; every function works inside the caller's transaction.

    intended ──> active <──> off ──> undone (final)
        │           └────────────────^
        └──> failed (final)              refused (final: the guard said no, nothing was intended)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from liveweight.errors import InvalidInput, StateConflict
from liveweight.ledger import once, reading
from liveweight.ledger.actor import actor
from liveweight.ledger.records import ChangeState, IntendedMove, Move, Proposal, plain
from liveweight.ledger.tables import ChangeRow, EventRow, FeedbackRow, IntentRow, ReportRow, now

_ALLOWED: Mapping[str, frozenset[str]] = {
    "active": frozenset({"off", "undone"}),
    "off": frozenset({"active", "undone"}),
}
_FINAL = {
    "undone": "was undone, which is final",
    "refused": "was refused, so it never changed the model",
    "failed": "failed, so it never changed the model",
    "intended": "is still being made",
}


def note(
    session: Session, kind: str, subject: str, model: str | None, details: Mapping[str, Any] | None = None
) -> None:
    """Add a line to the journal, with the name of who is at work."""
    line = EventRow(kind=kind, subject=subject, model_hash=model, details=plain(details or {}), made_by=actor().name)
    session.add(line)


def insert_change(
    session: Session, proposal: Proposal, blob: str | None, state: Literal["intended", "refused"], reason: str = ""
) -> ChangeRow:
    """Write a proposal down as the last change of its model; in place of what an earlier run of the same job began."""
    reading.require_model(session, proposal.model)
    strength = _strength(proposal.strength)
    if proposal.feedback is not None and session.get(FeedbackRow, proposal.feedback) is None:
        raise InvalidInput(f"There is no feedback {proposal.feedback}.", hint="Record it with add_feedback first.")
    adjustment, key = proposal.adjustment, proposal.key
    tree, _ = adjustment.to_parts()
    row = once.change(session, proposal) or _last(session, proposal.model)
    row.state = state
    row.strength = strength
    row.name = adjustment.name
    row.method = adjustment.method
    row.adjustment_hash = adjustment.hash
    row.adjustment = tree
    row.blob_hash = blob
    row.feedback_id = proposal.feedback
    row.question = proposal.question
    row.wanted = proposal.wanted
    row.prompt_hash = proposal.prompt_hash
    row.key_layer = None if key is None else key.layer
    row.key_vector = reading.key_bytes(key)
    row.forced = proposal.forced
    row.reason = reason
    row.made_by, row.job_id = actor().name, actor().job
    session.add(row)
    session.flush()
    session.add(ReportRow(change_id=row.id, report=plain(proposal.report)))
    what = {"name": row.name, "method": row.method, "adjustment": row.adjustment_hash, "strength": strength}
    note(session, state, f"c{row.id}", row.model_hash, what | {"forced": row.forced, "reason": reason})
    return row


def _last(session: Session, model: str) -> ChangeRow:
    last = session.scalar(select(func.max(ChangeRow.position)).where(ChangeRow.model_hash == model))
    return ChangeRow(model_hash=model, position=(last or 0) + 1)


def open_intent(session: Session, model: str, moves: Sequence[IntendedMove], change: int | None) -> IntentRow:
    """Write down what is about to happen. Raises StateConflict while something else is being done to this model."""
    other = reading.open_intent(session, model)
    if other is not None:
        busy = ", ".join(f"c{move['change']}" for move in other.moves)
        raise StateConflict(
            f"{busy} is being changed just now.", hint="Wait for it; after a crash, call recover.", intent=other.id
        )
    row = IntentRow(
        model_hash=model, change_id=change, moves=[move.model_dump() for move in moves], status="open", reason=""
    )
    session.add(row)
    session.flush()
    if change is None:
        for move in moves:
            note(session, "intended", f"c{move.change}", model, move.model_dump() | {"intent": row.id})
    return row


def first_move(row: ChangeRow) -> IntendedMove:
    """A new change's way into the model."""
    return IntendedMove(
        change=row.id, from_state="intended", from_strength=row.strength, to_state="active", to_strength=row.strength
    )


def plan(row: ChangeRow, wish: Move) -> IntendedMove:
    """What `wish` means for this change. Raises StateConflict when its state forbids it or nothing would move."""
    label = f"c{row.id}"
    if row.state in _FINAL:
        hint = "Wait for it." if row.state == "intended" else "Give the feedback again to make a new change."
        raise StateConflict(f"{label} {_FINAL[row.state]}.", hint=hint, change=label, state=row.state)
    target = wish.to or row.state
    strength = row.strength if wish.strength is None else _strength(wish.strength)
    if target == row.state and strength == row.strength:
        raise StateConflict(
            f"{label} is {row.state} at strength {row.strength:g} already.",
            hint="Nothing was changed.",
            change=label,
            state=row.state,
        )
    if target != row.state and target not in _ALLOWED[row.state]:
        raise StateConflict(
            f"{label} cannot go from {row.state} to {target}.", hint="It can be active, off or undone.", change=label
        )
    return IntendedMove.model_validate(
        {
            "change": row.id,
            "from_state": row.state,
            "from_strength": row.strength,
            "to_state": target,
            "to_strength": strength,
        }
    )


def finish(session: Session, intent: IntentRow, details: Mapping[str, Any]) -> None:
    """The weights are as intended: make the ledger say so."""
    _require_open(intent)
    for move in _moves(intent):
        row = reading.find_change(session, move.change)
        row.state, row.strength = move.to_state, move.to_strength
        replaced = intent.change_id is not None and move.change != intent.change_id
        if replaced:
            row.replaced_by = intent.change_id
        elif move.to_state == "active":
            row.replaced_by = None
        if move.to_state == "undone" and row.replaced_by is not None:  # what it had replaced is its successor's now
            before = update(ChangeRow).where(ChangeRow.replaced_by == row.id)
            session.execute(before.values(replaced_by=row.replaced_by))
        kind = "replaced" if replaced else "strength" if move.from_state == move.to_state else str(move.to_state)
        what = dict(details) | move.model_dump() | {"intent": intent.id}
        if replaced:
            what["replaced_by"] = f"c{intent.change_id}"
        note(session, kind, f"c{row.id}", row.model_hash, what)
    intent.status, intent.closed_at = "finished", now()


def abandon(session: Session, intent: IntentRow, reason: str, new_change_becomes: ChangeState = "failed") -> None:
    """The weights were not moved: what existed stays as it was, and a new change never came to be."""
    _require_open(intent)
    if intent.change_id is not None:
        row = reading.find_change(session, intent.change_id)
        row.state, row.reason = new_change_becomes, reason
        note(session, new_change_becomes, f"c{row.id}", row.model_hash, {"reason": reason, "intent": intent.id})
    else:
        for move in _moves(intent):
            note(session, "abandoned", f"c{move.change}", intent.model_hash, {"reason": reason, "intent": intent.id})
    intent.status, intent.reason, intent.closed_at = "abandoned", reason, now()


def recover(session: Session) -> list[str]:
    """Close what a killed process left open, and say in a sentence each what was done."""
    said: list[str] = []
    for intent in session.scalars(select(IntentRow).where(IntentRow.status == "open").order_by(IntentRow.id)):
        sentences: list[str] = []
        if intent.change_id is not None:
            row = reading.find_change(session, intent.change_id)
            sentences.append(
                f"c{row.id} ({row.name}) was being made when the program stopped and was never confirmed, so it is"
                f" off; nothing of it is lost, and `on c{row.id}` turns it on."
            )
        else:
            for move in _moves(intent):
                wished = move.to_state if move.to_state != move.from_state else f"strength {move.to_strength:g}"
                sentences.append(
                    f"c{move.change} was being moved to {wished} when the program stopped; it is"
                    f" {move.from_state} at strength {move.from_strength:g}, as before."
                )
        for move, sentence in zip(_moves(intent), sentences, strict=False):  # a new change says one for all its moves
            note(session, "recovered", f"c{move.change}", intent.model_hash, {"said": sentence})
        abandon(session, intent, "the program stopped before it was done", new_change_becomes="off")
        said += sentences
    return said


def _moves(intent: IntentRow) -> list[IntendedMove]:
    return [IntendedMove.model_validate(move) for move in intent.moves]


def _require_open(intent: IntentRow) -> None:
    if intent.status != "open":
        raise StateConflict(f"The intent {intent.id} is already {intent.status}.", hint="Each one is closed once.")


def _strength(value: float) -> float:
    if not math.isfinite(value):
        raise InvalidInput(f"The strength {value} is not finite.", hint="Use a number such as 1, 0.5 or 0.")
    return float(value)
