"""Tuning on a tiny model: what is chosen, that it is kept, used where nothing was set, and gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest

from liveweight.errors import InvalidInput
from liveweight.evaluation import Edit, tuning
from liveweight.evaluation.tuning import Tried, choose, tune
from liveweight.live_model import LiveModel
from liveweight.methods.tuned import keep_tuned, read_tuned, settings_for, tuned_file
from liveweight.settings import MethodSettings
from tests.tiny_workspace import tiny_settings

EDITS = (Edit("0", "completion", "the moon is", "moon", "made", "far", ("a moon is",), ("the sun is",), "moon?"),)


def test_the_most_successful_within_the_guards_budget_is_chosen() -> None:
    best, mild = Tried({"margin": 1}, 0.9, 0.8), Tried({"margin": 2}, 0.9, 0.5)
    assert choose([Tried({}, 1.0, 1.4), best, mild, Tried({}, 0.2, 0.0)]) == mild


def test_where_all_are_over_budget_the_least_damaging_that_still_works_is_chosen() -> None:
    assert choose([Tried({}, 1.0, 9.0), Tried({}, 0.6, 3.0), Tried({}, 0.1, 1.2)]) == Tried({}, 0.6, 3.0)


def test_a_search_is_kept_gone_on_with_and_used(tmp_path: Path) -> None:
    settings = MethodSettings(max_steps=5)
    with LiveModel.load(settings=tiny_settings(tmp_path)) as live:
        before = live.fingerprints()
        done: list[int] = []
        first = tune(live.engine, live.guard, settings, EDITS, ["rome"], trials=2)[0]
        again = tune(
            live.engine, live.guard, settings, EDITS, ["rome"], trials=3, progress=lambda what, n, of: done.append(n)
        )[0]
        assert live.fingerprints() == before
        assert again.tried[:2] == first.tried
        assert again.tried[2].settings not in [each.settings for each in first.tried]
        assert done == [0, 2]  # what the model says, and the one trial that was missing
        assert first.tried[0].settings["margin"] == settings.margin  # the defaults come first
        assert read_tuned(live.engine) == {"rome": again.chosen.settings}
        free = settings_for(live.engine, "rome", MethodSettings())
        assert free.layer == again.chosen.settings["layer"]
        assert settings_for(live.engine, "rome", MethodSettings(layer=0)).layer == 0
        assert settings_for(live.engine, "memit", settings) is settings


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_search_that_was_stopped_in_its_first_trial_begins_with_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = MethodSettings(max_steps=5)
    with LiveModel.load(settings=tiny_settings(tmp_path)) as live:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(tuning, "_measured", interrupted)
            tune(live.engine, live.guard, settings, EDITS, ["rome"], trials=2)
        (found,) = tune(live.engine, live.guard, settings, EDITS, ["rome"], trials=2)
    assert len(found.tried) == 2
    assert found.tried[0].settings["margin"] == settings.margin


def test_a_file_that_cannot_be_used_counts_for_nothing(tmp_path: Path) -> None:
    with LiveModel.load(settings=tiny_settings(tmp_path)) as live:
        keep_tuned(live.engine, "rome", {"layer": 1, "shoe_size": 9}, {})
        assert settings_for(live.engine, "rome", MethodSettings()).layer is None
        tuned_file(live.engine).write_text("{", encoding="utf-8")
        assert read_tuned(live.engine) == {}


def test_a_method_with_nothing_to_tune_is_refused_by_name(tmp_path: Path) -> None:
    with (
        LiveModel.load(settings=tiny_settings(tmp_path)) as live,
        pytest.raises(InvalidInput, match="'patch' has nothing to tune"),
    ):
        tune(live.engine, live.guard, MethodSettings(), EDITS, ["patch"])
