"""The card under an answer: say what was wrong, look at what a change would do, apply it, tune it, take it back.

Owns the card's steps. Which one is shown follows from the reply's latest job and change and from what the visitor has
begun to write, never from where the card stands: a reload, or another browser, finds it as it is.

    writing ──Preview──> working ──> looking ──Apply──> working ──> applied
       ^───────────────────── Discard ──┘                └──> failed ──> writing
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from nicegui import ui

from liveweight.errors import LiveweightError
from liveweight.ledger import Job
from liveweight.reports import Reply
from liveweight.web.board import Draft
from liveweight.web.change_controls import ChangeControls
from liveweight.web.frame import Frame
from liveweight.web.parts import aside, button, problem, tag, tell
from liveweight.web.report_view import report_view
from liveweight.web.story import Judged, change_of

REASONS = ("Wrong fact", "Made up", "Does not answer", "Too long", "Wrong language", "Rude or unsafe")

_ACTIVE = {"fix": "Fixed", "bad": "It will not say that again", "good": "Protected, and made surer"}
_AFTERWARDS = {
    "off": "Switched off: the model is as without this change",
    "undone": "Undone: the model is as if this had never been changed",
    "refused": "Refused: it would have changed too much else",
    "failed": "It could not be applied",
}


class JudgementCard:
    """The feedback on one reply."""

    def __init__(
        self, frame: Frame, reply: Reply, changed: Callable[[], None], ask_again: Callable[[], Awaitable[None]]
    ) -> None:
        """Nothing is drawn before `update`; `changed` is called when the card opens, closes or goes on.

        `ask_again` asks the reply's question once more, of the model as it is then.
        """
        self._frame, self._reply, self._changed, self._ask_again = frame, reply, changed, ask_again
        self._tab = frame.tab
        self._judged = Judged()
        self._drawn: Any = None  # what was drawn last; drawn anew only where this differs
        self._controls: ChangeControls | None = None
        self._progress: tuple[Any, Any] | None = None
        self._box = tag("div", "", "card", role="region", aria_label=f"Feedback on answer {reply.label}")
        self._box.set_visibility(False)

    # ------------------------------------------------------------------------------------------------- what is said

    async def good(self) -> None:
        """One click: the answer is protected, and made surer where it is shaky."""
        await self._submit("good", preview=False)

    def open(self, *, correct: bool = False) -> None:
        """Begin to write what is wrong with the answer; to `correct` it, its text is selected."""
        if self._key not in self._drafts:
            self._frame.board.draft(*self._key, Draft(self._reply.text, set()))
        self._forget()
        self._draw()
        ui.run_javascript(f"liveweight.focus('#c{self._box.id} textarea', {str(correct).lower()})")

    def update(self, judged: Judged) -> None:
        """Show the step that the reply's feedback is at."""
        self._judged = judged
        self._draw()

    def tick(self) -> None:
        """Show how far the work is."""
        job = self._judged.job
        if self._progress is not None and job is not None:
            self._show_progress(self._frame.board.feedback_job(self._reply) or job)

    # ------------------------------------------------------------------------------------------------- which step

    @property
    def _drafts(self) -> dict[tuple[str, int], Draft]:
        return self._frame.board.drafts

    @property
    def _key(self) -> tuple[str, int]:
        return self._tab, self._reply.id

    def _step(self) -> tuple[str, Any]:
        job, change = self._judged.job, self._judged.change
        if job is not None and not job.ended:
            return "working", job.id
        if self._key in self._drafts:
            return "writing", None
        hidden = job is None or job.id in self._frame.board.discarded
        if job is not None and not hidden and job.status in ("failed", "cancelled"):
            return "failed", job.id
        if job is not None and not hidden and job.request.get("preview"):
            return "looking", job.id
        if self._judged.protected is not None and (change is None or change.state == "undone"):
            return "kept", self._judged.protected
        if change is not None:
            return "applied", change.id
        return "closed", None

    def _forget(self) -> None:
        self._drawn = None

    def _draw(self) -> None:
        step, about = self._step()
        self._box.set_visibility(step != "closed")
        if (step, about) == self._drawn:
            self._refresh(step)
            return
        self._drawn = (step, about)
        self._controls = self._progress = None
        self._box.clear()
        with self._box:
            getattr(self, f"_{step}")()
        self._refresh(step)

    def _refresh(self, step: str) -> None:
        """What moves within a step."""
        self.tick()
        if step == "applied" and self._controls is not None and self._judged.change is not None:
            change = self._judged.change
            self._title.text = _AFTERWARDS.get(change.state, _ACTIVE.get(change.verdict, "Changed"))
            self._controls.update(change)

    # ------------------------------------------------------------------------------------------------- the steps

    def _closed(self) -> None:
        """Nothing to show."""

    def _writing(self) -> None:
        draft = self._drafts[self._key]
        tag("h3", "What should be different?")
        wanted = ui.textarea("What it should have said", value=draft.wanted).props("outlined autogrow")
        meaning = tag("p", "", "dim", "small", aria_live="polite")

        def say() -> None:
            draft.wanted = str(wanted.value or "")
            meaning.text = (
                "The model will be taught to answer this. Short corrections work best: only what was wrong."
                if self._verdict(draft) == "fix"
                else "Left as it is, the model will only be made to stop giving this answer. To teach it another one,"
                " write it above."
            )

        wanted.on_value_change(say)
        say()
        with tag("div", "", "row", role="group", aria_label="What was wrong"):
            for reason in REASONS:
                self._chip(reason, draft)
        note = ui.input("A note, if you like", value=draft.note).props("outlined dense")
        note.on_value_change(lambda event: setattr(draft, "note", str(event.value or "")))
        with tag("div", "", "row"):
            button("Preview", self._preview, "primary", title="Measure what would change; nothing is changed yet")
            button("Close", self._close)

    def _chip(self, reason: str, draft: Draft) -> None:
        def toggle() -> None:
            draft.reasons ^= {reason}
            chip.props["aria-pressed"] = str(reason in draft.reasons).lower()

        chip = button(reason, toggle, aria_pressed=str(reason in draft.reasons).lower())

    def _working(self) -> None:
        job = self._judged.job
        assert job is not None
        tag("h3", "Looking for a small change" if job.request.get("preview") else "Working")
        bar = tag("progress", "", aria_label="Progress")
        said = tag("p", "", "dim", aria_live="polite")
        self._progress = bar, said
        with tag("div", "", "row"):
            button("Cancel", self._cancel)

    def _show_progress(self, job: Job) -> None:
        assert self._progress is not None
        bar, said = self._progress
        progress = job.progress or {}
        of, done = int(progress.get("of") or 0), int(progress.get("done") or 0)
        if of:
            bar.props["max"], bar.props["value"] = of, done
        else:
            bar.props.pop("value", None)
        what = str(progress.get("what") or "")
        text = "Waiting for other work." if job.status == "queued" else f"{what or 'Reading the answer'}…"
        if said.text != text:
            said.text = text

    def _looking(self) -> None:
        job = self._judged.job
        assert job is not None
        change = change_of(job.result)
        tag("h3", "Preview: nothing has been changed yet")
        if change is None or change.report is None:
            tag("p", "The preview has no report.")
        else:
            report_view(change.report, self._frame.neurons)
        guard = None if change is None or change.report is None else change.report.guard
        refused = guard is not None and not guard.passed
        if refused:
            tag(
                "p", "It would change more than is allowed. You can apply it all the same, and undo it later.", "strong"
            )
        with tag("div", "", "row"):
            apply = lambda: self._apply(job, force=refused)  # noqa: E731 # a button's one line
            button("Apply all the same" if refused else "Apply", apply, "danger" if refused else "primary")
            button("Discard", lambda: self._discard(job))
            button("Change the correction", lambda: self._again(job))

    def _failed(self) -> None:
        job = self._judged.job
        assert job is not None
        if job.status == "cancelled":
            tag("p", "Cancelled. Nothing was changed.")
        else:
            tag("h3", "Nothing was changed")
            problem(job.error or {})
        with tag("div", "", "row"):
            button("Try again", lambda: self._again(job))
            button("Close", lambda: self._discard(job))

    def _applied(self) -> None:
        change = self._judged.change
        assert change is not None
        self._title = tag("h3", "")
        if change.state in ("refused", "failed"):
            tag("p", change.reason or "It was not applied.")
        self._controls = ChangeControls(self._frame, change)
        with tag("div", "", "row"):
            button("See the answer now", self._ask_again)
            tag("span", "What is said behind the old answer still builds on it.", "dim", "small")
        if change.report is not None:
            with tag("details"):
                tag("summary", "What it changed")
                with tag("div", "", "stack"):
                    report_view(change.report, self._frame.neurons, done=change.state in ("active", "off", "undone"))

    def _kept(self) -> None:
        tag("p", f"Protected ({self._judged.protected}): later changes have to leave this answer as it is.")
        with tag("div", "", "row"):
            button("Take back", self._unprotect, title="Let later changes move this answer again")

    # ------------------------------------------------------------------------------------------------- what happens

    async def _preview(self) -> None:
        draft = self._drafts[self._key]
        await self._submit(self._verdict(draft), preview=True, draft=draft)

    async def _apply(self, job: Job, *, force: bool) -> None:
        await self._send({**job.request, "preview": False, "force": force})

    async def _submit(self, verdict: str, *, preview: bool, draft: Draft | None = None) -> None:
        reason = ""
        if draft is not None:
            said = ", ".join(each for each in REASONS if each in draft.reasons)
            reason = ". ".join(each for each in (said, draft.note.strip()) if each)
        wanted = draft.wanted.strip() if draft is not None and verdict == "fix" else None
        await self._send(
            {
                "reply": self._reply.id,
                "verdict": verdict,
                "wanted": wanted,
                "reason": reason or None,
                "method": None,
                "preview": preview,
                "force": False,
                "keep_both": False,
            }
        )

    async def _send(self, request: dict[str, Any]) -> None:
        author = await self._frame.allowed()
        if author is None:
            return
        jobs = self._frame.service.jobs
        try:
            job = await aside(lambda: jobs.submit("feedback", request, author=author))
        except LiveweightError as error:
            tell(f"{error.message} {error.hint}".strip(), "negative")
            return
        self._drafts.pop(self._key, None)
        self._judged = Judged(self._judged.verdict, job, self._judged.change, self._judged.protected)
        self._draw()
        self._changed()

    async def _unprotect(self) -> None:
        if await self._frame.act(self._frame.service.live.undo, str(self._judged.protected)) is not None:
            tell(f"{self._judged.protected} is not protected any more.")

    async def _cancel(self) -> None:
        job = self._judged.job
        if job is not None and await self._frame.allowed() is not None:
            await aside(self._frame.service.jobs.cancel, job.id)

    def _discard(self, job: Job) -> None:
        self._frame.board.discarded.add(job.id)
        self._close()

    def _again(self, job: Job) -> None:
        """Back to writing, with what was sent."""
        self._frame.board.discarded.add(job.id)
        said = str(job.request.get("reason") or "")
        chosen = {reason for reason in REASONS if reason in said}
        note = "" if chosen else said
        text = str(job.request.get("wanted") or self._reply.text)
        self._frame.board.draft(*self._key, Draft(text, chosen, note))
        self._draw()
        self._frame.board.bump()

    def _close(self) -> None:
        self._drafts.pop(self._key, None)
        self._draw()
        self._changed()
        self._frame.board.bump()

    def _verdict(self, draft: Draft) -> str:
        wanted = draft.wanted.strip()
        return "fix" if wanted and wanted != self._reply.text.strip() else "bad"
