"""Which neurons pushed an answer, and how hard.

Owns gradient times activation of the answer's margin, the ranking that methods choose from, and the report behind
`why`. Knows nothing of how a report is shown or of what is then changed. Source of the measure: Simonyan et al. 2013
(gradient times input), applied to hidden units as by Ancona et al. 2018; it is the first-order estimate of what the
margin would lose were the neuron's activation zero.

Super neurons (columns that hold a super weight) look like the most important neurons of every answer. They are left
out of every ranking and reported apart.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from liveweight.engines.base import Message
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from liveweight.shown import Shown, quoted, table
from liveweight.tracing.capture import AnswerReading, Neuron, read_answer, require_dense
from liveweight.tracing.neuron_labels import NeuronLabel, label_neurons
from liveweight.tracing.super_weights import super_neurons


class Ranked(NamedTuple):
    """A neuron and how much it pushed the answer, in nats; below zero it pushed against it."""

    layer: int
    neuron: int
    push: float


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AnswerToken(_Value):
    """One token of the answer and what it was measured against."""

    id: int
    text: str
    probability: float
    rival_id: int | None  # the runner-up, or the other answer's token; None where this token is not in the margin
    rival: str | None
    margin: float | None  # nats: this token's logit over the rival's


class NeuronPush(_Value):
    """What one neuron did to the answer's margin."""

    layer: int
    neuron: int
    push: float  # nats: gradient times activation, summed over the positions that the answer came from
    share: float  # push / WhyReport.total
    activation: float  # at the position where |gradient times activation| was largest
    position: int  # that position, counted from the prompt's first token
    token: str  # what the model read there
    predicts: str  # the answer's token that came from there
    label: NeuronLabel | None


class WhyReport(_Value, Shown):
    """Why the model gave an answer: the neurons that pushed it most, and those that pushed against it most."""

    model: str
    version: str
    answer: str
    against: str | None  # the other answer, or None: each token's runner-up
    tokens: tuple[AnswerToken, ...]
    margin: float  # nats, summed over the tokens that have a rival
    total: float  # nats: the sum of |push| over every neuron, super neurons included; what shares are shares of
    pushed: tuple[NeuronPush, ...]  # strongest first
    opposed: tuple[NeuronPush, ...]  # strongest first; their pushes are below zero
    super_neurons: tuple[NeuronPush, ...]  # left out of both lists

    def __rich__(self) -> RenderableType:
        """The neurons for and against the answer."""
        against = f" rather than {self.against!r}" if self.against else ""
        head = Text.assemble("Why ", (self.answer.strip(), "bold"), against, "?")
        head.append(f"  margin {self.margin:.2f} nats at {self.version.split(':')[0]}", style="dim")
        parts: list[RenderableType] = [head, Text()]
        for title, pushes in (("pushed it", self.pushed), ("pushed against it", self.opposed)):
            parts += [_pushes(title, pushes), Text()]
        if self.super_neurons:
            named = ", ".join(f"L{each.layer}/{each.neuron}" for each in self.super_neurons)
            parts.append(Text(f"Left out: {named}, which hold super weights and push every answer.", "dim"))
        return Group(*parts)


def _pushes(title: str, pushes: Sequence[NeuronPush]) -> Table:
    shown = table(title, "share>", "activation>", "at", "predicting", "writes")
    for each in pushes:
        label = each.label.text(negative=each.activation < 0, tokens=3) if each.label is not None else ""
        shown.add_row(
            Text(f"L{each.layer}/{each.neuron}", "bold"),
            f"{each.share:.2%}",
            f"{each.activation:.2f}",
            quoted(each.token),
            quoted(each.predicts),
            Text(label),
        )
    return shown


def why(
    engine: TransformersEngine,
    messages: Sequence[Message],
    answer: str | Sequence[int],
    *,
    against: str | Sequence[int] | None = None,
    top: int = 20,
    labels: bool = True,
    exclude: Collection[Neuron] | None = None,
    cache_dir: Path | None = None,
) -> WhyReport:
    """Explain an answer to a chat by its neurons, under the present weights.

    `answer` and `against` are texts, or tokens as the model gave them. The margin is the answer's over `against` at
    the token where the two part, else over the runner-up at each of its tokens. `top` neurons are listed on each side.
    `exclude` is listed apart from the ranking; None is the model's super neurons, found once and cached in `cache_dir`
    (None: the model's own cache). Raises InvalidInput and Unsupported as `read_answer` does.
    """
    if top < 1:
        raise InvalidInput(f"{top} neurons cannot be listed.", hint="Give top=1 or more.")
    require_dense(engine)
    prompt = engine.encode(messages)
    tokens = answer_ids(engine, prompt, answer)
    rivals = answer_ids(engine, prompt, against) if against is not None else ()
    if against is not None and not rivals:
        raise InvalidInput("The answer to compare with is empty.", hint="Leave it out to compare with the runner-up.")
    excluded = excluded_neurons(engine, exclude, cache_dir)
    reading = read_answer(engine, prompt, tokens, against=rivals, gradients=True)
    pushes = reading.pushes()  # (layers, P, neurons)
    summed = pushes.sum(1)
    ranking = _ranking(summed, excluded)
    pushed = [each for each in ranking[:top] if each.push > 0]
    opposed = [each for each in reversed(ranking[-top:]) if each.push < 0]
    apart = sorted(Ranked(layer, neuron, float(summed[layer, neuron])) for layer, neuron in excluded)
    wanted = [(each.layer, each.neuron) for each in (*pushed, *opposed, *apart)]
    known = label_neurons(engine, wanted, cache_dir=cache_dir) if labels else {}
    total = float(summed.abs().sum())

    def described(found: Sequence[Ranked]) -> tuple[NeuronPush, ...]:
        return tuple(_describe(engine, reading, pushes, each, total, known) for each in found)

    assert reading.margin is not None  # gradients were asked for
    return WhyReport(
        model=engine.info.name,
        version=str(reading.version),
        answer=engine.format.decode(tokens),
        against=engine.format.decode(rivals) if rivals else None,
        tokens=_answer_tokens(engine, reading, rivals),
        margin=reading.margin,
        total=total,
        pushed=described(pushed),
        opposed=described(opposed),
        super_neurons=described(apart),
    )


