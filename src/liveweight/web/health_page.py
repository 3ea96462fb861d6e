"""How the server and the model are: the version, the drift from the base, what waits, how fast it is.

Owns reading these figures off the service and showing them. Knows nothing of how they are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from liveweight.guard import GuardReport
from liveweight.ledger import Job
from liveweight.reports import Change, Reply
from liveweight.shown import short
from liveweight.web.frame import Frame
from liveweight.web.parts import aside, button, counted, table, tag, when
from liveweight.web.report_view import guard_view
from liveweight.web.work_view import WorkView

_REPLIES = 500  # the newest, whose versions are counted
_GUARDED = 30
_JOBS = 12


@dataclass(frozen=True)
class _Seen:
    changes: list[Change]
    replies: list[Reply]
    jobs: list[Job]
    protected: int


class HealthPage:
    """One open page of figures."""

    def __init__(self, frame: Frame) -> None:
        """Draw it, and follow what happens."""
        self._frame = frame
        with tag("div", "", "stack", "wide"):
            tag("h1", "Health")
            self._tiles = tag("div", "", "tiles")
            with tag("section", "", "stack", aria_label="How far the model is from its base"):
                tag("h2", "How far the model is from its base")
                tag(
                    "p", "All changes that are on, together, on the guard's questions and the protected answers.", "dim"
                )
                with tag("div", "", "row"):
                    button("Measure now", self._measure)
                self._drift = WorkView(frame, "guard", _show_drift)
            self._rest = tag("div", "", "stack", "wide")
        self._drift.about("")
        frame.watch(self._read)

    async def _measure(self) -> None:
        await self._drift.send("", {}, changing=True)

    async def _read(self) -> None:
        seen = await aside(self._look)
        self._draw_tiles(seen)
        self._rest.clear()
        with self._rest:
            _queue(seen.jobs)
            _guard_history(seen.changes)
            _versions(seen.replies)

    def _look(self) -> _Seen:
        service = self._frame.service
        live = service.live
        return _Seen(
            live.changes(), live.replies(limit=_REPLIES), list(service.jobs.list(limit=_JOBS)), len(live.protected())
        )

    def _draw_tiles(self, seen: _Seen) -> None:
        service = self._frame.service
        info, batcher, rates = service.live.engine.info, service.batcher, self._frame.board.talk.rates
        active = sum(change.state == "active" for change in seen.changes)
        speed = f"{median(rates):.1f} tokens/s" if rates else "not measured yet"
        tiles = (
            ("Model", Path(info.name).name, f"{info.parameters:,} numbers, {info.dtype} on {info.device}"),
            (
                "Version of the weights",
                f"v{service.live.engine.version.number}",
                str(service.live.engine.version.hash)[:12],
            ),
            ("Changes that are on", str(active), f"{counted(len(seen.changes), 'change')} in all"),
            ("Protected answers", str(seen.protected), "that changes have to leave as they are"),
            ("Speed", speed, "median of the page's latest replies"),
            ("Replies", f"{batcher.running} running, {batcher.waiting} waiting", f"at most {batcher.rows} at once"),
            ("Since the start", f"{batcher.tokens:,} tokens", f"said; {batcher.prompt_tokens:,} read"),
        )
        self._tiles.clear()
        with self._tiles:
            for title, figure, about in tiles:
                with tag("div", "", "panel", "tile"):
                    tag("p", title, "dim", "small")
                    tag("p", figure, "figure")
                    tag("p", about, "dim", "small")


def _show_drift(result: Mapping[str, Any]) -> None:
    guard_view(GuardReport.model_validate(result["guard"]), "Compared with the base model")


def _queue(jobs: list[Job]) -> None:
    tag("h2", "Work")
    if not jobs:
        tag("p", "No longer work was asked for yet.", "dim")
        return
    rows = []
    for job in jobs:
        about = job.request.get("reply") or job.request.get("neuron") or job.request.get("find") or ""
        ended = None if job.started_at is None or job.ended_at is None else job.ended_at - job.started_at
        took = "" if ended is None else f"{ended.total_seconds():.1f} s"
        why = "" if job.error is None else short(str(job.error.get("message", "")), 60)
        rows.append((job.label, job.kind, str(about), job.status, took, job.author, why))
    table(("Job", "Kind", "About", "State", "Took", "By", "Error"), rows, "The latest jobs", numbers=(4,))


def _guard_history(changes: list[Change]) -> None:
    tag("h2", "What changes moved besides what they were meant to")
    measured = [change for change in changes if change.report is not None and change.report.guard is not None]
    if not measured:
        tag("p", "No change was measured yet.", "dim")
        return
    rows = []
    for change in reversed(measured[-_GUARDED:]):
        assert change.report is not None
        guard = change.report.guard
        assert guard is not None
        verdict = "within budget" if guard.passed else "over budget"
        rows.append(
            (
                change.label,
                change.state,
                verdict,
                f"{guard.mean_kl:.4f}",
                f"{guard.changed_share:.1%}",
                f"{guard.perplexity_ratio:.4f}",
                f"{guard.total_mean_kl:.4f}",
                when(change.created_at),
            )
        )
    names = (
        "Change",
        "State",
        "Guard",
        "Shift, nats",
        "Answers changed",
        "Surprise (1: as before)",
        "Drift from base, nats",
        "When (UTC)",
    )
    table(names, rows, "What the guard measured of each change, the newest first", numbers=(3, 4, 5, 6))


def _versions(replies: list[Reply]) -> None:
    tag("h2", "Which version answered")
    if not replies:
        tag("p", "Nothing was asked yet.", "dim")
        return
    counts = Counter((reply.version_number, reply.version_hash) for reply in replies)
    last = {(reply.version_number, reply.version_hash): reply.created_at for reply in reversed(replies)}
    rows = [
        (f"v{number}", digest[:12], f"{count:,}", when(last[number, digest]))
        for (number, digest), count in sorted(counts.items(), key=lambda each: last[each[0]], reverse=True)
    ]
    table(
        ("Version", "Hash", "Replies", "Last (UTC)"),
        rows,
        f"Versions of the newest {len(replies)} replies",
        numbers=(2,),
    )
