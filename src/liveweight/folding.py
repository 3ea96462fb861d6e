"""From a change that acts while the model runs to the same change in the weights.

Owns the exchange: the folded change takes the old one's place in ledger and model with its question, strength and
protected answer, once it was seen to be the same function; undoing it brings the old one back. What folds is
`adjustments.folding`'s to say. The caller holds the lock, and settles when anything was raised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from liveweight.adjustments import Active, State, folded
from liveweight.commits import Commits
from liveweight.engines.base import Message
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import StateConflict, Unsupported
from liveweight.evidence import answer_under, moved
from liveweight.ladder import Phases
from liveweight.ledger import Change as Record
from liveweight.ledger import Ledger, Proposal
from liveweight.reports import Change, Report

# How far logits may part, as a share of the largest one: float noise of another order of the same arithmetic.
_SAME = {torch.float32: 1e-3, torch.float64: 1e-3}
_SAME_ROUNDED = 0.05  # where the folded weights are rounded to fewer digits


def fold(engine: TransformersEngine, ledger: Ledger, commits: Commits, number: int, others: Sequence[str]) -> Change:
    """Replace an active change by its fold. `others` are questions that the two are compared on too."""
    phases = Phases()
    old = ledger.change(number, model=engine.info.hash)
    if old.state != "active":
        raise StateConflict(
            f"{old.label} is {old.state}, and only what is on can be folded.", hint="Switch it on first."
        )
    with phases.of("fold"), engine.gate.step():
        adjustment = folded(ledger.adjustment(number), engine.sites)
        acting, rest = _parted(ledger, engine, old)
        candidate = (*rest, Active(adjustment, old.strength))
        asked = [each for each in (old.question, *others) if each.strip()] or ["Who are you?"]
        watched = [(prompt, answer_under(engine, acting, prompt)[1]) for prompt in _prompts(engine, asked)]
        _require_same(engine, acting, candidate, watched, old.label)
    told = Report.model_validate(ledger.report(number))
    with phases.of("report"):
        note = f"{told.note} Folded into weights from {old.label}.".strip()
        report = told.model_copy(
            update={
                "note": note,
                "weights": moved(engine, adjustment),
                "version_before": str(engine.version),
                "seconds": dict(phases.seconds),
            }
        )
    proposal = Proposal(
        model=engine.info.hash,
        adjustment=adjustment,
        question=old.question,
        prompt_hash=old.prompt_hash,
        report=report.model_dump(mode="json"),
        wanted=old.wanted,
        feedback=old.feedback,
        key=ledger.key_of(number),
        strength=old.strength,
        forced=old.forced,
    )

    def then(change: Record) -> None:
        for answer in ledger.released_by(number):
            ledger.release(answer, change.id)
        for each in ledger.protected(engine.info.hash, everything=True):
            if each.active and each.change == number:  # it counts only while its change is active
                ledger.protect(
                    engine.info.hash,
                    each.messages,
                    each.answer,
                    each.token_ids,
                    feedback=each.feedback,
                    change=change.id,
                )

    return commits.commit(proposal, report, phases, watched[0], replaces=[number], then=then, must_move=False)


def _parted(ledger: Ledger, engine: TransformersEngine, change: Record) -> tuple[State, State]:
    """The present state with one change, and without it."""
    acting = ledger.state(engine.info.hash)
    on = [each.id for each in ledger.changes(engine.info.hash, states=["active"])]
    return acting, tuple(active for number, active in zip(on, acting, strict=True) if number != change.id)


def _prompts(engine: TransformersEngine, questions: Sequence[str]) -> list[tuple[int, ...]]:
    return [tuple(engine.encode([Message("user", question)])) for question in questions]


def _require_same(
    engine: TransformersEngine,
    acting: State,
    candidate: State,
    watched: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    label: str,
) -> None:
    """Raises Unsupported where logits over any watched answer part by more than float noise."""
    found: list[list[Tensor]] = []
    for state in (acting, candidate):
        with engine.preview(state):
            found.append([engine.logits(*each) for each in watched])
    apart = max(float((new - old).abs().max() / old.abs().max()) for old, new in zip(*found, strict=True))
    most = _SAME.get(engine.model.dtype, _SAME_ROUNDED)
    if apart > most:
        raise Unsupported(
            f"In the weights {label} would not be the same function: logits part by {apart:.2%} of the largest one.",
            hint="It stays as it is. Another active change acts on the same weights; undo that first, or leave both.",
        )
