"""How well an edit went, in both families of figures: likelihoods under teacher forcing, and what is really said.

Owns the figures' arithmetic and what has to be asked of a model for them. Reads and never writes. The likelihoods are
those of "Locating and Editing Factual Associations in GPT" (Meng et al. 2022), over candidates' mean negative
log-likelihood a token; that they overstate is known (96.8 % against 38.5 % in free generation: Yang et al., "The Mirage
of Model Editing", ACL 2025), so that chat success stands beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from liveweight.engines.base import Message, ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.evaluation.answers import fluency, same_first_sentence, says
from liveweight.evaluation.edits import Edit, Form
from liveweight.evaluation.generation import generate_batch

_REPLY = 32  # tokens of a reply that is judged by its first sentence


@dataclass(frozen=True)
class Likelihood:
    """One prompt under teacher forcing."""

    new: float  # mean negative log-likelihood of the new answer, nats a token
    true: float | None  # the same of the old one (a neighbour: of its own), where it is known
    said: bool  # whether every token of the new answer (a neighbour: of its own) is the likeliest

    @property
    def prefers_new(self) -> bool | None:
        """Whether the new answer is likelier than the old one; None where there is no old one."""
        return None if self.true is None else self.new < self.true


@dataclass(frozen=True)
class EditScores:
    """One edit, measured. Shares are from 0 to 1; None where the data set has nothing to measure it on."""

    efficacy: float | None  # ES: the new answer is likelier than the old one
    paraphrase: float | None  # PS: the same on the paraphrases
    neighbourhood: float | None  # NS: on the neighbours their own answer is the likelier one
    accuracy: float  # every token of the new answer is the likeliest
    accuracy_paraphrase: float | None
    accuracy_neighbourhood: float | None  # of the neighbours' own answer
    chat: float  # greedy free generation says the new answer in its first sentence
    chat_paraphrase: float | None
    kept: float | None  # neighbours whose first sentence is the same, word for word, as the base's
    fluency: float  # of what is said to the question and its paraphrases: n-gram entropies in bits x 100


def efficacy(found: Sequence[Likelihood]) -> float | None:
    """ES and PS: the share of prompts with NLL(new) < NLL(true); None where no old answer is known."""
    return share([each.prefers_new for each in found if each.prefers_new is not None])


def neighbourhood(found: Sequence[Likelihood]) -> float | None:
    """NS: the share of neighbours with NLL(true) < NLL(new)."""
    return share([each.true < each.new for each in found if each.true is not None])


def harmonic(*shares: float | None) -> float | None:
    """S: the harmonic mean of what is there; 0 as soon as one share is."""
    there = [each for each in shares if each is not None]
    if not there:
        return None
    return 0.0 if min(there) <= 0 else len(there) / sum(1 / each for each in there)


def share(held: Sequence[bool]) -> float | None:
    """The share of what held; None of nothing."""
    return sum(held) / len(held) if held else None


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is there; None of nothing."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def asked_of(edit: Edit) -> tuple[Form, str]:
    """What is asked in free generation: the set's own chat question where it has one."""
    return ("question", edit.asked) if edit.asked else (edit.form, edit.prompt)


def _spoken_of(edit: Edit, texts: Sequence[str]) -> list[tuple[Form, str]]:
    """Which of an edit's paraphrases or neighbours are judged by what is said: questions; completions by likelihood."""
    return [(edit.form, text) for text in texts] if edit.form == "question" else []


def _compared(edit: Edit) -> list[tuple[Sequence[str], Sequence[str | None]]]:
    """An edit's prompt, its paraphrases and its neighbours, and the answers that the new one is compared with."""
    own: Sequence[str | None] = edit.answers or [edit.true] * len(edit.neighbours)
    return [
        ((edit.prompt,), [edit.true]),
        (edit.paraphrases, [edit.true] * len(edit.paraphrases)),
        (edit.neighbours, own),
    ]


