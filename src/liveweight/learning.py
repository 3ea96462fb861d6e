"""From feedback in bulk to changes: one joint change for all corrections, or one judgement after another.

Owns the order, what becomes of each record, and how a joint change that would move too much is divided. What is right
already is left alone, so that a run that was stopped is gone on with by running it again. The caller holds the lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from liveweight.adjustments import Active, Adjustment
from liveweight.commits import Commits
from liveweight.conversation import Chatter
from liveweight.engines.base import ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, LiveweightError, UnknownMethod
from liveweight.evidence import moved, prompt_hash, touched_neurons
from liveweight.guard import Guard, GuardReport
from liveweight.judging import Judge, Judgement, Options
from liveweight.ladder import Phases, Say, sparing
from liveweight.ledger import Change as Record
from liveweight.ledger import Ledger, Proposal
from liveweight.lessons import Lesson
from liveweight.methods import METHODS, build_case, works
from liveweight.methods.base import Case
from liveweight.methods.case import OPENING, prompts_of
from liveweight.methods.trials import keyed
from liveweight.methods.tuned import settings_for
from liveweight.reports import Change, Reply, Report
from liveweight.settings import Settings

Outcome = Literal["learnt", "already", "protected", "failed", "refused", "error", "preview"]
Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much

JOINT = "patch"  # the method of a joint change, unless told otherwise
_AT_ONCE = 12  # lessons that are read together


class Learnt(BaseModel):
    """What became of one record."""

    model_config = ConfigDict(frozen=True)
    number: int
    prompt: str
    wanted: str | None
    outcome: Outcome
    why: str = ""
    change: str | None = None


class Lessons(BaseModel):
    """What became of all records, and what it took."""

    model_config = ConfigDict(frozen=True)
    items: tuple[Learnt, ...]
    changes: tuple[str, ...]
    seconds: dict[str, float]

    def count(self, outcome: Outcome) -> int:
        """How many records came to this."""
        return sum(item.outcome == outcome for item in self.items)


@dataclass(frozen=True)
class _Item:
    """One correction under way."""

    lesson: Lesson
    reply: Reply
    case: Case

    def became(self, outcome: Outcome, why: str = "", change: str | None = None) -> Learnt:
        return Learnt(
            number=self.lesson.number,
            prompt=self.lesson.prompt,
            wanted=self.lesson.correction,
            outcome=outcome,
            why=why,
            change=change,
        )


@dataclass(frozen=True)
class _Trial:
    """A joint change that was tried."""

    items: Sequence[_Item]
    right: Sequence[bool]  # whose wished answer comes with it
    adjustment: Adjustment
    guard: GuardReport
    forced: bool


class Learner:
    """Learns from records on one engine and one ledger."""

    def __init__(
        self,
        engine: TransformersEngine,
        ledger: Ledger,
        guard: Guard,
        commits: Commits,
        judge: Judge,
        chatter: Chatter,
        settings: Settings,
        *,
        say: Say,
    ) -> None:
        """The engine is in the ledger's state, and stays so between two changes."""
        self._engine, self._ledger, self._guard, self._commits = engine, ledger, guard, commits
        self._judge, self._chatter, self._settings, self._say = judge, chatter, settings, say
        self._phases = Phases()

    def learn(self, lessons: Sequence[Lesson], options: Options, *, joint: bool, progress: Progress) -> Lessons:
        """Carry all of it out; what the joint change does not bring is judged on its own.

        Raises UnknownMethod for a method that makes no joint change.
        """
        self._phases = Phases()
        if joint:
            name = options.method or JOINT
            if name not in METHODS or METHODS[name].together is None:
                able = [each.name for each in METHODS.values() if each.together is not None]
                raise UnknownMethod(
                    f"{name!r} makes no joint change.", hint=f"Use {', '.join(able)}, or learn one by one."
                )
        found: list[Learnt] = []
        fixes = [each for each in lessons if joint and each.kind == "fix"]
        found += self._together(fixes, options, progress) if fixes else []
        settled = {item.number for item in found}
        singles = [each for each in lessons if each.number not in settled]
        for number, lesson in enumerate(singles):
            progress("one by one", number, len(singles))
            found.append(self._one(lesson, options))
        found.sort(key=lambda item: item.number)
        changes = tuple(dict.fromkeys(item.change for item in found if item.change is not None))
        return Lessons(items=tuple(found), changes=changes, seconds=dict(self._phases.seconds))

    # ------------------------------------------------------------------------------------------------- one by one

    def _one(self, lesson: Lesson, options: Options) -> Learnt:
        def became(outcome: Outcome, why: str = "", change: str | None = None) -> Learnt:
            return Learnt(
                number=lesson.number,
                prompt=lesson.prompt,
                wanted=lesson.correction,
                outcome=outcome,
                why=why,
                change=change,
            )

        try:
            with self._phases.of("one by one"):
                reply = self._chatter.recalled([(lesson.prompt, lesson.answer)])[0]
                change = self._judge.judge(Judgement(lesson.kind, reply, wanted=lesson.correction), options)
        except LiveweightError as error:
            self._commits.settle()
            codes: dict[str, Outcome] = {
                "state_conflict": "already",
                "guard_refused": "refused",
                "no_mend_found": "failed",
            }
            return became(codes.get(error.code, "error"), error.message, error.details.get("change"))
        state: Outcome = "learnt" if change.id is not None else "protected" if change.protected else "preview"
        return became(state, "", change.label if change.id is not None else None)

    # ------------------------------------------------------------------------------------------------- together

    def _together(self, lessons: Sequence[Lesson], options: Options, progress: Progress) -> list[Learnt]:
        """What became of those that a joint change can bring, or that need none."""
        progress("asking", 0, len(lessons))
        with self._phases.of("case"), self._engine.remembering():
            replies = self._chatter.recalled([(each.prompt, each.answer) for each in lessons])
            items: list[_Item] = []
            for start in range(0, len(lessons), _AT_ONCE):
                progress("reading what is asked", start, len(lessons))
                some = list(zip(lessons, replies, strict=True))[start : start + _AT_ONCE]
                # What building the cases will ask for, many at once; few enough to be remembered.
                prompts = [prompt for _, reply in some for prompt in prompts_of(self._engine, reply.prompt)]
                self._engine.greedy(prompts, OPENING)
                items += [_Item(lesson, reply, self._case(lesson, reply)) for lesson, reply in some]
        right = self._right((), items)
        found = [item.became("already") for item, there in zip(items, right, strict=True) if there]
        by_subject = METHODS[options.method or JOINT].by_subject
        open_items = [
            item
            for item, there in zip(items, right, strict=True)
            if not there and (item.case.subject is not None or not by_subject)
        ]
        made = self._change(open_items, options, progress) if open_items else []
        return found + [item for item in made if item.outcome != "failed"]

    def _case(self, lesson: Lesson, reply: Reply) -> Case:
        spoken = self._judge.spoken(reply)
        return build_case(
            self._engine, reply.prompt, reply.text, spoken, kind="fix", wanted=lesson.correction, brief=True
        )

    def _change(self, items: Sequence[_Item], options: Options, progress: Progress) -> list[Learnt]:
        """One change for these; where it moves too much, one for each half."""
        method = options.method or JOINT
        together = METHODS[method].together
        assert together is not None  # looked at before anything was asked
        settings = settings_for(self._engine, method, self._settings.methods)
        progress(f"{method}: {len(items)} corrections", 0, len(items))
        try:
            with self._phases.of("propose"):
                proposed = sparing(
                    self._engine,
                    together(self._engine, [item.case for item in items], settings),
                )
        except LiveweightError as error:
            if len(items) == 1:
                return [items[0].became("failed", error.message)]
            return self._halves(items, options, progress)
        with self._phases.of("check"):
            right = self._right((Active(proposed),), items)
        progress("measuring what else would change", 0, len(items))
        with self._phases.of("guard"):
            candidate = (*self._engine.state, Active(proposed))
            measured = self._guard.measure(
                candidate,
                protected=self._commits.protected_items(),
                leave_out=[item.lesson.prompt for item in items],
                facts=sum(right),
                progress=False,
            )
        trial = _Trial(items, right, proposed, measured, options.force and not measured.passed)
        if not measured.passed and not options.force:
            if len(items) > 1:
                return self._halves(items, options, progress)
            refused = self._commits.refuse(self._proposal(trial), measured)
            return [items[0].became("refused", refused.message, refused.details["change"])]
        unlearnt = "The joint change did not bring it."
        if not any(right):
            return [item.became("failed", unlearnt) for item in items]
        label = None if options.preview else self._commit(trial).label
        made: Outcome = "preview" if options.preview else "learnt"
        found = [item.became(made, "", label) for item, there in zip(items, right, strict=True) if there]
        rest = [item for item, there in zip(items, right, strict=True) if not there]
        if rest and label is not None:  # once more, beside what has been learnt
            return found + self._change(rest, options, progress)
        return found + [item.became("failed", unlearnt) for item in rest]

    def _halves(self, items: Sequence[_Item], options: Options, progress: Progress) -> list[Learnt]:
        middle = len(items) // 2
        return [
            *self._change(items[:middle], options, progress),
            *self._change(items[middle:], options, progress),
        ]

    def _right(self, trial: tuple[Active, ...], items: Sequence[_Item]) -> list[bool]:
        """Whether each wished answer comes, with `trial` on top of the present state."""
        with self._engine.preview((*self._engine.state, *trial)), self._engine.remembering():
            contexts = [item.case.contexts[0] for item in items]
            scores = self._engine.score([ScoreItem(each.prompt, keyed(each)) for each in contexts])
            return [score.greedy or works(self._engine, item.case) for score, item in zip(scores, items, strict=True)]

    def _report(self, trial: _Trial) -> Report:
        first = trial.items[0]
        return Report(
            verdict="learn",
            question=first.lesson.prompt,
            wanted=first.lesson.correction,
            before=first.reply.text,
            after=f"{sum(trial.right)} of {len(trial.items)} corrections come; the first: {first.case.wanted}",
            works=any(trial.right),
            method=trial.adjustment.method,
            name=trial.adjustment.name,
            note=trial.adjustment.note,
            neurons=touched_neurons(self._engine, trial.adjustment),
            weights=moved(self._engine, trial.adjustment),
            guard=trial.guard,
            forced=trial.forced,
            version_before=str(self._engine.version),
            seconds=dict(self._phases.seconds),
        )

    def _proposal(self, trial: _Trial) -> Proposal:
        first, many = trial.items[0], len(trial.items) > 1
        question = first.lesson.prompt
        return Proposal(
            model=self._engine.info.hash,
            adjustment=trial.adjustment,
            question=f"{len(trial.items)} corrections: {question}, …" if many else question,
            # A joint change answers no single question, so no later one takes it to be contradicted.
            prompt_hash=trial.adjustment.hash if many else prompt_hash(first.reply.prompt),
            report=self._report(trial).model_dump(mode="json"),
            wanted=None if many else first.lesson.correction,
            forced=trial.forced,
        )

    def _commit(self, trial: _Trial) -> Change:
        proposal = self._proposal(trial)
        pairs = list(zip(trial.items, trial.right, strict=True))

        def then(change: Record) -> None:
            """What is right now is protected from here on."""
            for item, there in pairs:
                said = self._ledger.add_feedback(item.reply.id, "fix", wanted=item.lesson.correction)
                if there:
                    wished = keyed(item.case.contexts[0])
                    text = self._engine.format.decode(wished)
                    model = self._engine.info.hash
                    self._ledger.protect(model, item.reply.prompt, text, wished, feedback=said.id, change=change.id)

        first = next(item for item, there in pairs if there).case.contexts[0]
        report = Report.model_validate(proposal.report)
        return self._commits.commit(proposal, report, self._phases, (first.prompt, first.target), then=then)


def checked(lessons: Sequence[Lesson]) -> Sequence[Lesson]:
    """The lessons, numbered as they come where they have no number. Raises InvalidInput where there are none."""
    if not lessons:
        raise InvalidInput("There is no feedback to learn from.", hint="Give one record at least.")
    return [each if each.number else each.model_copy(update={"number": i}) for i, each in enumerate(lessons, start=1)]
