"""grace: no weight moves; a codebook says what to put in place of what.

Owns the codebook of one case at one layer: a key is what the residual stream holds where a token of the answer is due,
its entry what it should hold instead, its radius half the way to the nearest of what is to be left alone (after "Aging
with GRACE", Hartvigsen et al. 2023, where one key stands for the whole prompt; here each token of the answer has its
own, so that decoding needs to remember nothing). Entries are optimised; far from every key the model is bit for bit
what it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liveweight.adjustments import Adjustment, Codebook
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import NoMendFound, Unsupported
from liveweight.methods.base import Case
from liveweight.methods.trials import Predictions, closed, named, no_mend, outcome, stalled, works
from liveweight.settings import MethodSettings

DEPTH = 2 / 3  # the layer by relative depth: late, where what is said next is told apart
RADIUS = 0.5  # of the way to the nearest of what is to be left alone
ALONE = 0.1  # of a key's own length, where nothing is known that is to be left alone
_STEP = 0.2  # Adam's, as a share of the stream's root mean square


def propose(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
    """A codebook at one layer's residual stream (width,) that gives the targets.

    Raises NoMendFound where the answer does not become likely enough, UnknownSite for a layer that is not there.
    """
    layer = _layer(engine, settings)
    before = outcome(engine, case)
    targets = [closed(engine, context) for context in case.contexts]
    rows = [(*context.prompt, *target[:-1]) for context, target in zip(case.contexts, targets, strict=True)]
    replay = engine.record(rows, [len(context.prompt) - 1 for context in case.contexts], layers=[layer + 1])
    predictions = Predictions.of(replay, case.contexts, targets)
    with engine.gate.step(), torch.no_grad():
        final = replay.final[predictions.rows, predictions.columns]
        due = engine.leads(final, predictions.tokens)[0] < 0
    if not bool(due.any()):
        raise NoMendFound(
            "The model gives this answer already, in every wording that was tried.", hint="There is nothing to mend."
        )
    at = (predictions.rows[due], predictions.columns[due])
    keys = replay.inputs[layer + 1][at].float()  # (n, width)
    delta = torch.zeros_like(keys, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=_STEP * float(keys.square().mean().sqrt()))
    losses: list[float] = []
    best, reached = delta.detach().clone(), 0.0
    for step in range(settings.max_steps + 1):
        with engine.gate.step(), torch.enable_grad():
            stream = replay.inputs[layer + 1]
            moved = stream.index_put(at, (keys + delta).to(stream.dtype))
            logprobs = predictions.logprobs(engine, replay.run(layer + 1, moved), len(case.contexts))
            loss = -logprobs.mean()
            losses.append(float(loss.detach()))
            if losses[-1] == min(losses):
                best, reached = delta.detach().clone(), float(logprobs.detach().exp().mean())
            if reached >= settings.target_probability or step == settings.max_steps or stalled(losses):
                break
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    found = Adjustment(
        name=named("grace", case),
        method="grace",
        ops=(
            Codebook(
                site=f"layers.{layer}.resid",
                keys=keys,
                radii=_radii(keys, _left_alone(engine, case, layer)),
                entries=keys + best,
            ),
        ),
        note=f"{len(keys)} keys at layer {layer}, {step} steps; no weight moves.",
    )
    if not works(case, outcome(engine, case, found), before):
        raise no_mend("grace", case, [f"layer {layer}, {step} steps, probability {reached:.2f}"])
    return found


def _layer(engine: TransformersEngine, settings: MethodSettings) -> int:
    """The layer whose stream is looked up: something has to be left to run behind it."""
    layers = engine.sites.layers
    layer = min(round(DEPTH * layers), layers - 2) if settings.layer is None else settings.layer
    if settings.layer is not None:
        engine.sites.check_layer(layer)
    if not 0 <= layer < layers - 1:
        raise Unsupported(
            "grace needs a layer behind the one that it edits, and there is none.",
            hint=f"Choose a layer below {layers - 1}." if layers > 1 else "Choose another method.",
        )
    return layer


def _left_alone(engine: TransformersEngine, case: Case, layer: int) -> Tensor:
    """(m, width): the residual stream where the case's neighbours and the protected answers are said."""
    answered = [(each.prompt, each.target) for each in (*case.others, *case.about)] + list(case.previous)
    if not answered:
        return torch.empty(0, engine.sites.width, device=engine.model.device)
    rows = [(*prompt, *answer) for prompt, answer in answered]
    replay = engine.record(rows, [max(1, len(prompt) - 1) for prompt, _ in answered], layers=[layer + 1], final=False)
    own = [replay.inputs[layer + 1][row, :length] for row, length in enumerate(replay.lengths())]
    return torch.cat(own).float()


def _radii(keys: Tensor, alone: Tensor) -> Tensor:
    radii: Tensor = ALONE * keys.norm(dim=1)
    if len(alone):
        radii = RADIUS * torch.cdist(keys, alone, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
    return radii.clamp(min=torch.finfo(keys.dtype).tiny)
