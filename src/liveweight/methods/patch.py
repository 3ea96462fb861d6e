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

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from liveweight.adjustments import Adjustment, ReplaceNeurons
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import NoMendFound, Unsupported
from liveweight.methods.base import Case
from liveweight.methods.surroundings import Surroundings, surroundings
from liveweight.settings import MethodSettings
from liveweight.sites import patchable_layers

STEEPNESS = 20.0  # the gate's scale: act(-20) is nothing
NEAR = 2.0  # weight of the case's own neighbours beside everyday chats
AGREE = 0.8  # the share of like questions whose answers are to begin with a token, for its neuron to open freely
ABOUT = 2.0  # weight of other questions about the same thing, for neurons of a first token
DUE = 20.0  # weight of the places where the neuron is to be open
BEGINNING = 3.0  # weight of where everyday replies begin, for neurons of an opening
MARGIN = 4.0  # nats by which a mended token is to lead
CLOSE = 0.3  # of MARGIN: near enough to stop
RIVALS = 48  # tokens that each target is compared with while the neurons are optimised
LONGEST_STEP = 1.0  # of the residual stream's usual norm
MOST_NEURONS = 64
CROWD = 8  # patches in the model from which on new ones are fitted more strictly: what each moves adds up
CLOSER = 0.2  # by how much their gates then open less, and shut more
PREVIOUS = 16  # protected answers, those to the most alike prompts, that the gates are fitted against
USUAL = 16  # neurons that a mend seldom needs more of: what must be left of a layer's spare ones
_OPENING = 1000  # places from here on are in an opening


@dataclass(frozen=True)
class _Near:
    """What the MLP reads where a case's own neighbours are answered, (N, width) each."""

    begins: (
        Tensor  # where like questions' answers begin; apart, since that is where a first token's neuron has its likes
    )
    said: Tensor  # (N,) the tokens that like questions' answers begin with
    about: Tensor  # where other questions' answers begin
    behind: Tensor  # behind all of these
    broken: list[Tensor]  # the whole of each protected answer that a first try would have changed

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


@dataclass(frozen=True)
class _Batch:
    """What the model does in the case's contexts now. Shorter targets are padded; `real` says where."""

    x: Tensor  # (B, T, width), what the MLP reads where each target token is predicted
    target: Tensor  # (B, T)
    real: Tensor  # (B, T)
    lead: Tensor  # (B, T) nats by which each target token leads now; negative where it does not
    place: Tensor  # (B, T) which token this is for: see `_places`
    also: dict[int, Tensor]  # place -> (N, width), what is read there where other wordings are answered as the first


