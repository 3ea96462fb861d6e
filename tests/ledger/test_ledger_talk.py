"""Replies as a server needs them: public ids, conversations, pages."""

from __future__ import annotations

import pytest

from liveweight.errors import InvalidInput, UnknownReply
from liveweight.ledger import Ledger, Reply
from tests.ledger.ledger_examples import MODEL, OTHER, say


def _say(ledger: Ledger, said: str, model: str = MODEL, **more: object) -> Reply:
    return ledger.add_reply(
        model,
        [{"role": "system", "content": "be kind"}, {"role": "user", "content": said}],
        "yes",
        token_ids=(1,),
        prompt_token_ids=(2,),
        version_number=0,
        version_hash="v",
        **more,  # type: ignore[arg-type]
    )


def test_a_reply_is_found_by_its_public_id_wherever_an_id_is_taken(ledger: Ledger) -> None:
    say(ledger)
    reply = _say(ledger, "hello", public_id="chatcmpl-ab12", chat="7f3a", after="r1")
    assert (reply.public_id, reply.chat, reply.after) == ("chatcmpl-ab12", "7f3a", 1)
    for written in ("chatcmpl-ab12", " chatcmpl-ab12 ", "r2", "2", 2):
        assert ledger.reply(written) == reply
    assert ledger.add_feedback("chatcmpl-ab12", "good").reply == 2
    assert len(ledger.feedback("chatcmpl-ab12")) == 1
    assert _say(ledger, "more", after="chatcmpl-ab12").after == 2


@pytest.mark.parametrize("written", ["chatcmpl-none", "", "r", "c1", "\x00", "a" * 4000, "../r1", "ch\ud83d"])
def test_what_no_reply_is_called_is_an_unknown_reply(ledger: Ledger, written: str) -> None:
    _say(ledger, "hello", public_id="chatcmpl-ab12")
    with pytest.raises(UnknownReply):
        ledger.reply(written)


@pytest.mark.parametrize("written", ["r3", "12", "R012", "", "with space", "a" * 65, "x\x00", "chatcmpl-ab12"])
def test_a_public_id_is_unlike_the_ledgers_own_and_unlike_every_other(ledger: Ledger, written: str) -> None:
    _say(ledger, "hello", public_id="chatcmpl-ab12")
    with pytest.raises(InvalidInput):
        _say(ledger, "hello", public_id=written)
    assert len(ledger.replies()) == 1


def test_a_reply_goes_on_from_one_that_is_there(ledger: Ledger) -> None:
    with pytest.raises(UnknownReply):
        _say(ledger, "hello", after=7)
    with pytest.raises(InvalidInput, match="conversation"):
        _say(ledger, "hello", chat="my chat\n")
    assert ledger.replies() == []


def test_the_replies_of_a_conversation_come_in_pages_newest_first(ledger: Ledger) -> None:
    for number in range(6):
        _say(ledger, "hello", chat="even" if number % 2 == 0 else "odd")
    assert [reply.id for reply in ledger.replies(MODEL, chat="odd")] == [6, 4, 2]
    page = ledger.replies(MODEL, limit=2)
    assert [reply.id for reply in page] == [6, 5]
    assert [reply.id for reply in ledger.replies(MODEL, limit=2, before=page[-1].id)] == [4, 3]
    assert [reply.id for reply in ledger.replies(MODEL, limit=2, chat="even", before=5)] == [3, 1]
    assert ledger.replies(MODEL, chat="neither") == []


def test_a_conversation_is_called_by_what_was_said_first_and_the_last_one_comes_first(ledger: Ledger) -> None:
    ledger.ensure_model(OTHER, "other", "tests/other", "gpt2")
    _say(ledger, "what is zed?", chat="a")
    _say(ledger, "who are you?", chat="b")
    last = _say(ledger, "and then?", chat="a", after=1)
    _say(ledger, "elsewhere", model=OTHER, chat="c")
    say(ledger)  # of no conversation
    found = ledger.chats(MODEL)
    assert [(chat.id, chat.title, chat.newest, chat.count) for chat in found] == [
        ("a", "what is zed?", 3, 2),
        ("b", "who are you?", 2, 1),
    ]
    assert found[0].at == last.created_at
    assert [chat.id for chat in ledger.chats(MODEL, limit=1)] == ["a"]
    assert [chat.id for chat in ledger.chats()] == ["c", "a", "b"]


def test_the_journal_comes_in_pages_from_behind_a_line(ledger: Ledger) -> None:
    for _ in range(4):
        say(ledger)
    assert [event.id for event in ledger.events()] == [1, 2, 3, 4, 5]
    assert [event.id for event in ledger.events(2)] == [3, 4, 5]
    assert [event.id for event in ledger.events(after=2, limit=2)] == [3, 4]
    assert ledger.events(5) == []
