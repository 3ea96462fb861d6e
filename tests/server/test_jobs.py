"""Jobs on a tiny random model: order, progress, cancelling, errors, and being killed."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from liveweight.adjustments import Adjustment, Steer
from liveweight.errors import (
    GenerationCancelled,
    GuardRefused,
    IdempotencyConflict,
    InvalidInput,
    LedgerUnavailable,
    NoMendFound,
    QueueFull,
    UnknownJob,
)
from liveweight.ledger import Job, acting_as
from liveweight.live_model import LiveModel
from liveweight.methods import METHODS
from liveweight.server.jobs import JobContext, JobRunner
from tests.ledger.other_process import running
from tests.server.job_process import AUTHOR, POINTS, stop_at, work, work_without_end
from tests.tiny_workspace import QUESTION, SHOUT, tiny_settings

KILLS = int(os.environ.get("LIVEWEIGHT_TEST_KILLS", "3"))
Request = dict[str, Any]


@pytest.fixture(autouse=True)
def the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "shout", SHOUT)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveModel]:
    with LiveModel.load(settings=tiny_settings(tmp_path)) as model:
        yield model


class Work:
    """What the tests' jobs do: count, fail, wait until told to go on."""

    def __init__(self, live: LiveModel) -> None:
        self.live = live
        self.began: list[str] = []
        self.here, self.go_on = threading.Event(), threading.Event()

    def kinds(self) -> dict[str, Callable[[JobContext, Request], Request]]:
        mine = {"count": self.count, "hold": self.hold, "fail": self.fail, "learn": self.learn, "then": self.then}
        return {**work(self.live), **mine}

    def count(self, context: JobContext, request: Request) -> Request:
        self.began.append(context.job.label)
        for done in range(request.get("of", 2)):
            context.progress("counting", done, request.get("of", 2))
        return {"counted": request.get("of", 2), "for": context.author}

    def hold(self, context: JobContext, request: Request) -> Request:
        """Wait in the middle of the work; go on by steps of the engine."""
        context.progress("holding", 1, 2)
        self.here.set()
        assert self.go_on.wait(60)
        with self.live.engine.gate.step():
            return {}

    def fail(self, context: JobContext, request: Request) -> Request:
        raise {"refused": GuardRefused("No.", hint="Force it.", change="c1"), "secret": RuntimeError("my prompt")}[
            request["how"]
        ]

    def learn(self, context: JobContext, request: Request) -> Request:
        change = self.live.apply(_pull(request["seed"]), force=True)
        raise GenerationCancelled(change.label)

    def then(self, context: JobContext, request: Request) -> Request:
        """Something else goes wrong once the change is in the model."""
        self.live.fix(request["reply"], request["wanted"])
        raise NoMendFound("behind the change")


def _pull(seed: int) -> Adjustment:
    vector = torch.randn(24, generator=torch.Generator().manual_seed(seed))
    return Adjustment(name=f"pull {seed}", method="steer", ops=(Steer(site="layers.0.resid", vector=vector),))


@pytest.fixture
def does(live: LiveModel) -> Work:
    return Work(live)


@pytest.fixture
def started(live: LiveModel, does: Work) -> Iterator[Callable[..., JobRunner]]:
    """Makes runners, as a program that is started again and again does."""
    made: list[JobRunner] = []

    def make(**more: Any) -> JobRunner:
        made.append(JobRunner(live, does.kinds(), interruptible=live.engine.gate.interruptible, **more))
        made[-1].start()
        return made[-1]

    yield make
    does.go_on.set()
    for each in made:
        each.close()


@pytest.fixture
def runner(started: Callable[..., JobRunner]) -> JobRunner:
    return started()


def test_jobs_are_done_in_the_order_in_which_they_came(runner: JobRunner, does: Work) -> None:
    jobs = [runner.submit("count", {"of": each}, author="key:bob") for each in range(3)]
    assert jobs[0].label == "j1"
    done = runner.wait("j3", 60)
    assert does.began == ["j1", "j2", "j3"]
    assert (done.status, done.result, done.error) == ("done", {"counted": 2, "for": "key:bob"}, None)
    assert done.ended_at is not None and done.started_at is not None
    assert [job.id for job in runner.list()] == [3, 2, 1]
    assert runner.list(limit=1, status="done") == (runner.get(3),)
    assert runner.list(status="queued") == ()


