"""The arena on a tiny model: every mode, killed and gone on with, and its figures against ones worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from liveweight.adjustments import Adjustment, LowRank
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, NoMendFound
from liveweight.evaluation import Edit, EditScores
from liveweight.evaluation.arena import Arena, Mode, Plan
from liveweight.evaluation.arena_report import figure, markdown, summary
from liveweight.guard import Guard
from liveweight.live_model import LiveModel
from liveweight.methods import METHODS, Case
from liveweight.methods.base import Joint
from liveweight.settings import GuardSettings, MethodSettings
from tests.tiny_workspace import SHOUT, tiny_settings

EDITS = (
    Edit("0", "completion", "the moon is", "moon", "made", "far", ("a moon is",), ("the sun is", "a boat is"), "moon?"),
    Edit("1", "completion", "the boat is", "boat", "old", "new", ("a boat is",), ("the sun is",), "boat?"),
    Edit("2", "completion", "the sun is", "sun", "hot", "cold", ("a sun is",), ("the boat is",), "sun?"),
)
SETTINGS = MethodSettings(layer=1, max_steps=40)


@pytest.fixture(autouse=True)
def the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "shout", SHOUT)


def arena(live: LiveModel, mode: Mode, methods: tuple[str, ...], cases: tuple[Edit, ...] = EDITS) -> Arena:
    plan = Plan("tiny", cases, methods, mode, points=(1, 2), collapse=float("inf"))
    return Arena(live.engine, live.guard, SETTINGS, plan, neutral=["who?", "why?"], text="a b c d e f g h")


@pytest.mark.parametrize("mode", ["single", "sequential", "batch"])
def test_a_run_measures_every_method_and_leaves_the_base(mode: Mode, tmp_path: Path) -> None:
    with LiveModel.load(settings=tiny_settings(tmp_path)) as live:
        before = live.fingerprints()
        data = arena(live, mode, ("shout", "memit")).run(tmp_path / "run.json")
        assert live.fingerprints() == before
        assert live.changes() == []
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == json.loads(json.dumps(data))
    assert not (tmp_path / "run.parts").exists()
    rows = summary(data)
    names = [row["method"] for row in rows]
    assert names[0] == "unedited"
    assert {"shout", "memit"} <= set(names)
    assert all(row["undo_exact"] for row in rows[1:] if row["made"] and row.get("undo_exact") is not None)
    if mode == "sequential":
        assert [row["cases"] for row in rows if row["method"] == "shout"] == [1, 2, 3]
    table = markdown(data)
    assert "| unedited |" in table
    assert len(figure(data).data) > 0


class Killed(BaseException):
    pass


@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_a_run_that_was_killed_goes_on_and_gives_the_same_figures(mode: Mode, tmp_path: Path) -> None:
    with LiveModel.load(settings=tiny_settings(tmp_path)) as live:
        whole = arena(live, mode, ("shout",)).run(tmp_path / "whole.json")
        broken = arena(live, mode, ("shout",))

        def die(what: str, done: int, of: int) -> None:
            if what == "shout" and done == 2:
                raise Killed

        broken._progress = die
        with pytest.raises(Killed):
            broken.run(tmp_path / "broken.json")
        assert live.engine.state == ()
        with pytest.raises(InvalidInput, match="is there already"):
            arena(live, mode, ("shout",)).run(tmp_path / "broken.json")
        again = arena(live, mode, ("shout",)).run(tmp_path / "broken.json", resume=True)
        with pytest.raises(InvalidInput, match="cases was 3, not 2"):
            arena(live, mode, ("shout",), EDITS[:2]).run(tmp_path / "broken.json", resume=True)
        with pytest.raises(InvalidInput, match="holds a run whose ground was"):
            other = Arena(live.engine, live.guard, SETTINGS, broken.plan, neutral=["who?"], text="a b c d e f g h")
            other.run(tmp_path / "broken.json", resume=True)
        with pytest.raises(InvalidInput, match="holds a run whose guard was"):
            other = arena(live, mode, ("shout",))
            other.guard = Guard(live.engine, GuardSettings(tokens=3), tmp_path / "guard", live.guard.probes)
            other.run(tmp_path / "broken.json", resume=True)
    same = ("efficacy", "paraphrase", "neighbourhood", "chat", "kl", "perplexity_ratio", "made")
    for one, other in zip(summary(whole), summary(again), strict=True):
        assert [one.get(name) for name in same] == pytest.approx([other.get(name) for name in same])


def test_a_sequence_that_was_stopped_while_it_was_measured_is_measured_there_again(tmp_path: Path) -> None:
    with LiveModel.load(settings=tiny_settings(tmp_path)) as live:
        broken = arena(live, "sequential", ("shout",))

        def die(what: str, done: int, of: int) -> None:
            if what.startswith("shout: measuring") and done == 2:
                raise Killed

        broken._progress = die
        with pytest.raises(Killed):
            broken.run(tmp_path / "broken.json")
        again = arena(live, "sequential", ("shout",)).run(tmp_path / "broken.json", resume=True)
    assert [point["edits"] for point in again["points"]["shout"]] == [1, 2, 3]


def test_weights_of_two_bytes_are_told_to_be_the_old_ones(tmp_path: Path) -> None:
    with LiveModel.load(settings=tiny_settings(tmp_path, dtype="bfloat16")) as live:
        (row,) = arena(live, "single", ("shout",), EDITS[:1]).run(tmp_path / "run.json")["methods"]["shout"]
    assert row["undo_exact"]


def test_a_method_that_finds_nothing_for_all_at_once_leaves_the_others_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(engine: TransformersEngine, cases: object, settings: MethodSettings) -> Joint:
        raise NoMendFound("there is no room.", hint="Make some.")

    monkeypatch.setitem(METHODS, "memit", replace(METHODS["memit"], together=nothing))
    with LiveModel.load(settings=tiny_settings(tmp_path)) as live:
        data = arena(live, "batch", ("memit", "shout")).run(tmp_path / "run.json")
    assert "memit found nothing in 3 of 3 cases; the first: there is no room." in markdown(data)
    assert [row["made"] for row in summary(data)[1:]] == [0, 3]


def test_a_model_that_ends_its_reply_at_once_has_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LiveModel.load(settings=tiny_settings(tmp_path)) as live:
        run = arena(live, "sequential", ("shout",), EDITS[:1])
        monkeypatch.setattr(live.engine, "generate", lambda *_: iter(["end"]))
        (point,) = run.run(tmp_path / "run.json")["points"]["shout"]
    assert point["decode_speed"] is None


def test_a_sequence_is_measured_by_a_sample_and_ends_where_the_model_collapsed(tmp_path: Path) -> None:
    with LiveModel.load(settings=tiny_settings(tmp_path)) as live:
        run = arena(live, "sequential", ("shout",))
        run.plan = replace(run.plan, measured=1)
        sampled = run.run(tmp_path / "sampled.json")
        run.plan = replace(run.plan, collapse=0.0)
        ended = run.run(tmp_path / "ended.json")
        assert run.run(tmp_path / "ended.json", resume=True) == ended
        assert live.engine.state == ()
    assert [point["measured"] for point in sampled["points"]["shout"]] == [1, 1, 1]
    assert [point["edits"] for point in ended["points"]["shout"]] == [1]
    assert all(point["decode_speed"] > 0 and point["undo_exact"] for point in ended["points"]["shout"])
    assert "shout collapsed by edit 1 (" in markdown(ended)
    assert "collapsed" not in markdown(sampled).replace("collapse ", "")


def test_under_the_guard_what_was_refused_counts_as_not_edited() -> None:
    def scores(value: float) -> dict[str, float | None]:
        return dict.fromkeys(EditScores.__dataclass_fields__, value)

    def case(passed: bool) -> dict[str, object]:
        damage = {"kl": 0.2, "perplexity_ratio": 1.5, "share": 0.1, "seconds": 3.0, "undo_exact": True}
        return {"outcome": "made", "guard": {"passed": passed}, "scores": scores(1.0), **damage}

    failed = {"outcome": "nothing", "why": "no step did it.", "scores": scores(0.0), "seconds": 1.0}
    data = {
        "run": {"mode": "single", "data": "x", "cases": 3, "model": "m"},
        "machine": {},
        "unedited": [{"scores": scores(0.0)}, {"scores": scores(0.5)}, {"scores": scores(0.0)}],
        "methods": {"rome": [case(True), case(False), failed]},
    }
    unedited, free, guarded = summary(data)
    assert unedited["chat"] == pytest.approx(0.5 / 3)
    assert (free["made"], free["chat"]) == (2, pytest.approx(2 / 3))
    assert (guarded["made"], guarded["chat"]) == (1, pytest.approx((1.0 + 0.5 + 0.0) / 3))
    assert guarded["kl"] == pytest.approx(0.2)  # of what was carried out alone
    assert "rome found nothing in 1 of 3 cases; the first: no step did it." in markdown(data)


@pytest.mark.parametrize(("refits", "milder"), [(True, True), (True, False), (False, True)])
def test_what_the_guard_refused_is_proposed_once_more_with_care(
    refits: bool, milder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def propose(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
        asked.append(case.careful)
        found = SHOUT.propose(engine, case, settings)
        (op,) = found.ops
        assert isinstance(op, LowRank)
        silent = LowRank(site=op.site, left=0 * op.left, right=op.right)
        return found.model_copy(update={"ops": (silent,)}) if case.careful and milder else found

    monkeypatch.setitem(METHODS, "shout", replace(SHOUT, propose=propose, refits=refits))
    with LiveModel.load(settings=tiny_settings(tmp_path)) as live:
        run = arena(live, "single", ("shout",), EDITS[:1])
        strict = GuardSettings(max_mean_kl=0.0, max_worst_kl=0.0, max_perplexity_ratio=1.0)
        run.guard = Guard(live.engine, strict, tmp_path / "strict", live.guard.probes)
        (row,) = run.run(tmp_path / "run.json")["methods"]["shout"]
    assert asked == ([False, True] if refits else [False])
    assert row["guard"]["passed"] == (refits and milder)
    assert row.get("tries") == (2 if refits else None)
    assert (row["share"] == 0) == (refits and milder)


def test_an_unknown_method_is_refused_by_name(tmp_path: Path) -> None:
    with (
        LiveModel.load(settings=tiny_settings(tmp_path)) as live,
        pytest.raises(InvalidInput, match="no method 'magic'"),
    ):
        arena(live, "single", ("magic",)).run(tmp_path / "run.json")
