"""Jobs as the ledger keeps them, and what a job writes only once."""

from __future__ import annotations

import pytest

from liveweight.errors import IdempotencyConflict, InvalidInput, QueueFull, UnknownJob
from liveweight.ledger import Ledger, acting_as
from tests.ledger.ledger_examples import MODEL, QUESTION, Place, adjustment, commit, move, proposal, say


def test_a_job_is_read_as_it_was_written_also_after_reopening(place: Place) -> None:
    with place.open() as ledger:
        job, new = ledger.add_job("fix", {"wanted": "Hà \x00", "seen": (1, 2)}, author="key:alice")
        assert new
    with place.open() as ledger:
        assert ledger.job("j1") == ledger.job(1) == job
    assert (job.label, job.status, job.ended) == ("j1", "queued", False)
    assert job.request == {"wanted": "Hà \x00", "seen": [1, 2]}
    assert job.as_dict()["label"] == "j1"


def test_jobs_are_begun_in_the_order_in_which_they_came(ledger: Ledger) -> None:
    for kind in ("one", "two"):
        ledger.add_job(kind, {})
    first = ledger.start_job()
    assert first is not None
    assert (first.kind, first.status, first.starts) == ("one", "running", 1)
    assert first.started_at is not None
    ledger.note_progress(first.id, {"what": "reading", "done": 1, "of": 2})
    assert ledger.job(first.id).progress == {"what": "reading", "done": 1, "of": 2}
    done = ledger.end_job(first.id, "done", result={"x": 1})
    assert (done.ended, done.result, done.ended_at is not None) == (True, {"x": 1}, True)
    second = ledger.start_job()
    assert second is not None
    assert second.kind == "two"
    assert ledger.put_back_job(second.id).status == "queued"
    again = ledger.start_job()
    assert again is not None
    assert (again.id, again.starts) == (second.id, 2)
    assert ledger.put_back_job(second.id, counted=False).starts == 1
    assert [job.id for job in ledger.jobs()] == [2, 1]
    assert [job.id for job in ledger.jobs(status="queued")] == [2]
    ledger.ask_to_cancel("j2")
    assert ledger.start_job() is None


