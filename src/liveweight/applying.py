"""From an adjustment that no reply asked for to a change: a steering vector, a clamp, what a stepped run kept.

Owns what is looked at where there is no question: the answer to one prompt, before and after. Guard, ledger and weights
are met as in every other change.
"""

from __future__ import annotations

from liveweight.adjustments import Active, Adjustment
from liveweight.commits import Commits
from liveweight.engines.base import Message
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from liveweight.evidence import answer_under, moved, touched_neurons
from liveweight.guard import Guard
from liveweight.ladder import Phases, Say, sparing
from liveweight.ledger import Proposal
from liveweight.reports import Change, Report

_ASKED = "Who are you?"  # where the guard has no question of its own


def apply(
    engine: TransformersEngine,
    guard: Guard,
    commits: Commits,
    adjustment: Adjustment,
    *,
    prompt: str | None,
    preview: bool,
    force: bool,
    say: Say,
    progress: bool,
) -> Change:
    """Preview, refuse or commit. See `LiveModel.apply`."""
    phases = Phases()
    if not adjustment.ops:
        raise InvalidInput("The adjustment has no ops, so there is nothing to apply.", hint="Give it one at least.")
    engine.check((*engine.state, Active(adjustment)))
    if not force:
        adjustment = sparing(engine, adjustment)
        if not adjustment.ops:
            raise InvalidInput(
                "The adjustment acts on super neurons only, which hold the model together.",
                hint="Commit it all the same with --force.",
            )
    candidate = (*engine.state, Active(adjustment))
    asked = prompt if prompt is not None else next((each.question for each in guard.probes.chats), _ASKED)
    tokens = tuple(engine.encode([Message("user", asked)]))
    say("measuring what else would change")
    with phases.of("guard"):
        measured = guard.measure(
            candidate,
            protected=commits.protected_items(),
            leave_out=[] if prompt is None else [prompt],
            progress=progress,
        )
    say("writing the report")
    with phases.of("report"):
        before, spoken = answer_under(engine, engine.state, tokens)
        after, _ = answer_under(engine, candidate, tokens, spoken)
        report = Report(
            verdict="apply",
            question=asked,
            wanted=None,
            before=before,
            after=after,
            works=True,
            method=adjustment.method,
            name=adjustment.name,
            note=adjustment.note,
            neurons=touched_neurons(engine, adjustment),
            weights=moved(engine, adjustment),
            guard=measured,
            forced=force and not measured.passed,
            version_before=str(engine.version),
            seconds=dict(phases.seconds),
        )
    if preview:
        return Change(
            id=None,
            state="preview",
            verdict="apply",
            method=adjustment.method,
            name=adjustment.name,
            question=asked,
            wanted=None,
            adjustment_hash=adjustment.hash,
            report=report,
        )
    proposal = Proposal(
        model=engine.info.hash,
        adjustment=adjustment,
        question=asked,
        prompt_hash=adjustment.hash,  # it answers no question, so it contradicts no other change
        report=report.model_dump(mode="json"),
        forced=report.forced,
    )
    if not measured.passed and not force:
        raise commits.refuse(proposal, measured)
    return commits.commit(proposal, report, phases, (tokens, spoken))
