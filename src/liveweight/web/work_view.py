"""Reading that takes a while, as a job that the page follows: its progress, its result, its error.

Owns sending the job and showing how far it is, the same for every page that asks for one. A reload finds the job again.
Knows nothing of what is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nicegui import ui

from liveweight.errors import LiveweightError
from liveweight.ledger import Job
from liveweight.web.frame import Frame
from liveweight.web.parts import aside, button, problem, tag, tell

_POLL = 0.25  # seconds between two looks at a job


class WorkView:
    """A place on a page where the latest job of a kind about something is shown."""

    def __init__(self, frame: Frame, kind: str, show: Callable[[Mapping[str, Any]], None]) -> None:
        """`show` draws a result, in this view's place."""
        self._frame, self._kind, self._show = frame, kind, show
        self._subject = ""
        self._drawn: tuple[int, str] | None = None
        self._bar: Any = None
        self._said: Any = None
        self._box = tag("div", "", "stack", aria_live="polite")
        ui.timer(_POLL, self._look)

    def about(self, subject: str) -> bool:
        """Show the latest job about this; whether there is one that has not failed."""
        self._subject, self._drawn = subject, None
        self._box.clear()
        job = self._job()
        self._look()
        return job is not None and job.status not in ("failed", "cancelled")

    async def send(self, subject: str, request: dict[str, Any], *, changing: bool = False) -> None:
        """Ask for the work. Reading needs no editor's key; what the API asks one for is `changing`."""
        if not await self._may(changing):
            return
        jobs, author = self._frame.service.jobs, self._frame.visitor.author
        try:
            await aside(lambda: jobs.submit(self._kind, request, author=author))
        except LiveweightError as error:
            tell(f"{error.message} {error.hint}".strip(), "negative")
            return
        self.about(subject)

    def _job(self) -> Job | None:
        return self._frame.board.job_about(self._kind, self._subject)

    def _look(self) -> None:
        job = self._job()
        if job is None:
            return
        if (job.id, job.status) != self._drawn:
            self._drawn = job.id, job.status
            self._box.clear()
            with self._box:
                self._draw(job)
        if not job.ended and self._bar is not None:
            self._progress(job)

    def _draw(self, job: Job) -> None:
        if not job.ended:
            self._bar = tag("progress", "", aria_label="Progress")
            self._said = tag("p", "", "dim")
            with tag("div", "", "row"):
                button("Cancel", lambda: self._cancel(job))
        elif job.status == "done":
            self._show(job.result or {})
        elif job.status == "cancelled":
            tag("p", "Cancelled.")
        else:
            problem(job.error or {})

    def _progress(self, job: Job) -> None:
        progress = job.progress or {}
        of, done = int(progress.get("of") or 0), int(progress.get("done") or 0)
        if of:
            self._bar.props["max"], self._bar.props["value"] = of, done
        text = f"{progress.get('what') or 'Working'}…" if job.status == "running" else "Waiting for other work."
        if self._said.text != text:
            self._said.text = text

    async def _cancel(self, job: Job) -> None:
        if await self._may(job.author != self._frame.visitor.author):
            await aside(self._frame.service.jobs.cancel, job.id)

    async def _may(self, changing: bool) -> bool:
        """Whether this visitor may do what takes an editor, or else what takes any key; said aloud where not."""
        return await self._frame.allowed() is not None if changing else await self._frame.known()
