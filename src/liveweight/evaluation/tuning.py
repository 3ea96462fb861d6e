"""Finding a method's settings for one model: tried on some edits, by success and by damage.

Owns the search (optuna's, over both figures at once), its store, which lets a stopped search go on, and the choice
among what it found. Knows no method beyond the settings that it says it listens to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from liveweight.adjustments import Active
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, NoMendFound, StateConflict, Unsupported
from liveweight.evaluation.arena import case_of
from liveweight.evaluation.edit_metrics import EditMeter, EditScores
from liveweight.evaluation.edits import Edit
from liveweight.guard import Guard, GuardReport
from liveweight.ladder import sparing
from liveweight.methods import METHODS, Case
from liveweight.methods.tuned import keep_tuned, tuned_file
from liveweight.settings import MethodSettings

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Tried:
    """One set of settings and what it reached."""

    settings: dict[str, Any]
    success: float  # mean over the edits, 0 to 1
    damage: float  # mean over the edits; 1 is what the guard allows


@dataclass(frozen=True)
class Tuned:
    """A method's best settings, and all that were tried, in order; the first are the defaults."""

    method: str
    chosen: Tried
    tried: tuple[Tried, ...]


def tune(
    engine: TransformersEngine,
    guard: Guard,
    settings: MethodSettings,
    edits: Sequence[Edit],
    methods: Sequence[str],
    *,
    trials: int = 20,
    seed: int = 0,
    progress: Progress = lambda what, done, of: None,
) -> list[Tuned]:
    """Find and keep the settings of each method. Damage is what the guard sees on the probes nearest to each edit.

    Raises InvalidInput for a method that has nothing to tune, StateConflict where changes are active.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if engine.state:
        raise StateConflict("Tuning needs the base model.", hint="Use a workspace without active changes.")
    for name in methods:
        if name not in METHODS or not METHODS[name].tunes:
            able = ", ".join(each.name for each in METHODS.values() if each.tunes)
            raise InvalidInput(f"{name!r} has nothing to tune.", hint=f"Use {able}.")
    progress("reading what the model says now", 0, len(edits))
    meter = EditMeter(engine, edits)
    with engine.remembering():
        cases = [case_of(engine, edit) for edit in edits]
    file = tuned_file(engine).with_suffix(".db")
    file.parent.mkdir(parents=True, exist_ok=True)
    told = json.dumps([asdict(each) for each in edits], sort_keys=True)
    key = hashlib.sha256(f"{told}{seed}{settings.model_dump_json()}".encode()).hexdigest()[:12]
    found = []
    for name in methods:
        study = optuna.create_study(
            study_name=f"{name}-{key}",
            storage=f"sqlite:///{file}",
            load_if_exists=True,
            directions=("maximize", "minimize"),
        )
        study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))  # gone on with, it draws others
        done = sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.trials)
        if not done:
            study.enqueue_trial(defaults(name, engine, settings))
        for number in range(done, trials):
            progress(name, number, trials)
            trial = study.ask()
            values = {key: suggest(trial, engine) for key, suggest in _SPACE.items() if key in METHODS[name].tunes}
            study.tell(trial, _measured(engine, guard, meter, name, settings, values, edits, cases))
        tried = tuple(
            Tried(dict(trial.params), trial.values[0], trial.values[1])
            for trial in study.trials
            if trial.state == optuna.trial.TrialState.COMPLETE
        )
        best = choose(tried)
        keep_tuned(engine, name, best.settings, {"success": best.success, "damage": best.damage, "edits": len(edits)})
        found.append(Tuned(name, best, tried))
    return found


def choose(tried: Sequence[Tried]) -> Tried:
    """The most successful of those that do no more damage than the guard allows; else the least damaging of the rest.

    Of the rest only those count that reach half of the best success. Of equals the less damaging one is taken.
    """
    within = [each for each in tried if each.damage <= 1.0]
    if within:
        return max(within, key=lambda each: (each.success, -each.damage))
    best = max(each.success for each in tried)
    return min((each for each in tried if each.success >= best / 2), key=lambda each: (each.damage, -each.success))


def defaults(name: str, engine: TransformersEngine, settings: MethodSettings) -> dict[str, Any]:
    """Where the search begins: what the method does when nothing is set."""
    depth = METHODS[name].depth
    layer = settings.layer if settings.layer is not None else round((depth or 0.0) * engine.sites.layers)
    start = {**settings.model_dump(), "layer": min(layer, engine.sites.layers - 1)}
    return {key: start[key] for key in METHODS[name].tunes}


def success(scores: EditScores) -> float:
    """What an edit is for, in one figure: half what is said when asked, half what holds in other wordings."""
    elsewhere = scores.chat_paraphrase if scores.chat_paraphrase is not None else scores.paraphrase
    return scores.chat if elsewhere is None else (scores.chat + elsewhere) / 2


def damage(report: GuardReport) -> float:
    """The largest of the guard's figures, as a share of what is allowed; 1 is just within budget."""
    figures = {
        "mean_kl": report.mean_kl,
        "p95_kl": report.p95_kl,
        "worst_kl": report.worst_kl,
        "changed_share": report.changed_share,
    }
    return max(value / max(report.budget[name], 1e-9) for name, value in figures.items())


def _measured(
    engine: TransformersEngine,
    guard: Guard,
    meter: EditMeter,
    name: str,
    settings: MethodSettings,
    values: dict[str, Any],
    edits: Sequence[Edit],
    cases: Sequence[Case],
) -> tuple[float, float]:
    """Mean success and mean damage of one set of settings."""
    own = MethodSettings.model_validate({**settings.model_dump(), **values})
    good, harm = 0.0, 0.0
    for edit, case in zip(edits, cases, strict=True):
        try:
            found = sparing(engine, METHODS[name].propose(engine, case, own))
        except (NoMendFound, Unsupported):
            continue
        state = (Active(found),)
        harm += damage(guard.screen(state, edit.prompt))
        with engine.preview(state):
            good += success(meter.measure(edit))
    return good / len(edits), harm / len(edits)


# How each setting is searched; a layer anywhere in the model but its last.
_SPACE: dict[str, Callable[[Any, TransformersEngine], Any]] = {
    "layer": lambda trial, engine: trial.suggest_int("layer", 0, max(engine.sites.layers - 2, 0)),
    "margin": lambda trial, engine: trial.suggest_float("margin", 2.0, 16.0, log=True),
    "clamp_norm": lambda trial, engine: trial.suggest_float("clamp_norm", 1.0, 16.0, log=True),
    "max_contexts": lambda trial, engine: trial.suggest_int("max_contexts", 1, 10),
    "target_probability": lambda trial, engine: trial.suggest_float("target_probability", 0.5, 0.99),
    "max_neurons": lambda trial, engine: trial.suggest_int("max_neurons", 16, 1024, log=True),
    "eta": lambda trial, engine: trial.suggest_float("eta", 0.1, 1.0),
}


__all__ = ["Tried", "Tuned", "choose", "damage", "defaults", "success", "tune"]
