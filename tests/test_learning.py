"""Learning in bulk on a tiny model: a joint change, its halves where it moves too much, one by one, and again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from liveweight import judging, learning
from liveweight.adjustments import LowRank, State
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, NoMendFound, UnknownMethod
from liveweight.guard import Guard, GuardReport
from liveweight.learning import Learner
from liveweight.lessons import lesson, read_lessons
from liveweight.live_model import LiveModel
from liveweight.methods import METHODS, Case, case
from liveweight.methods.base import Joint, Together
from liveweight.settings import MethodSettings
from tests.tiny_workspace import OTHER, QUESTION, SHOUT, shout_all, tiny_settings

FIXES = [{"prompt": QUESTION, "correction": "a"}, {"prompt": OTHER, "correction": "a"}]


@pytest.fixture(autouse=True)
def the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "shout", SHOUT)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveModel]:
    with LiveModel.load(settings=tiny_settings(tmp_path)) as model:
        yield model


def noting(asked: list[int], most: int | None = None) -> Together:
    """The search of shout, which notes for how many cases it was asked; its change is for the first `most` of them."""

    def together(engine: TransformersEngine, cases: Iterable[Case], settings: MethodSettings) -> Joint:
        given = list(cases)
        asked.append(len(given))
        found = shout_all(engine, given, settings)
        return lambda numbers: found(numbers[:most])

    return together


def test_corrections_become_one_change_that_undo_takes_back(live: LiveModel) -> None:
    before = live.fingerprints()
    found = live.learn(FIXES, method="shout")
    assert [item.outcome for item in found.items] == ["learnt", "learnt"]
    assert found.changes == ("c1",)
    change = live.change("c1")
    assert (change.verdict, change.method) == ("learn", "shout")
    assert {each.wanted for each in live.feedback()} == {"a"}
    assert len(live.protected()) == 2
    assert "a" in live.ask(QUESTION)
    live.undo()
    assert live.fingerprints() == before
    assert live.protected() == []


def test_what_is_right_already_is_left_alone_so_that_a_run_can_be_gone_on_with(live: LiveModel) -> None:
    live.learn(FIXES, method="shout")
    again = live.learn(FIXES, method="shout")
    assert [item.outcome for item in again.items] == ["already", "already"]
    assert len(live.changes()) == 1


def test_what_did_not_come_is_tried_again_together_before_it_is_fixed_alone(
    live: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []  # the first of many only gets its letter
    monkeypatch.setitem(METHODS, "shout", replace(SHOUT, together=noting(asked, most=1)))
    right = iter([[False, False], [True, False], [True]])
    monkeypatch.setattr(Learner, "_right", lambda *_: next(right))
    found = live.learn(FIXES, method="shout")
    assert asked == [2, 1]
    assert [(item.outcome, item.change) for item in found.items] == [("learnt", "c1"), ("learnt", "c2")]


def test_a_preview_commits_nothing(live: LiveModel) -> None:
    found = live.learn(FIXES, preview=True, method="shout")
    assert {item.outcome for item in found.items} <= {"preview", "failed"}
    assert live.changes() == []


def test_over_budget_a_joint_change_is_divided_until_single_ones_are_refused(tmp_path: Path) -> None:
    settings = tiny_settings(
        tmp_path, guard={"probe_file": tmp_path / "probes.jsonl", "tokens": 2, "max_worst_kl": 0.0}
    )
    with LiveModel.load(settings=settings) as live:
        found = live.learn(FIXES, method="shout")
        assert [item.outcome for item in found.items] == ["refused", "refused"]
        assert [change.state for change in live.changes()] == ["refused", "refused"]
        assert live.engine.state == ()


def test_what_moves_a_single_item_too_far_is_left_out_and_fixed_alone(
    live: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what comes from the second correction is too much, in whatever company; nothing is searched for again."""
    searched: list[int] = []
    monkeypatch.setitem(METHODS, "shout", replace(SHOUT, together=noting(searched)))
    measure, b = Guard.measure, live.engine.format.encode_text("b")[0]

    def strict(self: Guard, after: State, **options: Any) -> GuardReport:
        found = measure(self, after, **options)
        ops = [op for active in after for op in active.adjustment.ops if isinstance(op, LowRank)]
        if not any(float(op.left[b]) for op in ops):
            return found
        return found.model_copy(update={"reasons": ("too much",), "too_far": ("hello there",)})

    monkeypatch.setattr(Guard, "measure", strict)
    more = [*FIXES, *({"prompt": f"{letter}?", "correction": "a"} for letter in "efgh")]
    more[1] = {"prompt": OTHER, "correction": "b"}
    found = live.learn(more, method="shout")
    assert len(searched) == 1 and searched[0] >= 4
    assert found.items[1].outcome == "refused"
    assert {item.outcome for item in found.items if item.wanted == "a"} <= {"learnt", "already"}
    assert found.changes == ("c1", "c2")


