"""From a judgement to a change: case, conflicts, ladder, report.

Owns what a judgement means for the changes and protected answers that are there, and everything that its report holds.
The caller holds the lock. Knows nothing of chats, of how a report is shown, or of how a change is carried out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from liveweight.adjustments import Active
from liveweight.commits import Commits, messages_of
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import NoEffect, NoMendFound, StateConflict, WrongModel
from liveweight.evidence import answer_under, key_of, moved, prompt_hash, touched_neurons
from liveweight.guard import Guard
from liveweight.interrupts import uninterrupted
from liveweight.ladder import Climb, Found, Limits, Phases, Say, climb, rungs
from liveweight.ledger import Change as Record
from liveweight.ledger import Ledger, Proposal, ProtectedAnswer
from liveweight.methods import build_case, works
from liveweight.methods.base import Answered, Case
from liveweight.methods.trials import keyed
from liveweight.methods.wording import first_sentence, has_words, may_ask_the_same
from liveweight.reports import Change, Kind, Replaced, Reply, Report
from liveweight.settings import Settings

# Nats: a good answer whose weakest token is closer than this to its runner-up is reinforced.
THIN_MARGIN = 0.5
_PREVIEWS = 8  # the last ones, which can be committed without another search


@dataclass(frozen=True)
class Judgement:
    """What a person said of a reply."""

    kind: Kind
    reply: Reply
    wanted: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Options:
    """How a judgement is carried out; see `LiveModel.fix`."""

    method: str | None = None
    preview: bool = False
    force: bool = False
    keep_both: bool = False


@dataclass(frozen=True)
class _Work:
    """One judgement under way."""

    said: Judgement
    options: Options
    case: Case
    phases: Phases
    conflicts: tuple[Record, ...]
    released: tuple[ProtectedAnswer, ...]
    key: Any
    hash: str

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.case.contexts[0].prompt


Searched = tuple[Climb, Report, tuple[int, ...]]  # what to do, its report, the answer's tokens then


class Judge:
    """Carries judgements out on one engine and one ledger."""

    def __init__(
        self,
        engine: TransformersEngine,
        ledger: Ledger,
        guard: Guard,
        commits: Commits,
        settings: Settings,
        *,
        say: Say,
        progress: bool,
    ) -> None:
        """The engine is in the ledger's state, and stays so between two calls."""
        self._engine, self._ledger, self._guard, self._commits = engine, ledger, guard, commits
        self._settings = settings
        self._say, self._progress = say, progress
        self._previewed: OrderedDict[tuple[Any, ...], Searched] = OrderedDict()

    @property
    def _model(self) -> str:
        return self._engine.info.hash

    # ------------------------------------------------------------------------------------------------- records

    def reply(self, reply: str | int) -> Reply:
        """A reply of this model. Raises UnknownReply, or WrongModel for another model's."""
        record = self._ledger.reply(reply)
        if record.model != self._model:
            raise WrongModel(
                f"{record.label} was answered by another model ({record.model[:12]}) than the one loaded"
                f" ({self._model[:12]}).",
                hint="Load that model, or ask again.",
                reply=record.label,
            )
        return Reply(**record.model_dump())

    def spoken(self, reply: Reply) -> tuple[int, ...]:
        """A reply's tokens without the one that ends it."""
        return tuple(token for token in reply.token_ids if token not in self._engine.format.end_tokens)

    # ------------------------------------------------------------------------------------------------ judgement

    def judge(self, said: Judgement, options: Options) -> Change:
        """Carry a judgement out. Raises what `LiveModel.fix` says."""
        with self._engine.remembering():
            return self._judged(said, options)

    def _judged(self, said: Judgement, options: Options) -> Change:
        phases = Phases()
        names = rungs(said.kind, options.method, self._settings.methods)
        with phases.of("case"):
            work = self._work(said, options, phases)
        if said.kind == "good":
            return self._keep(work, names)
        if said.kind == "fix" and not work.conflicts and self._works_now(work.case):
            raise StateConflict(
                f"The model answers {said.wanted!r} to that question already, so there is nothing to change.",
                hint="Say `good` to have the answer protected.",
                reply=said.reply.label,
            )
        feedback = None if options.preview else self._feedback(said)
        found, report, spoken = self._searched(work, names)
        return self._conclude(work, found, report, spoken, feedback)

    def _searched(self, work: _Work, names: Sequence[str]) -> Searched:
        """What to do, and its report; what was previewed in this very state is not searched for again."""
        said, options = work.said, work.options
        protected = tuple(each.id for each in self._ledger.protected(self._model))
        key = (said.reply.id, said.kind, said.wanted, names, options.keep_both, self._engine.state, protected)
        known = self._previewed.pop(key, None)
        if known is not None:
            found, report, spoken = known
            for phase, seconds in report.seconds.items():
                work.phases.seconds[phase] = work.phases.seconds.get(phase, 0.0) + seconds
            forced = found.chosen is None and options.force
            now = {"reason": said.reason, "forced": forced, "version_before": str(self._engine.version)}
            known = found, report.model_copy(update=now), spoken
        else:
            with self._without(work.conflicts if not options.keep_both else ()):
                found = self._climb(work, names)
                known = found, *self._report(work, found)
        if options.preview:
            self._previewed[key] = known
            while len(self._previewed) > _PREVIEWS:
                self._previewed.popitem(last=False)
        return known

    def _work(self, said: Judgement, options: Options, phases: Phases) -> _Work:
        engine, reply = self._engine, said.reply
        digest = prompt_hash(reply.prompt)
        case = build_case(
            engine,
            reply.prompt,
            reply.text,
            self.spoken(reply),
            kind=said.kind,
            wanted=said.wanted,
            previous=self._previous(reply),
            rejected=[answer for _, answer in self._rejected(digest)] if said.kind == "bad" else (),
        )
        key = key_of(engine, case.contexts[0].prompt)
        wanted = said.wanted if said.kind == "fix" else None
        found = [] if said.kind == "good" else self._ledger.conflicts(self._model, digest, key, wanted=wanted)
        found = [each for each in found if each.prompt_hash == digest or _same_thing(case, each)]
        conflicts = tuple(each for each in found if said.kind == "fix" or self._taught(each, reply))
        kept = self._ledger.protected(self._model, released=True)  # what is replaced may have overruled some of it
        same = [each for each in kept if prompt_hash(messages_of(each)) == digest]
        # What a replaced change protects goes off and comes back with it.
        replaced = set() if options.keep_both else {each.id for each in conflicts}
        released = () if said.kind == "good" else tuple(each for each in same if each.change not in replaced)
        return _Work(said, options, case, phases, conflicts, released, key, digest)

    def _taught(self, change: Record, reply: Reply) -> bool:
        """Whether a change is what brought an answer that is bad: then it goes. What took another one away stays."""
        told = self._ledger.report(change.id)
        if told.get("verdict") == "bad":
            return False
        taught = change.wanted if change.wanted is not None else first_sentence(str(told.get("after", "")))
        return has_words(reply.text.lower(), taught.strip().rstrip(".").lower())

    def _rejected(self, digest: str) -> list[tuple[str, str]]:
        """The active changes that took an answer to a prompt away, by their ids, and the answers."""
        on = [(each, self._ledger.report(each.id)) for each in self._ledger.conflicts(self._model, digest)]
        return [(each.label, str(told["before"])) for each, told in on if told.get("verdict") == "bad"]

    def settled(self, kind: Kind, reply: Reply, known: bool) -> str | None:
        """What there is already that a rating of a reply asks for, by its id; None where there is nothing.

        Where the answer that was rated is not `known`, any such rating of the same question counts.
        """
        digest = prompt_hash(reply.prompt)
        if kind == "good":
            same = [each for each in self._ledger.protected(self._model) if prompt_hash(messages_of(each)) == digest]
            return next((each.label for each in same if each.answer.strip() == reply.text.strip()), None)
        return next((label for label, before in self._rejected(digest) if not known or before == reply.text), None)

    def _previous(self, reply: Reply) -> list[Answered]:
        """Prompt and answer tokens of what is protected, but for this very question."""
        own = prompt_hash(reply.prompt)
        return [
            (tuple(self._engine.encode(messages_of(each))), each.token_ids)
            for each in self._ledger.protected(self._model)
            if prompt_hash(messages_of(each)) != own and each.token_ids
        ]

    def _works_now(self, case: Case) -> bool:
        with self._engine.preview(self._engine.state):
            return bool(works(self._engine, case))

    def _feedback(self, said: Judgement) -> int:
        return self._ledger.add_feedback(said.reply.id, said.kind, wanted=said.wanted, reason=said.reason).id

    def _climb(self, work: _Work, names: Sequence[str]) -> Climb:
        replaced = {each.id for each in work.conflicts} if not work.options.keep_both else set()
        gone = {each.id for each in work.released}
        items = self._commits.protected_items(lambda each: each.id in gone or each.change in replaced)
        limits = Limits(items, [work.case.question], self._progress)
        methods = self._settings.methods
        return climb(self._engine, self._guard, work.case, names, methods, limits, work.phases, self._say)

    @contextmanager
    def _without(self, changes: Sequence[Record]) -> Iterator[None]:
        """Be the state without some changes, for this thread alone: no reply is generated from it meanwhile."""
        if not changes:
            yield
            return
        gone = {each.adjustment_hash for each in changes}
        state = self._engine.state
        with self._engine.preview(tuple(active for active in state if active.adjustment.hash not in gone)):
            yield

    # ---------------------------------------------------------------------------------------------------- report

    def _report(self, work: _Work, found: Climb) -> tuple[Report, tuple[int, ...]]:
        """What was measured of the best proposal, and the answer's tokens then.

        Called in the state that the change will come on top of.
        """
        best = found.chosen or found.refused
        assert best is not None  # climb raises where nothing works
        candidate = (*self._engine.state, Active(best.adjustment))
        self._say("writing the report")
        with work.phases.of("report"):
            after, spoken = answer_under(self._engine, candidate, work.prompt, work.case.contexts[0].target)
            neurons = touched_neurons(self._engine, best.adjustment)
            weights = moved(self._engine, best.adjustment)
        named = tuple(Replaced(change=c.label, question=c.question, wanted=c.wanted) for c in work.conflicts)
        both = work.options.keep_both
        report = Report(
            verdict=work.said.kind,
            question=work.case.question,
            wanted=work.said.wanted,
            reason=work.said.reason,
            before=work.said.reply.text,
            after=after,
            works=True,
            method=best.method,
            name=best.adjustment.name,
            note=best.adjustment.note,
            tried=found.tried,
            neurons=neurons,
            weights=weights,
            guard=best.guard,
            forced=found.chosen is None and work.options.force,
            replaced=() if both else named,
            kept=named if both else (),
            released=tuple(each.label for each in work.released),
            version_before=str(self._engine.version),
            seconds=dict(work.phases.seconds),
        )
        return report, spoken

    def _conclude(
        self, work: _Work, found: Climb, report: Report, spoken: tuple[int, ...], feedback: int | None
    ) -> Change:
        """Preview, refuse or commit."""
        best = found.chosen or found.refused
        assert best is not None
        options = work.options
        if options.preview:
            return _unwritten(work.said, report, "preview", best)
        if found.chosen is None and not options.force:
            proposal = self._proposal(work, best, report.model_dump(mode="json"), feedback)
            raise self._commits.refuse(proposal, best.guard)
        return self._commit(work, best, report, spoken, feedback)

    def _proposal(self, work: _Work, best: Found, told: dict[str, Any], feedback: int | None) -> Proposal:
        return Proposal(
            model=self._model,
            adjustment=best.adjustment,
            question=work.case.question,
            prompt_hash=work.hash,
            report=told,
            wanted=work.said.wanted,
            feedback=feedback,
            key=work.key,
            forced=bool(told.get("forced")),
        )

    # ---------------------------------------------------------------------------------------------------- commit

    def _commit(
        self, work: _Work, best: Found, report: Report, spoken: tuple[int, ...], feedback: int | None
    ) -> Change:
        """Commit, protect what was asked for, and release what it overrules."""

        def then(change: Record) -> None:
            if work.said.kind != "bad":
                self._protect_answer(work, change, spoken, feedback)
            for each in work.released:
                self._ledger.release(each.id, change.id)

        return self._commits.commit(
            self._proposal(work, best, report.model_dump(mode="json"), feedback),
            report,
            work.phases,
            (work.prompt, work.case.contexts[0].target),
            replaces=[] if work.options.keep_both else [each.id for each in work.conflicts],
            then=then,
        )

    def _protect_answer(self, work: _Work, change: Record, spoken: tuple[int, ...], feedback: int | None) -> None:
        """Protect what was asked for: of a fix the answer through the wished words, not what is said behind them."""
        wished = keyed(work.case.contexts[0])
        if work.said.kind == "fix" and spoken[: len(wished)] == wished:
            spoken = wished
        text = self._engine.format.decode(spoken)
        self._ledger.protect(self._model, work.said.reply.prompt, text, spoken, feedback=feedback, change=change.id)

    # ------------------------------------------------------------------------------------------------ good

    def _keep(self, work: _Work, names: Sequence[str]) -> Change:
        """Protect the answer; where its margin is thin, make the model surer of it if that can be had in budget."""
        reply, options = work.said.reply, work.options
        with work.phases.of("case"):
            margin = self._margin(work.prompt, self.spoken(reply))
        change: Change | None = None
        label: str | None = None
        if not options.preview:
            with uninterrupted():
                feedback = self._feedback(work.said)
                label = self._ledger.protect(
                    self._model, reply.prompt, reply.text, self.spoken(reply), feedback=feedback
                ).label
        why = f"The answer is protected; its thinnest token leads by {margin:.2f} nats."
        if margin < THIN_MARGIN and names:
            try:
                climbed = self._climb(work, names)
                best = climbed.chosen or (climbed.refused if options.force else None)
                if best is not None:
                    report, spoken = self._report(work, climbed)
                    report = report.model_copy(update={"margin": margin})
                    if options.preview:
                        return _unwritten(work.said, report, "preview", best)
                    change = self._commit(work, best, report, spoken, feedback)
                else:
                    why += " Making it surer would have changed too much else."
            except (NoMendFound, NoEffect) as error:
                why += f" It could not be made surer: {error.message}"
        if change is not None:
            return change
        report = Report(
            verdict="good",
            question=work.case.question,
            wanted=None,
            reason=work.said.reason,
            before=reply.text,
            after=reply.text,
            works=True,
            method=None,
            note=why,
            margin=margin,
            version_before=str(self._engine.version),
            version_after=str(self._engine.version),
            seconds=dict(work.phases.seconds),
        )
        return _unwritten(work.said, report, "preview" if options.preview else "protected", None, label)

    def _margin(self, prompt: Sequence[int], answer: Sequence[int]) -> float:
        """The smallest lead, in nats, of a token of the answer over the best other one; below zero it trails."""
        engine = self._engine
        final = engine.record([[*prompt, *answer]], [len(prompt) - 1]).final[0, : len(answer)]
        with engine.gate.step(), torch.inference_mode():
            return float(engine.leads(final, torch.tensor(list(answer), device=final.device))[0].min())

    def contradicting(self, record: Record) -> list[Record]:
        """The active changes that contradict one of the ledger's."""
        others = self._ledger.conflicts(self._model, record.prompt_hash, wanted=record.wanted)
        return [each for each in others if each.id != record.id]

    def require_no_conflict(self, change: int) -> None:
        """Raises StateConflict when an active change contradicts this one."""
        record = self._ledger.change(change, model=self._model)
        other = next(iter(self.contradicting(record)), None)
        if other is not None:
            raise StateConflict(
                f"{other.label} is on and answers the same question otherwise ({other.wanted!r}, not"
                f" {record.wanted!r}).",
                hint=f"Switch {other.label} off first, or keep both with --keep-both.",
                change=record.label,
                other=other.label,
            )


def _unwritten(said: Judgement, report: Report, state: Any, best: Found | None, protected: str | None = None) -> Change:
    """A judgement that put no change into the ledger."""
    return Change(
        id=None,
        state=state,
        verdict=said.kind,
        method=best.method if best is not None else None,
        name=best.adjustment.name if best is not None else f"{said.kind}: {report.question}",
        question=report.question,
        wanted=said.wanted,
        adjustment_hash=best.adjustment.hash if best is not None else None,
        protected=protected,
        report=report,
    )


def _same_thing(case: Case, other: Record) -> bool:
    """Whether two questions that wake the same neurons ask the same about the same thing, as far as that can be told.

    Questions of one form ("What is the capital of …?") wake much the same, whatever they are about.
    """
    if case.subject is not None and case.subject.casefold() not in other.question.casefold():
        return False
    return may_ask_the_same(case.question, other.question)


__all__ = ["Judge", "Judgement", "Options"]
