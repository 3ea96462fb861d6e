"""The loop on a tiny random model: talk, judge, refuse, commit, switch, undo, and being interrupted or killed."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import liveweight
from liveweight.adjustments import Adjustment, ScaleNeurons, Steer
from liveweight.engines.base import Message
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import (
    GuardRefused,
    InvalidInput,
    LedgerDamaged,
    NoEffect,
    NoMendFound,
    NoSpace,
    StateConflict,
    UnknownChange,
    UnknownMethod,
    UnknownReply,
    UnknownSite,
    WorkspaceBusy,
)
from liveweight.interrupts import uninterrupted
from liveweight.judging import Judgement, Options
from liveweight.ladder import Phases
from liveweight.live_model import LiveModel
from liveweight.methods import METHODS, Case
from liveweight.reports import Change, Reply, Report
from liveweight.settings import MethodSettings
from tests.ledger.other_process import running
from tests.live_process import change_without_end, interrupted
from tests.tiny_workspace import OTHER, QUESTION, SHOUT, tiny_settings

KILLS = int(os.environ.get("LIVEWEIGHT_TEST_KILLS", "3"))


@pytest.fixture(autouse=True)
def the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "shout", SHOUT)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveModel]:
    with LiveModel.load(settings=tiny_settings(tmp_path)) as model:
        yield model


def test_the_public_names_are_these_and_no_others() -> None:
    assert liveweight.__all__ == ["Change", "LiveModel", "Reply", "Report", "__version__", "diff"]
    assert liveweight.LiveModel is LiveModel
    with pytest.raises(AttributeError, match="nothing"):
        _ = liveweight.nothing  # type: ignore[attr-defined]


def test_a_reply_is_remembered_with_its_tokens_its_chat_and_its_version(live: LiveModel) -> None:
    pieces: list[str] = []
    reply = live.chat(QUESTION, on_token=lambda token: pieces.append(token.text), max_tokens=5)
    assert reply.label == "r1"
    assert "".join(pieces).strip() == reply.text
    assert len(reply.tokens) == 5
    assert reply.finish == "length"
    assert reply.versions == (str(live.engine.version),)
    assert reply.prompt == (Message("user", QUESTION),)
    assert live.reply("r1") == live.replies()[0] == reply


def test_a_chat_goes_on_from_an_earlier_reply(live: LiveModel) -> None:
    first = live.chat(QUESTION, system="be kind")
    second = live.chat(OTHER, after=first)
    roles = [(turn.role, turn.content) for turn in second.messages]
    assert roles == [("system", "be kind"), ("user", QUESTION), ("assistant", first.text), ("user", OTHER)]


def test_a_stream_that_is_closed_keeps_what_was_said(live: LiveModel) -> None:
    stream = live.stream(QUESTION)
    next(stream)
    with pytest.raises(StateConflict, match="not over"):
        _ = stream.reply
    stream.close()
    stream.close()
    assert (stream.reply.finish, len(stream.reply.tokens)) == ("cancelled", 1)
    assert live.replies()[0] == stream.reply


def test_chat_alone_changes_no_weight(live: LiveModel) -> None:
    before = live.fingerprints()
    live.chat([{"role": "user", "content": QUESTION}], temperature=1.0, seed=3)
    assert live.fingerprints() == before
    assert live.changes() == []


@pytest.mark.parametrize("said", ["", "   ", [], [{"role": "user"}], [{"role": "cat", "content": "x"}], [3]])
def test_a_chat_with_nothing_to_answer_is_refused(live: LiveModel, said: object) -> None:
    with pytest.raises(InvalidInput):
        live.chat(said)  # type: ignore[arg-type]


def test_an_unknown_way_of_sampling_is_refused(live: LiveModel) -> None:
    with pytest.raises(InvalidInput, match="beams"):
        live.chat(QUESTION, beams=3)
    for name, value in (("top_p", 90), ("temperature", float("nan")), ("max_tokens", 0), ("seed", 10**20)):
        with pytest.raises(InvalidInput):
            live.chat(QUESTION, **{name: value})


def test_a_fix_changes_the_answer_and_undo_gives_every_tensor_back(live: LiveModel) -> None:
    before = live.fingerprints()
    reply = live.chat(QUESTION)
    change = live.fix(reply, "z")
    assert (change.label, change.state, change.method) == ("c1", "active", "shout")
    assert "z" in live.ask(QUESTION)
    assert live.fingerprints() != before
    assert live.undo(change).state == "undone"
    assert live.fingerprints() == before
    assert live.ask(QUESTION) == reply.text


def test_the_report_says_what_was_before_what_is_after_and_what_it_cost(live: LiveModel) -> None:
    reply = live.chat(QUESTION)
    report = live.fix(reply, "z").report
    assert report is not None
    assert report.before == reply.text
    assert "z" in report.after
    assert report.guard is not None and report.guard.passed
    assert report.weights is not None
    assert report.weights.sites == ("lm_head.weight",)
    assert 0 < report.weights.entries <= 24 and report.weights.survived == 1.0
    assert set(report.seconds) == {"case", "propose", "guard", "report", "commit"}
    assert report.version_before != report.version_after == str(live.engine.version)
    assert [attempt.outcome for attempt in report.tried] == ["chosen"]
    assert "shout" in str(report) and "before" in str(report)


def test_a_report_read_back_from_the_ledger_is_the_one_that_was_given(live: LiveModel) -> None:
    change = live.fix(live.chat(QUESTION), "z")
    assert live.change("c1") == change == live.changes()[0]
    assert isinstance(change.report, Report)
    assert Change.model_validate_json(change.model_dump_json()) == change


def test_a_fixed_answer_is_protected_while_its_change_is_active(live: LiveModel) -> None:
    change = live.fix(live.chat(QUESTION), "z")
    assert [answer.label for answer in live.protected()] == [change.protected]
    # The wished words, and not what this model goes on to say.
    assert live.protected()[0].answer.strip().lower().endswith("z")
    assert len(live.protected()[0].answer) < len(change.report.after if change.report else "")
    live.off(change)
    assert live.protected() == []
    live.on(change)
    assert len(live.protected()) == 1


def test_a_preview_is_committed_without_another_search(live: LiveModel, monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    shout = METHODS["shout"]
    told = dataclasses.replace(shout, propose=lambda *given: searched.append(given) or shout.propose(*given))
    monkeypatch.setitem(METHODS, "shout", told)
    reply = live.chat(QUESTION)
    seen = live.fix(reply, "z", preview=True)
    change = live.fix(reply, "z", "because")
    assert len(searched) == 1
    assert change.report is not None
    assert (change.adjustment_hash, change.report.reason) == (seen.adjustment_hash, "because")
    assert set(change.report.seconds) >= {"propose", "guard", "commit"}
    live.undo(change)
    # Something else, or another state, is searched for.
    live.fix(reply, "z", preview=True)
    live.fix(live.chat(OTHER), "y", force=True)
    live.fix(reply, "z", force=True)
    assert len(searched) >= 4


def test_a_preview_measures_and_leaves_no_trace(live: LiveModel) -> None:
    reply, before = live.chat(QUESTION), live.fingerprints()
    events = len(live.history())
    for change in (live.fix(reply, "z", preview=True), live.bad(reply, preview=True), live.good(reply, preview=True)):
        assert (change.id, change.state) == (None, "preview")
        assert change.report is not None
    assert live.fingerprints() == before
    assert (live.changes(), live.protected(), live.feedback(), len(live.history())) == ([], [], [], events)
    with pytest.raises(StateConflict, match="no weight"):
        live.undo(change)


def test_over_budget_nothing_is_changed_and_the_refusal_is_remembered(tmp_path: Path) -> None:
    with LiveModel.load(settings=tiny_settings(tmp_path, loose=False)) as live:
        before = live.fingerprints()
        with pytest.raises(GuardRefused, match="c1 works") as caught:
            live.fix(live.chat(QUESTION), "z")
        assert caught.value.details["change"] == "c1"
        assert live.fingerprints() == before
        refused = live.change("c1")
        assert refused.state == "refused" and refused.report is not None and refused.report.guard is not None
        assert refused.report.guard.reasons
        assert [each.verdict for each in live.feedback()] == ["fix"]
        forced = live.fix("r1", "z", force=True)
        assert forced.forced and forced.state == "active" and forced.report is not None and forced.report.forced
        assert "z" in live.ask(QUESTION)


def test_where_no_method_finds_a_mend_the_error_says_what_was_tried(live: LiveModel) -> None:
    before = live.fingerprints()
    with pytest.raises(NoMendFound, match="shout cannot say q") as caught:
        live.fix(live.chat(QUESTION), "q")
    assert caught.value.details["tried"][0]["method"] == "shout"
    assert live.fingerprints() == before
    assert [each.wanted for each in live.feedback()] == ["q"]  # what the person said is kept all the same


@pytest.mark.parametrize(("name", "kind"), [("nonsense", "fix"), ("rome ", "fix"), ("scale", "fix")])
def test_an_unknown_or_unfit_method_is_refused_by_name(live: LiveModel, name: str, kind: str) -> None:
    with pytest.raises(UnknownMethod, match=name):
        live.fix(live.chat(QUESTION), "z", method=name)


def test_an_empty_wish_an_unknown_reply_and_an_unknown_change_are_refused(live: LiveModel) -> None:
    with pytest.raises(UnknownReply):
        live.fix("r7", "z")
    with pytest.raises(InvalidInput, match="empty"):
        live.fix(live.chat(QUESTION), "  ")
    with pytest.raises(UnknownChange):
        live.undo("c9")
    with pytest.raises(StateConflict, match="nothing to undo"):
        live.undo()


def test_a_fix_that_the_model_says_already_is_told_so(live: LiveModel) -> None:
    live.fix(live.chat(QUESTION), "z")
    with pytest.raises(StateConflict, match="already"):
        live.fix(live.chat(QUESTION), "z")
    assert len(live.changes()) == 1


def test_a_contradicting_fix_replaces_the_earlier_one_by_name_and_undo_brings_it_back(live: LiveModel) -> None:
    live.fix(live.chat(QUESTION), "z")
    with_z, kept = live.fingerprints(), live.protected()
    second = live.fix(live.chat(QUESTION), "k")
    assert second.report is not None
    assert [each.change for each in second.report.replaced] == ["c1"]
    assert (live.change("c1").state, live.change("c1").replaced_by) == ("off", "c2")
    with pytest.raises(StateConflict, match="c2 is on"):
        live.on("c1")
    live.undo(second)
    assert live.change("c1").state == "active"
    assert live.fingerprints() == with_z
    assert live.protected() == kept


def test_what_a_replaced_change_had_replaced_stays_off_until_what_replaced_that_is_undone(live: LiveModel) -> None:
    for letter in "zka":
        live.fix(live.chat(QUESTION), letter)
    live.undo("c2")
    assert [change.state for change in live.changes()] == ["off", "undone", "active"]
    live.undo("c3")
    assert [change.state for change in live.changes()] == ["active", "undone", "undone"]


def test_undo_brings_nothing_back_that_contradicts_what_is_on(live: LiveModel) -> None:
    live.fix(live.chat(QUESTION), "z")
    live.fix(live.chat(QUESTION), "k")
    live.off("c2")
    live.fix(live.chat(QUESTION), "a")
    live.undo("c2")
    assert [change.state for change in live.changes()] == ["off", "undone", "active"]


def contradicted(live: LiveModel, reply: Reply) -> list[str]:
    """The changes that a bad for this reply would replace."""
    work = live._judge._work(Judgement("bad", reply), Options(), Phases())
    return [change.label for change in work.conflicts]


def test_a_second_bad_leaves_on_what_took_the_first_answer_away(live: LiveModel) -> None:
    live.bad(live.chat(QUESTION))
    assert contradicted(live, live.chat(QUESTION)) == []


def test_a_bad_replaces_the_change_that_taught_the_answer_and_no_other(live: LiveModel) -> None:
    reply = live.chat(QUESTION)
    live.fix(reply, "z")
    assert "z" not in reply.text
    assert contradicted(live, reply) == []
    assert contradicted(live, live.chat(QUESTION)) == ["c1"]


def test_what_a_fix_overrules_is_protected_again_whenever_the_fix_is_not_on(live: LiveModel) -> None:
    live.good(live.chat(QUESTION))
    (kept,) = live.protected()

    def in_force() -> bool:
        return kept.label in [each.label for each in live.protected()]

    change = live.fix(live.chat(QUESTION), "z")
    assert change.report is not None and change.report.released == (kept.label,)
    assert not in_force()
    live.off(change)
    assert in_force()
    live.on(change)
    assert not in_force()
    second = live.fix(live.chat(QUESTION), "k")  # replaces the first
    assert live.change(change).state == "off" and not in_force()
    live.undo(second)
    assert not in_force()
    live.undo(change)
    assert in_force()


def test_both_can_be_kept(live: LiveModel) -> None:
    live.fix(live.chat(QUESTION), "z")
    second = live.fix(live.chat(QUESTION), "k", keep_both=True)
    assert [change.state for change in live.changes()] == ["active", "active"]
    assert second.report is not None and [each.change for each in second.report.kept] == ["c1"]
    assert len(live.engine.state) == 2


def test_off_on_and_strength_move_weights_and_ledger_together(live: LiveModel) -> None:
    base = live.fingerprints()
    change = live.fix(live.chat(QUESTION), "z")
    full = live.fingerprints()
    assert live.set_strength(change, 0.5).strength == 0.5
    half = live.fingerprints()
    assert half not in (base, full)
    live.off(change)
    assert live.fingerprints() == base
    with pytest.raises(StateConflict):
        live.off(change)
    live.on(change)
    assert live.fingerprints() == half
    live.set_strength(change, 0)
    assert live.fingerprints() == base
    with pytest.raises(InvalidInput):
        live.set_strength(change, float("nan"))
    live.set_strength(change, 1)
    assert live.fingerprints() == full


def test_changes_undone_in_any_order_leave_the_base(live: LiveModel) -> None:
    base = live.fingerprints()
    for letter in "abcd":
        live.fix(live.chat(QUESTION), letter, keep_both=True)
    changes = live.changes()
    random.Random(5).shuffle(changes)
    for change in changes:
        live.undo(change)
    assert live.fingerprints() == base
    assert live.engine.state == ()


def test_bad_makes_another_answer_come(live: LiveModel) -> None:
    reply = live.chat(QUESTION)
    change = live.bad(reply, "nonsense")
    assert change.state == "active"
    assert live.ask(QUESTION) != reply.text
    assert [(each.verdict, each.reason) for each in live.feedback(reply)] == [("bad", "nonsense")]
    assert live.protected() == []


def test_a_good_answer_is_protected_and_an_overruling_fix_releases_it(live: LiveModel) -> None:
    reply = live.chat(QUESTION)
    change = live.good(reply)
    assert live.protected()[0].answer == reply.text
    assert change.report is not None and change.report.margin is not None
    if change.id is not None:  # its lead was thin, so it was made surer
        live.undo(change)
    label = live.protected()[0].label
    fixed = live.fix(reply, "z")
    assert fixed.report is not None and label in fixed.report.released
    assert label not in [answer.label for answer in live.protected()]


def test_a_protected_answer_is_taken_back_like_a_change(live: LiveModel) -> None:
    change = live.good(live.chat(QUESTION))
    if change.id is not None:
        live.undo(change)
    gone = live.undo("p1")
    assert (gone.label, gone.state, gone.question) == ("p1", "undone", QUESTION)
    assert live.protected() == []
    assert live.history()[-1].kind == "unprotected"
    with pytest.raises(StateConflict, match="p1"):
        live.undo("p1")
    with pytest.raises(UnknownChange, match="p9"):
        live.undo("p9")


def test_a_method_that_refits_is_asked_again_with_the_protected_answers_that_it_would_change(
    live: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Case] = []

    def deaf(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
        """Shout all the same."""
        asked.append(case)
        return SHOUT.propose(engine, case, settings)

    live.fix(live.chat(OTHER), "k")
    (kept,) = live.protected()
    monkeypatch.setitem(METHODS, "shout", dataclasses.replace(SHOUT, propose=deaf, refits=True))
    with pytest.raises(GuardRefused, match="protected"):
        live.fix(live.chat(QUESTION), "z")
    assert [(len(case.broken), case.careful) for case in asked] == [(0, False), (1, False), (1, True)]
    assert asked[1].broken[0][1] == kept.token_ids
    monkeypatch.setitem(METHODS, "shout", dataclasses.replace(SHOUT, propose=deaf))
    with pytest.raises(GuardRefused):
        live.fix("r2", "z")
    assert len(asked) == 4


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_the_second_start_is_in_the_state_that_the_first_left(
    database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = None if database == "sqlite" else next(request.getfixturevalue("postgresql"))
    settings = tiny_settings(tmp_path, database_url=url)
    with LiveModel.load(settings=settings) as live:
        live.fix(live.chat(QUESTION), "z")
        live.fix(live.chat(OTHER), "k", force=True)  # the first answer is protected, and this method spares nothing
        base = live.fingerprints()
        live.set_strength("c2", 0.5)
        left = live.fingerprints()
        assert left != base
        with pytest.raises(WorkspaceBusy):
            LiveModel.load(settings=settings)
    with LiveModel.load(settings=settings) as live:
        assert live.notices == ()
        assert live.fingerprints() == left
        live.set_strength("c2", 1.0)
        assert live.fingerprints() == base
        assert [(change.label, change.state) for change in live.changes()] == [("c1", "active"), ("c2", "active")]


def test_threads_may_judge_and_chat_at_once(live: LiveModel) -> None:
    live.chat(QUESTION)
    outcomes: list[object] = []

    def work(letter: str) -> None:
        try:
            outcomes.append(live.fix("r1", letter, keep_both=True).state)
            live.chat(OTHER)
        except BaseException as error:
            outcomes.append(error)

    threads = [threading.Thread(target=work, args=(letter,)) for letter in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # On top of another letter this method may find no way; whoever comes first does.
    assert all(outcome == "active" or isinstance(outcome, NoMendFound) for outcome in outcomes)
    assert len(outcomes) == 3 and "active" in outcomes
    assert live.engine.state == live.ledger.state(live.engine.info.hash)
    assert len(live.changes()) == outcomes.count("active")


def test_ctrl_c_at_any_instant_leaves_weights_and_ledger_whole(tmp_path: Path) -> None:
    tiny_settings(tmp_path)
    with running(interrupted, tmp_path, 1) as (_, pipe):
        found = [pipe.recv() for _ in range(12)]
        base, fingerprints, hits = pipe.recv()
    assert found == [(True, True, True)] * 12
    assert (base, hits) == ("base", 12)
    with LiveModel.load(settings=tiny_settings(tmp_path)) as live:
        live.engine.become(())
        assert live.fingerprints() == fingerprints


def test_killed_at_any_instant_the_weights_equal_the_ledger_after_restart(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    for kill in range(KILLS):
        chance = random.Random(kill)
        known: list[tuple[str, str]] = []
        with running(change_without_end, tmp_path, kill) as (child, pipe):
            assert pipe.recv() == "ready"
            for _ in range(chance.randint(1, 4)):
                known = pipe.recv()
            pipe.poll(chance.random() * 0.3)  # on to an instant nobody can foresee
            child.kill()
            child.join()
        with LiveModel.load(settings=settings) as live:
            assert [change.label for change in live.changes()][: len(known)] == [label for label, _ in known]
            assert live.ledger.verify() == []
            assert live.ledger.changes(states=["intended"]) == []
            assert live.engine.state == live.ledger.state(live.engine.info.hash)
            now = live.fingerprints()
            live.engine.become(())
            live.engine.become(live.ledger.state(live.engine.info.hash))
            assert live.fingerprints() == now


def test_an_interrupt_waits_for_the_outermost_block() -> None:
    over = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
        over.append("inner")
    assert over == ["inner"]


def test_ctrl_c_while_the_ledger_is_written_costs_neither_the_reply_nor_the_ledger(
    live: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialect = live.ledger._engine.dialect
    commit, pressed = dialect.do_commit, []

    def press(connection: Any) -> None:
        if not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)
        commit(connection)

    monkeypatch.setattr(dialect, "do_commit", press)
    with pytest.raises(KeyboardInterrupt):
        live.chat(QUESTION)
    assert pressed and [reply.question for reply in live.replies()] == [QUESTION]
    live.fix(live.chat(QUESTION), "z")
    assert live.changes()[0].state == "active"


def test_an_interrupt_is_not_lost_behind_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("the block failed too")
    assert signal.getsignal(signal.SIGINT) is before


def test_an_adjustment_that_no_reply_asked_for_is_measured_committed_and_undone(live: LiveModel) -> None:
    before = live.fingerprints()
    vector = torch.zeros(live.engine.info.width)
    vector[3] = 2.0
    steer = Adjustment(name="pull", method="steer", ops=(Steer(site="layers.0.resid", vector=vector),))
    seen = live.apply(steer, prompt=QUESTION, preview=True)
    assert (seen.id, seen.state, live.changes()) == (None, "preview", [])
    change = live.apply(steer, prompt=QUESTION)
    assert (change.state, change.verdict, change.method) == ("active", "apply", "steer")
    assert change.report is not None and change.report.guard is not None
    assert change.report.question == QUESTION
    assert live.engine.activations.hooks
    assert live.undo().state == "undone"
    assert not live.engine.activations.hooks
    assert live.fingerprints() == before


def test_an_adjustment_over_budget_is_refused_and_remembered_unless_forced(tmp_path: Path) -> None:
    with LiveModel.load(settings=tiny_settings(tmp_path, loose=False)) as live:
        scale = Adjustment(
            name="louder",
            method="scale",
            ops=(ScaleNeurons(layer=0, neurons=(1, 2, 3), factors=torch.full((3,), 9.0)),),
        )
        with pytest.raises(GuardRefused) as refused:
            live.apply(scale)
        assert live.change(refused.value.details["change"]).state == "refused"
        assert live.apply(scale, force=True).forced


def test_an_adjustment_that_moves_nothing_or_does_not_fit_is_refused(live: LiveModel) -> None:
    nothing = Adjustment(name="nothing", method="scale", ops=(ScaleNeurons(layer=0, neurons=(1,), factors=[1.0]),))
    with pytest.raises(NoEffect):
        live.apply(nothing)
    with pytest.raises(InvalidInput):
        live.apply(Adjustment(name="empty", method="scale", ops=()))
    with pytest.raises(UnknownSite):
        live.apply(Adjustment(name="far", method="scale", ops=(ScaleNeurons(layer=9, neurons=(1,), factors=[2.0]),)))
    assert [change.state for change in live.changes()] == ["failed"]


def test_weights_go_back_also_where_the_ledger_cannot_be_written(
    live: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise NoSpace("The disk is full.", hint="Free some space.")

    before, reply = live.fingerprints(), live.chat(QUESTION)
    with monkeypatch.context() as patched:
        for name in ("activate", "fail", "recover", "finish", "abandon"):
            patched.setattr(live.ledger, name, full)
        with pytest.raises(NoSpace):
            live.fix(reply, "z", force=True)
        assert live.fingerprints() == before
        assert live.engine.state == ()
    change = live.fix(reply, "z", force=True)
    now = live.fingerprints()
    with monkeypatch.context() as patched:
        patched.setattr(live.ledger, "finish", full)
        with pytest.raises(NoSpace):
            live.off(change)
        assert live.fingerprints() == now


def test_a_verb_that_is_refused_moves_no_weight(live: LiveModel, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[object] = []
    monkeypatch.setattr(live.engine, "become", moved.append)
    with pytest.raises(UnknownChange):
        live.off("c999")
    assert moved == []


def test_while_a_correction_is_replaced_others_see_what_is_committed(
    live: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = live.chat(QUESTION)
    live.fix(reply, "z", force=True)
    seen: list[object] = []
    committed = live.engine.state, live.engine.version

    def look() -> None:
        seen.append((live.engine.state, live.engine.version) == committed)

    def propose(*given: Any) -> Adjustment:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        seen.append(live.engine.state == ())  # its own thread searches without what is replaced
        return SHOUT.propose(*given)

    monkeypatch.setitem(METHODS, "shout", replace(SHOUT, propose=propose))
    change = live.fix(live.chat(QUESTION), "y", force=True)
    assert seen == [True, True]
    assert change.report is not None and change.report.version_before == str(committed[1])


def test_a_change_whose_tensors_are_lost_can_still_be_undone_while_the_model_runs(live: LiveModel) -> None:
    before = live.fingerprints()
    change = live.fix(live.chat(QUESTION), "z", force=True)
    for blob in (live.settings.workspace / "blobs").rglob("*"):
        if blob.is_file():
            blob.unlink()
    with pytest.raises(LedgerDamaged):
        live.off("c999")
    live.undo(change)
    assert live.fingerprints() == before