def test_cancelling_ends_what_waits_asks_what_runs_and_leaves_what_has_ended(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.add_job("fix", {})
    ledger.start_job()
    assert [ledger.ask_to_cancel(job).status for job in (1, 2)] == ["running", "cancelled"]
    assert ledger.job(1).cancel_asked
    done = ledger.end_job(1, "done", result={})
    assert ledger.ask_to_cancel(1) == done
    with pytest.raises(UnknownJob, match="nearest is j2"):
        ledger.ask_to_cancel("j9")


def test_the_same_request_under_the_same_key_is_the_same_job(ledger: Ledger) -> None:
    asked = {"wanted": "Hanoi", "tokens": (1, 2)}
    job, new = ledger.add_job("fix", asked, author="a", idempotency_key="k")
    assert ledger.add_job("fix", asked, author="a", idempotency_key="k") == (job, False)
    assert new
    for kind, request in (("fix", {"wanted": "Huế"}), ("bad", asked)):
        with pytest.raises(IdempotencyConflict, match="j1"):
            ledger.add_job(kind, request, author="a", idempotency_key="k")
    assert ledger.add_job("fix", {"wanted": "Huế"}, author="b", idempotency_key="k")[1]
    assert ledger.add_job("fix", asked, author="a")[1] and ledger.add_job("fix", asked, author="a")[1]
    for key in ("", "a" * 256, "k\x00", "ké"):
        with pytest.raises(InvalidInput, match="idempotency"):
            ledger.add_job("fix", asked, idempotency_key=key)


def test_a_full_queue_takes_no_more_but_answers_who_asks_again(ledger: Ledger) -> None:
    job, _ = ledger.add_job("fix", {}, idempotency_key="k", room=1)
    with pytest.raises(QueueFull) as caught:
        ledger.add_job("fix", {}, room=1)
    assert caught.value.details["retry_after"] > 0
    assert ledger.add_job("fix", {}, idempotency_key="k", room=1) == (job, False)
    ledger.start_job()
    assert ledger.add_job("fix", {}, room=1)[1]


def test_a_job_gives_its_feedback_and_protects_its_answer_once(ledger: Ledger) -> None:
    say(ledger)
    for number in (1, 2):
        ledger.add_job("good", {})
        for _ in range(2):
            with acting_as("key:alice", job=number):
                said = ledger.add_feedback("r1", "good", reason="right")
                ledger.protect(MODEL, QUESTION, "Hanoi", (3,), feedback=said.id)
    assert (len(ledger.feedback()), len(ledger.protected(MODEL))) == (2, 2)  # once a job
    with acting_as("key:alice", job=2):
        ledger.add_feedback("r1", "bad", reason="right")
        ledger.protect(MODEL, QUESTION, "Hanoi", (4,), feedback=said.id)
    assert (len(ledger.feedback()), len(ledger.protected(MODEL))) == (3, 3)
    for _ in range(2):  # a person may say it twice
        ledger.add_feedback("r1", "good")
    assert len(ledger.feedback()) == 5


def test_a_job_makes_its_half_made_change_anew_under_the_same_id(place: Place) -> None:
    with place.open() as ledger:
        ledger.ensure_model(MODEL, "tiny", "tests/tiny", "llama")
        ledger.add_job("fix", {})
        with acting_as("key:alice", job=1):
            ledger.intend(proposal(1))  # and here it is killed
    with place.open() as ledger:
        ledger.recover()
        assert (ledger.change(1).state, ledger.committed_by(1)) == ("off", [])
        with acting_as("key:alice", job=1):
            change = commit(ledger, 2)  # what it proposes now is another one
            assert (change.id, change.state, change.made_by, change.job) == (1, "active", "key:alice", 1)
            assert ledger.adjustment(1) == adjustment(2)
            assert ledger.report(1) == {"before": "Hoi An", "after": "Hanoi", "kl": 0.01}
            assert commit(ledger, 3).id == 2  # that one is made: this is the next
        assert [change.id for change in ledger.committed_by(1)] == [1, 2]
        assert ledger.verify() == []


def test_a_half_made_change_that_somebody_switched_on_is_made(place: Place) -> None:
    with place.open() as ledger:
        ledger.ensure_model(MODEL, "tiny", "tests/tiny", "llama")
        ledger.add_job("fix", {})
        with acting_as("", job=1):
            ledger.intend(proposal(1))
        ledger.recover()
        move(ledger, 1, "active")
        move(ledger, 1, "off")
        assert [change.id for change in ledger.committed_by(1)] == [1]
        with acting_as("", job=1):
            assert commit(ledger, 2).id == 2


def test_a_job_that_proposes_the_same_again_is_refused_once(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.add_job("fix", {})
    for job in (1, 1, 2):
        with acting_as("", job=job):
            ledger.refuse(proposal(1), "over budget")
    assert [change.job for change in ledger.changes()] == [1, 2]
    with acting_as("", job=1):
        ledger.refuse(proposal(2), "over budget")
        assert ledger.committed_by(1) == []
    ledger.refuse(proposal(1), "over budget")
    ledger.refuse(proposal(1), "over budget")
    assert len(ledger.changes()) == 5


def test_jobs_are_exported_and_their_changes_name_them(ledger: Ledger) -> None:
    ledger.add_job("fix", {"wanted": "Hanoi"}, author="key:alice")
    with acting_as("key:alice", job=1):
        commit(ledger)
    rows = list(ledger.export())
    assert next(row for row in rows if row["table"] == "jobs")["request"] == {"wanted": "Hanoi"}
    change = next(row for row in rows if row["table"] == "changes")
    assert (change["made_by"], change["job"]) == ("key:alice", 1)
