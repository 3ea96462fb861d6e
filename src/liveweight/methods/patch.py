"""patch: one little-used neuron for each wrong token, which fires where that token is due and nowhere else.

A mend keyed on one direction (rome) answers in proportion to a key's likeness, so that every like question feels some
of it. A neuron has a threshold: its gate row is fitted so that it is open where the answer is due, in every wording of
the case, and shut for the same question about other things, for other questions about this thing, for everyday chats
and for plain text. Shut means shut: an activation function is almost zero below its threshold, so the neighbours do not
move. What the neuron writes is then optimised until every token of the wished answer leads by a margin.

    gate  g = s·A⁻¹(a·w₊·k - b·m)      A = M + w₊·E[x₊ x₊ᵀ] + ridge,  M and m: moment and mean of all that is to be left
    up    u = A⁻¹k / (kᵀA⁻¹k) / act(s·a)   k: mean MLP input where the token is due
    down  d: gradient steps on the margins of the answer's tokens

The idea of a neuron for a mistake: Huang et al., "Transformer-Patcher: One Mistake Worth One Neuron", ICLR 2023. Here
the neuron is not added but taken from the least used ones, so the model keeps its shape, and its gate is solved in
closed form against the model's surroundings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from liveweight.adjustments import Adjustment, ReplaceNeurons
from liveweight.engines.replay import Replay
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import NoMendFound, Unsupported
from liveweight.methods.base import Case
from liveweight.methods.surroundings import Surroundings, surroundings
from liveweight.settings import MethodSettings

DEPTH = 0.77  # relative depth of the first layer that is patched: late enough to know what is about to be said
SPREAD = 3  # layers over which patches are spread, so that none loses many neurons
OPEN, SHUT = 0.8, 1.2  # what the gate reads where it is to be open, and with a minus sign where it is to be shut
STEEPNESS = 12.0  # the gate's scale: act(-12) is nothing
NEAR = 0.5  # weight of the case's own neighbours beside everyday chats
DUE = 20.0  # weight of the places where the neuron is to be open
RIDGE = 1e-3
MARGIN = 4.0  # nats by which a mended token is to lead
STEP, MOMENTUM = 0.1, 0.6  # of the residual stream's usual norm
MOST_NEURONS = 64


@dataclass(frozen=True)
class _Batch:
    """The case's contexts as run once, with what their targets need. Shorter targets are padded; `real` says where."""

    replay: Replay
    x: Tensor  # (B, T, width), what the MLP reads where each target token is predicted
    target: Tensor  # (B, T)
    real: Tensor  # (B, T)
    lead: Tensor  # (B, T) nats by which each target token leads now; negative where it does not
    place: Tensor  # (B, T) which token this is for: see `_places`


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
    batch = _record(engine, case, layer)
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
    gates, ups = _fit(batch, due, around, _neighbours(engine, case, layer))
    act = engine.sites.activation_function(layer)
    assert act is not None, layer
    open_value = float(act(torch.tensor([STEEPNESS * OPEN]))[0])
    firing = act(STEEPNESS * (batch.x @ gates.T)) / open_value  # (B, T, P)
    if engine.sites.gated:
        firing = firing * (batch.x @ ups.T)
    writes = _optimise(engine, batch, due, layer, firing, settings)
    neurons = _spare(engine, layer, around, len(due))
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
                up=(ups / open_value) if gated else STEEPNESS * gates,
                down=(writes if gated else writes / open_value).T.contiguous(),
                bias=dead,
            ),
        ),
        note=f"{len(due)} little-used neurons of layer {layer} now say: {case.wanted}",
    )


def _layer(engine: TransformersEngine, settings: MethodSettings) -> int:
    """The wished layer, or the one of a few late layers that holds the fewest patches."""
    layers = engine.sites.layers
    if settings.layer is not None:
        engine.sites.check_layer(settings.layer)
        return settings.layer
    first = min(round(DEPTH * layers), layers - 2) if layers > 1 else 0
    taken = _taken(engine)
    return min(range(first, min(first + SPREAD, max(layers - 1, 1))), key=lambda each: (len(taken.get(each, ())), each))


def _taken(engine: TransformersEngine) -> dict[int, set[int]]:
    """Neurons that active changes have replaced."""
    taken: dict[int, set[int]] = {}
    for active in engine.state:
        for op in active.adjustment.ops:
            if isinstance(op, ReplaceNeurons):
                taken.setdefault(op.layer, set()).update(op.neurons)
    return taken


def _spare(engine: TransformersEngine, layer: int, around: Surroundings, count: int) -> list[int]:
    """The least used neurons that no active change has taken, super neurons (the most used) never among them."""
    taken = _taken(engine).get(layer, set())
    free = [neuron for neuron in around.usage.argsort().tolist() if neuron not in taken]
    if len(free) < count + engine.sites.neurons_of(layer) // 2:
        raise NoMendFound(
            f"More than half of the neurons of layer {layer} hold patches already.",
            hint="Undo some changes, or name another layer.",
        )
    return sorted(free[:count])


