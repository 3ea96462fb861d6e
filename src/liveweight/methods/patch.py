"""patch: one new neuron for each wrong token, which fires where that token is due and nowhere else.

A mend keyed on one direction (rome) answers in proportion to a key's likeness, so that every like question feels some
of it. A neuron has a threshold: its gate row is fitted so that it is open where the answer is due, in every wording of
the case, and shut for the same question about other things, for other questions about this thing, for everyday chats
and for plain text. Shut means shut: an activation function is almost zero below its threshold, so the neighbours do not
move. What the neuron writes is then optimised until every token of the wished answer leads by a margin.

    gate  g = s·A⁻¹(a·w₊·k - b·m)      A = M + w₊·(E[x₊ x₊ᵀ] + W) + ridge
    up    u = A⁻¹k / (kᵀA⁻¹k) / act(s·a)
    down  d: steps of Polyak's length on what the answer's tokens fall short of their margins

k is the mean MLP input x₊ where the token is due, M and m are moment and mean of all that is to be left alone. W is how
the input at a question's end varies with the wording alone, measured on other questions: a gate that does not read
those directions opens for wordings that no one thought of (within-class covariance: Hatch et al., Interspeech 2006).
Where the token is a reply's first, the up row is fitted to tell the beginning of any reply (1) from all else (0), so
that gate and up are a conjunction: this question, and here.

The idea of a neuron for a mistake: Huang et al., "Transformer-Patcher: One Mistake Worth One Neuron", ICLR 2023. Here
its gate is solved in closed form against the model's surroundings, and it takes the place of a spare neuron, then of
the least used ones. The step length: Polyak, "Minimization of unsmooth functionals", 1969.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from liveweight.adjustments import Adjustment
from liveweight.engines.half import half_products
from liveweight.engines.replay import Replay
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import NoMendFound
from liveweight.methods.base import Case, Joint
from liveweight.methods.gates import (
    OPENING,
    STEEPNESS,
    TOLD,
    Batch,
    Near,
    firing,
    fit,
    most_alike,
    neighbours,
    opened,
    uncontested,
)
from liveweight.methods.room import new_neurons, roomy_layer
from liveweight.methods.surroundings import Surroundings, surroundings
from liveweight.methods.trials import spread
from liveweight.settings import MethodSettings
from liveweight.sites import patchable_layers

MARGIN = 4.0  # nats by which a mended token is to lead
LED_MARGIN = 8.0  # the same for what goes on from where something else led to, since it is to do so in any wording
THIN = 1.0  # nats: a good answer's tokens that lead by less are made surer
CLOSE = 0.3  # of either: near enough to stop
RIVALS = 48  # tokens that each target is compared with while the neurons are optimised
LONGEST_STEP = 1.0  # of the residual stream's usual norm
MOST_NEURONS = 64
CROWD = 2  # patches in the model from which on new ones are fitted more strictly: what each moves adds up
USUAL = 16  # neurons that a mend seldom needs more of: what must be left of a layer's spare ones
BEHIND = 24  # other questions behind which an answer that was led to is gone on with


def propose(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
    """Neurons that say the wished answer in every context of the case.

    Raises NoMendFound where no step makes every token lead, Unsupported for a layer with experts.
    """
    return propose_all(engine, [case], settings)([0])


def propose_all(engine: TransformersEngine, cases: Iterable[Case], settings: MethodSettings) -> Joint:
    """Neurons for each of the cases, shut where the others' answers are said. One case's neurons know no other's.

    Where a case's answer is led to by something else, they only have to go on with it: they do so whatever was asked,
    and also where a token of it leads by little now. Cases whose tokens cannot be made to lead are left out. Raises as
    `propose` does, at once or when the change is asked for, where none is left.
    """
    missed: dict[int, NoMendFound] = {}
    planned: dict[int, _Planned] = {}
    with engine.remembering():
        for number, case in enumerate(cases):
            try:
                planned[number] = _planned(engine, case, list(planned.values()), settings)
            except NoMendFound as error:
                missed[number] = error
        patches = sum(each.adjustment.method == "patch" for each in engine.state)
        crowded = patches + len(planned) + len(missed) > CROWD
        around = surroundings(engine, sorted({plan.layer for plan in planned.values()}))
        half = {each: half_products([*engine.sites.blocks[each:], engine.sites.lm_head]) for each in around}
        found: dict[int, _Neurons] = {}
        for number, plan in planned.items():
            rest = [each for other, each in planned.items() if other != number]
            alike = most_alike(plan.case, [each.case.contexts[0].prompt for each in rest])
            beside = [rest[index].said[plan.layer] for index in alike]
            try:
                found[number] = _neurons(
                    engine, plan, around[plan.layer], half[plan.layer], beside, settings, crowded=crowded
                )
            except NoMendFound as error:
                missed[number] = error

    def change(numbers: Sequence[int]) -> Adjustment:
        there = [number for number in numbers if number in found]
        if not there:
            raise missed[numbers[0]]
        ops = []
        for layer in sorted({planned[number].layer for number in there}):
            own = [found[number] for number in there if planned[number].layer == layer]
            parts = ([getattr(each, name) for each in own] for name in ("gates", "ups", "opened", "writes"))
            ops.append(new_neurons(engine, layer, around[layer].usage, *map(torch.cat, parts)))
        count, layers = sum(len(op.neurons) for op in ops), " and ".join(str(op.layer) for op in ops)
        first, one = planned[there[0]].case, len(numbers) == 1
        return Adjustment(
            name=f"{first.kind}: {first.question[:60]}" if one else f"patch: {len(there)} facts",
            method="patch",
            ops=tuple(ops),
            note=f"Neurons taken in layer {layers}: {count}." + (f" They say: {first.wanted}" if one else ""),
        )

    if missed and not found:
        raise missed[min(missed)]
    return change


@dataclass(frozen=True)
class _Planned:
    """One case of a change, where it is to be mended, and all that is read of it for that."""

    case: Case
    layer: int
    batch: Batch
    near: Near
    due: list[int]
    said: dict[int, Tensor]  # layer -> (T, width), what is read where its first answer is said
    replay: Replay  # of the contexts from the first due place on


@dataclass(frozen=True)
class _Neurons:
    """What one case is mended with."""

    gates: Tensor  # (P, width)
    ups: Tensor  # (P, width)
    opened: Tensor  # (P,) what the activation function gives where they are open
    writes: Tensor  # (P, width)


def _planned(engine: TransformersEngine, case: Case, before: Sequence[_Planned], settings: MethodSettings) -> _Planned:
    """Patches of one layer read what no other of them moves, so they are kept together while there is room."""
    layers = patchable_layers(engine.sites.layers)
    taken = {layer: sum(len(each.due) for each in before if each.layer == layer) for layer in layers}
    layer = roomy_layer(engine, layers, settings, USUAL, taken)
    batch = _read(engine, case, layer)
    due = _due(batch, MARGIN if case.led_to else THIN if case.kind == "good" else 0.0)
    if not due:
        raise NoMendFound(
            "The model gives this answer already, in every wording that was tried.", hint="There is nothing to mend."
        )
    if len(due) > MOST_NEURONS:
        raise NoMendFound(
            f"The wished answer has {len(due)} tokens that the model would not say, more than {MOST_NEURONS}.",
            hint="Give a shorter answer.",
        )
    near = neighbours(engine, case, layer)
    due = uncontested(batch, due, near) or due
    replay = _recorded(engine, case, batch, due, layer)
    first = case.contexts[0]
    said = {
        each: engine.read([first.tokens[:-1]], [len(first.prompt) - 1], each)[0][1].float() for each in {*layers, layer}
    }
    return _Planned(case, layer, batch, near, due, said, replay)


def _recorded(engine: TransformersEngine, case: Case, batch: Batch, due: list[int], layer: int) -> Replay:
    """The contexts from their first due place on. Tokens before it feel nothing: they are part of what was there."""
    begins = _begins(case, _wanted(batch, due))
    return engine.record(
        [context.tokens[:-1] for context in case.contexts],
        [len(context.prompt) - 1 + begin for context, begin in zip(case.contexts, begins, strict=True)],
        layers=[layer],
        final=False,
        packed=True,
        prompts=[len(context.prompt) for context in case.contexts],
    )


def _neurons(
    engine: TransformersEngine,
    plan: _Planned,
    around: Surroundings,
    half: AbstractContextManager[object],
    beside: Sequence[Tensor],
    settings: MethodSettings,
    *,
    crowded: bool,
) -> _Neurons:
    """One case's neurons, shut where the answers `beside` it are said; searched for in `half` precision."""
    near, case = plan.near.and_beside(beside), plan.case
    gates, ups, opens = fit(
        plan.batch, plan.due, around, near, careful=case.careful, crowded=crowded, led_to=case.led_to
    )
    fires = firing(engine, plan.layer, plan.batch.x, gates, ups, opens)
    writes = _optimise(engine, plan, fires, half, settings, LED_MARGIN if case.led_to else MARGIN)
    return _Neurons(STEEPNESS * gates, ups, opened(engine, plan.layer, opens), writes)