def test_asking_twice_with_one_key_is_asking_once(runner: JobRunner, does: Work) -> None:
    job = runner.submit("count", {"of": 1}, author="a", idempotency_key="k")
    again = runner.submit("count", {"of": 1}, author="a", idempotency_key="k")
    assert again.id == job.id
    assert runner.wait(job.id, 60) == runner.submit("count", {"of": 1}, author="a", idempotency_key="k")
    with pytest.raises(IdempotencyConflict):
        runner.submit("count", {"of": 2}, author="a", idempotency_key="k")
    assert runner.wait(runner.submit("count", {"of": 2}, author="b", idempotency_key="k").id, 60).id == 2
    assert does.began == ["j1", "j2"]


def test_every_step_of_a_job_is_told_in_order_and_progress_is_seen_meanwhile(runner: JobRunner, does: Work) -> None:
    told: list[tuple[str, Any]] = []

    def fail(job: Job) -> None:
        raise RuntimeError("no")

    runner.subscribe(fail)
    end = runner.subscribe(lambda job: told.append((job.status, job.progress and job.progress["done"])))
    runner.submit("count", {"of": 2}, author="")
    assert runner.wait(1, 60).progress == {"what": "counting", "done": 1, "of": 2}
    assert told == [("queued", None), ("running", None), ("running", 0), ("running", 1), ("done", 1)]
    end()
    runner.submit("hold", {}, author="")
    assert does.here.wait(60)
    now = runner.get("j2")
    assert (now.status, now.progress) == ("running", {"what": "holding", "done": 1, "of": 2})
    assert runner.wait("j2", 0.01) == now  # not over yet
    does.go_on.set()
    assert runner.wait("j2", 60).status == "done"
    assert len(told) == 5


def test_a_job_that_waits_is_cancelled_at_once_and_never_begun(runner: JobRunner, does: Work) -> None:
    runner.submit("hold", {}, author="")
    waiting = runner.submit("count", {}, author="")
    assert does.here.wait(60)
    assert runner.cancel(waiting.id).status == "cancelled"
    assert runner.wait(waiting.id, 60).status == "cancelled"
    does.go_on.set()
    ended = runner.wait(1, 60)
    assert runner.cancel(1) == ended  # it is done, and stays so
    assert does.began == []


def test_a_job_that_runs_is_cancelled_at_the_next_step_of_the_engine(runner: JobRunner, does: Work) -> None:
    runner.submit("hold", {}, author="")
    assert does.here.wait(60)
    asked = runner.cancel("j1")
    assert (asked.status, asked.cancel_asked) == ("running", True)
    does.go_on.set()
    ended = runner.wait("j1", 60)
    assert (ended.status, ended.result, ended.error) == ("cancelled", None, None)
    assert runner.wait(runner.submit("count", {}, author="").id, 60).status == "done"


def test_without_steps_of_the_engine_the_next_progress_cancels(live: LiveModel) -> None:
    here, go_on = threading.Event(), threading.Event()

    def hold(context: JobContext, request: Request) -> Request:
        here.set()
        assert go_on.wait(60)
        context.progress("never said")
        return {}

    runner = JobRunner(live, {"hold": hold})
    runner.start()
    runner.submit("hold", {}, author="")
    assert here.wait(60)
    runner.cancel(1)
    go_on.set()
    ended = runner.wait(1, 60)
    assert (ended.status, ended.progress) == ("cancelled", None)
    runner.close()
    runner.close()


def test_what_goes_wrong_is_the_jobs_error_with_its_status(runner: JobRunner) -> None:
    failed = runner.wait(runner.submit("fail", {"how": "refused"}, author="").id, 60)
    assert failed.status == "failed"
    assert failed.error == {
        "code": "guard_refused",
        "message": "No.",
        "hint": "Force it.",
        "change": "c1",
        "status": 409,
    }


