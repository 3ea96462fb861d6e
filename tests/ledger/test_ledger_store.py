"""Replies, feedback, protected answers, conflicts and the journal, on both databases."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from liveweight.errors import (
    InvalidInput,
    LedgerDamaged,
    StateConflict,
    UnknownChange,
    UnknownReply,
    Unsupported,
    WrongModel,
)
from liveweight.ledger import Key, Ledger
from tests.ledger.ledger_examples import MODEL, OTHER, QUESTION, Place, adjustment, commit, move, proposal, say


def test_a_reply_is_read_as_it_was_written_also_after_reopening(place: Place) -> None:
    with place.open() as ledger:
        ledger.ensure_model(MODEL, "tiny", "tests/tiny", "llama")
        written = say(ledger)
    with place.open() as ledger:
        assert ledger.reply("r1") == ledger.last_reply() == written
    assert written.label == "r1"
    assert [turn.content for turn in written.messages] == [QUESTION[0]["content"]]
    assert written.token_ids == (5, 6)
    assert written.created_at.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - written.created_at) < timedelta(minutes=5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.text(st.characters(exclude_categories=()), max_size=20))
@pytest.mark.parametrize("known", ["\x00 and \ud83d", "Hà Nội", 'quo"te'])
def test_any_text_that_a_broken_model_can_say_is_kept_as_it_is(ledger: Ledger, known: str, words: str) -> None:
    for said in (known, words):
        reply = say(ledger, said)
        assert ledger.reply(reply.id).text == said
        assert ledger.add_feedback(reply.id, "fix", wanted=said, reason=said).wanted == said


def test_replies_come_newest_first_and_by_model(ledger: Ledger) -> None:
    ledger.ensure_model(OTHER, "other", "tests/other", "gpt2")
    for model in (MODEL, OTHER, MODEL):
        say(ledger, model=model)
    assert [reply.id for reply in ledger.replies()] == [3, 2, 1]
    assert [reply.id for reply in ledger.replies(MODEL, limit=1)] == [3]
    last = ledger.last_reply(OTHER)
    assert last is not None
    assert last.id == 2
    assert ledger.last_reply("c" * 64) is None


def test_an_unknown_id_is_named_with_the_nearest_there_is(ledger: Ledger) -> None:
    with pytest.raises(UnknownReply, match="holds no reply yet"):
        ledger.reply("r1")
    say(ledger)
    say(ledger)
    for written in ("r9", 9):
        with pytest.raises(UnknownReply, match=r"r9.*nearest is r2"):
            ledger.reply(written)
    with pytest.raises(UnknownReply, match="nearest is r2"):
        ledger.reply("r" + "9" * 40)
    with pytest.raises(UnknownChange, match="holds no change yet"):
        ledger.change(1)


def test_feedback_belongs_to_a_reply(ledger: Ledger) -> None:
    reply = say(ledger)
    given_ = ledger.add_feedback("r1", "fix", wanted="Hanoi", reason="it is the capital")
    assert ledger.feedback(reply.id) == ledger.feedback() == [given_]
    with pytest.raises(UnknownReply):
        ledger.add_feedback(2, "good")
    with pytest.raises(InvalidInput, match="meh"):
        ledger.add_feedback(1, "meh")  # type: ignore[arg-type]


def test_a_model_has_to_be_registered_first(ledger: Ledger) -> None:
    with pytest.raises(WrongModel, match=OTHER[:12]):
        say(ledger, model=OTHER)
    with pytest.raises(WrongModel):
        ledger.intend(proposal(model=OTHER))
    with pytest.raises(WrongModel):
        ledger.protect(OTHER, QUESTION, "Hanoi", (1,))


def test_each_model_has_its_own_changes(ledger: Ledger) -> None:
    ledger.ensure_model(OTHER, "other", "tests/other", "gpt2")
    mine, other = commit(ledger, 1), commit(ledger, 2, model=OTHER)
    assert [change.id for change in ledger.changes(MODEL)] == [mine.id]
    assert [active.adjustment for active in ledger.state(OTHER)] == [adjustment(2)]
    assert len(ledger.changes()) == len(ledger.models()) == 2
    with pytest.raises(WrongModel, match=rf"c{other.id} belongs to other"):
        ledger.intend_move(other.id, "off", model=MODEL)
    with pytest.raises(WrongModel):
        ledger.change(other.label, model=MODEL)


def test_another_checkpoint_under_the_same_name_is_refused_while_changes_would_be_lost(ledger: Ledger) -> None:
    ledger.ensure_model(MODEL, "tiny", "tests/tiny", "llama")  # the same one again is fine
    change = commit(ledger)
    with pytest.raises(WrongModel, match="1 active change"):
        ledger.ensure_model(OTHER, "tiny", "tests/tiny", "llama")
    assert ledger.ensure_model(OTHER, "tiny", "tests/tiny", "llama", other_checkpoint=True).hash == OTHER
    move(ledger, change.id, "off")
    assert ledger.ensure_model("d" * 64, "tiny", "tests/tiny", "llama").name == "tiny"


def test_an_answer_from_a_change_is_protected_only_while_the_change_is_active(ledger: Ledger) -> None:
    own = ledger.protect(MODEL, QUESTION, "Yes.", (1, 2))
    change = ledger.intend(proposal())
    from_change = ledger.protect(MODEL, QUESTION, "Hanoi", (3,), change=change.id)
    assert ledger.protected(MODEL) == [own]
    ledger.activate(change.id)
    assert ledger.protected(MODEL) == [own, from_change]
    move(ledger, change.id, "off")
    assert ledger.protected(MODEL) == [own]
    assert ledger.unprotect(own.label).active is False
    assert ledger.unprotect(own.label).active is False
    assert ledger.protected(MODEL) == []
    assert len(ledger.protected(MODEL, everything=True)) == 2
    with pytest.raises(InvalidInput, match="p9"):
        ledger.unprotect("p9")


def test_a_change_on_the_same_prompt_conflicts_unless_it_wants_the_same(ledger: Ledger) -> None:
    change = commit(ledger, prompt="1" * 64, wanted="Hanoi")
    found = [ledger.conflicts(MODEL, "1" * 64, wanted=wanted) for wanted in ("Hue", " hanoi", None)]
    assert found == [[change], [], [change]]
    assert ledger.conflicts(MODEL, "2" * 64) == []
    assert ledger.conflicts(OTHER, "1" * 64) == []
    move(ledger, change.id, "off")
    assert ledger.conflicts(MODEL, "1" * 64) == []


def test_a_change_whose_key_points_the_same_way_conflicts(ledger: Ledger) -> None:
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    change = commit(ledger, key=Key(3, east))
    assert ledger.conflicts(MODEL, "f" * 64, Key(3, east * 5 + north)) == [change]
    assert ledger.conflicts(MODEL, "f" * 64, Key(3, east + north)) == []
    assert ledger.conflicts(MODEL, "f" * 64, Key(3, east + north), threshold=0.7) == [change]
    assert ledger.conflicts(MODEL, "f" * 64, Key(3, -east)) == []
    assert ledger.conflicts(MODEL, "f" * 64, Key(4, east)) == []
    assert ledger.conflicts(MODEL, "f" * 64, Key(3, torch.ones(3))) == []
    assert ledger.conflicts(MODEL, "f" * 64, Key(3, torch.zeros(2))) == []
    key = ledger.key_of(change.id)
    assert key is not None
    assert key.layer == 3
    assert torch.equal(key.vector, east)


def test_the_newest_report_counts_and_any_number_can_be_reported(ledger: Ledger) -> None:
    change = commit(ledger, report={"kl": float("inf"), "spread": (1, 2)})
    assert ledger.report(change.id) == {"kl": "Infinity", "spread": [1, 2]}
    ledger.add_report(change.label, {"kl": 0.5})
    assert ledger.report(change.id) == {"kl": 0.5}


def test_everything_that_happened_is_in_the_journal_in_order(ledger: Ledger) -> None:
    reply = say(ledger)
    feedback = ledger.add_feedback(reply.id, "fix", wanted="Hanoi")
    change = commit(ledger, feedback=feedback.id)
    move(ledger, change.id, strength=0.5)
    move(ledger, change.id, "undone")
    kinds = [event.kind for event in ledger.events()]
    wished = ["intended", "active", "intended", "strength", "intended", "undone"]
    assert kinds == ["model", "reply", "feedback", *wished]
    assert [event.kind for event in ledger.events(subject=change.label)] == wished
    assert [event.kind for event in ledger.events(after=7, limit=1)] == ["intended"]


@pytest.mark.parametrize("statement", ["UPDATE events SET kind = 'x'", "DELETE FROM events"])
def test_the_database_refuses_to_rewrite_the_journal(ledger: Ledger, statement: str) -> None:
    with pytest.raises(DBAPIError, match="append-only"), ledger._engine.begin() as connection:
        connection.execute(text(statement))
    assert [event.kind for event in ledger.events()] == ["model"]


def test_everything_can_be_exported_as_json(ledger: Ledger) -> None:
    reply = say(ledger)
    change = commit(ledger, feedback=ledger.add_feedback(reply.id, "bad").id)
    ledger.protect(MODEL, QUESTION, "Hanoi", (3,), change=change.id)
    rows = [json.loads(json.dumps(row)) for row in ledger.export()]
    tables = {row["table"] for row in rows}
    assert tables == {
        *("models", "replies", "feedback", "changes", "reports", "protected_answers", "intents", "events")
    }
    assert next(row for row in rows if row["table"] == "changes")["adjustment_hash"] == adjustment().hash
    assert len([row for row in rows if row["table"] == "events"]) == len(ledger.events())


def test_records_are_values_that_nobody_can_change(ledger: Ledger) -> None:
    change = commit(ledger)
    with pytest.raises(ValidationError):
        change.state = "off"  # type: ignore[misc]
    move(ledger, change.id, "off")
    assert change.state == "active"


def test_a_damaged_blob_is_named_and_found_by_verify(ledger: Ledger) -> None:
    change = commit(ledger)
    assert ledger.verify() == []
    assert change.blob_hash is not None
    ledger.blobs.path(change.blob_hash).write_bytes(b"rubbish")
    with pytest.raises(LedgerDamaged, match=change.blob_hash):
        ledger.state(MODEL)
    assert [problem.split(":")[0] for problem in ledger.verify()] == [change.label]


def test_an_adjustment_that_was_tampered_with_is_named(ledger: Ledger) -> None:
    change = commit(ledger)
    with ledger._engine.begin() as connection:
        connection.execute(text("UPDATE changes SET adjustment_hash = :hash"), {"hash": "0" * 64})
    with pytest.raises(LedgerDamaged, match=change.label):
        ledger.state(MODEL)


def test_pruning_keeps_the_blobs_of_every_change_whatever_its_state(ledger: Ledger) -> None:
    refused = ledger.refuse(proposal(1), "over budget")
    undone = commit(ledger, 2)
    move(ledger, undone.id, "undone")
    stray = ledger.blobs.write({"x": torch.ones(3)})
    assert ledger.prune_blobs() == [stray]
    assert ledger.adjustment(refused.id) == adjustment(1)
    assert ledger.adjustment(undone.id) == adjustment(2)


def test_a_reader_sees_what_a_running_process_commits_and_writes_nothing(ledger: Ledger, place: Place) -> None:
    with place.open(read_only=True) as reader:
        assert reader.changes() == []
        change = commit(ledger)
        assert reader.changes() == [change]
        assert reader.state(MODEL) == ledger.state(MODEL)
        for attempt in (lambda: say(reader), lambda: reader.intend(proposal(1)), reader.recover, reader.prune_blobs):
            with pytest.raises(Unsupported, match="reading only"):
                attempt()
        assert len(list(reader.blobs.names())) == 1


def test_a_reader_of_an_empty_workspace_finds_it_empty_and_makes_nothing(place: Place) -> None:
    with place.open(read_only=True) as reader:
        assert reader.changes() == reader.replies() == reader.events() == []
        with pytest.raises(UnknownChange, match="holds no change yet"):
            reader.change("c1")
    assert not place.workspace.exists()


def test_a_closed_ledger_says_so(place: Place) -> None:
    ledger = place.open()
    ledger.close()
    ledger.close()
    with pytest.raises(StateConflict, match="closed"):
        ledger.changes()
    with pytest.raises(StateConflict, match="closed"):
        ledger.recover()