def _read(engine: TransformersEngine, case: Case, layer: int) -> Batch:
    contexts = case.contexts
    seen = engine.read(
        [context.tokens[:-1] for context in contexts], [len(context.prompt) - 1 for context in contexts], layer
    )
    length = max(len(context.target) for context in contexts)
    device = seen[0][0].device
    x = torch.zeros(len(contexts), length, engine.sites.width, device=device)
    target = torch.zeros(len(contexts), length, dtype=torch.int64, device=device)
    real = torch.zeros(len(contexts), length, dtype=torch.bool, device=device)
    lead = torch.zeros(len(contexts), length, device=device)
    with engine.gate.step(), torch.no_grad():
        for row, (context, (final, read)) in enumerate(zip(contexts, seen, strict=True)):
            own = slice(0, len(context.target))
            x[row, own], real[row, own] = read.float(), True
            target[row, own] = torch.tensor(context.target)
            lead[row, own], other = engine.leads(final, target[row, own])
            # A full stop at the end only counts where the word before it would go on.
            end = len(context.target) - 1
            stops = end > 0 and context.target[end] not in engine.format.end_tokens
            if stops and lead[row, end] < 0 and not engine.format.decode([int(other[end])])[:1].isalnum():
                real[row, end] = False
    place = _places(case, length).to(device)
    return Batch(x, target, real, lead, place, _also(engine, case, layer, place[0].tolist()))


