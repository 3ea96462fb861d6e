"""Climbing the methods, from the least invasive to the most, until one works within the guard's budget.

Owns the search for one change: which methods are asked in which order, and which proposal is taken. Nothing here
writes: every candidate is only previewed. Knows nothing of ledgers, replies or people.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from liveweight.adjustments import Active, Adjustment, State
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import NoMendFound, UnknownMethod, Unsupported
from liveweight.guard import Guard, GuardReport, ProtectedItem
from liveweight.methods import LADDER, METHODS, works
from liveweight.methods.base import Case, CaseKind
from liveweight.methods.tuned import settings_for
from liveweight.reports import Attempt
from liveweight.settings import MethodSettings
from liveweight.tracing import find_super_weights, protect, spare

Say = Callable[[str], None]
AUTO = "auto"
TRIES = 3  # times that a method is asked, each time with what the guard said of its last proposal


@dataclass
class Phases:
    """Seconds by phase of one judgement."""

    seconds: dict[str, float] = field(default_factory=dict)
    _within: list[str] = field(default_factory=list, repr=False)

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Count what the block takes as that phase, and not as the one around it."""
        start = time.perf_counter()
        self._within.append(phase)
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._within.pop()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
            if self._within:
                around = self._within[-1]
                self.seconds[around] = self.seconds.get(around, 0.0) - spent


@dataclass(frozen=True)
class Found:
    """A proposal that works, and what the guard measured of it."""

    method: str
    adjustment: Adjustment
    guard: GuardReport


@dataclass(frozen=True)
class Climb:
    """What the climb came to: what was chosen, else the best of what the guard refused, and every rung's outcome."""

    chosen: Found | None
    refused: Found | None
    tried: tuple[Attempt, ...]


@dataclass(frozen=True)
class Limits:
    """What a proposal is measured against."""

    protected: Sequence[ProtectedItem]
    leave_out: Sequence[str]  # probe questions that are meant to change
    progress: bool


def rungs(kind: CaseKind, method: str | None, settings: MethodSettings) -> tuple[str, ...]:
    """The methods to ask, in order. Raises UnknownMethod for one that does not exist or does not do this kind."""
    name = method or settings.method
    if name == AUTO:
        return LADDER.get(kind, ())
    described = METHODS.get(name)
    fit = sorted(each.name for each in METHODS.values() if kind in each.kinds)
    if described is None or kind not in described.kinds:
        what = "There is no method" if described is None else f"No {kind!r} can be done with the method"
        raise UnknownMethod(f"{what} {name!r}.", hint=f"Use {', '.join([AUTO, *fit])}.", method=name, methods=fit)
    return (name,)


def climb(
    engine: TransformersEngine,
    guard: Guard,
    case: Case,
    names: Sequence[str],
    settings: MethodSettings,
    limits: Limits,
    phases: Phases,
    say: Say,
) -> Climb:
    """Ask each method in turn, on top of the engine's present state, and take the first that works within budget.

    A candidate that works is screened on a few probes, and measured on all of them unless those few alone break the
    budget of all. A method that can fit otherwise is asked again, with the protected answers that it would change, or
    for a more careful proposal. Raises NoMendFound when no method found a candidate that works.
    """
    tried: list[Attempt] = []
    refused: Found | None = None
    best: tuple[bool, int, float] | None = None
    steps = [(name, case) for name in names]
    while steps:
        name, case = steps.pop(0)
        start = time.perf_counter()

        def note(outcome: str, why: str, name: str = name, start: float = start) -> None:
            seconds = time.perf_counter() - start
            tried.append(Attempt.model_validate({"method": name, "outcome": outcome, "why": why, "seconds": seconds}))

        say(f"{name}: looking for a change")
        try:
            with phases.of("propose"):
                adjustment = METHODS[name].propose(engine, case, settings_for(engine, name, settings))
                adjustment = sparing(engine, adjustment)
        except (NoMendFound, Unsupported) as error:
            note("nothing", error.message)
            continue
        candidate = (*engine.state, Active(adjustment))
        with phases.of("propose"), engine.preview(candidate):
            mended = works(engine, case)
        if not mended:
            note("fails", "Its proposal does not bring what was asked for when the model answers freely.")
            continue
        say(f"{name}: measuring what else would change")
        with phases.of("guard"):
            measured = guard.screen(candidate, case.question)
            whole = not _certain_to_fail(guard, measured)
            if whole:
                measured = _measure(guard, candidate, limits)
        found = Found(name, adjustment, measured)
        if whole and measured.passed:
            note("chosen", "It works within the guard's budget.")
            return Climb(found, None, tuple(tried))
        note("refused", " ".join(measured.reasons) or "Over the guard's budget.")
        rank = (not whole, len(measured.reasons), measured.mean_kl)  # a few near probes look worse than all of them
        if best is None or rank < best:
            refused, best = found, rank
        again = _again(case, measured, limits)
        if METHODS[name].refits and again is not None and sum(each.method == name for each in tried) < TRIES:
            steps.insert(0, (name, again))
    if refused is None:
        raise _none_works(case, tried)
    return Climb(None, _fully_measured(engine, guard, refused, limits, phases), tuple(tried))


def _again(case: Case, measured: GuardReport, limits: Limits) -> Case | None:
    """The case with what the guard's refusal of a proposal teaches; None where it teaches nothing new."""
    changed = {each.text for each in measured.protected_changed}
    answers = [(item.prompt, item.answer) for item in limits.protected if item.label in changed]
    broken = [answer for answer in answers if answer not in case.broken]
    if not broken and case.careful:
        return None
    return replace(case, broken=(*case.broken, *broken), careful=case.careful or not broken)


def _fully_measured(engine: TransformersEngine, guard: Guard, found: Found, limits: Limits, phases: Phases) -> Found:
    """The refused proposal with the whole guard's report, for the person who has to decide about it."""
    with phases.of("guard"):
        candidate = (*engine.state, Active(found.adjustment))
        return Found(found.method, found.adjustment, _measure(guard, candidate, limits))


def _certain_to_fail(guard: Guard, few: GuardReport) -> bool:
    """Whether a few probes alone move so much that all of them together must be over budget.

    The few are those nearest to the question, so their mean says nothing of the whole set's, but their sum does.
    """
    share = few.items / max(len(guard.probes.chats), few.items, 1)
    return (
        few.mean_kl * share > few.budget["mean_kl"]
        or few.changed_share * share > few.budget["changed_share"]
        or few.worst_kl > few.budget["worst_kl"]
        or bool(few.protected_changed)
    )


def _measure(guard: Guard, candidate: State, limits: Limits) -> GuardReport:
    return guard.measure(candidate, protected=limits.protected, leave_out=limits.leave_out, progress=limits.progress)


def sparing(engine: TransformersEngine, adjustment: Adjustment) -> Adjustment:
    """The adjustment without what it would do to a super weight: nothing may touch one by accident."""
    found = find_super_weights(engine, engine.loaded.source.cache_dir)
    return spare(adjustment, found) if protect(adjustment, found) else adjustment


def _none_works(case: Case, tried: Sequence[Attempt]) -> NoMendFound:
    wish = {"fix": "bring the wished answer", "bad": "make that answer go", "good": "make that answer surer"}[case.kind]
    return NoMendFound(
        f"No method could {wish} to {case.question!r}: " + " ".join(f"{each.method}: {each.why}" for each in tried),
        hint="Try it in other words, a shorter answer, or more steps (LIVEWEIGHT_METHODS__MAX_STEPS).",
        tried=[each.model_dump() for each in tried],
    )
