"""What the jobs' tests run in a second process, to be killed there."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from liveweight.live_model import LiveModel
from liveweight.server.jobs import JobContext, JobRunner
from tests.tiny_workspace import QUESTION, add_shout, tiny_settings

AUTHOR = "key:alice"
# Where a job can be cut off, in the order in which it comes there: behind one of these calls.
POINTS = {
    "added": ("ledger", "add_job"),
    "started": ("ledger", "start_job"),
    "feedback": ("ledger", "add_feedback"),
    "announced": ("ledger", "intend"),
    "moved": ("engine", "become"),
    "active": ("ledger", "activate"),
    "reported": ("ledger", "add_report"),
    "ended": ("ledger", "end_job"),
}


def work(live: LiveModel) -> dict[str, Callable[[JobContext, dict[str, Any]], dict[str, Any]]]:
    """Judgements, as the server carries them out."""

    def fix(context: JobContext, request: dict[str, Any]) -> dict[str, Any]:
        context.progress("looking for a change")
        return {"change": live.fix(request["reply"], request["wanted"]).as_dict()}

    def good(context: JobContext, request: dict[str, Any]) -> dict[str, Any]:
        return {"change": live.good(request["reply"]).as_dict()}

    return {"fix": fix, "good": good}


def stop_at(pipe: Connection, root: Path, point: str) -> None:
    """Take one job, and stop for ever behind one of its steps."""
    torch.set_num_threads(1)
    add_shout()
    live = LiveModel.load(settings=tiny_settings(root))
    live.chat(QUESTION)
    owner, name = POINTS[point]
    _stop_behind(getattr(live, owner), name, pipe, only_for=(lambda: bool(live.ledger.changes(states=["intended"]))))
    runner = JobRunner(live, work(live), interruptible=live.engine.gate.interruptible)
    runner.submit("fix", {"reply": "r1", "wanted": "z"}, author=AUTHOR, idempotency_key="once")
    runner.start()
    runner.wait("j1")


def _stop_behind(owner: object, name: str, pipe: Connection, *, only_for: Callable[[], bool]) -> None:
    """Let a method do what it does, then say so and go no further; `become` only where a change is being made."""
    method = getattr(owner, name)

    def and_stop(*given: Any, **named: Any) -> Any:
        found = method(*given, **named)
        if name != "become" or only_for():
            pipe.send("here")
            pipe.recv()
        return found

    setattr(owner, name, and_stop)


def work_without_end(pipe: Connection, root: Path, run: int) -> None:
    """Go on with what is left, and take job after job, saying each one that was taken."""
    torch.set_num_threads(1)
    add_shout()
    live = LiveModel.load(settings=tiny_settings(root))
    runner = JobRunner(live, work(live), interruptible=live.engine.gate.interruptible)
    runner.start()
    pipe.send("ready")
    for number in range(1000):
        reply = live.chat(QUESTION).label
        request = {"reply": reply, "wanted": "abcdefgh"[number % 8]}
        kind = "good" if number % 5 == 4 else "fix"
        pipe.send(runner.submit(kind, request, author=AUTHOR, idempotency_key=f"{run}.{number}").id)
        if number % 3:  # some wait in the queue, some are on their own
            runner.wait(number)