def test_an_unforeseen_error_is_logged_without_its_words(runner: JobRunner, caplog: pytest.LogCaptureFixture) -> None:
    failed = runner.wait(runner.submit("fail", {"how": "secret"}, author="").id, 60)
    assert failed.error is not None
    assert (failed.status, failed.error["code"], failed.error["status"]) == ("failed", "internal_error", 500)
    assert "j1" in failed.error["message"]
    assert "my prompt" not in caplog.text + str(failed.error)
    assert "RuntimeError" in caplog.text and "test_jobs.py" in caplog.text


def test_what_is_no_job_is_refused(live: LiveModel, runner: JobRunner) -> None:
    with pytest.raises(InvalidInput, match="count, fail"):
        runner.submit("dance", {}, author="")
    for unknown in ("j9", 9, "r1", "\x00"):
        with pytest.raises(UnknownJob):
            runner.get(unknown)
    live.ledger.add_job("dance", {})  # another version's
    runner.submit("count", {}, author="")
    assert runner.wait(2, 60).status == "done"
    failed = runner.get(1)
    assert failed.error is not None
    assert (failed.status, failed.error["code"]) == ("failed", "invalid_input")


def test_a_queue_has_room_for_so_many(started: Callable[..., JobRunner], does: Work) -> None:
    runner = started(room=1)
    runner.submit("hold", {}, author="")
    assert does.here.wait(60)
    runner.submit("count", {}, author="")
    with pytest.raises(QueueFull):
        runner.submit("count", {}, author="")


def test_a_job_writes_its_author_and_itself_into_its_change(live: LiveModel, runner: JobRunner) -> None:
    live.chat(QUESTION)
    done = runner.wait(runner.submit("fix", {"reply": 1, "wanted": "z"}, author=AUTHOR).id, 60)
    assert done.result is not None
    assert (done.status, done.result["change"]["made_by"]) == ("done", AUTHOR)
    assert [(change.made_by, change.job) for change in live.ledger.changes()] == [(AUTHOR, 1)]
    assert {event.made_by for event in live.ledger.events(subject="c1")} == {AUTHOR}


def test_a_job_whose_change_is_in_the_model_is_done_whatever_came_after(live: LiveModel, runner: JobRunner) -> None:
    live.chat(QUESTION)
    done = runner.wait(runner.submit("then", {"reply": 1, "wanted": "z"}, author=AUTHOR).id, 60)
    assert done.result is not None
    assert (done.status, done.error, done.result["change"]["label"]) == ("done", None, "c1")
    # A kind that may make several is what its work says it is.
    cancelled = runner.wait(runner.submit("learn", {"seed": 1}, author=AUTHOR).id, 60)
    assert (cancelled.status, len(live.changes())) == ("cancelled", 2)