def _also(engine: TransformersEngine, case: Case, layer: int, places: list[int]) -> dict[int, Tensor]:
    """What the MLP reads at the first context's places where wordings that have a sentence of their own get its one.

    Not at a reply's first token: there they are to go their own way. Where the answer is led to, other questions get
    the answer proper too: its rest is due once TOLD tokens of it are said. Its end is not, which any reply may have.
    """
    target, (begins, ends) = case.contexts[0].target, case.key
    said = [(context.prompt, 0, 1, len(target)) for context in case.contexts if context.target != target]
    if case.led_to and ends > begins + TOLD:
        others = spread((*case.about, *case.others), BEHIND)
        said += [(context.prompt, begins, TOLD, ends) for context in others]
    if not said:
        return {}
    rows = [(*prompt, *target[start : end - 1]) for prompt, start, _, end in said]
    seen = engine.read(rows, [len(prompt) - 1 for prompt, *_ in said], layer)
    found: dict[int, list[Tensor]] = {}
    for (_, start, told, end), (_, read) in zip(said, seen, strict=True):
        for step in range(start + told, end):
            found.setdefault(places[step], []).append(read[step - start].float())
    return {place: torch.stack(reads) for place, reads in found.items()}


def _places(case: Case, length: int) -> Tensor:
    """(B, T) names for what each position is for; equal names share a neuron.

    The answer's own tokens have one name each, whatever stands before them, so that a neuron learns where the answer
    is due and not how one sentence opens. An opening's tokens are named by their position in that opening.
    """
    place = torch.full((len(case.contexts), length), -1)
    openings: dict[tuple[int, ...], int] = {}
    for row, context in enumerate(case.contexts):
        start, _ = context.key
        number = openings.setdefault(context.target[:start], len(openings))
        for position in range(len(context.target)):
            behind = position - start
            place[row, position] = behind if behind >= 0 else OPENING * (number + 1) + position
    return place


