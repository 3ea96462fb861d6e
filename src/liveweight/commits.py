"""From a proposal to a change: written ahead, carried out, proved, marked active; and from one state to another.

Owns the order of these steps, and that weights and ledger are equal again whenever one of them fails. The caller holds
the lock, and calls `settle` when anything was raised. Knows nothing of why a change is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from liveweight.engines.base import Message
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import GuardRefused, LiveweightError, NoEffect
from liveweight.guard import GuardReport, ProtectedItem
from liveweight.interrupts import uninterrupted
from liveweight.ladder import Phases
from liveweight.ledger import Change as Record
from liveweight.ledger import Ledger, Move, Proposal, ProtectedAnswer
from liveweight.reports import Change, Report

Watched = tuple[tuple[int, ...], tuple[int, ...]]  # a prompt's and an answer's tokens, which a change must move


class Commits:
    """Carries changes out on one engine and one ledger."""

    def __init__(self, engine: TransformersEngine, ledger: Ledger) -> None:
        """The engine is in the ledger's state, and stays so between two calls."""
        self._engine, self._ledger = engine, ledger

    @property
    def _model(self) -> str:
        return self._engine.info.hash

    def recorded(self, change: int) -> Change:
        """A change as the ledger has it, with its report and the protected answer that came with it."""
        record = self._ledger.change(change, model=self._model)
        answers = self._ledger.protected(self._model, everything=True)
        own = next((answer.label for answer in answers if answer.change == record.id), None)
        return Change.of(record, self._ledger.report(record.id), own)

    def commit(
        self,
        proposal: Proposal,
        report: Report,
        phases: Phases,
        watched: Watched,
        *,
        replaces: Sequence[int] = (),
        then: Callable[[Record], None] = lambda change: None,
        must_move: bool = True,
    ) -> Change:
        """Write ahead, change the weights, prove it, mark it active; a Ctrl-C meanwhile waits until it is done.

        `then` is what belongs to the same change in the ledger. Raises NoEffect where a forward pass over what is
        watched is bit for bit what it was, unless it need not move (a change said in another way).
        """
        engine, ledger = self._engine, self._ledger
        before = engine.logits(*watched)
        with uninterrupted(), engine.gate.uninterruptible():
            with phases.of("commit"):
                change = ledger.intend(proposal, replaces=replaces)
                version = engine.become(ledger.state(self._model, intended=True))
                if must_move and torch.equal(before, engine.logits(*watched)):
                    raise self._no_effect(change, report)
            final = {"version_after": str(version), "seconds": dict(phases.seconds)}
            with ledger.together():  # killed here, all of it is there, or the change is not yet
                ledger.activate(change.id, {"version": str(version)})
                then(change)
                ledger.add_report(change.id, report.model_copy(update=final).model_dump(mode="json"))
            return self.recorded(change.id)

    def _no_effect(self, change: Record, report: Report) -> NoEffect:
        """Take the change out again, and say that it did nothing."""
        survived = "" if report.weights is None else f" {report.weights.survived:.0%} of it survived rounding."
        reason = f"{change.label} moved nothing that a forward pass over the question could see.{survived}"
        self._ledger.fail(change.id, reason)
        self._engine.become(self._ledger.state(self._model))
        return NoEffect(reason, hint="Try another method, or a model in float32.", change=change.label)

    def refuse(self, proposal: Proposal, guard: GuardReport) -> GuardRefused:
        """Remember a proposal that the guard refused; the error to raise."""
        with uninterrupted():
            reason = " ".join(guard.reasons)
            refused = self._ledger.refuse(proposal, reason)
        return GuardRefused(
            f"{refused.label} works, but it would change too much else: {reason}.",
            hint=f"Look at it with `show {refused.label}`, or commit it all the same with --force.",
            change=refused.label,
            report=dict(proposal.report),
        )

    def move(self, wishes: Sequence[Move]) -> None:
        """Bring changes to other states or strengths, all of them or none, in ledger and weights alike."""
        ledger, engine = self._ledger, self._engine
        with uninterrupted(), engine.gate.uninterruptible():
            intent = ledger.intend_moves(self._model, wishes)
            try:
                version = engine.become(ledger.state(self._model, intended=True))
            except LiveweightError as error:
                ledger.abandon(intent.id, error.message)
                raise
            ledger.finish(intent.id, {"version": str(version)})

    def settle(self) -> None:
        """After an error or an interrupt: be what the ledger says, and close what was left half-made.

        What was intended does not count as done, so the weights can go back also where the ledger cannot be written.
        """
        try:
            state = self._ledger.state(self._model)
            if not self._engine.holds(state):  # else a change would wait for replies, to change nothing
                self._engine.become(state)
        finally:
            for change in self._ledger.changes(self._model, states=["intended"]):
                self._ledger.fail(change.id, "it was interrupted before it was done")
            self._ledger.recover()

    def protected_items(self, without: Callable[[ProtectedAnswer], bool] = lambda each: False) -> list[ProtectedItem]:
        """The protected answers as the guard takes them, but for those that are not to count."""
        return [
            ProtectedItem(each.label, tuple(self._engine.encode(messages_of(each))), each.token_ids)
            for each in self._ledger.protected(self._model)
            if each.token_ids and not without(each)
        ]


def messages_of(answer: ProtectedAnswer) -> tuple[Message, ...]:
    """A protected answer's chat, as an engine takes it."""
    return tuple(Message(turn.role, turn.content) for turn in answer.messages)
