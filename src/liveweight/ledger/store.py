"""The ledger: what was said, what was changed, and what the weights therefore are.

Owns the one object through which everything is written and read. Knows nothing of connections, nor of engines: a
model is the hash of its base, a state is a list of adjustments and strengths.

The order that keeps weights and ledger equal, whatever kills the process:

    change = ledger.intend(proposal)                  # on disk before a weight moves
    engine.become(ledger.state(model, intended=True))
    ledger.activate(change.id)                        # or fail(change.id, reason) where `become` raised

and likewise `intend_move`, `become`, `finish` (or `abandon`) for off, on, undo and strength. After a crash `recover`
closes what was left open, and `state` is what the weights have to become.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from liveweight.adjustments import Active, Adjustment, State
from liveweight.errors import (
    InvalidInput,
    LedgerDamaged,
    LiveweightError,
    StateConflict,
)
from liveweight.ledger import moves, once, reading
from liveweight.ledger.queue import Queue
from liveweight.ledger.records import (
    Change,
    ChangeState,
    Event,
    Intent,
    Key,
    Move,
    Proposal,
    ProtectedAnswer,
    Turnlike,
    plain,
    turns_as_json,
)
from liveweight.ledger.tables import ChangeRow, EventRow, IntentRow, ProtectedRow, ReleaseRow, ReportRow
from liveweight.ledger.talk import Talk

Id = int | str  # 3 or "c3"


class Ledger(Talk, Queue):
    """A workspace's ledger, opened with `Ledger.open` and closed with `close` or a with statement."""

    # ------------------------------------------------------------------------------------------ changes, written ahead

    def intend(self, proposal: Proposal, *, replaces: Sequence[Id] = ()) -> Change:
        """Put a change into the ledger before it is put into the weights; what it `replaces` goes off with it.

        Raises StateConflict while another change of this model is being made, NoSpace, WrongModel, UnknownChange.
        """
        with self._alone():
            blob = self._write_tensors(proposal.adjustment)
            with self._write() as session:
                row = moves.insert_change(session, proposal, blob, "intended")
                old = [reading.find_change(session, change, proposal.model) for change in replaces]
                away = [moves.plan(other, Move(other.id, "off")) for other in old]
                moves.open_intent(session, proposal.model, [moves.first_move(row), *away], row.id)
                return reading.to_record(Change, row)

    def activate(self, change: Id, details: Mapping[str, Any] | None = None) -> Change:
        """The weights now hold the change: mark it active, and what it replaces off, in one transaction."""
        with self._write() as session:
            row = reading.find_change(session, change)
            moves.finish(session, self._intent_of(session, row), details or {})
            session.flush()
            return reading.to_record(Change, row)

    def fail(self, change: Id, reason: str) -> Change:
        """The weights could not take the change: it never was."""
        with self._write() as session:
            row = reading.find_change(session, change)
            moves.abandon(session, self._intent_of(session, row), reason)
            session.flush()
            return reading.to_record(Change, row)

    def refuse(self, proposal: Proposal, reason: str) -> Change:
        """Remember a proposal that the guard refused, with its report."""
        with self._alone():
            blob = self._write_tensors(proposal.adjustment)
            with self._write() as session:
                return reading.to_record(Change, moves.insert_change(session, proposal, blob, "refused", reason))

    def intend_move(
        self, change: Id, to: ChangeState | None = None, *, strength: float | None = None, model: str | None = None
    ) -> Intent:
        """Write down that a change is to go active, off or undone, or to another strength, before the weights move."""
        if to not in (None, "active", "off", "undone"):
            raise InvalidInput(f"A change cannot be moved to {to!r}.", hint="Use active, off or undone.")
        with self._read() as session:
            row = reading.find_change(session, change, model)
            number, owner = row.id, row.model_hash
        return self.intend_moves(owner, [Move(number, to, strength)])

    def intend_moves(self, model: str, wishes: Sequence[Move]) -> Intent:
        """Several moves of one model at once, all or none.

        Raises StateConflict when a change's state does not allow it, WrongModel, UnknownChange, InvalidInput.
        """
        if len({wish.change for wish in wishes}) != len(wishes) or not wishes:
            raise InvalidInput("Each change can be moved once, and one at least.", hint="Name different changes.")
        with self._write() as session:
            rows = [reading.find_change(session, wish.change, model) for wish in wishes]
            planned = [moves.plan(row, wish) for row, wish in zip(rows, wishes, strict=True)]
            return reading.to_record(Intent, moves.open_intent(session, model, planned, None))

    def finish(self, intent: int, details: Mapping[str, Any] | None = None) -> Intent:
        """The weights are as intended: make it so in the ledger. Raises StateConflict when it is closed already."""
        with self._write() as session:
            row = _find_intent(session, intent)
            moves.finish(session, row, details or {})
            return reading.to_record(Intent, row)

    def abandon(self, intent: int, reason: str) -> Intent:
        """The weights were not moved: everything stays as it was. Raises StateConflict when it is closed already."""
        with self._write() as session:
            row = _find_intent(session, intent)
            moves.abandon(session, row, reason)
            return reading.to_record(Intent, row)

    def recover(self) -> list[str]:
        """Close what a killed process left half-made, and say in a sentence each what became of it."""
        with self._write() as session:
            return moves.recover(session)

    # ------------------------------------------------------------------------------------------ changes, read

    def change(self, change: Id, *, model: str | None = None) -> Change:
        """The change of that id. Raises UnknownChange, or WrongModel when it is not of `model`."""
        with self._read() as session:
            return reading.to_record(Change, reading.find_change(session, change, model))

    def changes(self, model: str | None = None, *, states: Sequence[ChangeState] | None = None) -> list[Change]:
        """The changes in ledger order, of one model or of all, in any state or in some."""
        with self._read() as session:
            return [reading.to_record(Change, row) for row in reading.changes(session, model, states)]

    def state(self, model: str, *, intended: bool = False) -> State:
        """What the weights have to be, from ledger and blobs alone; `intended` is what they are about to be.

        Raises LedgerDamaged naming the blob that is missing or not what was written.
        """
        with self._read() as session:
            found = reading.state_rows(session, model, intended=intended)
            return tuple(Active(self._rebuild(row), strength) for row, strength in found)

    def adjustment(self, change: Id) -> Adjustment:
        """A change's adjustment, whatever the change's state. Raises UnknownChange, LedgerDamaged."""
        with self._read() as session:
            return self._rebuild(reading.find_change(session, change))

    def report(self, change: Id) -> dict[str, Any]:
        """What was measured of a change, as last reported."""
        with self._read() as session:
            return reading.report(session, reading.find_change(session, change).id)

    def add_report(self, change: Id, report: Mapping[str, Any]) -> None:
        """Put a newer report before a change's earlier ones, which are kept."""
        with self._write() as session:
            row = reading.find_change(session, change)
            session.add(ReportRow(change_id=row.id, report=plain(report)))
            moves.note(session, "report", f"c{row.id}", row.model_hash)

    def key_of(self, change: Id) -> Key | None:
        """The key that was recorded with a change."""
        with self._read() as session:
            return reading.key_of(reading.find_change(session, change))

    def conflicts(
        self, model: str, prompt_hash: str, key: Key | None = None, *, wanted: str | None = None, threshold: float = 0.9
    ) -> list[Change]:
        """The active changes that a new one on this question would contradict.

        Those on the same prompt, or whose key at the same layer has a cosine above `threshold` with `key`; not those
        that want the same answer as `wanted`.
        """
        with self._read() as session:
            rows = reading.conflicts(session, model, prompt_hash, key, wanted, threshold)
            return [reading.to_record(Change, row) for row in rows]

    # ------------------------------------------------------------------------------------------ protected answers

    def protect(
        self,
        model: str,
        messages: Sequence[Turnlike | Mapping[str, str]],
        answer: str,
        token_ids: Sequence[int],
        *,
        feedback: int | None = None,
        change: Id | None = None,
    ) -> ProtectedAnswer:
        """Keep an answer from being changed. One that comes from a `change` counts only while that is active."""
        with self._write() as session:
            reading.require_model(session, model)
            origin = None if change is None else reading.find_change(session, change, model).id
            known = once.protected(session, token_ids, feedback, origin)
            if known is not None:
                return reading.to_record(ProtectedAnswer, known)
            row = ProtectedRow(
                model_hash=model,
                messages=turns_as_json(messages),
                answer=answer,
                token_ids=list(token_ids),
                feedback_id=feedback,
                change_id=origin,
                active=True,
            )
            session.add(row)
            session.flush()
            moves.note(session, "protected", f"p{row.id}", model, {"change": origin, "feedback": feedback})
            return reading.to_record(ProtectedAnswer, row)

    def protected(self, model: str, *, everything: bool = False, released: bool = False) -> list[ProtectedAnswer]:
        """The protected answers in force, with those that active changes overrule, or all that ever were."""
        with self._read() as session:
            return reading.protected(session, model, everything=everything, released=released)

    def release(self, answer: Id, change: Id) -> None:
        """Let a change overrule a protected answer, as long as it is on."""
        with self._write() as session:
            kept, over = reading.find(session, ProtectedRow, answer, "p"), reading.find_change(session, change)
            if session.get(ReleaseRow, (kept.id, over.id)) is None:
                session.add(ReleaseRow(protected_id=kept.id, change_id=over.id))
                moves.note(session, "released", f"p{kept.id}", kept.model_hash, {"change": over.id})

    def released_by(self, change: Id) -> list[int]:
        """The protected answers that a change overrules while it is on."""
        with self._read() as session:
            row = reading.find_change(session, change)
            return list(session.scalars(select(ReleaseRow.protected_id).where(ReleaseRow.change_id == row.id)))

    def unprotect(self, answer: Id) -> ProtectedAnswer:
        """Let an answer be changed again; the record stays. Raises InvalidInput for an unknown id."""
        with self._write() as session:
            row = reading.find(session, ProtectedRow, answer, "p")
            if row.active:
                row.active = False
                moves.note(session, "unprotected", f"p{row.id}", row.model_hash)
                session.flush()
            return reading.to_record(ProtectedAnswer, row)

    # ------------------------------------------------------------------------------------------ journal and upkeep

    def events(self, after: int | None = None, limit: int | None = None, *, subject: str | None = None) -> list[Event]:
        """The journal behind the line `after`, oldest first; with a limit, its beginning.

        Of one reply (`r3`), change (`c3`), protected answer (`p3`) or job (`j3`), or of everything.
        """
        with self._read() as session:
            return reading.events(session, after, subject, limit)

    def last_event(self) -> int:
        """The id of the journal's newest line; 0 where there is none."""
        with self._read() as session:
            return session.scalar(select(func.max(EventRow.id))) or 0

    def export(self) -> Iterator[dict[str, Any]]:
        """Everything, record by record, as JSON takes it; tensors stay in their blobs."""
        with self._read() as session:
            yield from reading.everything(session)

    def verify(self) -> list[str]:
        """Check the database and every blob that a change needs; one sentence a problem, none when all is well."""
        found: list[str] = []
        with self._read() as session:
            if self._engine.dialect.name == "sqlite":
                told = session.execute(text("PRAGMA integrity_check")).scalars()
                found += [f"The database: {line}." for line in told if line != "ok"]
                for table, row, *_ in session.execute(text("PRAGMA foreign_key_check")):
                    found.append(f"The database: row {row} of {table} refers to nothing.")
            for change in reading.changes(session, None, None):
                try:
                    self._rebuild(change)
                except LiveweightError as error:
                    found.append(f"c{change.id}: {error}")
        return found

    def prune_blobs(self) -> list[str]:
        """Remove the blobs that no change refers to, such as a killed process leaves. Gives their names."""
        with self._write() as session:
            needed = set(session.scalars(select(ChangeRow.blob_hash).where(ChangeRow.blob_hash.is_not(None))))
            return self.blobs.prune({name for name in needed if name is not None})

    # ------------------------------------------------------------------------------------------ inside

    def _write_tensors(self, adjustment: Adjustment) -> str | None:
        self._require_writable()
        _, tensors = adjustment.to_parts()
        return self.blobs.write(tensors) if tensors else None

    def _rebuild(self, row: ChangeRow) -> Adjustment:
        tensors = {} if row.blob_hash is None else self.blobs.read(row.blob_hash)
        hint = "Restore the workspace from a backup."
        try:
            adjustment = Adjustment.from_parts(row.adjustment, tensors)
        except InvalidInput as error:
            raise LedgerDamaged(f"c{row.id} cannot be read: {error}", hint=hint, change=f"c{row.id}") from error
        if adjustment.hash != row.adjustment_hash:
            raise LedgerDamaged(
                f"c{row.id} has the hash {adjustment.hash[:12]}, not {row.adjustment_hash[:12]} as recorded.",
                hint=hint,
                change=f"c{row.id}",
            )
        return adjustment

    @staticmethod
    def _intent_of(session: Session, row: ChangeRow) -> IntentRow:
        found = session.scalar(select(IntentRow).where(IntentRow.change_id == row.id, IntentRow.status == "open"))
        if found is None:
            raise StateConflict(
                f"c{row.id} is {row.state}, not being made.", hint="Use intend_move to turn it on.", change=f"c{row.id}"
            )
        return found


def _find_intent(session: Session, number: int) -> IntentRow:
    row = session.get(IntentRow, number)
    if row is None:
        raise InvalidInput(f"There is no intent {number}.", hint="Use the id that intend_move gave.")
    return row