def _due(batch: Batch, least: float) -> list[int]:
    """Where some context would say something else, or a token of an answer proper leads by less than `least`."""
    own = (batch.place >= 0) & (batch.place < OPENING)
    short = batch.lead < torch.where(own, least, 0.0)
    return sorted(set(batch.place[short & batch.real].tolist()))


def _wanted(batch: Batch, due: list[int]) -> Tensor:
    """(B, T) whether a token is to be made to lead."""
    return torch.isin(batch.place, torch.tensor(due, device=batch.place.device)) & batch.real


def _begins(case: Case, wanted: Tensor) -> list[int]:
    """Each context's first token that is to be made to lead, or its last one."""
    return [
        int(row.float().argmax()) if bool(row.any()) else len(context.target) - 1
        for context, row in zip(case.contexts, wanted.cpu(), strict=True)
    ]


def _optimise(
    engine: TransformersEngine,
    plan: _Planned,
    fired: Tensor,
    half: AbstractContextManager[object],
    settings: MethodSettings,
    margin: float,
) -> Tensor:
    """(P, width) what the neurons write, so that every due token leads by the margin and no other loses half its lead.

    `fired` (B, T, P) is how much of it each adds at the targets' tokens. The loss is the sum of what the leads fall
    short. Its least value is known, 0, so each step is Polyak's.
    """
    batch, replay, layer = plan.batch, plan.replay, plan.layer
    wanted = _wanted(batch, plan.due)
    goal = torch.where(wanted, margin, batch.lead.clamp(max=margin) * 0.5)
    contexts = [
        (row, len(context.prompt) - 1, step)
        for row, (context, begin) in enumerate(zip(plan.case.contexts, _begins(plan.case, wanted), strict=True))
        for step in range(begin, len(context.target))
        if bool(batch.real[row, step])
    ]
    rows, steps = (torch.tensor([each[part] for each in contexts], device=fired.device) for part in (0, 2))
    places = torch.tensor([replay.at(row, end + step) for row, end, step in contexts], device=fired.device).T
    there = tuple(places)
    target, goal = batch.target[rows, steps], goal[rows, steps]
    fires = torch.zeros(*replay.ids.shape, fired.shape[-1], device=fired.device)
    fires[there] = fired[rows, steps]
    writes = torch.zeros(len(plan.due), engine.sites.width, device=fired.device, requires_grad=True)
    stream = replay.inputs[layer].detach()
    most = LONGEST_STEP * float(stream[there].float().norm(dim=-1).median())
    down: nn.Module = engine.sites.weight(engine.sites.mlp_part(layer, "down")).module
    rivals: Tensor | None = None  # (n, k), what a target may have to beat; what else may is looked at in the end
    for _ in range(settings.max_steps):
        with engine.gate.step(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), half:
            handle = down.register_forward_hook(lambda _, args, out: out + (fires @ writes).to(out.dtype))
            try:
                final = replay.run(layer, stream)
            finally:
                handle.remove()
            final = final[there]
            if rivals is None:
                rivals = engine.rivals(final, target, RIVALS)
            gap = torch.relu(goal - engine.leads(final, target, rivals)[0])
            worst = float(gap.detach().max())
            if worst < CLOSE * margin:
                others = engine.rivals(final, target, 1)
                if bool((rivals == others).any(1).all()):
                    break
                rivals = torch.cat((rivals, others), dim=1)
                gap = torch.relu(goal - engine.leads(final, target, rivals)[0])
                worst = float(gap.detach().max())
            loss = gap.sum()
            (gradient,) = torch.autograd.grad(loss, [writes])
        with torch.no_grad():
            size = gradient.norm().clamp(min=1e-12)
            writes.sub_(gradient / size * (loss / size).clamp(max=most))
    asked = gap.detach()[rows == 0]
    if len(asked) and float(asked.max()) >= margin:
        raise NoMendFound(
            f"After {settings.max_steps} steps the wished answer still does not lead (short by {worst:.1f} nats).",
            hint="Name another layer, or raise methods.max_steps.",
        )
    return writes.detach()