def test_a_correction_that_no_case_can_be_made_of_leaves_the_others_together(
    live: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = learning.build_case

    def refuse(engine: TransformersEngine, messages: Any, *rest: Any, **more: Any) -> Case:
        if messages[-1].content == QUESTION:
            raise NoMendFound("no case.", hint="Ask otherwise.")
        return build(engine, messages, *rest, **more)

    monkeypatch.setattr(learning, "build_case", refuse)
    monkeypatch.setattr(judging, "build_case", refuse)
    found = live.learn([*FIXES, {"prompt": "hello?", "correction": "a"}], method="shout")
    assert [(item.outcome, item.why) for item in found.items[:1]] == [("failed", "no case.")]
    assert {item.outcome for item in found.items[1:]} <= {"learnt", "already"}


def test_the_report_shows_an_answer_that_came(live: LiveModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Learner, "_right", lambda _, trial, items: [bool(trial) and index > 0 for index in range(2)])
    fixes = [{"prompt": QUESTION, "correction": "a"}, {"prompt": OTHER, "correction": "b"}]
    found = live.learn(fixes, method="shout")
    report = live.change(str(found.changes[0])).report
    assert report is not None
    assert (report.question, report.wanted) == (OTHER, "b")


def test_ratings_are_judged_one_by_one_beside_the_joint_change(live: LiveModel) -> None:
    records = [{"prompt": OTHER, "rating": "up"}, {"prompt": QUESTION, "correction": "a"}]
    found = live.learn(records, method="shout")
    assert found.items[0].outcome in ("protected", "learnt")
    assert found.items[1].outcome == "learnt"


def test_what_a_joint_change_cannot_be_told_the_subject_of_is_fixed_on_its_own(
    live: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "shout", replace(SHOUT, by_subject=True))
    monkeypatch.setattr(case, "subject_of", lambda question: None)
    found = live.learn(FIXES, method="shout")
    assert {item.outcome for item in found.items} <= {"learnt", "already"}
    assert all(live.change(each).verdict == "fix" for each in found.changes)


def test_a_method_without_a_joint_change_is_refused_by_name(live: LiveModel) -> None:
    with pytest.raises(UnknownMethod, match="'grace' makes no joint change"):
        live.learn(FIXES, method="grace")
    with pytest.raises(InvalidInput):
        live.learn([])


def test_records_come_in_several_spellings() -> None:
    assert lesson({"question": "q", "expected": "a"}).kind == "fix"
    assert lesson({"prompt": "q", "response": "r", "label": False}).kind == "bad"
    assert lesson({"messages": [{"role": "user", "content": "q"}], "rating": "+1"}).prompt == "q"
    assert lesson({"prompt": "q", "correction": " ", "rating": "bad"}).kind == "bad"
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "q"), ("assistant", "r")]
    chat = lesson({"messages": [{"role": role, "content": content} for role, content in turns], "rating": "bad"})
    assert (chat.prompt, chat.answer) == ("q", "r")
    assert [(turn.role, turn.content) for turn in chat.chat] == turns[:-1]
    assert lesson({"prompt": "q", "correction": " a\n"}).correction == "a"
    blank = {"prompt": "q", "correction": " "}
    for bad in (
        blank,
        {"prompt": "q"},
        {"correction": "a"},
        {"prompt": "q", "rating": "so so"},
        {"prompt": 3, "rating": 1},
        {"messages": [{"role": "assistant", "content": "r"}], "rating": "bad"},
        {"messages": ["q"], "rating": "bad"},
    ):
        with pytest.raises(InvalidInput):
            lesson(bad)


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "feedback.jsonl"
    file.write_text(json.dumps({"prompt": "q", "rating": "good"}) + "\n\n{oops\n", encoding="utf-8")
    with pytest.raises(InvalidInput, match="Line 3"):
        read_lessons(file)
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(InvalidInput, match="holds no feedback"):
        read_lessons(file)
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_lessons(tmp_path / "missing.jsonl")


def test_ratings_that_led_to_something_are_left_alone_when_the_file_is_learnt_again(live: LiveModel) -> None:
    said = live.ask(OTHER)
    records = [{"prompt": QUESTION, "rating": "bad"}, {"prompt": OTHER, "answer": said, "rating": "good"}]
    first = live.learn(records)
    assert [item.outcome for item in first.items] == ["learnt", "protected"]
    changes, protected = live.changes(), live.protected()
    again = live.learn(records)
    assert [item.outcome for item in again.items] == ["already", "already"]
    assert (live.changes(), live.protected()) == (changes, protected)


def test_a_joint_change_is_made_by_the_method_that_is_set(live: LiveModel) -> None:
    found = live.learn(FIXES)  # the settings say shout
    assert [live.change(each).method for each in found.changes] == ["shout"]


def test_a_correction_in_a_chat_is_learnt_in_that_chat(live: LiveModel) -> None:
    before = [{"role": "user", "content": OTHER}, {"role": "assistant", "content": "me"}]
    found = live.learn([{"messages": [*before, {"role": "user", "content": QUESTION}], "correction": "a"}])
    assert [item.outcome for item in found.items] == ["learnt"]
    assert [turn.content for turn in live.protected()[0].messages] == [OTHER, "me", QUESTION]
