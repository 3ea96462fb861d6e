"""Where a neuron is open: gate and up rows that fire where a token is due, and are shut for what is to be left alone.

Owns what is to be left alone, in groups that count alike, and the closed form (see patch.py, which says what a neuron
writes). What it returns does not depend on the weights beyond what it reads of the case under them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from liveweight.engines.transformers import TransformersEngine
from liveweight.methods.base import Answered, Case
from liveweight.methods.surroundings import Surroundings

STEEPNESS = 20.0  # a gate's scale: act(-20) is nothing
NEAR = 2.0  # weight of the case's own neighbours beside everyday chats
AGREE = 0.8  # the share of like questions whose answers are to begin with a token, for its neuron to open freely
ABOUT = 2.0  # weight of other questions about the same thing, for neurons of a first token
LAST_WORD = 0.1  # weight of a subject's last word by itself: so near that more would open the gate for other words
DUE = 20.0  # weight of the places where the neuron is to be open
BEGINNING = 3.0  # weight of where everyday replies begin, for neurons of an opening
OPENS_LESS, SHUTS_MORE = 0.1, 0.3  # what gates read, in a model with many patches
PREVIOUS = 16  # protected answers, those to the most alike prompts, that the gates are fitted against
OPENING = 1000  # places from here on are in an opening
TOLD = 2  # tokens that tell an answer from others: many begin with "The", many replies with "I"


@dataclass(frozen=True)
class Batch:
    """What the model does in the case's contexts now. Shorter targets are padded; `real` says where."""

    x: Tensor  # (B, T, width), what the MLP reads where each target token is predicted
    target: Tensor  # (B, T)
    real: Tensor  # (B, T)
    lead: Tensor  # (B, T) nats by which each target token leads now; negative where it does not
    place: Tensor  # (B, T) which token this is for: see `patch.py`
    also: dict[int, Tensor]  # place -> (N, width), what is read there where other wordings are answered as the first


@dataclass(frozen=True)
class Near:
    """What the MLP reads where a case's own neighbours are answered, (N, width) each."""

    begins: (
        Tensor  # where like questions' answers begin; apart, since that is where a first token's neuron has its likes
    )
    said: Tensor  # (N,) the tokens that like questions' answers begin with
    about: Tensor  # where other questions' answers begin
    behind: Tensor  # behind all of these
    broken: list[Tensor]  # the whole of each protected answer that a first try would have changed

    def and_beside(self, reads: Sequence[Tensor]) -> Near:
        """And other answers of the same change: what is read where each is said, (T, width)."""
        begins, behind = [each[:1] for each in reads], [each[1:] for each in reads]
        return replace(self, begins=torch.cat([self.begins, *begins]), behind=torch.cat([self.behind, *behind]))

    def agree(self, token: int) -> bool:
        """Whether like questions' answers begin with this token anyway, nearly all of them."""
        return not len(self.said) or float((self.said == token).float().mean()) >= AGREE


@dataclass(frozen=True)
class _Left:
    """Second moment and mean of what is to be left alone; groups count alike, however many are in them."""

    moment: Tensor  # (width, width)
    mean: Tensor  # (width,)

    def plus(self, weight: float, moment: Tensor, mean: Tensor) -> _Left:
        """And this too."""
        return _Left(self.moment + weight * moment, self.mean + weight * mean)

    def and_(self, weight: float, *groups: Tensor) -> _Left:
        """And these groups (N, width) too, as far as there is anything in them."""
        left = self
        for group in groups:
            if len(group):
                left = left.plus(weight, group.T @ group / len(group), group.mean(0))
        return left

    def ridged(self, system: Tensor, ridge: float) -> Tensor:
        """A system (width, width) with a ridge as high as what is left alone calls for."""
        return system + ridge * self.moment.diagonal().mean() * torch.eye(len(system), device=system.device)


@dataclass(frozen=True)
class _Gate:
    """How a neuron for one sort of place is fitted."""

    opens: float  # what the gate reads where it is to be open
    shuts: float  # and, with a minus sign, where it is to be shut
    wording: float  # weight of W
    ridge: float


# A reply's first token decides which sentence it will be, so its neuron has to know a question in any wording: freely
# where like questions' answers begin with that token anyway, and strictly where they do not, since then they would
# change (or where a free one was refused). Further on a neuron only has to go on with a sentence that has begun.
FIRST, STRICT = _Gate(1.1, 0.9, 5.0, 0.03), _Gate(0.7, 1.3, 5.0, 0.03)
FURTHER, ANSWER = _Gate(0.7, 1.3, 0.3, 1e-3), _Gate(0.5, 1.5, 0.0, 1e-3)
LED_TO = _Gate(1.2, 0.8, 0.3, 1e-3)  # of an answer's further tokens, where something else brings how it begins
SUBJECT = _Gate(1.0, 1.0, 0.0, 0.1)  # of a neuron that knows a subject by its name


def neighbours(engine: TransformersEngine, case: Case, layer: int) -> Near:
    """What the MLP reads while it says what is to be left alone."""
    alike = like_answers(case)
    rows = [*alike, *((each.prompt, each.target) for each in case.about), *case.broken]
    seen = engine.read([(*prompt, *reply) for prompt, reply in rows], [len(prompt) - 1 for prompt, _ in rows], layer)
    reads = [read.float() for _, read in seen]
    nothing = torch.empty(0, engine.sites.width, device=engine.model.device)
    unlike = len(rows) - len(case.broken)
    finals = [final[:1] for final, _ in seen[: len(case.others)]]
    with engine.gate.step(), torch.no_grad():
        said = engine.unembed(torch.cat(finals)).argmax(-1) if finals else nothing[:, 0]
    return Near(
        said=said,
        begins=torch.cat([nothing, *(read[:1] for read in reads[: len(alike)])]),
        about=torch.cat([nothing, *(read[:1] for read in reads[len(alike) : unlike])]),
        behind=torch.cat([nothing, *(read[1:] for read in reads[:unlike])]),
        broken=reads[unlike:],
    )