def propose(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
    """Neurons that say the wished answer in every context of the case.

    Raises NoMendFound where no step makes every token lead, Unsupported for a layer with experts.
    """
    layer = _layer(engine, settings)
    if engine.sites.experts_of(layer):
        raise Unsupported(
            f"Layer {layer} has experts, and a patch needs a dense MLP.",
            hint="Choose another method, such as finetune.",
        )
    around = surroundings(engine, [layer])[layer]
    batch = _read(engine, case, layer)
    due = _due(batch)
    if not due:
        raise NoMendFound(
            "The model gives this answer already, in every wording that was tried.", hint="There is nothing to mend."
        )
    if len(due) > MOST_NEURONS:
        raise NoMendFound(
            f"The wished answer has {len(due)} tokens that the model would not say, more than {MOST_NEURONS}.",
            hint="Give a shorter answer.",
        )
    near = _neighbours(engine, case, layer)
    due = _uncontested(batch, due, near) or due
    crowded = sum(each.adjustment.method == "patch" for each in engine.state) >= CROWD
    gates, ups, opens = _fit(batch, due, around, near, careful=case.careful or crowded, closer=CLOSER * crowded)
    act = engine.sites.activation_function(layer)
    assert act is not None, layer
    open_value = act(STEEPNESS * opens)  # (P,)
    firing = act(STEEPNESS * (batch.x @ gates.T)) / open_value  # (B, T, P)
    if engine.sites.gated:
        firing = firing * (batch.x @ ups.T)
    writes = _optimise(engine, case, batch, due, layer, firing, settings)
    neurons = _free(engine, layer, around, len(due))
    dead = torch.zeros(len(due)) if engine.sites.has_weight(f"layers.{layer}.mlp.up.bias") else None
    gated = engine.sites.gated
    return Adjustment(
        name=f"{case.kind}: {case.question[:60]}",
        method="patch",
        ops=(
            ReplaceNeurons(
                layer=layer,
                neurons=tuple(neurons),
                gate=(STEEPNESS * gates) if gated else None,
                up=(ups / open_value[:, None]) if gated else STEEPNESS * gates,
                down=(writes if gated else writes / open_value[:, None]).T.contiguous(),
                bias=dead,
            ),
        ),
        note=f"Neurons taken in layer {layer}: {len(due)}. They say: {case.wanted}",
    )


def _layer(engine: TransformersEngine, settings: MethodSettings) -> int:
    """The wished layer; or the first of a few late ones that has spare neurons left, else the one with fewest patches.

    Patches of one layer read what no other of them moves, so they are kept together while there is room.
    """
    if settings.layer is not None:
        engine.sites.check_layer(settings.layer)
        return settings.layer
    taken, layers = _taken(engine), patchable_layers(engine.sites.layers)
    roomy = [each for each in layers if len(taken.get(each, ())) + USUAL <= engine.sites.spare_of(each)]
    return roomy[0] if roomy else min(layers, key=lambda each: len(taken.get(each, ())))


def _taken(engine: TransformersEngine) -> dict[int, set[int]]:
    """Neurons that active changes have replaced."""
    taken: dict[int, set[int]] = {}
    for active in engine.state:
        for op in active.adjustment.ops:
            if isinstance(op, ReplaceNeurons):
                taken.setdefault(op.layer, set()).update(op.neurons)
    return taken


def _free(engine: TransformersEngine, layer: int, around: Surroundings, count: int) -> list[int]:
    """Neurons that no active change has taken: spare ones while there are any, then the least used of the layer's own.

    Super neurons, the most used ones, are never among them.
    """
    taken = _taken(engine).get(layer, set())
    own = engine.sites.neurons_of(layer)
    spare = range(own, own + engine.sites.spare_of(layer))
    free = [neuron for neuron in (*spare, *around.usage.argsort().tolist()) if neuron not in taken]
    if len(free) < count + own // 2:
        raise NoMendFound(
            f"More than half of the neurons of layer {layer} hold patches already.",
            hint="Undo some changes, or name another layer.",
        )
    return sorted(free[:count])


def _read(engine: TransformersEngine, case: Case, layer: int) -> _Batch:
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
            # The last token, the full stop, only counts where the word before it would go on.
            end = len(context.target) - 1
            if end > 0 and lead[row, end] < 0 and not engine.format.decode([int(other[end])])[:1].isalnum():
                real[row, end] = False
    place = _places(case, length).to(device)
    return _Batch(x, target, real, lead, place, _also(engine, case, layer, place[0].tolist()))


def _also(engine: TransformersEngine, case: Case, layer: int, places: list[int]) -> dict[int, Tensor]:
    """What the MLP reads at the first context's places where wordings that have a sentence of their own get its one.

    Not at a reply's first token: there they are to go their own way.
    """
    target = case.contexts[0].target
    prompts = [context.prompt for context in case.contexts if context.target != target]
    if not prompts:
        return {}
    seen = engine.read([(*prompt, *target[:-1]) for prompt in prompts], [len(prompt) - 1 for prompt in prompts], layer)
    return {places[step]: torch.stack([read[step] for _, read in seen]).float() for step in range(1, len(target))}


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
            place[row, position] = behind if behind >= 0 else _OPENING * (number + 1) + position
    return place


def _due(batch: _Batch) -> list[int]:
    """The places where some context would say something else."""
    return sorted(set(batch.place[(batch.lead < 0) & batch.real].tolist()))


def _neighbours(engine: TransformersEngine, case: Case, layer: int) -> _Near:
    """What the MLP reads while it says what is to be left alone."""
    asked = set(case.contexts[0].prompt)
    previous = sorted(case.previous, key=lambda pair: -len(asked.intersection(pair[0])))[:PREVIOUS]
    alike = [*((each.prompt, each.target) for each in case.others), *previous]
    rows = [*alike, *((each.prompt, each.target) for each in case.about), *case.broken]
    seen = engine.read([(*prompt, *reply) for prompt, reply in rows], [len(prompt) - 1 for prompt, _ in rows], layer)
    reads = [read.float() for _, read in seen]
    nothing = torch.empty(0, engine.sites.width, device=engine.model.device)
    unlike = len(rows) - len(case.broken)
    finals = [final[:1] for final, _ in seen[: len(case.others)]]
    with engine.gate.step(), torch.no_grad():
        said = engine.unembed(torch.cat(finals)).argmax(-1) if finals else nothing[:, 0]
    return _Near(
        said=said,
        begins=torch.cat([nothing, *(read[:1] for read in reads[: len(alike)])]),
        about=torch.cat([nothing, *(read[:1] for read in reads[len(alike) : unlike])]),
        behind=torch.cat([nothing, *(read[1:] for read in reads[:unlike])]),
        broken=reads[unlike:],
    )


def _uncontested(batch: _Batch, due: list[int], near: _Near) -> list[int]:
    """The due places without the openings of other wordings that like questions would have to share.

    Where a question's answers begin now with this token and now with that one, a neuron for one of them tips others'.
    """
    asked, dropped = set(batch.place[0].tolist()), set()
    for place in due:
        first = place % _OPENING == 0 and place >= _OPENING
        if first and place not in asked and not near.agree(int(batch.target[batch.place == place][0])):
            dropped.add(place // _OPENING)
    return [place for place in due if place // _OPENING not in dropped]


def _fit(
    batch: _Batch, due: list[int], around: Surroundings, near: _Near, *, careful: bool, closer: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate and up rows, (P, width) each, for the places in `due`; and what each gate reads where it is open, (P,)."""
    x, device = batch.x, batch.x.device
    usual = _Left(around.moment.to(device), around.mean.to(device))
    begins = _Left(around.first_moment.to(device), around.first_mean.to(device))
    behind = usual.and_(NEAR, near.behind, *near.broken)
    gates, ups, opens = [], [], []
    for place in due:
        own = batch.place == place
        here, rest = torch.cat((x[own], batch.also.get(place, x[:0, 0]))), x[(batch.place >= 0) & ~own]
        first = bool(own[:, 0].sum() == own.sum())
        gate = FURTHER if place >= _OPENING else ANSWER
        if first:
            gate = FIRST if near.agree(int(batch.target[own][0])) and not careful else STRICT
        gate = replace(gate, opens=gate.opens - closer, shuts=gate.shuts + closer)
        left = behind.and_(NEAR, near.begins, rest)
        if first or place >= _OPENING:
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


def _optimise(
    engine: TransformersEngine,
    case: Case,
    batch: _Batch,
    due: list[int],
    layer: int,
    firing: Tensor,
    settings: MethodSettings,
) -> Tensor:
    """(P, width) what the neurons write, so that every due token leads by MARGIN and no other loses half its lead.

    The loss is the sum of what the leads fall short. Its least value is known, 0, so each step is Polyak's.
    """
    wanted = torch.isin(batch.place, torch.tensor(due, device=batch.place.device)) & batch.real
    goal = torch.where(wanted, MARGIN, batch.lead.clamp(max=MARGIN) * 0.5)
    # Tokens before the first due one feel nothing: they are part of what was there before.
    first = [int(row.float().argmax()) if bool(row.any()) else len(row) - 1 for row in wanted.cpu()]
    contexts = case.contexts
    replay = engine.record(
        [context.tokens[:-1] for context in contexts],
        [len(context.prompt) - 1 + begin for context, begin in zip(contexts, first, strict=True)],
        layers=[layer],
    )
    places = [
        (row, replay.column(row, len(context.prompt) - 1 + step), step)
        for row, (context, begin) in enumerate(zip(contexts, first, strict=True))
        for step in range(begin, len(context.target))
        if bool(batch.real[row, step])
    ]
    rows, columns, steps = (torch.tensor(part, device=firing.device) for part in zip(*places, strict=True))
    target, goal = batch.target[rows, steps], goal[rows, steps]
    fires = torch.zeros(*replay.ids.shape, firing.shape[-1], device=firing.device)
    fires[rows, columns] = firing[rows, steps]
    writes = torch.zeros(len(due), engine.sites.width, device=firing.device, requires_grad=True)
    stream = replay.inputs[layer].detach()
    most = LONGEST_STEP * float(stream[rows, columns].float().norm(dim=-1).median())
    down: nn.Module = engine.sites.weight(engine.sites.mlp_part(layer, "down")).module
    rivals: Tensor | None = None  # (n, k), what a target may have to beat; what else may is looked at in the end
    for _ in range(settings.max_steps):
        with engine.gate.step(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            handle = down.register_forward_hook(lambda _, args, out: out + (fires @ writes).to(out.dtype))
            try:
                final = replay.run(layer, stream)
            finally:
                handle.remove()
            final = final[rows, columns]
            if rivals is None:
                rivals = engine.rivals(final, target, RIVALS)
            gap = torch.relu(goal - engine.leads(final, target, rivals)[0])
            worst = float(gap.detach().max())
            if worst < CLOSE * MARGIN:
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
    if float(gap.detach()[rows == 0].max()) >= MARGIN:
        raise NoMendFound(
            f"After {settings.max_steps} steps the wished answer still does not lead (short by {worst:.1f} nats).",
            hint="Name another layer, or raise methods.max_steps.",
        )
    return writes.detach()