def test_an_end_that_cannot_be_written_down_is_tried_again(
    live: LiveModel, runner: JobRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    end, tries = live.ledger.end_job, list[int]()

    def fail_once(job: int, *given: Any, **named: Any) -> Job:
        tries.append(job)
        if len(tries) == 1:
            raise LedgerUnavailable("gone")
        return end(job, *given, **named)

    monkeypatch.setattr(live.ledger, "end_job", fail_once)
    runner.submit("count", {}, author="")
    assert runner.wait(1, 60).status == "done"
    assert tries == [1, 1]


def test_a_stop_interrupts_what_runs_and_the_next_start_goes_on_with_it(
    started: Callable[..., JobRunner], does: Work
) -> None:
    first = started()
    first.submit("hold", {}, author="")
    first.submit("count", {}, author="")
    assert does.here.wait(60)
    closing = threading.Thread(target=first.close)
    closing.start()
    assert first.wait(1).status == "running"  # who waits is let go when the runner closes
    does.go_on.set()
    closing.join()
    assert [(job.status, job.starts) for job in first.list()] == [("queued", 0), ("queued", 0)]
    second = started()
    assert second.wait(2, 60).status == "done"
    assert (second.get(1).status, second.get(1).starts) == ("done", 1)


def test_a_job_that_was_cut_off_is_run_again_unless_it_was_to_stop_or_stops_the_program(
    live: LiveModel, started: Callable[..., JobRunner], does: Work
) -> None:
    for _ in range(3):
        live.ledger.add_job("count", {})
    for job in (1, 2, 3):  # as a killed program leaves them
        live.ledger.start_job()
        if job == 2:
            live.ledger.ask_to_cancel(job)
    for _ in range(9):
        live.ledger.put_back_job(3)
        live.ledger.start_job()
    runner = started()
    assert [runner.wait(job, 60).status for job in (1, 2, 3)] == ["done", "cancelled", "failed"]
    assert does.began == ["j1"]


def test_a_job_that_had_made_its_change_when_it_was_cut_off_is_not_run_again(
    live: LiveModel, started: Callable[..., JobRunner], does: Work
) -> None:
    for kind in ("count", "learn", "count"):
        job, _ = live.ledger.add_job(kind, {"seed": 5}, author=AUTHOR)
        live.ledger.start_job()
        if job.id < 3:
            with acting_as(AUTHOR, job=job.id):
                live.apply(_pull(job.id), force=True)
    live.off("c1")  # by somebody, before the server is started again
    live.ledger.ask_to_cancel(1)
    runner = started()
    done = runner.wait(1, 60)
    assert done.result is not None
    assert (done.status, done.result["change"]["label"], done.result["change"]["state"]) == ("done", "c1", "off")
    runner.wait(3, 60)
    assert does.began == ["j3"]
    assert [change.job for change in live.ledger.changes()] == [1, 2, 2]  # a kind of many changes goes on


# ----------------------------------------------------------------------------------------------------- kill -9


@pytest.mark.parametrize("point", POINTS)
def test_killed_behind_any_step_a_job_makes_exactly_one_change(tmp_path: Path, point: str) -> None:
    settings = tiny_settings(tmp_path)
    with running(stop_at, tmp_path, point) as (child, pipe):
        assert pipe.recv() == "here"
        child.kill()
        child.join()
    with LiveModel.load(settings=settings) as live:
        runner = JobRunner(live, work(live))
        runner.start()
        again = runner.submit("fix", {"reply": "r1", "wanted": "z"}, author=AUTHOR, idempotency_key="once")
        job = runner.wait(again.id, 60)
        runner.close()
        assert (job.id, job.status, len(runner.list())) == (1, "done", 1)
        changes = live.changes()
        assert [(change.label, change.state, change.made_by) for change in changes] == [("c1", "active", AUTHOR)]
        assert job.result is not None
        assert job.result["change"]["label"] == "c1"
        assert [said.verdict for said in live.feedback()] == ["fix"]
        assert len(live.protected()) == 1
        assert live.ledger.verify() == []
        assert live.engine.state == live.ledger.state(live.engine.info.hash)
        assert "z" in live.ask(QUESTION)


def test_killed_at_any_instant_no_job_is_lost_and_none_makes_two_changes(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    known: set[int] = set()
    for kill in range(KILLS):
        chance = random.Random(kill)
        with running(work_without_end, tmp_path, kill) as (child, pipe):
            assert pipe.recv() == "ready"
            for _ in range(chance.randint(1, 4)):
                known.add(pipe.recv())
            pipe.poll(chance.random() * 0.3)  # on to an instant nobody can foresee
            child.kill()
            child.join()
    with LiveModel.load(settings=settings) as live:
        runner = JobRunner(live, work(live))
        runner.start()
        for job in known:
            assert runner.wait(job, 60).status in ("done", "failed")
        runner.close()
        jobs = {job.id: job for job in runner.list()}
        assert known <= set(jobs)
        made = [change.job for change in live.ledger.changes()]
        assert len(made) == len(set(made))
        for change in live.ledger.changes():
            assert change.state in ("active", "off", "undone", "refused", "failed") and change.job in jobs
            if change.state == "active":
                assert jobs[change.job].result is not None
        assert len({said.reply for said in live.feedback()}) == len(live.feedback())
        assert live.ledger.verify() == []
        assert live.engine.state == live.ledger.state(live.engine.info.hash)