class EditMeter:
    """Measures edits on an engine, against what the base said to their neighbours."""

    def __init__(self, engine: TransformersEngine, cases: Sequence[Edit]) -> None:
        """Ask the base about every neighbour. The engine's present weights should be the base's."""
        self.engine = engine
        asked = list(dict.fromkeys(spoken for each in cases for spoken in _spoken_of(each, each.neighbours)))
        self._before = dict(zip(asked, self._said(asked), strict=True))

    def measure(self, edit: Edit) -> EditScores:
        """One edit under the weights of now."""
        return self.measure_all([edit])[0]

    def measure_all(self, cases: Sequence[Edit]) -> list[EditScores]:
        """Many edits under the weights of now, each in batches with the others."""
        likely = self._likelihoods(cases)
        replies = self._replies(cases)
        return [self._scores(edit, likely[i], replies) for i, edit in enumerate(cases)]

    def _scores(
        self,
        edit: Edit,
        likely: tuple[list[Likelihood], ...],
        replies: dict[tuple[Form, str], str],
    ) -> EditScores:
        own, paraphrases, neighbours = likely
        asked = replies[asked_of(edit)]
        paraphrased = [replies[each] for each in _spoken_of(edit, edit.paraphrases)]
        kept = [same_first_sentence(replies[each], self._before[each]) for each in _spoken_of(edit, edit.neighbours)]
        return EditScores(
            efficacy=efficacy(own),
            paraphrase=efficacy(paraphrases),
            neighbourhood=neighbourhood(neighbours),
            accuracy=float(own[0].said),
            accuracy_paraphrase=share([each.said for each in paraphrases]),
            accuracy_neighbourhood=share([each.said for each in neighbours if each.true is not None]),
            chat=float(says(asked, edit.new)),
            chat_paraphrase=share([says(reply, edit.new) for reply in paraphrased]),
            kept=share(kept),
            fluency=mean([fluency(reply) for reply in (asked, *paraphrased)]) or 0.0,
        )

    def _likelihoods(self, cases: Sequence[Edit]) -> list[tuple[list[Likelihood], ...]]:
        """Of each edit: its prompt, its paraphrases, its neighbours."""
        items: list[ScoreItem] = []
        for edit in cases:
            for texts, olds in _compared(edit):
                for text, old in zip(texts, olds, strict=True):
                    prompt = self._prompt(edit.form, text)
                    for answer in (edit.new,) if old is None else (edit.new, old):
                        items.append(ScoreItem(prompt, self._answer(edit.form, prompt, answer)))
        scores = iter(self.engine.score(items))
        found = []
        for edit in cases:
            groups = []
            for (_, olds), neighbours in zip(_compared(edit), (False, False, True), strict=True):
                group = []
                for old in olds:
                    new = next(scores)
                    true = next(scores) if old is not None else None
                    said = true.greedy if neighbours and true is not None else new.greedy
                    group.append(Likelihood(new.mean_nll, None if true is None else true.mean_nll, said))
                groups.append(group)
            found.append(tuple(groups))
        return found

    def _replies(self, cases: Sequence[Edit]) -> dict[tuple[Form, str], str]:
        """What is said to everything that is judged by what is said."""
        wanted: list[tuple[Form, str]] = []
        for edit in cases:
            wanted += [asked_of(edit), *_spoken_of(edit, (*edit.paraphrases, *edit.neighbours))]
        unique = list(dict.fromkeys(wanted))
        return dict(zip(unique, self._said(unique), strict=True))

    def _said(self, asked: Sequence[tuple[Form, str]]) -> list[str]:
        replies = generate_batch(self.engine, [self._prompt(form, text) for form, text in asked], _REPLY)
        return [self.engine.format.decode(reply) for reply in replies]

    def _prompt(self, form: Form, text: str) -> tuple[int, ...]:
        if form == "question":
            return tuple(self.engine.encode([Message("user", text)]))
        return tuple(self.engine.format.encode_text(text, special=True))

    def _answer(self, form: Form, prompt: Sequence[int], answer: str) -> tuple[int, ...]:
        """As the model would write it: behind a completion's prompt after a space."""
        if form == "question":
            return tuple(self.engine.format.encode_continuation(prompt, answer))
        return tuple(self.engine.format.encode_text(" " + answer.strip()))
