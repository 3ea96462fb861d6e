"""The loop: chat, judge, propose, measure, write down, change, undo.

Owns the order of these steps and the promise that weights and ledger are equal whenever a verb returns, raises or is
interrupted. Knows no method by name, nothing of databases or tensors, and nothing of how results are shown.

    from liveweight import LiveModel

    with LiveModel.load("smollm2") as live:
        reply = live.chat("What is the capital of Angola?")
        change = live.fix(reply, "Luanda")
        print(change.report)
        live.undo(change)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from liveweight import applying, folding
from liveweight.adjustments import Active, Adjustment
from liveweight.commits import Commits
from liveweight.conversation import Chatter, Place, ReplyStream, as_messages
from liveweight.engines.base import Message, Sampling, Token
from liveweight.engines.model_source import load as load_checkpoint
from liveweight.engines.model_source import resolve
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, LedgerDamaged, StateConflict, UnknownChange
from liveweight.evidence import answer_under
from liveweight.guard import Guard, GuardReport
from liveweight.interrupts import uninterrupted
from liveweight.judging import Judge, Judgement, Options
from liveweight.learning import Learner, Lessons, checked
from liveweight.ledger import Event, Feedback, Ledger, Move, ProtectedAnswer
from liveweight.lessons import Lesson, lesson
from liveweight.methods.calibration import Measure
from liveweight.methods.contrast import Contrast, Given, contrast, examples, judged
from liveweight.methods.direction import Directed, directed
from liveweight.methods.sides import Chat, Pair, of_pairs, of_sets, of_words, two_words
from liveweight.methods.steer import How, Steering, steering
from liveweight.reading import Reading
from liveweight.reports import Change, Kind, Reply
from liveweight.settings import Settings
from liveweight.tracing import Features, Run

Say = Callable[[str], None]
ReplyLike = Reply | str | int  # the reply, "r3" or 3
ChangeLike = Change | str | int  # the change, "c3" or 3


def _quiet(_: str) -> None:
    """Tell nobody."""


class LiveModel(Reading):
    """A running model that learns from feedback, and can take every change back. Safe to use from several threads."""

    def __init__(
        self,
        engine: TransformersEngine,
        ledger: Ledger,
        settings: Settings,
        *,
        say: Say = _quiet,
        progress: bool = False,
    ) -> None:
        """Take an engine in its base state and an open ledger; the engine becomes what the ledger says.

        `say` gets one sentence a step of longer work; `progress` draws bars on stderr. `LiveModel.load` makes both.
        """
        self.engine = engine
        self.ledger = ledger
        self.settings = settings
        self._lock = threading.RLock()  # around whole changes; chats only meet them at the engine's gate
        self._settled = True  # whether ledger and weights are known to agree
        self.patience: float | None = None
        """Seconds that off, on, undo and strength wait for a change that is being made; None, as long as it takes."""
        info = engine.info
        ledger.ensure_model(info.hash, info.name, info.source, info.architecture)
        self.notices: tuple[str, ...] = tuple(ledger.recover())
        """What was done at the start about changes that a killed process left half-made, a sentence each."""
        engine.become(ledger.state(info.hash))
        self.chatter = Chatter(engine, ledger, settings.generation)
        guard = Guard(engine, settings.guard, settings.cache_dir)
        self.guard, self._say, self._progress = guard, say, progress
        self._commits = Commits(engine, ledger)
        self._judge = Judge(engine, ledger, guard, self._commits, settings, say=say, progress=progress)
        self._learner = Learner(engine, ledger, guard, self._commits, self._judge, self.chatter, settings, say=say)

    @classmethod
    def load(
        cls,
        name: str | None = None,
        *,
        settings: Settings | None = None,
        say: Say = _quiet,
        progress: bool = False,
        **flags: Any,
    ) -> Self:
        """Load a model (smollm2, a hub id, a folder, a .gguf file) with the changes that its workspace holds.

        `flags` are settings by name (`workspace=…`, `device=…`); `settings` is a whole set instead. Raises what
        finding a model, opening a workspace and reading a ledger raise: ModelNotFound, ModelUnusable,
        UnsupportedArchitecture, WorkspaceBusy, LedgerDamaged, WrongModel, InvalidInput.
        """
        if settings is not None and flags:
            raise InvalidInput("Give either settings or single flags.", hint="Put the flags into the settings.")
        if settings is None:
            settings = Settings(**({"model": name} if name else {}), **flags)
        elif name is not None:
            settings = settings.model_copy(update={"model": name})
        ledger = Ledger.open(settings.workspace, settings.database_url)
        try:
            say(f"loading {settings.model}")
            source = resolve(settings.model, settings=settings)
            loaded = load_checkpoint(source, dtype=settings.dtype, device=settings.device, progress=progress)
            engine = TransformersEngine(
                loaded,
                gate=settings.gate,
                patience=settings.gate_patience,
                system=settings.generation.system,
                threads=settings.threads,
                spare_neurons=settings.spare_neurons,
            )
            return cls(engine, ledger, settings, say=say, progress=progress)
        except BaseException:
            ledger.close()
            raise

    def close(self) -> None:
        """Let go of the workspace. What was changed stays in its ledger. Closing twice does no harm."""
        with self._lock:
            self.ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------- talking

    def chat(
        self,
        messages: str | Sequence[Message | Mapping[str, str]],
        *,
        after: ReplyLike | None = None,
        system: str | None = None,
        on_token: Callable[[Token], None] | None = None,
        **sampling: Any,
    ) -> Reply:
        """Answer a question or a whole chat, and remember the answer. Never changes a weight.

        `after` goes on from an earlier reply's chat. `on_token` sees each token as it comes. `sampling` takes
        `max_tokens`, `temperature`, `top_p`, `top_k`, `seed` and `stop`; what is left out comes from the settings.
        An interrupt keeps what was said so far. Raises InvalidInput for a chat that the model cannot answer.
        """
        stream = self.stream(messages, after=after, system=system, **sampling)
        try:
            for token in stream:
                if on_token is not None:
                    on_token(token)
        finally:
            stream.close()
        return stream.reply

    def stream(
        self,
        messages: str | Sequence[Message | Mapping[str, str]],
        *,
        after: ReplyLike | None = None,
        system: str | None = None,
        **sampling: Any,
    ) -> ReplyStream:
        """As `chat`, as an iterator over tokens; its `reply` is there once it has ended or was closed."""
        earlier = None if after is None else self.reply(after)
        before = () if earlier is None else earlier.history
        place = Place(after=None if earlier is None else earlier.id, chat=None if earlier is None else earlier.chat)
        return self.chatter.stream(as_messages(messages, before, system), self.sampling(**sampling), place)

    def sampling(self, **given: Any) -> Sampling:
        """How tokens are drawn where this is given: what is left out or None comes from the settings.

        Raises InvalidInput for a setting that there is not, and for a value that cannot be.
        """
        defaults = self.settings.generation
        values: dict[str, Any] = {name: getattr(defaults, name) for name in ("max_tokens", "temperature", "top_p")}
        values |= {name: value for name, value in given.items() if value is not None}
        unknown = sorted(set(values) - set(Sampling.__dataclass_fields__))
        if unknown:
            raise InvalidInput(
                f"Sampling has no setting {unknown[0]!r}.", hint=f"It has {', '.join(Sampling.__dataclass_fields__)}."
            )
        if values["max_tokens"] < 1:
            raise InvalidInput(f"A reply of {values['max_tokens']} tokens says nothing.", hint="Give 1 or more.")
        return Sampling(**values)

    def ask(self, question: str, **options: Any) -> str:
        """The text of the answer to one question; see `chat`."""
        return self.chat(question, **options).text

    def reply(self, reply: ReplyLike) -> Reply:
        """A reply of this model by its id. Raises UnknownReply, WrongModel."""
        return self._judge.reply(reply.id if isinstance(reply, Reply) else reply)

    def replies(self, *, limit: int | None = None) -> list[Reply]:
        """What this model answered, newest first."""
        return [Reply(**record.model_dump()) for record in self.ledger.replies(self.engine.info.hash, limit=limit)]

    def step(self, prompt: str | Sequence[Message | Mapping[str, str]], *, raw: bool = False) -> Run:
        """A forward pass to stop, look into and change, for a `with` block; see `tracing.stepping`.

        `prompt` is a question or a whole chat; `raw` takes it as plain text, without a chat template. Nothing of it
        stays in the model; `apply(run.adjustment(name))` keeps what was done.
        """
        if raw and isinstance(prompt, str):
            tokens, question = self.engine.format.encode_text(prompt, special=True), ""
        else:
            messages = as_messages(prompt, (), None)
            tokens = self.engine.encode(messages)
            question = next((each.content for each in reversed(messages) if each.role == "user"), "")
        return Run(self.engine, tokens, question=question, cache_dir=self.settings.cache_dir)

    def contrast(
        self,
        a: Sequence[Given] | None = None,
        b: Sequence[Given] | None = None,
        *,
        names: tuple[str, str] | None = None,
        completion: bool = False,
    ) -> Contrast:
        """Which neurons tell two sides of prompts apart, by statistics. Changes nothing.

        A side is a list of prompts, or of pairs of prompt and answer; where the answer is left out, it is the model's
        own. With `completion` prompts are text to go on from, not questions. Without sides, a is the replies that were
        judged bad and b those judged good. `apply(found.adjustment())` makes a's answers go and leaves b's. Raises
        InvalidInput where a side is missing or has too few prompts, Unsupported for models of experts.
        """
        if (a is None) != (b is None):
            raise InvalidInput("Only one side is given.", hint="Give two lists, or none for the judged replies.")
        question = None
        if a is None or b is None:
            sides = [judged(self.engine, self._replies_judged(verdict)) for verdict in ("bad", "good")]
            names = names or ("bad", "good")
        else:
            sides = [examples(self.engine, side, completion=completion) for side in (a, b)]
            if a and not completion:
                question = a[0] if isinstance(a[0], str) else a[0][0]
        return contrast(
            self.engine, *sides, names=names or ("a", "b"), question=question, say=self._say, show=self._progress
        )

    def _replies_judged(self, verdict: str) -> list[tuple[Sequence[Message], Sequence[int]]]:
        """Chat and tokens of the replies whose latest feedback is this."""
        latest = {each.reply: each.verdict for each in self.feedback()}
        return [(each.prompt, self._judge.spoken(each)) for each in self.replies() if latest.get(each.id) == verdict]

    # ------------------------------------------------------------------------------------------------- judging

    def fix(
        self,
        reply: ReplyLike,
        wanted: str,
        reason: str | None = None,
        *,
        method: str | None = None,
        preview: bool = False,
        force: bool = False,
        keep_both: bool = False,
    ) -> Change:
        """Make the model answer `wanted` where it gave this reply.

        `method` is one of `liveweight.methods.METHODS`, or auto. `preview` measures and commits nothing. `force`
        commits over the guard's budget. `keep_both` leaves earlier changes active that this one contradicts. Raises
        InvalidInput, NoMendFound, GuardRefused (the refusal and its report are in the ledger), StateConflict where
        the model says so already, NoEffect.
        """
        options = Options(method, preview, force, keep_both)
        return self._judged(Judgement("fix", self.reply(reply), wanted=wanted, reason=reason), options)

    def bad(
        self,
        reply: ReplyLike,
        reason: str | None = None,
        *,
        method: str | None = None,
        preview: bool = False,
        force: bool = False,
        keep_both: bool = False,
    ) -> Change:
        """Make the model stop giving this reply. It does not teach a right one. Options and errors as `fix`."""
        options = Options(method, preview, force, keep_both)
        return self._judged(Judgement("bad", self.reply(reply), reason=reason), options)

    def good(
        self,
        reply: ReplyLike,
        reason: str | None = None,
        *,
        method: str | None = None,
        preview: bool = False,
        force: bool = False,
        keep_both: bool = False,
    ) -> Change:
        """Protect this reply from later changes and, where its margin is thin, make the model surer of it."""
        options = Options(method, preview, force, keep_both)
        return self._judged(Judgement("good", self.reply(reply), reason=reason), options)

    def _judged(self, judgement: Judgement, options: Options) -> Change:
        with self._whole():
            return self._judge.judge(judgement, options)

    def learn(
        self,
        lessons: Sequence[Lesson | Mapping[str, Any]],
        *,
        joint: bool = True,
        method: str | None = None,
        preview: bool = False,
        force: bool = False,
        progress: Callable[[str, int, int], None] = lambda what, done, of: None,
    ) -> Lessons:
        """Learn from many records of feedback: all corrections by one joint change, the rest one by one.

        A record has a prompt, perhaps the answer that was given, and a correction or a rating. A joint change that
        would move too much is divided in halves until the guard lets each pass, or one correction stands alone and is
        refused; what it does not bring is fixed on its own. Records that are right already are left alone. With
        `joint` false each is a judgement of its own. What became of each is in the result; only an interrupt, bad
        records and an unknown method raise.
        """
        records = checked([each if isinstance(each, Lesson) else lesson(each) for each in lessons])
        options = Options(method, preview, force)
        with self._whole():
            return self._learner.learn(records, options, joint=joint, progress=progress)

    def apply(
        self, adjustment: Adjustment, *, prompt: str | None = None, preview: bool = False, force: bool = False
    ) -> Change:
        """Commit an adjustment that no reply asked for, if what it changes stays within the guard's budget.

        `prompt` is a question whose answer it is to move: the report shows it before and after, and the guard leaves it
        out; without one, a probe of the guard's is shown. Super neurons are left out of it unless forced. `preview`
        measures and commits nothing; `force` commits over the budget. Raises GuardRefused, NoEffect where the answer's
        probabilities are bit for bit what they were, and InvalidInput or UnknownSite for what does not fit the model.
        """
        with self._whole():
            return applying.apply(
                self.engine,
                self.guard,
                self._commits,
                adjustment,
                prompt=prompt,
                preview=preview,
                force=force,
                say=self._say,
                progress=self._progress,
            )

    def steer(
        self,
        words: str | None = None,
        *,
        pairs: Sequence[Pair] | None = None,
        toward: Sequence[Chat] | None = None,
        away: Sequence[Chat] | None = None,
        how: How = "mean",
        layer: int | None = None,
        kl: float = 0.5,
        measure: Measure = "p95",
        name: str | None = None,
    ) -> Steering:
        """A steering vector with its layer and strength, found and calibrated; nothing is committed.

        From two words or texts ("Love - Hate"), from pairs of (wished for, its opposite), or from two sets: each side
        is a question or a chat, and where the model has its last word, that is the answer. The strength is the factor
        at which the KL on the guard's questions is `kl` nats over the answers' first tokens: the mean over questions,
        or their 95th percentile.
        Commit it with `live.apply(steering.adjustment())`. Raises InvalidInput, UnknownSite, NoMendFound.
        """
        if (words is not None) + (pairs is not None) + (toward is not None or away is not None) != 1:
            raise InvalidInput(
                "Steering needs one thing to go by.", hint="Give two words, or pairs, or both toward and away."
            )
        chat = self.engine.format
        with self._whole():
            self._say("reading what neutral questions are answered")
            neutral = self.guard.references(progress=self._progress)
            if words is not None:
                sides = of_words(chat, *two_words(words), carriers=[item.prompt for item in neutral])
            elif pairs is not None:
                sides = of_pairs(chat, pairs, name or "pairs")
            else:
                sides = of_sets(chat, toward or (), away or (), name or "two sets")
            self._say("looking for direction, layer and strength")
            return steering(
                self.engine,
                sides,
                neutral,
                how=how,
                layer=layer,
                target=kl,
                measure=measure,
                progress=self._progress,
            )

    def steer_feature(
        self, number: int, features: Features | None = None, *, kl: float = 0.5, measure: Measure = "p95"
    ) -> Directed:
        """A feature as a steering: its direction behind its layer, at the factor whose KL is `kl` nats; see `steer`.

        Of `features`, or of those that were asked for last. Commit it with `live.apply(found.adjustment(strength))`; a
        strength below 0 steers away. Raises InvalidInput for a feature that is not there, NoMendFound.
        """
        features = features or self.last_features()
        feature = features[number]
        name = f"feature {number} of layer {feature.layer}: {feature.promotes.text(3)}"
        watched = [guess.id for guess in feature.promotes.top]
        with self._whole():
            self._say("reading what neutral questions are answered")
            neutral = self.guard.references(progress=self._progress)
            self._say("looking for the strength")
            return directed(
                self.engine,
                name,
                feature.layer,
                features.written[number],
                neutral,
                watched=watched,
                target=kl,
                measure=measure,
                progress=self._progress,
            )

    def tried(self, adjustment: Adjustment, question: str) -> tuple[str, str]:
        """The greedy answers to a question as the model is now, and with `adjustment` on top; nothing is kept."""
        tokens = self.engine.encode([Message("user", question)])
        states = (self.engine.state, (*self.engine.state, Active(adjustment)))
        before, after = (answer_under(self.engine, state, tokens)[0] for state in states)
        return before, after

    # ------------------------------------------------------------------------------------------------- changes

    def changes(self) -> list[Change]:
        """Every change of this model in the ledger's order, whatever its state."""
        return [self._commits.recorded(record.id) for record in self.ledger.changes(self.engine.info.hash)]

    def change(self, change: ChangeLike) -> Change:
        """A change by its id, with its report. Raises UnknownChange, WrongModel."""
        return self._commits.recorded(self._id(change))

    def set_strength(self, change: ChangeLike, strength: float) -> Change:
        """Weaken or amplify a change: 1 is as proposed, 0 is the same as off."""
        return self._moved(change, strength=strength)

    def off(self, change: ChangeLike) -> Change:
        """Switch a change off; `on` brings it back. Raises StateConflict where it is off already."""
        return self._moved(change, to="off")

    def on(self, change: ChangeLike, *, keep_both: bool = False) -> Change:
        """Switch a change on again.

        Raises StateConflict where it is on, was undone, or contradicts an active change that is not to be kept too.
        """
        with self._whole(self.patience):
            number = self._id(change)
            self._require_not_folded(number)
            if not keep_both:
                self._judge.require_no_conflict(number)
            return self._moved(number, to="active")

    def undo(self, change: ChangeLike | None = None) -> Change:
        """Take a change back for good: the newest one that is on or off, unless told which.

        What it had replaced comes back on with the same step, so that the model is what it would have been without;
        what replaced it has then replaced that, too. Of an answer that `good` only protected (`p3`), the protection
        ends.
        """
        label = change.label if isinstance(change, Change) else str(change)
        if change is not None and label.startswith("p") and label[1:].isdecimal():
            return self._unprotected(label)
        with self._whole(self.patience):
            number = self._newest() if change is None else self._id(change)
            back = [] if self.ledger.change(number).replaced_by is not None else self._replaced_by(number)
            self._commits.move([Move(number, "undone"), *(Move(each, "active") for each in back)])
            return self._commits.recorded(number)

    def _replaced_by(self, number: int) -> list[int]:
        """What a change replaced and what no other active one contradicts."""
        off = self.ledger.changes(self.engine.info.hash, states=["off"])
        return [
            each.id
            for each in off
            if each.replaced_by == number and all(other.id == number for other in self._judge.contradicting(each))
        ]

    def fold(self, change: ChangeLike) -> Change:
        """Say a change that acts while the model runs (a gain, a constant steering, …) in the weights instead.

        The folded change takes its place with the same function, up to float noise, and decoding is as fast as without
        hooks; undoing it brings the old one back. Exact for the weights as they are now. Raises Unsupported for what no
        weight can say (a slope other than 1), InvalidInput where there is nothing to fold, StateConflict where it is
        not on.
        """
        with self._whole():
            questions = [each.question for each in self.guard.probes.chats[:3]]
            return folding.fold(self.engine, self.ledger, self._commits, self._id(change), questions)

    def _unprotected(self, label: str) -> Change:
        everything = self.ledger.protected(self.engine.info.hash, everything=True)
        found = next((each for each in everything if each.label == label), None)
        hint = "`liveweight protected` lists those that are."
        if found is None:
            raise UnknownChange(f"There is no protected answer {label}.", hint=hint, change=label)
        if not found.active:
            raise StateConflict(f"{label} is not protected any more.", hint=hint, change=label)
        self.ledger.unprotect(found.id)
        return Change(
            id=None,
            state="undone",
            verdict="good",
            method=None,
            name=f"good: {found.question}",
            question=found.question,
            wanted=None,
            protected=label,
        )

    def _require_not_folded(self, number: int) -> None:
        """Raises StateConflict where a change's own fold is on: it would act twice."""
        old = self.ledger.change(number)
        fold = None if old.replaced_by is None else self.ledger.change(old.replaced_by)
        if fold is not None and fold.state == "active" and (fold.name, fold.method) == (old.name, old.method):
            raise StateConflict(
                f"{old.label} was folded into {fold.label}, which is on.",
                hint=f"`undo {fold.label}` brings {old.label} back.",
            )

    def _moved(self, change: ChangeLike, to: Any = None, strength: float | None = None) -> Change:
        with self._whole(self.patience):
            number = self._id(change)
            self._commits.move([Move(number, to, strength)])
            return self._commits.recorded(number)

    def _newest(self) -> int:
        found = self.ledger.changes(self.engine.info.hash, states=["active", "off"])
        if not found:
            raise StateConflict("There is nothing to undo.", hint="No change is on or off in this workspace.")
        return found[-1].id

    def _id(self, change: ChangeLike) -> int:
        if not isinstance(change, Change):
            return self.ledger.change(change, model=self.engine.info.hash).id
        if change.id is None:
            raise StateConflict(
                f"{change.label} changed no weight, so it cannot be switched or undone.",
                hint="Only a committed change has an id such as c3.",
            )
        return change.id

    # ------------------------------------------------------------------------------------------------- reading

    def protected(self) -> list[ProtectedAnswer]:
        """The answers that changes must leave as they are."""
        return self.ledger.protected(self.engine.info.hash)

    def feedback(self, reply: ReplyLike | None = None) -> list[Feedback]:
        """What was said of one reply, or of all, oldest first."""
        return self.ledger.feedback(None if reply is None else self.reply(reply).id)

    def measured(self) -> GuardReport:
        """How far the model as it is now is from its base, on the guard's probes and the protected answers."""
        with self._whole():
            state = self.engine.state
            return self.guard.measure(
                state,
                protected=self._commits.protected_items(),
                facts=max(1, len(state)),
                before=(),
                progress=self._progress,
            )

    def history(self, *, limit: int | None = None) -> list[Event]:
        """The journal, oldest first; with a limit, its end."""
        events = self.ledger.events()
        return events if limit is None else events[max(0, len(events) - limit) :]

    def fingerprints(self) -> dict[str, str]:
        """sha256 of every tensor's bytes as they are now, by parameter name."""
        return self.engine.fingerprints()

    # -------------------------------------------------------------------------------------------------- inside

    @contextmanager
    def _whole(self, patience: float | None = None) -> Iterator[None]:
        """One change at a time; an error or an interrupt leaves the weights as the ledger says."""
        if not self._lock.acquire(timeout=-1 if patience is None else patience):
            raise StateConflict(
                f"Another change is being made, and was not over in {patience:g} seconds.", hint="Try again later."
            )
        try:
            if not self._settled:  # the ledger could not be written when the last change failed
                with suppress(LedgerDamaged):  # what is damaged may be what is now to be undone
                    self._settle()
            yield
        except BaseException:
            self._settle()
            raise
        finally:
            self._lock.release()

    def _settle(self) -> None:
        self._settled = False
        with uninterrupted():
            self._commits.settle()
            self._settled = True


__all__ = ["Kind", "LiveModel"]
