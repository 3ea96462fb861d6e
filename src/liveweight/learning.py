"""From feedback in bulk to changes: one joint change for all corrections, or one judgement after another.

Owns the order, what becomes of each record, and how a joint change that would move too much is divided. What is right
already is left alone, so that a run that was stopped is gone on with by running it again. The caller holds the lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from pydantic import BaseModel, ConfigDict

from liveweight.adjustments import Active, Adjustment
from liveweight.commits import Commits
from liveweight.conversation import Chatter
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import GenerationCancelled, InvalidInput, LiveweightError, NoMendFound, UnknownMethod
from liveweight.evidence import moved, prompt_hash, touched_neurons
from liveweight.guard import Guard, GuardReport
from liveweight.judging import Judge, Judgement, Options
from liveweight.ladder import Phases, Say, sparing
from liveweight.ledger import Change as Record
from liveweight.ledger import Ledger, Proposal
from liveweight.lessons import Lesson
from liveweight.methods import METHODS, REPLY, build_case, works
from liveweight.methods.base import Case, Joint
from liveweight.methods.case import OPENING, prompts_of
from liveweight.methods.trials import keyed, says, scored
from liveweight.methods.tuned import settings_for
from liveweight.reports import Change, Reply, Report
from liveweight.settings import Settings

Outcome = Literal["learnt", "already", "protected", "failed", "refused", "error", "preview"]
Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much

JOINT = "patch"  # the method of a joint change, unless told otherwise
_AT_ONCE = 12  # lessons that are read together
_BLAMED = 4  # every so many-th of a joint change may be left out for what single items would be moved


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
        return _became(self.lesson, outcome, why, change)


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
            name = self._method(options)
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

    def _method(self, options: Options) -> str:
        """Which method makes the joint change: the one that was told, or that is set."""
        wished = options.method or self._settings.methods.method
        return JOINT if wished == "auto" else wished

    # ------------------------------------------------------------------------------------------------- one by one

    def _one(self, lesson: Lesson, options: Options) -> Learnt:
        try:
            with self._phases.of("one by one"):
                reply = self._chatter.recalled([(lesson.chat, lesson.answer)])[0]
                known = lesson.answer is not None
                if lesson.kind != "fix" and (there := self._judge.settled(lesson.kind, reply, known)):
                    return _became(lesson, "already", f"{there} does it.", None)
                change = self._judge.judge(Judgement(lesson.kind, reply, wanted=lesson.correction), options)
        except GenerationCancelled:
            raise
        except LiveweightError as error:
            self._commits.settle()
            codes: dict[str, Outcome] = {
                "state_conflict": "already",
                "guard_refused": "refused",
                "no_mend_found": "failed",
            }
            return _became(lesson, codes.get(error.code, "error"), error.message, error.details.get("change"))
        state: Outcome = "learnt" if change.id is not None else "protected" if change.protected else "preview"
        return _became(lesson, state, "", change.label if change.id is not None else None)

    # ------------------------------------------------------------------------------------------------- together

    def _together(self, lessons: Sequence[Lesson], options: Options, progress: Progress) -> list[Learnt]:
        """What became of those that a joint change can bring, or that need none."""
        method = METHODS[self._method(options)]
        found: list[Learnt] = []
        items: list[_Item] = []  # what a joint change is to bring, as far as it has been read

        def cases() -> Iterator[Case]:
            for start in range(0, len(lessons), _AT_ONCE):
                progress("reading what is asked", start, len(lessons))
                with self._phases.of("case"):
                    some = self._items(lessons[start : start + _AT_ONCE], replies[start : start + _AT_ONCE])
                    right = self._right((), some)
                found.extend(item.became("already") for item, there in zip(some, right, strict=True) if there)
                for item, there in zip(some, right, strict=True):
                    if not there and (item.case.subject is not None or not method.by_subject):
                        items.append(item)
                        yield item.case

        progress("asking", 0, len(lessons))
        joint: Joint | LiveweightError
        with self._engine.remembering():  # a case is searched for while what was read of it is remembered
            with self._phases.of("case"):
                replies = self._chatter.recalled([(each.chat, each.answer) for each in lessons])
            reading = cases()
            first = next(reading, None)
            if first is None:
                return found
            try:
                joint = self._search(chain([first], reading), options)
            except GenerationCancelled:
                raise
            except LiveweightError as error:
                joint = error
                deque(reading, maxlen=0)  # all the same
        if isinstance(joint, LiveweightError):
            made = self._apart(items, joint, options, progress)
        else:
            made = self._settled(items, joint, options, progress)
        return found + [item for item in made if item.outcome != "failed"]

    def _items(self, lessons: Sequence[Lesson], replies: Sequence[Reply]) -> list[_Item]:
        """The corrections with their cases; few enough to be remembered.

        One that no case can be made of is left out, so that it is judged on its own, which says why.
        """
        # What building the cases will ask for, many at once.
        self._engine.greedy([prompt for each in replies for prompt in prompts_of(self._engine, each.prompt)], OPENING)
        found = []
        for lesson, reply in zip(lessons, replies, strict=True):
            try:
                found.append(_Item(lesson, reply, self._case(lesson, reply)))
            except GenerationCancelled:
                raise
            except LiveweightError:
                continue
        return found

    def _case(self, lesson: Lesson, reply: Reply) -> Case:
        spoken = self._judge.spoken(reply)
        return build_case(
            self._engine, reply.prompt, reply.text, spoken, kind="fix", wanted=lesson.correction, brief=True
        )

    def _search(self, cases: Iterable[Case], options: Options) -> Joint:
        method = self._method(options)
        together = METHODS[method].together
        assert together is not None  # looked at before anything was asked
        with self._phases.of("propose"):
            return together(self._engine, cases, settings_for(self._engine, method, self._settings.methods))

    def _change(self, items: Sequence[_Item], options: Options, progress: Progress) -> list[Learnt]:
        """One search for these, and the change that comes of it; where it fails, one for each half."""
        progress(f"{self._method(options)}: {len(items)} corrections", 0, len(items))
        try:
            joint = self._search([item.case for item in items], options)
        except GenerationCancelled:
            raise
        except LiveweightError as error:
            return self._apart(items, error, options, progress)
        return self._settled(items, joint, options, progress)

    def _apart(
        self, items: Sequence[_Item], error: LiveweightError, options: Options, progress: Progress
    ) -> list[Learnt]:
        """Each half searched for on its own, where a search for all of them ended with `error`."""
        middle = len(items) // 2
        if not middle:
            return [item.became("failed", error.message) for item in items]
        return [*self._change(items[:middle], options, progress), *self._change(items[middle:], options, progress)]

    def _settled(self, items: Sequence[_Item], joint: Joint, options: Options, progress: Progress) -> list[Learnt]:
        """What a search found for these items, committed, for as many of them as the guard lets pass at once."""
        try:
            proposed = sparing(self._engine, joint(range(len(items))))
        except GenerationCancelled:
            raise
        except LiveweightError as error:
            return [item.became("failed", error.message) for item in items]
        progress("measuring what else would change", 0, len(items))
        measured = self._measured(proposed, items, len(items))
        if measured.passed or options.force:
            progress("looking at the new answers", 0, len(items))
            with self._phases.of("check"):
                right = self._right((Active(proposed),), items)
            measured = self._measured(proposed, items, sum(right))  # nothing is run again
        if not measured.passed and not options.force:
            return self._divided(items, joint, options, progress, measured)
        trial = _Trial(items, right, proposed, measured, options.force and not measured.passed)
        unlearnt = "The joint change did not bring it."
        if not any(right):
            return [item.became("failed", unlearnt) for item in items]
        label = None if options.preview else self._commit(trial).label
        made: Outcome = "preview" if options.preview else "learnt"
        found = [item.became(made, "", label) for item, there in zip(items, right, strict=True) if there]
        left = [item for item, there in zip(items, right, strict=True) if not there]
        if left and label is not None:  # once more, beside what has been learnt
            return found + self._change(left, options, progress)
        return found + [item.became("failed", unlearnt) for item in left]

    def _measured(self, proposed: Adjustment, items: Sequence[_Item], facts: int) -> GuardReport:
        with self._phases.of("guard"):
            return self._guard.measure(
                (*self._engine.state, Active(proposed)),
                protected=self._commits.protected_items(),
                leave_out=[item.lesson.prompt for item in items],
                facts=facts,
                progress=False,
            )

    def _divided(
        self, items: Sequence[_Item], joint: Joint, options: Options, progress: Progress, measured: GuardReport
    ) -> list[Learnt]:
        """What was refused without those who are to blame for it, where they can be told; else in halves."""
        with self._phases.of("guard"):
            blamed = self._blamed(joint, len(items), measured) if measured.on_the_whole else []
        rest = [number for number in range(len(items)) if number not in blamed]
        middle = 0 if blamed else len(rest) // 2
        parts = [part for part in (rest[:middle], rest[middle:]) if part] if len(rest) > 1 else []
        why = "In a joint change it would move too much: " + "; ".join(measured.reasons) + "."
        found = [items[number].became("failed", why) for number in (blamed if parts else range(len(items)))]
        for part in parts:
            found += self._settled([items[number] for number in part], _among(joint, part), options, progress)
        return found

    def _blamed(self, joint: Joint, count: int, measured: GuardReport) -> list[int]:
        """Those without whom no single item would be moved too far; none where that would be every fourth or more."""
        changed = {each.text for each in measured.protected_changed}
        broken = [each for each in self._commits.protected_items() if each.label in changed]

        def breaks(some: Sequence[int]) -> bool:
            try:
                trial = Active(sparing(self._engine, joint(some)))
            except NoMendFound:
                return False
            state = (*self._engine.state, trial)
            found = self._guard.measure(state, protected=broken, only=measured.too_far, progress=False)
            return bool(found.too_far or found.protected_changed)

        rest, blamed = list(range(count)), list[int]()
        while rest and breaks(rest):
            if len(blamed) >= count // _BLAMED:
                return []
            fewer, enough = 0, len(rest)  # the first `enough` of the rest break it, the first `fewer` do not
            while enough - fewer > 1:
                middle = (fewer + enough) // 2
                fewer, enough = (fewer, middle) if breaks(rest[:middle]) else (middle, enough)
            blamed.append(rest.pop(enough - 1))
        return blamed

    def _right(self, trial: tuple[Active, ...], items: Sequence[_Item]) -> list[bool]:
        """Whether each wished answer comes, with `trial` on top of the present state."""
        with self._engine.preview((*self._engine.state, *trial)), self._engine.remembering():
            contexts = [item.case.contexts[0] for item in items]
            scores = scored(self._engine, contexts)
            right = [says(self._engine, each, score) for each, score in zip(contexts, scores, strict=True)]
            if trial:  # what `works` will ask for, all at once; what is said now is known
                others = [each.prompt for each, there in zip(contexts, right, strict=True) if not there]
                self._engine.greedy(others, REPLY)
            return [there or works(self._engine, item.case) for there, item in zip(right, items, strict=True)]

    def _report(self, trial: _Trial) -> Report:
        first = next((item for item, there in zip(trial.items, trial.right, strict=True) if there), trial.items[0])
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


def _among(joint: Joint, part: Sequence[int]) -> Joint:
    """The change for some of a part of the cases, by their number in it."""
    return lambda numbers: joint([part[number] for number in numbers])


def _became(lesson: Lesson, outcome: Outcome, why: str, change: str | None) -> Learnt:
    return Learnt(
        number=lesson.number,
        prompt=lesson.prompt,
        wanted=lesson.correction,
        outcome=outcome,
        why=why,
        change=change,
    )


def checked(lessons: Sequence[Lesson]) -> Sequence[Lesson]:
    """The lessons, numbered as they come where they have no number. Raises InvalidInput where there are none."""
    if not lessons:
        raise InvalidInput("There is no feedback to learn from.", hint="Give one record at least.")
    return [each if each.number else each.model_copy(update={"number": i}) for i, each in enumerate(lessons, start=1)]
