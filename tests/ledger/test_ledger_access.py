"""Transactions: who made them, who hears of them, and several writes as one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from liveweight.errors import InvalidInput, UnknownReply
from liveweight.ledger import Ledger, acting_as
from liveweight.ledger.actor import actor
from liveweight.ledger.key_table import KeyTable
from tests.ledger.ledger_examples import MODEL, Place, commit, move, proposal, say


def test_changes_and_the_journal_say_who_was_at_work(ledger: Ledger) -> None:
    with acting_as("key:alice"):
        change = commit(ledger)
        with acting_as("key:bob"):
            move(ledger, change.id, "off")
        refused = ledger.refuse(proposal(1), "over budget")
    nobodys = commit(ledger, 2)
    assert [each.made_by for each in ledger.changes()] == ["key:alice", "key:alice", ""]
    assert ledger.change(change.id).made_by == refused.made_by == "key:alice"  # who made it, not who moved it
    assert [event.made_by for event in ledger.events(subject=change.label)] == [*["key:alice"] * 2, *["key:bob"] * 2]
    assert {event.made_by for event in ledger.events(subject=nobodys.label)} == {""}


def test_a_thread_works_for_nobody_until_it_says_so(ledger: Ledger) -> None:
    with acting_as("key:alice", job=None), ThreadPoolExecutor(1) as threads:
        assert threads.submit(lambda: actor().name).result() == ""
        assert actor().name == "key:alice"
    assert actor().name == ""


def test_a_job_is_worked_on_whoever_is_named_within(ledger: Ledger) -> None:
    with acting_as("key:alice", job=3), acting_as("page"):
        assert (actor().name, actor().job) == ("page", 3)
    with pytest.raises(InvalidInput, match="printed"), acting_as("a\nb"):
        pass


def test_listeners_hear_of_every_committed_transaction_and_of_no_other(ledger: Ledger) -> None:
    heard: list[int] = []
    end = ledger.on_commit(lambda: heard.append(len(ledger.events())))
    say(ledger)
    assert heard == [2]
    with pytest.raises(UnknownReply):
        ledger.add_feedback(9, "good")
    ledger.reply(1)
    assert heard == [2]
    commit(ledger)  # two transactions
    assert heard == [2, 3, 4]
    end()
    end()
    say(ledger)
    assert len(heard) == 3


def test_a_listener_is_called_when_other_threads_may_write_again(ledger: Ledger) -> None:
    written = threading.Event()

    def other() -> None:
        say(ledger)
        written.set()

    def listener() -> None:
        if not written.is_set():
            end()
            thread = threading.Thread(target=other)
            thread.start()
            assert written.wait(30)
            thread.join()

    end = ledger.on_commit(listener)
    ledger.intend(proposal(1))
    assert written.is_set()


def test_a_listener_that_fails_harms_neither_the_ledger_nor_the_next_one(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[str] = []

    def fail() -> None:
        raise RuntimeError("no")

    ledger.on_commit(fail)
    ledger.on_commit(lambda: heard.append("yes"))
    assert say(ledger).id == 1
    assert heard == ["yes"]
    assert "listener" in caplog.text


def test_several_writes_together_are_one_transaction(ledger: Ledger) -> None:
    heard: list[int] = []
    ledger.on_commit(lambda: heard.append(len(ledger.events())))
    with ledger.together():
        reply = say(ledger)
        ledger.add_feedback(reply.id, "good")
        with pytest.raises(UnknownReply):
            ledger.add_feedback(9, "good")  # caught: the rest stands
    assert (len(ledger.replies()), len(ledger.feedback()), heard) == (1, 1, [3])
    with pytest.raises(UnknownReply), ledger.together():
        say(ledger)
        ledger.add_feedback(9, "good")
    assert (len(ledger.replies()), heard) == (1, [3])
    say(ledger)
    assert len(ledger.replies()) == 2


def test_keys_and_the_ledger_are_written_side_by_side(place: Place) -> None:
    with place.open() as ledger:
        ledger.ensure_model(MODEL, "tiny", "tests/tiny", "llama")
        table = KeyTable(place.workspace, place.url)

        def make(number: int) -> None:
            for each in range(15):
                key = table.add(f"n{number}.{each}", "chat", f"{number}{each:063}", "lw-chat-abcd")
                table.used(key.id, key.created_at)
                table.revoke(key.id)

        def talk(_: int) -> None:
            for _ in range(15):
                say(ledger)
                commit(ledger, 1)

        with ThreadPoolExecutor(4) as threads:
            for done in [*(threads.submit(make, number) for number in range(2)), threads.submit(talk, 0)]:
                done.result()
        assert len(table.all()) == 30
        assert len(ledger.replies()) == len(ledger.changes()) == 15
        table.close()
