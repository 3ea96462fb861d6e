"""What all open pages of one server share.

Owns a number that grows whenever anything happens (each page polls it and reads anew when it has grown), the replies
under way, what people have begun to write into judgement cards, and which previews were discarded. Only the latter two
live in memory alone. Knows nothing of elements.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from liveweight.ledger import Job, acting_as
from liveweight.reports import Reply
from liveweight.web.talking import Talk

if TYPE_CHECKING:
    from liveweight.server.service import Service

_log = logging.getLogger(__name__)

_DRAFTS = 1000  # that are kept; the oldest goes first
_JOBS = 500  # of the past, among which those of a reply are found
_KINDS = ("feedback", "neuron", "neurons", "clamp", "guard")  # whose jobs the page shows again


@dataclass
class Draft:
    """A judgement card that is open and not sent yet."""

    wanted: str
    reasons: set[str]
    note: str = ""


class Board:
    """Shared by all pages of one service; safe to use from any thread."""

    def __init__(self, service: Service) -> None:
        """Hears of jobs from now on; of the ledger's events once `follow` runs. Blocks while it reads past jobs."""
        self.service = service
        self.talk = Talk(service, self.bump)
        self.drafts: dict[tuple[str, int], Draft] = {}  # by browser tab and reply
        self.discarded: set[int] = set()  # jobs whose preview nobody wants
        self._number = 0
        self._lock = threading.Lock()
        self._jobs: dict[tuple[str, str], Job] = {}  # the latest by kind and subject
        self._unsubscribe = service.jobs.subscribe(self._hear)
        for job in sorted(service.jobs.list(limit=_JOBS), key=lambda each: each.id):
            self._keep(job)

    @property
    def number(self) -> int:
        """Grows with everything that happens, but for the progress of jobs."""
        return self._number

    def bump(self) -> None:
        """Something happened: pages read anew."""
        with self._lock:
            self._number += 1

    def draft(self, tab: str, reply: int, draft: Draft) -> None:
        """Keep what somebody begins to write."""
        self.drafts[tab, reply] = draft
        while len(self.drafts) > _DRAFTS:
            self.drafts.pop(next(iter(self.drafts)))

    def feedback_job(self, reply: Reply) -> Job | None:
        """The latest job with feedback on a reply, by whichever of its ids it was named."""
        names = (str(reply.id), reply.label, reply.public_id or "")
        found = [job for name in names if (job := self._jobs.get(("feedback", name))) is not None]
        return max(found, key=lambda job: job.id, default=None)

    def job_about(self, kind: str, subject: str) -> Job | None:
        """The latest job of a kind about something: a neuron, a word."""
        return self._jobs.get((kind, subject))

    async def follow(self) -> None:
        """Hear of what the ledger writes, whoever caused it, until this task is cancelled."""
        try:
            async for _ in self.service.events.subscribe(after=None):
                self.bump()
        except Exception:  # pages still hear of jobs and of their own doings
            _log.exception("The page hears of no more events of the ledger.")

    def close(self) -> None:
        """Hear of nothing any more, and stop what is being said."""
        self._unsubscribe()
        self.talk.stop_all()

    def change(self, author: str, verb: Callable[..., Any], *arguments: Any) -> Any:
        """Carry out a verb that changes something, as `author`; pages then read anew. Blocks."""
        try:
            with acting_as(author):
                return verb(*arguments)
        finally:
            self.bump()

    def _hear(self, job: Job) -> None:
        with self._lock:
            before = self._jobs.get(_about(job))
            self._keep(job)
        if before is None or (before.id, before.status) != (job.id, job.status):
            self.bump()

    def _keep(self, job: Job) -> None:
        known = self._jobs.get(_about(job))
        if job.kind in _KINDS and (known is None or known.id <= job.id):
            self._jobs.pop(_about(job), None)
            self._jobs[_about(job)] = job
            while len(self._jobs) > 2 * _JOBS:
                self._jobs.pop(next(iter(self._jobs)))


def _about(job: Job) -> tuple[str, str]:
    """A job's kind and what it is about."""
    subject = {"feedback": "reply", "neuron": "neuron", "neurons": "find"}.get(job.kind)
    return job.kind, "" if subject is None else str(job.request.get(subject, ""))
