"""Jobs: longer work that a server was asked for, in the order in which it came.

Owns what is written of a job, and that every step of one is durable when the call returns. Knows nothing of what a job
does, nor of threads: a runner takes the next one and says what became of it.

    queued ──> running ──> done | failed | cancelled
      │  ^────────┘ (the program was stopped)
      └──> cancelled
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from liveweight.errors import IdempotencyConflict, InvalidInput, QueueFull
from liveweight.ledger import once, reading
from liveweight.ledger.access import Access
from liveweight.ledger.records import Change, Job, JobStatus, plain
from liveweight.ledger.tables import ChangeRow, JobRow, now

_KEY_LENGTH = 255
_RETRY_AFTER = 10  # seconds, for who finds no room


class Queue(Access):
    """The part of a ledger that remembers jobs."""

    def add_job(
        self,
        kind: str,
        request: Mapping[str, Any],
        *,
        author: str = "",
        idempotency_key: str | None = None,
        room: int | None = None,
    ) -> tuple[Job, bool]:
        """A new job at the end of the queue, and True; or the one that this author asked for with the same key.

        Raises IdempotencyConflict where the key belongs to another request, QueueFull where `room` jobs wait already,
        InvalidInput for a key that is none.
        """
        asked = plain(dict(request))
        if idempotency_key is not None:
            _require_key(idempotency_key)
        with self._write() as session:
            known = _asked_before(session, author, idempotency_key)
            if known is not None:
                if (known.kind, known.request) != (kind, asked):
                    raise IdempotencyConflict(
                        f"The idempotency key {idempotency_key!r} was used for another request, j{known.id}.",
                        hint="Use a new key for each request, and the same one only to send it again.",
                        job=f"j{known.id}",
                    )
                return reading.to_record(Job, known), False
            waiting = session.scalar(select(func.count()).where(JobRow.status == "queued")) or 0
            if room is not None and waiting >= room:
                raise QueueFull(
                    f"{waiting} jobs are waiting already.",
                    hint="Try again when some are done.",
                    retry_after=_RETRY_AFTER,
                )
            row = JobRow(kind=kind, status="queued", author=author, request=asked, idempotency_key=idempotency_key)
            session.add(row)
            session.flush()
            return reading.to_record(Job, row), True

    def job(self, job: int | str) -> Job:
        """The job of that id: 12 or "j12". Raises UnknownJob."""
        with self._read() as session:
            return reading.to_record(Job, reading.find(session, JobRow, job, "j"))

    def jobs(self, *, status: JobStatus | None = None, limit: int | None = None) -> list[Job]:
        """The jobs, newest first."""
        query = select(JobRow).order_by(JobRow.id.desc()).limit(limit)
        if status is not None:
            query = query.where(JobRow.status == status)
        with self._read() as session:
            return [reading.to_record(Job, row) for row in session.scalars(query)]

    def start_job(self) -> Job | None:
        """Begin the job that has waited longest; None where none waits."""
        with self._write() as session:
            row = session.scalar(select(JobRow).where(JobRow.status == "queued").order_by(JobRow.id).limit(1))
            if row is None:
                return None
            row.status, row.started_at, row.starts = "running", now(), row.starts + 1
            session.flush()
            return reading.to_record(Job, row)

    def note_progress(self, job: int, progress: Mapping[str, Any]) -> None:
        """Remember how far a running job is."""
        with self._write() as session:
            reading.find(session, JobRow, job, "j").progress = plain(dict(progress))

    def ask_to_cancel(self, job: int | str) -> Job:
        """Cancel a job that waits; ask one that runs to stop. One that has ended stays as it is. Raises UnknownJob."""
        with self._write() as session:
            row = reading.find(session, JobRow, job, "j")
            if row.status == "queued":
                row.status, row.ended_at = "cancelled", now()
            if row.status in ("running", "cancelled"):
                row.cancel_asked = True
            session.flush()
            return reading.to_record(Job, row)

    def end_job(
        self,
        job: int,
        status: JobStatus,
        *,
        result: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
        progress: Mapping[str, Any] | None = None,
    ) -> Job:
        """Say what became of a running job, and how far it came."""
        with self._write() as session:
            row = reading.find(session, JobRow, job, "j")
            row.status, row.ended_at = status, now()
            row.result = None if result is None else plain(dict(result))
            row.error = None if error is None else plain(dict(error))
            if progress is not None:
                row.progress = plain(dict(progress))
            session.flush()
            return reading.to_record(Job, row)

    def put_back_job(self, job: int, *, counted: bool = True) -> Job:
        """Let a job that was running when the program stopped wait for its turn again: it is the oldest that waits.

        Where the program was stopped in order, its start is not counted.
        """
        with self._write() as session:
            row = reading.find(session, JobRow, job, "j")
            row.status, row.progress = "queued", None
            row.starts -= not counted
            session.flush()
            return reading.to_record(Job, row)

    def committed_by(self, job: int) -> list[Change]:
        """The changes that a job put into the model, whatever became of them since."""
        with self._read() as session:
            rows = session.scalars(select(ChangeRow).where(ChangeRow.job_id == job).order_by(ChangeRow.id))
            return [reading.to_record(Change, row) for row in rows if once.was_active(session, row)]


def _asked_before(session: Session, author: str, key: str | None) -> JobRow | None:
    if key is None:
        return None
    return session.scalar(select(JobRow).where(JobRow.author == author, JobRow.idempotency_key == key))


def _require_key(key: str) -> None:
    if not (0 < len(key) <= _KEY_LENGTH and key.isascii() and key.isprintable()):
        raise InvalidInput(
            "The idempotency key cannot be used.", hint=f"Use at most {_KEY_LENGTH} printable ASCII characters."
        )
