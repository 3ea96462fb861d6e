"""What the page makes of the ledger, without a browser: branches, states over time, texts side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from liveweight import versions
from liveweight.engines.base import Message, Sampling
from liveweight.errors import InvalidInput
from liveweight.ledger import Event
from liveweight.live_model import LiveModel
from liveweight.reports import Reply
from liveweight.server.service import Service
from liveweight.web.coloured_answer import token_texts
from liveweight.web.parts import marked
from liveweight.web.story import Tree
from liveweight.web.talking import Speaking, Talk
from liveweight.web.visitors import inside, page_secret
from tests.tiny_workspace import OTHER, QUESTION, add_shout, tiny_settings


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveModel]:
    add_shout()
    with LiveModel.load(settings=tiny_settings(tmp_path)) as found:
        yield found


def reply(number: int, after: int | None = None) -> Reply:
    return Reply(
        id=number,
        model="m",
        messages=(),
        text=str(number),
        token_ids=(),
        prompt_token_ids=(),
        version_number=0,
        version_hash="",
        sampling={},
        details={},
        created_at=datetime.now(UTC),
        chat="c",
        after=after,
    )


def event(number: int, subject: str, to: str, strength: float, intent: int) -> Event:
    details = {"to_state": to, "to_strength": strength, "intent": intent}
    return Event(
        id=number, kind=to, subject=subject, model="m", details=details, created_at=datetime(2026, 1, 1, tzinfo=UTC)
    )


def test_a_branch_is_the_way_from_the_first_reply_to_its_last() -> None:
    tree = Tree({each.id: each for each in (reply(1), reply(2, 1), reply(3, 1), reply(4, 3), reply(5))})
    assert [each.id for each in tree.path(4)] == [1, 3, 4]
    assert tree.siblings(3) == [2, 3]
    assert tree.siblings(1) == [1, 5]
    assert (tree.end(1), tree.end(2), tree.newest) == (4, 2, 5)


def test_a_reply_that_went_on_from_another_conversation_begins_this_one() -> None:
    tree = Tree({each.id: each for each in (reply(7, after=3), reply(8, after=7))})
    assert [each.id for each in tree.path(8)] == [7, 8]
    assert tree.siblings(7) == [7]


def test_the_states_over_time_follow_the_journal() -> None:
    found = versions.moments(
        [
            event(1, "c1", "active", 1.0, 1),
            event(2, "c2", "active", 1.0, 2),
            event(3, "c1", "off", 1.0, 2),
            event(4, "c2", "active", 0.5, 3),
            event(5, "c2", "undone", 0.5, 4),
            event(6, "c1", "active", 1.0, 4),
        ],
        "m",
    )
    assert [moment.on for moment in found] == [(), ((1, 1.0),), ((2, 1.0),), ((2, 0.5),), ((1, 1.0),)]
    assert found[2].said == "c2 on, c1 off"


def test_any_two_versions_answer_as_they_did_and_nothing_stays(live: LiveModel) -> None:
    base = live.chat(QUESTION).text
    first = live.fix(live.chat(QUESTION), "z")
    mended = live.chat(QUESTION).text
    live.fix(live.chat(OTHER), "k", keep_both=True, force=True)
    live.set_strength(first, 0.25)
    before = live.fingerprints()
    moments = versions.moments(live.history(), live.engine.info.hash)
    assert moments[-1].on == tuple((change.id, change.strength) for change in live.changes())
    was, then, now = versions.answers(live, QUESTION, [moments[0], moments[1], None])
    assert was.startswith(base) and then.startswith(mended)
    assert now.startswith(live.chat(QUESTION).text)
    assert live.fingerprints() == before


def test_two_versions_are_not_asked_nothing(live: LiveModel) -> None:
    with pytest.raises(InvalidInput, match="The question is empty"):
        versions.answers(live, "  ", [None, None])


def test_words_that_differ_are_marked_and_nothing_of_a_text_is_taken_for_markup() -> None:
    before, after = marked("The capital is <b>Hoi An</b> today.", "The capital is Hanoi today.")
    assert before == "The capital is <del>&lt;b&gt;Hoi An&lt;/b&gt;</del> today."
    assert after == "The capital is <ins>Hanoi</ins> today."


def test_texts_with_little_in_common_are_not_marked() -> None:
    assert marked("one two three", "four five six") == ("one two three", "four five six")


def test_a_character_of_several_tokens_comes_with_its_last_one() -> None:
    parts = [b"a", "é".encode()[:1], "é".encode()[1:], b"b"]
    texts = token_texts([0, 1, 2, 3], lambda ids: b"".join(parts[each] for each in ids).decode(errors="replace"))
    assert texts == ["a", "", "é", "b"]


def test_signing_in_leads_to_this_server_only() -> None:
    assert inside("/changes?change=c1") == "/changes?change=c1"
    for elsewhere in ("//elsewhere.example", "/\\elsewhere.example", "https://elsewhere.example", ""):
        assert inside(elsewhere) == "/"


def test_the_secret_of_cookies_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    first = page_secret(tmp_path)
    assert len(first) > 32 and page_secret(tmp_path) == first
    assert (tmp_path / "page-secret").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", ["", "abc"])
def test_a_secret_that_was_cut_short_signs_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "page-secret").write_text(content)
    assert len(page_secret(tmp_path)) > 32
    assert [each.name for each in tmp_path.iterdir()] == ["page-secret"]


def test_a_reply_that_waits_for_its_turn_is_stopped_at_once(tmp_path: Path) -> None:
    with Service.open(tiny_settings(tmp_path, server={"rows": 1})) as service:
        talk, batcher = Talk(service, lambda: None), service.batcher

        def begun(chat: str) -> Speaking:
            messages = [Message("user", "hello?")]
            return talk.say(messages, Sampling(max_tokens=4), chat=chat, after=None, author="me")

        with service.live.engine.gate.step():  # nothing is decoded meanwhile
            first = begun("a")
            until(lambda: batcher.running == 1)
            second = begun("b")
            until(lambda: batcher.waiting == 1)
            second.stop()
            until(lambda: second.over)
            assert (second.reply, second.error, batcher.waiting) == (None, None, 0)
        until(lambda: first.over)
        assert [reply.id for reply in service.live.replies()] == [first.reply and first.reply.id]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