def neuron_pushes(
    engine: TransformersEngine,
    prompt: Sequence[int],
    answer: Sequence[int],
    against: Sequence[int] | None = None,
) -> Tensor:
    """How much every neuron pushed an answer, in nats: (layers, neurons). Super neurons are in it, so rank with care.

    All arguments are token ids. Raises as `read_answer` does.
    """
    return read_answer(engine, prompt, answer, against=against or (), gradients=True).pushes().sum(1)


def rank_neurons(
    engine: TransformersEngine,
    prompt: Sequence[int],
    answer: Sequence[int],
    against: Sequence[int] | None = None,
    *,
    exclude: Collection[Neuron] | None = None,
    limit: int | None = None,
) -> list[Ranked]:
    """Neurons by how much they pushed an answer, strongest first; the last ones pushed against it most.

    All arguments are token ids. `exclude` is left out: None is the model's super neurons (see `why`), an empty
    collection is nobody. `limit` keeps that many from the front. Raises as `read_answer` does.
    """
    require_dense(engine)
    excluded = excluded_neurons(engine, exclude, None)
    return _ranking(neuron_pushes(engine, prompt, answer, against), excluded, limit)


def excluded_neurons(
    engine: TransformersEngine, exclude: Collection[Neuron] | None, cache_dir: Path | None
) -> frozenset[Neuron]:
    """What a ranking leaves out: the model's super neurons where it is None. Raises UnknownSite for one not there."""
    if exclude is None:
        return super_neurons(engine, cache_dir)
    for layer, neuron in exclude:
        engine.sites.check_neurons(layer, (neuron,))
    return frozenset(exclude)


def _ranking(pushes: Tensor, excluded: Collection[Neuron], limit: int | None = None) -> list[Ranked]:
    """Every neuron but the excluded of (layers, neurons), by push; of equal ones the first in the model comes first."""
    width = pushes.shape[1]
    values, order = pushes.flatten().sort(descending=True, stable=True)
    out = {layer * width + neuron for layer, neuron in excluded}
    if limit is not None:
        values, order = values[: limit + len(out)], order[: limit + len(out)]
    found = [
        Ranked(index // width, index % width, value)
        for index, value in zip(order.tolist(), values.tolist(), strict=True)
        if index not in out
    ]
    return found[:limit]


def _describe(
    engine: TransformersEngine,
    reading: AnswerReading,
    pushes: Tensor,
    ranked: Ranked,
    total: float,
    labels: dict[Neuron, NeuronLabel],
) -> NeuronPush:
    row = int(pushes[ranked.layer, :, ranked.neuron].abs().argmax())
    read = reading.prompt[-1] if row == 0 else reading.answer[row - 1]
    return NeuronPush(
        layer=ranked.layer,
        neuron=ranked.neuron,
        push=ranked.push,
        share=ranked.push / total if total else 0.0,
        activation=float(reading.activations[ranked.layer, row, ranked.neuron]),
        position=len(reading.prompt) - 1 + row,
        token=token_text(engine, read),
        predicts=token_text(engine, reading.answer[row]),
        label=labels.get((ranked.layer, ranked.neuron)),
    )


def _answer_tokens(
    engine: TransformersEngine, reading: AnswerReading, against: Sequence[int]
) -> tuple[AnswerToken, ...]:
    logits = reading.logits
    chosen = torch.tensor(reading.answer)[:, None]
    probabilities = logits.softmax(-1).gather(1, chosen)[:, 0].tolist()
    rivals: list[int | None] = list(logits.scatter(1, chosen, float("-inf")).argmax(-1).tolist())
    if against:
        parted = next(i for i, (a, b) in enumerate(zip(reading.answer, against, strict=False)) if a != b)
        rivals = [against[parted] if place == parted else None for place in range(len(rivals))]
    return tuple(
        AnswerToken(
            id=token,
            text=token_text(engine, token),
            probability=probability,
            rival_id=rival,
            rival=None if rival is None else token_text(engine, rival),
            margin=None if rival is None else float(row[token] - row[rival]),
        )
        for token, probability, rival, row in zip(reading.answer, probabilities, rivals, logits, strict=True)
    )


def answer_ids(engine: TransformersEngine, prompt: Sequence[int], answer: str | Sequence[int]) -> tuple[int, ...]:
    """An answer's token ids, of a text as the model would write it behind `prompt`. Raises InvalidInput."""
    if isinstance(answer, str):
        return tuple(engine.format.encode_continuation(prompt, answer))
    wrong = next((token for token in answer if not 0 <= token < engine.info.vocabulary), None)
    if wrong is not None:
        raise InvalidInput(
            f"There is no token {wrong} in this model.", hint=f"Its tokens are 0 to {engine.info.vocabulary - 1}."
        )
    return tuple(answer)


def token_text(engine: TransformersEngine, token: int) -> str:
    """One token as text."""
    return str(engine.format.tokenizer.decode([token]))
