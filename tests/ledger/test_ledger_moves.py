"""Write-ahead: every way a change can go, and every way it cannot."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liveweight.adjustments import Active
from liveweight.errors import InvalidInput, StateConflict, UnknownChange, WrongModel
from liveweight.ledger import Ledger, Move
from tests.ledger.ledger_examples import MODEL, Place, adjustment, commit, move, proposal


def test_a_change_counts_once_it_is_confirmed_and_not_before(ledger: Ledger) -> None:
    change = ledger.intend(proposal())
    assert change.state == "intended"
    assert ledger.state(MODEL) == ()
    assert ledger.state(MODEL, intended=True) == (Active(adjustment(), 1.0),)
    assert ledger.activate(change.id).state == "active"
    assert ledger.state(MODEL) == ledger.state(MODEL, intended=True) == (Active(adjustment(), 1.0),)


def test_the_state_is_rebuilt_from_disk_alone(place: Place) -> None:
    with place.open() as ledger:
        ledger.ensure_model(MODEL, "tiny", "tests/tiny", "llama")
        for seed in range(3):
            commit(ledger, seed, strength=seed + 0.1)
        before = ledger.state(MODEL)
    with place.open() as ledger:
        assert ledger.state(MODEL) == before == tuple(Active(adjustment(seed), seed + 0.1) for seed in range(3))


def test_a_change_turned_on_again_stands_where_it_stood(ledger: Ledger) -> None:
    first, second = commit(ledger, 1), commit(ledger, 2)
    move(ledger, first.id, "off")
    assert [active.adjustment for active in ledger.state(MODEL)] == [adjustment(2)]
    move(ledger, first.id, "active")
    assert [active.adjustment for active in ledger.state(MODEL)] == [adjustment(1), adjustment(2)]
    assert second.position > first.position


def test_a_strength_can_be_set_while_on_or_off(ledger: Ledger) -> None:
    change = commit(ledger)
    move(ledger, change.id, strength=0.5)
    assert ledger.state(MODEL)[0].strength == 0.5
    move(ledger, change.id, "off")
    move(ledger, change.id, strength=0.25)
    assert ledger.change(change.id).state == "off"
    move(ledger, change.id, "active", strength=0.75)
    assert ledger.state(MODEL)[0].strength == 0.75
    for strength in (float("nan"), float("inf")):
        with pytest.raises(InvalidInput, match="finite"):
            ledger.intend_move(change.id, strength=strength)


def test_undo_is_final(ledger: Ledger) -> None:
    change = commit(ledger)
    move(ledger, change.id, "undone")
    for wish in ("active", "off", "undone"):
        with pytest.raises(StateConflict, match=rf"{change.label} was undone, which is final"):
            ledger.intend_move(change.id, wish)  # type: ignore[arg-type]
    assert ledger.state(MODEL) == ()


def test_what_moves_nothing_is_refused(ledger: Ledger) -> None:
    change = commit(ledger)
    for to, strength in (("active", None), (None, 1.0), ("active", 1.0), (None, None)):
        with pytest.raises(StateConflict, match="active at strength 1 already"):
            ledger.intend_move(change.id, to, strength=strength)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="failed"):
        ledger.intend_move(change.id, "failed")
    with pytest.raises(UnknownChange, match="c7"):
        ledger.intend_move("c7", "off")


def test_refused_and_failed_changes_keep_their_reasons_and_cannot_be_moved(ledger: Ledger) -> None:
    refused = ledger.refuse(proposal(1), "KL 0.4 over 0.01")
    failed = ledger.fail(ledger.intend(proposal(2)).id, "the device is out of memory")
    assert (refused.state, refused.reason) == ("refused", "KL 0.4 over 0.01")
    assert (failed.state, failed.reason) == ("failed", "the device is out of memory")
    for change in (refused, failed):
        with pytest.raises(StateConflict, match=change.state):
            ledger.intend_move(change.id, "active")
    assert ledger.state(MODEL) == ledger.state(MODEL, intended=True) == ()
    assert ledger.report(refused.id)["kl"] == 0.01


def test_one_thing_at_a_time_is_done_to_a_model(ledger: Ledger) -> None:
    change = commit(ledger, 1)
    ledger.intend(proposal(2))
    with pytest.raises(StateConflict, match="c2 is being changed"):
        ledger.intend(proposal(3))
    with pytest.raises(StateConflict, match="c2 is being changed"):
        ledger.intend_move(change.id, "off")
    with pytest.raises(StateConflict, match="still being made"):
        ledger.intend_move(2, "undone")
    ledger.activate(2)
    assert [found.id for found in ledger.changes()] == [1, 2]


def test_an_intent_is_closed_once(ledger: Ledger) -> None:
    change = commit(ledger)
    intent = ledger.intend_move(change.id, "off")
    assert ledger.finish(intent.id, {"version": 7}).status == "finished"
    with pytest.raises(StateConflict, match="already finished"):
        ledger.finish(intent.id)
    with pytest.raises(StateConflict, match="already finished"):
        ledger.abandon(intent.id, "late")
    with pytest.raises(StateConflict, match="not being made"):
        ledger.activate(change.id)
    with pytest.raises(InvalidInput, match="99"):
        ledger.finish(99)
    assert ledger.events()[-1].details["version"] == 7


def test_an_abandoned_move_leaves_everything_as_it_was(ledger: Ledger) -> None:
    change = commit(ledger)
    intent = ledger.intend_move(change.id, "undone", strength=0.5)
    assert ledger.state(MODEL, intended=True) == ()
    assert ledger.abandon(intent.id, "the engine was busy").reason == "the engine was busy"
    assert ledger.change(change.id).model_dump(exclude={"updated_at"}) == change.model_dump(exclude={"updated_at"})
    move(ledger, change.id, "undone")


def test_a_change_replaces_others_in_the_same_stroke(ledger: Ledger) -> None:
    old, kept = commit(ledger, 1), commit(ledger, 2)
    new = ledger.intend(proposal(3), replaces=[old.label])
    assert len(ledger.state(MODEL)) == 2
    assert [active.adjustment for active in ledger.state(MODEL, intended=True)] == [adjustment(2), adjustment(3)]
    ledger.activate(new.id)
    old = ledger.change(old.id)
    assert (old.state, old.replaced_by) == ("off", new.id)
    assert [active.adjustment for active in ledger.state(MODEL)] == [adjustment(2), adjustment(3)]
    assert ledger.events(subject=old.label)[-1].details["replaced_by"] == new.label
    with pytest.raises(StateConflict, match="off at strength 1 already"):
        ledger.intend(proposal(4), replaces=[old.id])
    assert len(ledger.changes()) == 3
    ledger.finish(ledger.intend_moves(MODEL, [Move(new.id, "undone"), Move(old.id, "active")]).id)
    assert [active.adjustment for active in ledger.state(MODEL)] == [adjustment(1), adjustment(2)]
    assert ledger.change(old.id).replaced_by is None
    assert ledger.change(kept.id).state == "active"


def test_several_moves_are_made_together_or_not_at_all(ledger: Ledger) -> None:
    one, two = commit(ledger, 1), commit(ledger, 2)
    move(ledger, two.id, "undone")
    with pytest.raises(StateConflict):
        ledger.intend_moves(MODEL, [Move(one.id, "off"), Move(two.id, "off")])
    with pytest.raises(InvalidInput, match="once"):
        ledger.intend_moves(MODEL, [Move(one.id, "off"), Move(one.id, "undone")])
    with pytest.raises(InvalidInput, match="once"):
        ledger.intend_moves(MODEL, [])
    with pytest.raises(WrongModel):
        ledger.intend_moves("e" * 64, [Move(one.id, "off")])
    assert len(ledger.state(MODEL, intended=True)) == 1


def test_a_new_change_that_was_never_confirmed_is_off_after_a_crash_and_can_be_turned_on(place: Place) -> None:
    with place.open() as ledger:
        ledger.ensure_model(MODEL, "tiny", "tests/tiny", "llama")
        old = commit(ledger, 1)
        ledger.intend(proposal(2), replaces=[old.id])
    with place.open() as ledger:
        said = ledger.recover()
        assert len(said) == 1
        assert "c2" in said[0]
        assert "off" in said[0]
        assert ledger.recover() == []
        assert ledger.change("c2").state == "off"
        assert ledger.change("c1").state == "active"
        assert ledger.events(subject="c2")[-2].details["said"] == said[0]
        move(ledger, 2, "active")
        assert len(ledger.state(MODEL)) == 2


def test_a_half_made_move_is_rolled_back_after_a_crash(place: Place) -> None:
    with place.open() as ledger:
        ledger.ensure_model(MODEL, "tiny", "tests/tiny", "llama")
        one, two = commit(ledger, 1), commit(ledger, 2)
        ledger.intend_moves(MODEL, [Move(one.id, "undone"), Move(two.id, strength=0.25)])
    with place.open() as ledger:
        said = ledger.recover()
        assert ["undone" in said[0], "strength 0.25" in said[1], len(said)] == [True, True, 2]
        assert ledger.state(MODEL) == (Active(adjustment(1)), Active(adjustment(2)))
        assert "recovered" in [event.kind for event in ledger.events(subject="c1")]


@dataclass
class _Expected:
    """The plainest possible ledger: a list of [state, strength]."""

    changes: list[list[object]] = field(default_factory=list)

    def allows(self, number: int, to: str) -> bool:
        state = self.changes[number][0]
        return (state, to) in {("active", "off"), ("active", "undone"), ("off", "active"), ("off", "undone")}


_COMMANDS = st.lists(
    st.tuples(
        st.sampled_from(["commit", "fail", "refuse", "crash", "active", "off", "undone", "strength", "abandon"]),
        st.integers(0, 3),
        st.sampled_from([0.0, 0.5, 1.0, -2.0]),
    ),
    max_size=14,
)


_MODELS = itertools.count()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(commands=_COMMANDS)
def test_the_state_is_what_the_commands_say_in_ledger_order(
    ledger: Ledger, commands: list[tuple[str, int, float]]
) -> None:
    model = f"{next(_MODELS):064x}"  # each example has a model, and so a list of changes, of its own
    ledger.ensure_model(model, "tiny", model, "llama")
    expected = _Expected()
    for command, number, strength in commands:
        _obey(ledger, model, expected, command, number, strength)
    found = ledger.changes(model)
    assert [[change.state, change.strength] for change in found] == expected.changes
    assert ledger.state(model) == tuple(
        Active(adjustment(number), change.strength) for number, change in enumerate(found) if change.state == "active"
    )
    assert ledger.state(model) == ledger.state(model, intended=True)


def _obey(ledger: Ledger, model: str, expected: _Expected, command: str, number: int, strength: float) -> None:
    seed = len(expected.changes)
    new = proposal(seed, model=model, strength=strength)
    if command == "commit":
        ledger.activate(ledger.intend(new).id)
        expected.changes.append(["active", strength])
    elif command == "fail":
        ledger.fail(ledger.intend(new).id, "no memory")
        expected.changes.append(["failed", strength])
    elif command == "refuse":
        ledger.refuse(new, "over budget")
        expected.changes.append(["refused", strength])
    elif command == "crash":
        ledger.intend(new)
        assert len(ledger.recover()) == 1
        expected.changes.append(["off", strength])
    elif number < seed:
        _move(ledger, model, expected, command, number, strength)


def _move(ledger: Ledger, model: str, expected: _Expected, command: str, number: int, strength: float) -> None:
    change, kept = ledger.changes(model)[number], expected.changes[number]
    if command in ("strength", "abandon"):
        allowed = kept[0] in ("active", "off") and kept[1] != strength
        wish = Move(change.id, strength=strength)
    else:
        allowed = expected.allows(number, command)
        wish = Move(change.id, command)  # type: ignore[arg-type]
    if not allowed:
        with pytest.raises(StateConflict):
            ledger.intend_moves(model, [wish])
        return
    intent = ledger.intend_moves(model, [wish])
    if command == "abandon":
        ledger.abandon(intent.id, "never mind")
        return
    ledger.finish(intent.id)
    if command == "strength":
        kept[1] = strength
    else:
        kept[0] = command