def _record(engine: TransformersEngine, case: Case, layer: int) -> _Batch:
    contexts = case.contexts
    replay = engine.record(
        [context.tokens for context in contexts],
        [len(context.prompt) - 1 for context in contexts],
        layers=[layer],
        mlp_inputs=[layer],
    )
    length = max(len(context.target) for context in contexts)
    device = replay.final.device
    target = torch.zeros(len(contexts), length, dtype=torch.int64, device=device)
    real = torch.zeros(len(contexts), length, dtype=torch.bool, device=device)
    for row, context in enumerate(contexts):
        target[row, : len(context.target)] = torch.tensor(context.target)
        real[row, : len(context.target)] = True
    with engine.gate.step(), torch.no_grad():
        lead = _lead(engine.unembed(replay.final[:, :length]).float(), target)
        # The last token, the full stop, only counts where the word before it would go on.
        said = engine.unembed(replay.final[:, :length]).argmax(-1)
    for row, context in enumerate(contexts):
        end = len(context.target) - 1
        if end > 0 and not engine.format.decode([int(said[row, end])])[:1].isalnum():
            real[row, end] = False
    place = _places(case, length).to(device)
    return _Batch(replay, replay.mlp_inputs[layer][:, :length].float(), target, real, lead, place)


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
            place[row, position] = behind if behind >= 0 else 1000 * (number + 1) + position
    return place


def _lead(logits: Tensor, target: Tensor) -> Tensor:
    """(B, T) nats by which the target leads the best other token."""
    others = logits.detach().scatter(2, target[..., None], float("-inf")).max(-1).indices
    return (logits.gather(2, target[..., None]) - logits.gather(2, others[..., None]))[..., 0]


def _due(batch: _Batch) -> list[int]:
    """The places where some context would say something else."""
    return sorted(set(batch.place[(batch.lead < 0) & batch.real].tolist()))


def _neighbours(engine: TransformersEngine, case: Case, layer: int) -> Tensor:
    """(N, width) what the MLP reads while it says what is to be left alone."""
    rows = [*((context.prompt, context.target) for context in case.others), *case.previous[-32:]]
    if not rows:
        return torch.zeros(0, engine.sites.width)
    replay = engine.record(
        [(*prompt, *reply) for prompt, reply in rows], [len(prompt) - 1 for prompt, _ in rows], mlp_inputs=[layer]
    )
    found = replay.mlp_inputs[layer].float()
    return torch.cat([found[row, :length] for row, length in enumerate(replay.lengths())])


def _fit(batch: _Batch, due: list[int], around: Surroundings, near: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up rows, (P, width) each, for the places in `due`."""
    x = batch.x
    device = x.device
    moment, mean = around.moment.to(device), around.mean.to(device)
    if len(near):
        moment = moment + NEAR * near.T @ near / len(near)
        mean = mean + NEAR * near.mean(0)
    eye = torch.eye(x.shape[2], device=device)
    said = batch.place >= 0
    gates, ups = [], []
    for place in due:
        here, rest = x[batch.place == place], x[said & (batch.place != place)]
        left, left_mean = moment, mean
        if len(rest):
            left = left + NEAR * rest.T @ rest / len(rest)
            left_mean = left_mean + NEAR * rest.mean(0)
        key = here.mean(0)
        system = left + DUE * here.T @ here / len(here) + RIDGE * left.diagonal().mean() * eye
        solved = torch.linalg.solve(system, torch.stack((OPEN * DUE * key - SHUT * left_mean, key), dim=1))
        gates.append(solved[:, 0])
        ups.append(solved[:, 1] / (solved[:, 1] @ key))
    return torch.stack(gates), torch.stack(ups)


def _optimise(
    engine: TransformersEngine, batch: _Batch, due: list[int], layer: int, firing: Tensor, settings: MethodSettings
) -> Tensor:
    """(P, width) what the neurons write, so that every due token leads by MARGIN and no other loses half its lead."""
    length = batch.target.shape[1]
    replay = batch.replay
    wanted = torch.isin(batch.place, torch.tensor(due, device=batch.place.device))
    goal = torch.where(wanted, MARGIN, batch.lead.clamp(max=MARGIN) * 0.5)
    goal = torch.where(batch.real, goal, float("-inf"))
    padded = torch.zeros(*replay.ids.shape, firing.shape[-1], device=firing.device)
    padded[:, :length] = firing
    writes = torch.zeros(len(due), engine.sites.width, device=firing.device, requires_grad=True)
    velocity = torch.zeros_like(writes)
    unit = replay.inputs[layer][:, :length].float().norm(dim=-1).median()
    down: nn.Module = engine.sites.weight(engine.sites.mlp_part(layer, "down")).module
    worst = float("inf")
    for _ in range(settings.max_steps):
        with engine.gate.step(), torch.enable_grad():
            handle = down.register_forward_hook(lambda _, args, out: out + (padded @ writes).to(out.dtype))
            try:
                final = replay.run(layer)
            finally:
                handle.remove()
            gap = torch.relu(goal - _lead(engine.unembed(final[:, :length]).float(), batch.target))
            worst = float(gap.detach().max())
            if worst < 0.2 * MARGIN:
                break
            (gradient,) = torch.autograd.grad(gap.sum(1).mean(), [writes])
        with torch.no_grad():
            velocity.mul_(MOMENTUM).add_(gradient / gradient.norm().clamp(min=1e-12))
            writes.sub_(STEP * unit * velocity)
    first = gap.detach()[0]
    if float(first.max()) >= MARGIN:
        raise NoMendFound(
            f"After {settings.max_steps} steps the wished answer still does not lead (short by {worst:.1f} nats).",
            hint="Name another layer, or raise methods.max_steps.",
        )
    return writes.detach()
