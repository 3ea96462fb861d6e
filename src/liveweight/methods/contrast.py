"""contrast: two sides of prompts, the neurons that tell them apart, and as few of them changed as does it.

Owns choosing among the neurons by their statistics (those that differ surely, by half a deviation or more, and push
their own side's answers more than the other side's; the strongest first), the search for how many and how strong, and
both ways to it: two lists of prompts that a person gives, and one judged case against its neighbours. Knows nothing of
how the statistics come about.

An effect size alone ranks what is *read* (a neuron may tell digits apart and write nothing of them), so that silencing
the largest effects moves hardly any answer. What a neuron pushes the answers does, and the statistics then say which of
these differ surely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.progress import Progress

from liveweight.adjustments import Active, Adjustment, ScaleNeurons
from liveweight.engines.base import Message, ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, NoMendFound
from liveweight.methods.base import Case
from liveweight.methods.select import mildest
from liveweight.methods.trials import contest, dense_layers, named, no_mend, outcome, scaling
from liveweight.methods.wording import first_sentence
from liveweight.settings import MethodSettings
from liveweight.tracing import Neuron
from liveweight.tracing.contrast import Separation, separate

LEVEL = 0.05  # the largest share of false discoveries
LARGE_ENOUGH = 0.5  # deviations: Cohen's medium effect
GONE = 0.75  # of the first side's answers, at least, where no other share is told
KEPT = 0.95  # of the second side's answers, at least
MOST = 512  # neurons
_ANSWER = 8  # tokens of an answer that count
_CHECKED = 96  # examples a side that each trial is checked on
_FIRST, _GROWTH = 16, 2  # neurons of the first trial, and how many times more in the next
_FACTORS = (0.0, -1.0, -2.0)  # silenced first, then turned round
_COUNTS = 4  # numbers of neurons that are tried more mildly, each √_GROWTH times the one before
_ROWS = 16  # prompts that are answered at once

Given = str | tuple[str, str]  # a prompt, or a prompt and its answer
Say = Callable[[str], None]


class ContrastNeuron(BaseModel):
    """One neuron that tells the sides apart; see `Separation` for its figures."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    layer: int
    neuron: int
    side: Literal["a", "b"]  # where it is further from zero, so that turning it down makes the sides alike
    effect_size: float
    p: float
    q: float
    consistency: float
    mean_a: float
    mean_b: float
    push: float


class Held(NamedTuple):
    """What a trial does to the two sides' answers, as shares of those that the model gives now."""

    gone: float  # of side a
    kept: float  # of side b