def like_answers(case: Case) -> list[Answered]:
    """Prompts and answers of like questions about others, and of earlier changes to the most alike prompts."""
    previous = most_alike(case, [prompt for prompt, _ in case.previous])
    return [*((each.prompt, each.target) for each in case.others), *(case.previous[index] for index in previous)]


def most_alike(case: Case, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Which of some prompts share most tokens with the question as asked: PREVIOUS of them at most."""
    asked = set(case.contexts[0].prompt)
    return sorted(range(len(prompts)), key=lambda index: -len(asked.intersection(prompts[index])))[:PREVIOUS]


def uncontested(batch: Batch, due: list[int], near: Near) -> list[int]:
    """The due places without the openings of other wordings that like questions would have to share.

    Where a question's answers begin now with this token and now with that one, a neuron for one of them tips others'.
    """
    asked, dropped = set(batch.place[0].tolist()), set()
    for place in due:
        first = place % OPENING == 0 and place >= OPENING
        if first and place not in asked and not near.agree(int(batch.target[batch.place == place][0])):
            dropped.add(place // OPENING)
    return [place for place in due if place // OPENING not in dropped]


def fit(
    batch: Batch, due: list[int], around: Surroundings, near: Near, *, careful: bool, crowded: bool, led_to: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate and up rows, (P, width) each, for the places in `due`; and what each gate reads where it is open, (P,).

    Where something else knows the question and has `led_to` the answer, those further on in it open freely.
    """
    x, device = batch.x, batch.x.device
    usual = _Left(around.moment.to(device), around.mean.to(device))
    begins = _Left(around.first_moment.to(device), around.first_mean.to(device))
    behind = usual.and_(NEAR, near.behind, *near.broken)
    gates, ups, opens = [], [], []
    for place in due:
        own = batch.place == place
        here, rest = torch.cat((x[own], batch.also.get(place, x[:0, 0]))), x[(batch.place >= 0) & ~own]
        first = bool(own[:, 0].sum() == own.sum())
        gate = FURTHER if place >= OPENING else LED_TO if led_to and place >= TOLD and not careful else ANSWER
        if first:
            gate = FIRST if near.agree(int(batch.target[own][0])) and not (careful or crowded) else STRICT
        if crowded:
            gate = replace(gate, opens=gate.opens - OPENS_LESS, shuts=gate.shuts + SHUTS_MORE)
        left = behind.and_(NEAR, near.begins, rest)
        if first or place >= OPENING:
            left = left.plus(BEGINNING, begins.moment, begins.mean)
        if first:
            left = left.and_(ABOUT, near.about)
        key, due_here = here.mean(0), DUE * here.T @ here / len(here)
        system = left.moment + due_here + DUE * gate.wording * around.wording.to(device)
        goals = torch.stack((gate.opens * DUE * key - gate.shuts * left.mean, key), dim=1)
        solved = torch.linalg.solve(left.ridged(system, gate.ridge), goals)
        up = solved[:, 1]
        if first:
            system = behind.ridged(behind.moment + BEGINNING * begins.moment + due_here, gate.ridge)
            up = torch.linalg.solve(system, BEGINNING * begins.mean + DUE * key)
        gates.append(solved[:, 0])
        ups.append(up / (up @ key))
        opens.append(gate.opens)
    return torch.stack(gates), torch.stack(ups), torch.tensor(opens, device=device)


def opened(engine: TransformersEngine, layer: int, opens: Tensor) -> Tensor:
    """(P,) what the activation function gives where gates read `opens` (P,)."""
    act = engine.sites.activation_function(layer)
    assert act is not None, layer  # a dense layer has one
    value: Tensor = act(STEEPNESS * opens)
    return value


def firing(engine: TransformersEngine, layer: int, read: Tensor, gates: Tensor, ups: Tensor, opens: Tensor) -> Tensor:
    """(…, P) how much of what they write neurons add where the MLP reads `read` (…, width): 1 where they are open.

    `gates` and `ups` (P, width) and `opens` (P,) are as `fit` returns them.
    """
    act = engine.sites.activation_function(layer)
    assert act is not None, layer
    fires: Tensor = act(STEEPNESS * (read @ gates.T)) / opened(engine, layer, opens)
    return fires * (read @ ups.T) if engine.sites.gated else fires


def fit_subject(
    own: Tensor, around: Surroundings, left_alone: Sequence[Tensor], last_word: Tensor
) -> tuple[Tensor, Tensor]:
    """Gate and up rows, (width,) each, that are open where a subject has been read and shut in all else.

    `own` (n, width) is what the MLP reads there, in several texts; `left_alone` are groups (m, width) that count alike;
    `last_word` (m, width) is what is read where the subject's last word stands for something else.
    """
    left = _Left(around.moment.to(own.device), around.mean.to(own.device)).and_(NEAR, *left_alone)
    left, key = left.and_(LAST_WORD, last_word), own.mean(0)
    goals = torch.stack((SUBJECT.opens * DUE * key - SUBJECT.shuts * left.mean, key), dim=1)
    solved = torch.linalg.solve(left.ridged(left.moment + DUE * own.T @ own / len(own), SUBJECT.ridge), goals)
    return solved[:, 0], solved[:, 1] / (solved[:, 1] @ key)
