"""What a job writes it writes once, however often the program is stopped while it runs.

Owns how the rows are found again that an earlier run of the job at work wrote, so that the next run goes on with them
and adds no second. Outside of a job nothing is looked for: a person may say the same thing twice. Every function works
inside the caller's transaction.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from liveweight.ledger.actor import actor
from liveweight.ledger.records import Proposal
from liveweight.ledger.tables import ChangeRow, FeedbackRow, IntentRow, ProtectedRow


def feedback(session: Session, reply: int, verdict: str, wanted: str | None, reason: str | None) -> FeedbackRow | None:
    """This very feedback, where the job at work has given it."""
    if actor().job is None:
        return None
    query = select(FeedbackRow).where(FeedbackRow.job_id == actor().job, FeedbackRow.reply_id == reply)
    said = (verdict, wanted, reason)
    return next((row for row in session.scalars(query) if (row.verdict, row.wanted, row.reason) == said), None)


def protected(
    session: Session, token_ids: Sequence[int], feedback: int | None, change: int | None
) -> ProtectedRow | None:
    """This very answer, where it is protected already for the same feedback and change of the job at work."""
    if actor().job is None or feedback is None:
        return None
    query = select(ProtectedRow).where(ProtectedRow.feedback_id == feedback, ProtectedRow.active)
    rows = (row for row in session.scalars(query) if row.change_id == change)
    return next((row for row in rows if row.token_ids == list(token_ids)), None)


def change(session: Session, proposal: Proposal) -> ChangeRow | None:
    """What an earlier run of the job at work left of this change, to be made anew under the same id.

    That is one that was being made when the program stopped, and the very same proposal where it came to nothing.
    """
    if actor().job is None:
        return None
    query = select(ChangeRow).where(ChangeRow.job_id == actor().job, ChangeRow.model_hash == proposal.model)
    for row in session.scalars(query.order_by(ChangeRow.id)):
        same = (row.prompt_hash, row.adjustment_hash) == (proposal.prompt_hash, proposal.adjustment.hash)
        if (row.state == "off" and not was_active(session, row)) or (row.state in ("refused", "failed") and same):
            return row
    return None


def was_active(session: Session, row: ChangeRow) -> bool:
    """Whether a change was ever in the model: one that a kill cut off is off and never was anything else."""
    if row.state != "off":
        return row.state in ("active", "undone")
    moves = select(IntentRow.moves).where(IntentRow.model_hash == row.model_hash, IntentRow.status == "finished")
    return any(move["change"] == row.id for moved in session.scalars(moves) for move in moved)