@dataclass(frozen=True, eq=False)
class Contrast:
    """Two sides compared: the statistics, and the way from them to an adjustment. Nothing is changed by either."""

    engine: TransformersEngine = field(repr=False)
    a: tuple[ScoreItem, ...] = field(repr=False)
    b: tuple[ScoreItem, ...] = field(repr=False)
    separation: Separation = field(repr=False)
    names: tuple[str, str]
    version: str
    question: str | None = None  # one that side a asks, where its prompts are questions
    say: Say = field(default=lambda _: None, repr=False)

    @property
    def significant(self) -> int:
        """How many neurons differ with a corrected p-value below `LEVEL`."""
        return int((self.separation.q < LEVEL).sum())

    @property
    def eligible(self) -> int:
        """How many of them differ enough and push their side's answers: what an adjustment is made of."""
        return len(ranked(self.separation))

    def neurons(self, top: int = 20) -> tuple[ContrastNeuron, ...]:
        """The strongest ones, in the order in which an adjustment takes them."""
        found = self.separation
        return tuple(
            ContrastNeuron(
                layer=layer,
                neuron=neuron,
                side="a" if _fires_for_a(found, (layer, neuron)) else "b",
                **{
                    name: float(getattr(found, name)[layer, neuron])
                    for name in ("effect_size", "p", "q", "consistency", "mean_a", "mean_b", "push")
                },
            )
            for layer, neuron in ranked(found)[:top]
        )

    def as_dict(self, top: int = 20) -> dict[str, Any]:
        """The table as JSON can hold it."""
        return {
            "version": self.version,
            "names": list(self.names),
            "prompts": [len(self.a), len(self.b)],
            "tested": self.separation.tested,
            "significant": self.significant,
            "eligible": self.eligible,
            "neurons": [each.model_dump(mode="json") for each in self.neurons(top)],
        }

    def adjustment(
        self,
        *,
        both: bool = False,
        gone: float | None = None,
        count: int | None = None,
        factor: float | None = None,
        most: int = MOST,
    ) -> Adjustment:
        """Side a's neurons scaled down, as few and as mildly as makes a share `gone` of its answers go while b's stay.

        That is `GONE` where unset. With `both`, b's neurons are scaled up by as much. Tried on the given prompts, at
        most `_CHECKED` a side, and only on answers that the model gives now. `count` and `factor`, given together, are
        taken without a search. Raises NoMendFound where up to `most` neurons do not do it, InvalidInput where there is
        nothing to check on or `gone` is no share.
        """
        gone = GONE if gone is None else gone
        if not 0 < gone <= 1:
            raise InvalidInput(f"{gone} is no share of answers.", hint="Give a number above 0, at most 1.")
        neurons = [
            (neuron, own)
            for neuron in ranked(self.separation)
            if (own := _fires_for_a(self.separation, neuron)) or both
        ]
        name = f"contrast: {self.names[0]} against {self.names[1]}"
        if count is not None and factor is not None:
            return _proposal(name, neurons[:count], factor, "As told")
        a, b = (self._given_now(side, name) for side in zip((self.a, self.b), self.names, strict=True))

        def held(trial: Adjustment) -> Held:
            return Held(1.0 - _said(self.engine, a, trial), _said(self.engine, b, trial))

        tried: list[str] = []
        found = _search(name, neurons, held, gone, most, tried, self.say)
        if found is None:
            told = "; ".join(tried) or "no neuron tells the two sides apart and pushes one of them alone"
            raise NoMendFound(
                f"No {most} neurons or fewer take {gone:.0%} of {self.names[0]}'s answers away and leave {KEPT:.0%} of "
                f"{self.names[1]}'s. Tried: {told}.",
                hint="Give more prompts, or a second side that holds more of what is to stay.",
                tried=tried,
            )
        return found

    def _given_now(self, side: tuple[tuple[ScoreItem, ...], str], name: str) -> list[ScoreItem]:
        """Of one side, those whose answer the model gives now, spread evenly over it."""
        items, called = side
        step = max(1, -(-len(items) // _CHECKED))
        chosen = items[::step]
        with self.engine.preview(self.engine.state):
            given = [item for item, score in zip(chosen, self.engine.score(chosen), strict=True) if score.greedy]
        if not given:
            raise InvalidInput(
                f"The model gives none of {called}'s answers as it is now, so a change cannot be checked on them.",
                hint="Give prompts without answers to contrast what the model says by itself.",
            )
        return given


def contrast(
    engine: TransformersEngine,
    a: Sequence[ScoreItem],
    b: Sequence[ScoreItem],
    *,
    names: tuple[str, str] = ("a", "b"),
    question: str | None = None,
    say: Say = lambda _: None,
    show: bool = False,
) -> Contrast:
    """Compare two sides under the present weights; see `tracing.contrast.separate` for what is raised.

    `say` gets a sentence a step, now and in the search; `show` draws a bar on stderr.
    """
    say(f"reading {len(a)} and {len(b)} prompts")
    with Progress(console=Console(stderr=True), disable=not show, transient=True) as bar, engine.gate.step():
        task = bar.add_task("Reading neurons", total=None)
        found = separate(engine, a, b, lambda done, of: bar.update(task, completed=done, total=of))
        return Contrast(engine, tuple(a), tuple(b), found, names, str(engine.version), question, say)


def examples(engine: TransformersEngine, given: Sequence[Given], *, completion: bool = False) -> list[ScoreItem]:
    """Prompts with answers as tokens, each once; where no answer is given, the model's own greedy one.

    An answer counts through its first sentence (or line), at most `_ANSWER` tokens of it. With `completion` prompts are
    plain text to go on from, else questions for the chat template. Raises InvalidInput for an empty prompt or answer.
    """
    pairs = list(dict.fromkeys((each, None) if isinstance(each, str) else (each[0], each[1]) for each in given))
    prompts: list[tuple[int, ...]] = []
    for prompt, answer in pairs:
        if not prompt.strip() or (answer is not None and not answer.strip()):
            what = f"answer to {prompt!r}" if prompt.strip() else "prompt"
            raise InvalidInput(f"The {what} is empty.", hint="Leave it out, or give some text.")
        if completion:
            prompts.append(tuple(engine.format.encode_text(prompt, special=True)))
        else:
            prompts.append(tuple(engine.encode([Message("user", prompt)])))
    asked = [row for row, (_, answer) in enumerate(pairs) if answer is None]
    said: dict[int, list[int]] = {}
    for first in range(0, len(asked), _ROWS):
        batch = asked[first : first + _ROWS]
        said.update(zip(batch, engine.greedy([prompts[row] for row in batch], _ANSWER), strict=True))
    found = []
    for row, (tokens, (_, answer)) in enumerate(zip(prompts, pairs, strict=True)):
        own = said[row] if answer is None else engine.format.encode_continuation(tokens, answer)
        found.append(ScoreItem(tokens, answer_tokens(engine, own)))
    return found


def judged(engine: TransformersEngine, replies: Sequence[tuple[Sequence[Message], Sequence[int]]]) -> list[ScoreItem]:
    """Replies that were given, each a chat and the reply's tokens; those that say nothing are left out."""
    found = [ScoreItem(tuple(engine.encode(chat)), answer_tokens(engine, tokens)) for chat, tokens in replies]
    return [item for item in found if engine.format.decode(item.continuation).strip()]


def answer_tokens(engine: TransformersEngine, tokens: Sequence[int]) -> tuple[int, ...]:
    """The tokens of an answer that count: its first sentence's, at most `_ANSWER`; at least one."""
    sentence = first_sentence(engine.format.decode(tokens))
    for length in range(1, min(len(tokens), _ANSWER) + 1):
        if sentence and engine.format.decode(tokens[:length]).strip().startswith(sentence):
            return tuple(tokens[:length])
    return tuple(tokens[:_ANSWER])


def propose(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
    """Contrast the judged answer, in the case's wordings, with the case's neighbours, and turn its own neurons down.

    Side a is every context with the judged answer's token where it parts from the new one; side b the same question
    about other things and other questions about this one, each with the model's own next token. Raises NoMendFound
    when no count up to `settings.max_neurons` does it, Unsupported for layers of experts.
    """
    layers = dense_layers(engine, settings)
    answer, _ = contest(case)
    a = [ScoreItem((*context.prompt, *answer[:-1]), answer[-1:]) for context in case.contexts]
    openings = [context.tokens for context in (*case.others, *case.about)]
    openings += [prompt for prompt, _ in case.previous]
    step = max(1, -(-len(openings) // _CHECKED))
    openings = openings[::step]
    next_ones = engine.greedy(openings, 1) if openings else []
    b = [ScoreItem(opening, tuple(said[:1])) for opening, said in zip(openings, next_ones, strict=True)]
    try:
        separation = separate(engine, a, b)
    except InvalidInput as error:
        raise no_mend("contrast", case, [error.message]) from error
    neurons = [(each, True) for each in ranked(separation) if each[0] in layers and _fires_for_a(separation, each)]

    def held(trial: Adjustment) -> Held:
        return Held(float(outcome(engine, case, trial).removes), _said(engine, b, trial))

    tried: list[str] = []
    found = _search(named("contrast", case), neurons, held, GONE, settings.max_neurons, tried)
    if found is None:
        raise no_mend("contrast", case, tried or ["no neuron tells this answer from its neighbours"])
    return found


def ranked(separation: Separation) -> list[Neuron]:
    """The neurons that differ surely and enough and push their own side's answers, the strongest first."""
    sure = (separation.q < LEVEL) & (separation.effect_size.abs() >= LARGE_ENOUGH)
    push = torch.where(sure, separation.push, 0.0).clamp_min(0.0)
    order = push.flatten().sort(descending=True, stable=True).indices[: int((push > 0).sum())]
    return [divmod(place, push.shape[1]) for place in order.tolist()]


def _fires_for_a(separation: Separation, neuron: Neuron) -> bool:
    """Whether a neuron is further from zero on side a, so that turning it down makes a like b."""
    return bool(separation.mean_a[neuron].abs() >= separation.mean_b[neuron].abs())


def _said(engine: TransformersEngine, items: Sequence[ScoreItem], trial: Adjustment) -> float:
    """The share of answers that greedy decoding gives under a trial on top of the present state."""
    with engine.preview((*engine.state, Active(trial))):
        return sum(score.greedy for score in engine.score(items)) / len(items)


def _search(
    name: str,
    neurons: Sequence[tuple[Neuron, bool]],
    held: Callable[[Adjustment], Held],
    gone: float,
    most: int,
    tried: list[str],
    say: Say = lambda _: None,
) -> Adjustment | None:
    """The fewest neurons, as mildly as does it: silenced if that will do, else turned round. None where nothing does.

    Where the fewest that take enough of the first side's answers away leave too few of the second's, more neurons take
    as many away more mildly. `tried` gets a line a trial.
    """
    outcomes: dict[tuple[int, float], Held] = {}

    def goes(count: int, factor: float) -> bool:
        if (count, factor) not in outcomes:
            found = outcomes[count, factor] = held(_proposal(name, neurons[:count], factor, "A trial"))
            tried.append(f"{count} neurons by {factor:.2f}: {found.gone:.0%} gone, {found.kept:.0%} kept")
            say(tried[-1])
        return outcomes[count, factor].gone >= gone

    most = min(most, len(neurons))
    for strongest in _FACTORS if most else ():
        count = min(_FIRST, most)
        while not goes(count, strongest) and count < most:
            count = min(_GROWTH * count, most)
        for _ in range(_COUNTS):
            if not goes(count, strongest):
                break
            factor = mildest(strongest, lambda factor, count=count: goes(count, factor))  # type: ignore[misc]
            went, kept = outcomes[count, factor]
            if kept >= KEPT:
                told = f"On the given prompts {went:.0%} of the first side's answers go, {kept:.0%} of the other's stay"
                return _proposal(name, neurons[:count], factor, told)
            if count == most:
                break
            count = min(round(_GROWTH**0.5 * count), most)
    return None


def _proposal(name: str, neurons: Sequence[tuple[Neuron, bool]], factor: float, told: str) -> Adjustment:
    """The first side's neurons by `factor`, the second's by as much the other way."""
    down, up = ([neuron for neuron, own in neurons if own is side] for side in (True, False))
    ops: tuple[ScaleNeurons, ...] = scaling(down, factor) + scaling(up, 2.0 - factor)
    more = f", {len(up)} by {2.0 - factor:.2f}" if up else ""
    return Adjustment(name=name, method="contrast", ops=ops, note=f"{len(down)} neurons by {factor:.2f}{more}. {told}.")
