"""Long work, one piece after another, kept in the ledger across restarts.

Owns the worker thread and what becomes of a job: done, failed, cancelled, or gone on with after the program was
stopped. Knows nothing of what the work of a kind is, nor of HTTP.

A job that changes the model changes it once, whenever the process is killed. It works under `acting_as(author, job)`,
so the ledger writes its number into the change in the same transaction that announces it, and finds it again:

    killed before the change was written          the job is run again
    ... after its feedback was written            it is run again, and finds its feedback
    ... while the change was being made           it is run again, and makes the change anew under the same id
    ... after the change was active               it is done, with that change as its result
    ... after its end was written                 nothing is left to do
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from liveweight.errors import GenerationCancelled, InvalidInput, LiveweightError
from liveweight.ledger import Job, JobStatus, acting_as
from liveweight.ledger.records import plain
from liveweight.live_model import LiveModel

Request = dict[str, Any]
Listener = Callable[[Job], None]
Interruptible = Callable[[Callable[[], None]], AbstractContextManager[None]]

ROOM = 256  # jobs that may wait
_LOG = logging.getLogger(__name__)
_PROGRESS_WRITTEN = 1.0  # seconds between two
_AGAIN = 1.0  # seconds until an end that could not be written is tried again
_MOST_STARTS = 10  # a job that so often saw the program stopped is what stops it


class JobContext:
    """What the work of one job knows of it, and tells of itself."""

    def __init__(self, job: Job, runner: JobRunner) -> None:
        """Made by the runner."""
        self.job = job
        self._runner = runner

    @property
    def author(self) -> str:
        """Who asked for it."""
        return self.job.author

    def progress(self, what: str, done: int = 0, of: int = 0) -> None:
        """Say what is being done, and how much of how much of it is. Raises GenerationCancelled where it is to stop."""
        self._runner._progressed(self.job.id, {"what": what, "done": done, "of": of})

    def require_wanted(self) -> None:
        """Raises GenerationCancelled where the job is to stop."""
        self._runner._require_wanted()


Work = Callable[[JobContext, Request], Mapping[str, Any]]


class JobRunner:
    """Takes jobs, and works on them in one thread in the order in which they came. Safe to use from several threads."""

    def __init__(
        self,
        live: LiveModel,
        work: Mapping[str, Work],
        *,
        interruptible: Interruptible | None = None,
        many: Collection[str] = ("learn",),
        room: int = ROOM,
    ) -> None:
        """`work` is what each kind of job does; its result is JSON.

        `interruptible` gives a block in which the engine calls what it was given before each piece of work. The kinds
        in `many` may make several changes: stopped half-way they are run again, so they have to leave alone what is
        right already. `room` jobs may wait.
        """
        self._live, self._ledger = live, live.ledger
        self._work, self._many, self._room = dict(work), frozenset(many), room
        self._interruptible = interruptible
        self._changed = threading.Condition()
        self._listeners: tuple[Listener, ...] = ()
        self._running: Job | None = None
        self._progress: dict[str, Any] | None = None  # of the running job
        self._progress_written = 0.0
        self._cancelled = False  # the running job is to stop for good
        self._closing = False
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------------- its life

    def start(self) -> None:
        """Go on with what was left when the program stopped, then take what comes."""
        for job in sorted(self._ledger.jobs(status="running"), key=lambda each: each.id):
            self._resume(job)
        self._thread = threading.Thread(target=self._work_on, name="jobs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop. What is running is interrupted, and goes on at the next start. Closing twice does no harm."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # ------------------------------------------------------------------------------------------------- for callers

    def submit(self, kind: str, request: Request, *, author: str, idempotency_key: str | None = None) -> Job:
        """Take a job. It is on disk when this returns.

        The same author with the same idempotency key and request gets the job of the first time. Raises
        IdempotencyConflict for another request under the same key, QueueFull, InvalidInput for an unknown kind.
        """
        if kind not in self._work:
            raise InvalidInput(f"There is no job {kind!r}.", hint=f"Use {', '.join(sorted(self._work))}.")
        with self._changed:
            job, new = self._ledger.add_job(
                kind, request, author=author, idempotency_key=idempotency_key, room=self._room
            )
            if new:
                self._tell(job)
            return self._with_progress(job)

    def get(self, job: int | str) -> Job:
        """A job as it is now. Raises UnknownJob."""
        return self._with_progress(self._ledger.job(job))

    def list(self, limit: int | None = None, status: JobStatus | None = None) -> tuple[Job, ...]:
        """The jobs, newest first."""
        return tuple(self._with_progress(job) for job in self._ledger.jobs(status=status, limit=limit))

    def cancel(self, job: int | str) -> Job:
        """Cancel a job: at once where it waits, at its next step where it runs; one that has ended stays as it is.

        One that has put its change into the model before it hears of this is done, not cancelled. Raises UnknownJob.
        """
        with self._changed:
            found = self._ledger.ask_to_cancel(job)
            if found.status == "running" and self._running is not None and found.id == self._running.id:
                self._running, self._cancelled = found, True
            if found.cancel_asked:
                self._tell(found)
            return self._with_progress(found)

    def wait(self, job: int | str, timeout: float | None = None) -> Job:
        """The job once it has ended; or as it is when `timeout` seconds are over or the runner closes."""
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while True:
                found = self.get(job)
                left = None if until is None else until - time.monotonic()
                if found.ended or self._closing or (left is not None and left <= 0):
                    return found
                self._changed.wait(left)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Have `listener` called with a job at each change of its status or progress; what is returned ends that.

        It is called in the order of the changes, while the runner is held: it must not wait for another thread. What
        it raises is only logged.
        """

        def call(job: Job) -> None:  # of its own, so that one that is given twice can be taken away once
            listener(job)

        with self._changed:
            self._listeners = (*self._listeners, call)

        def end() -> None:
            with self._changed:
                self._listeners = tuple(each for each in self._listeners if each is not call)

        return end

    # ------------------------------------------------------------------------------------------------- the worker

    def _work_on(self) -> None:
        while (job := self._next()) is not None:
            self._run(job)

    def _next(self) -> Job | None:
        """The job that has waited longest, begun; waits for one, and gives None where the runner closes."""
        with self._changed:
            while not self._closing:
                try:
                    job = self._ledger.start_job()
                except LiveweightError as error:
                    _LOG.error("No job can be begun: %s", error.message)
                    self._changed.wait(_AGAIN)
                    continue
                if job is not None:
                    self._running, self._progress, self._cancelled = job, None, False
                    self._tell(job)
                    return job
                self._changed.wait()
            return None

    def _run(self, job: Job) -> None:
        """Do the work of a job, and write down what became of it."""
        around = nullcontext() if self._interruptible is None else self._interruptible(self._require_wanted)
        try:
            with acting_as(job.author, job=job.id), around:
                result = plain(dict(self._of_kind(job)(JobContext(job, self), job.request)))
        except GenerationCancelled:
            if self._closing and not self._cancelled:
                self._write(lambda: self._ledger.put_back_job(job.id, counted=False))
            else:
                self._end(job, "cancelled")
        except LiveweightError as error:
            self._end(job, "failed", error=told(error))
        except Exception as error:
            _LOG.error("%s (%s) failed inside: %s", job.label, job.kind, _without_text(error))
            self._end(job, "failed", error=_internal(job))
        else:
            self._end(job, "done", result=result)

    def _of_kind(self, job: Job) -> Work:
        work = self._work.get(job.kind)
        if work is None:
            raise InvalidInput(f"This server knows no job {job.kind!r}.", hint="Another version of it took the job.")
        return work

    def _end(
        self, job: Job, status: JobStatus, *, result: Mapping[str, Any] | None = None, error: Request | None = None
    ) -> None:
        """Write down how a job ended. One whose change is in the model is done, whatever came after the change."""

        def step() -> Job:
            done = None if status == "done" else self._result_of_change(job)
            if done is not None:
                return self._ledger.end_job(job.id, "done", result=done, progress=self._progress)
            return self._ledger.end_job(job.id, status, result=result, error=error, progress=self._progress)

        self._write(step)

    def _result_of_change(self, job: Job) -> dict[str, Any] | None:
        """The result of a job that has put its change into the model, and makes no other; else None."""
        made = [] if job.kind in self._many else self._ledger.committed_by(job.id)
        return {"change": self._live.change(made[-1].id).as_dict()} if made else None

    def _write(self, step: Callable[[], Job]) -> None:
        """Write a step down, then tell of it. Until it can be written, the job is running, also after a restart."""
        with self._changed:
            while True:
                try:
                    job = step()
                except LiveweightError as error:
                    _LOG.error("What became of a job cannot be written down: %s", error.message)
                    if self._closing:
                        return
                    self._changed.wait(_AGAIN)
                    continue
                self._running, self._progress, self._cancelled = None, None, False
                self._tell(job)
                return

    def _resume(self, job: Job) -> None:
        """What becomes of a job that was running when the program stopped."""
        done = self._result_of_change(job)
        if done is not None:
            _LOG.info("%s had made %s when the program stopped: it is done.", job.label, done["change"]["label"])
            self._end(job, "done", result=done)
        elif job.cancel_asked:
            self._end(job, "cancelled")
        elif job.starts >= _MOST_STARTS:
            _LOG.error("%s is given up: the program was stopped %d times while it ran.", job.label, job.starts)
            self._end(job, "failed", error=_internal(job))
        else:
            _LOG.info("%s was running when the program stopped: it is run again.", job.label)
            self._write(lambda: self._ledger.put_back_job(job.id))

    # ------------------------------------------------------------------------------------------------- its progress

    def _progressed(self, job: int, progress: dict[str, Any]) -> None:
        self._require_wanted()
        with self._changed:
            if self._running is None or self._running.id != job or progress == self._progress:
                return
            self._progress = progress
            if time.monotonic() - self._progress_written >= _PROGRESS_WRITTEN:
                self._progress_written = time.monotonic()
                try:
                    self._ledger.note_progress(job, progress)
                except LiveweightError as error:  # the work itself will meet what is wrong, where it matters
                    _LOG.warning("The progress of a job was not written down: %s", error.message)
            self._tell(self._with_progress(self._running))

    def _require_wanted(self) -> None:
        if self._cancelled or self._closing:
            raise GenerationCancelled("The job was told to stop.")

    def _with_progress(self, job: Job) -> Job:
        """With the progress of this moment, which the database learns once a second."""
        with self._changed:
            running = self._running is not None and self._running.id == job.id and job.status == "running"
            return job.model_copy(update={"progress": self._progress}) if running else job

    def _tell(self, job: Job) -> None:
        """Wake who waits, and call who listens; the caller holds the runner."""
        self._changed.notify_all()
        for listener in self._listeners:
            try:
                listener(job)
            except Exception:
                _LOG.exception("A listener to jobs failed.")


def told(error: LiveweightError) -> dict[str, Any]:
    """An error as a job keeps it: as the API prints it, with its HTTP status."""
    try:
        details = plain(error.as_dict())
    except InvalidInput:  # a detail that JSON cannot hold
        details = {"code": error.code, "message": error.message, "hint": error.hint}
    return {**details, "status": error.http_status}


def _internal(job: Job) -> dict[str, Any]:
    hint = f"The server's log says where: look for {job.label}."
    message = f"{job.label} failed inside liveweight."
    return {"code": "internal_error", "message": message, "hint": hint, "status": 500}


def _without_text(error: Exception) -> str:
    """An error's kind and where it came from. Its own words stay out: they may hold what somebody wrote."""
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    return f"{type(error).__name__} at {places}"
