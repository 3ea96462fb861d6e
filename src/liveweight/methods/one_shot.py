"""one-shot: one backward pass and a closed form.

Owns the edit of one write matrix by Δ = (HᵀH + I)⁻¹ Hᵀ V with V = -η |h|² g, after "UltraEdit" (Gu et al. 2025): keys
h are the neurons' activations where the answer's tokens are predicted, g the gradient of the answer's loss at what
`down` gives there. No subject and no inner optimisation: only η is searched, by forward passes. Knows nothing of
whether the change is worth its damage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liveweight.adjustments import Adjustment, LowRank
from liveweight.engines.transformers import TransformersEngine
from liveweight.methods.base import Case
from liveweight.methods.trials import (
    Predictions,
    chosen_contexts,
    closed,
    down_output,
    hooked,
    layer_at,
    named,
    no_mend,
    outcome,
    without_super_neurons,
    works,
)
from liveweight.settings import MethodSettings

DEPTH = 2 / 3  # the layer by relative depth: late enough that one gradient points the right way for a long step
_FIRST = 0.5  # the first η takes this share off the loss, were the loss a straight line
_TRIALS = 8  # η doubles from one to the next


def propose(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
    """A change of one `down` weight (width, neurons), of the rank of the answer's tokens, that gives the targets.

    Raises NoMendFound when no η does it, Unsupported for layers of experts.
    """
    layer = layer_at(engine, settings, DEPTH)
    before = outcome(engine, case)
    keys, gradients, loss = evidence(engine, case, layer, settings)
    left, right = closed_form(keys, gradients)
    slope = -float(((keys.double() @ right.T @ left.T) * gradients).sum())  # nats that a small η takes off, per unit
    site = f"layers.{layer}.mlp.down.weight"
    tried: list[str] = []
    eta = _FIRST * loss / slope if slope > 0 else 0.0
    for _ in range(_TRIALS if eta > 0 else 0):
        found = Adjustment(
            name=named("one-shot", case),
            method="one-shot",
            ops=(LowRank(site=site, left=eta * left, right=right),),
            note=f"Rank {len(right)} at {site}, from one backward pass, η {eta:.3g}.",
        )
        reached = outcome(engine, case, found)
        tried.append(f"η {eta:.3g} (log-probability {float(reached.logprobs.mean()):.2f})")
        if works(case, reached, before):
            return found
        if len(tried) > 1 and reached.logprobs.mean() < before.logprobs.mean():
            break  # so far that it got worse; further is no better
        eta *= 2
    raise no_mend("one-shot", case, [f"layer {layer}", *(tried or ["a gradient of zero"])])


def closed_form(keys: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Δᵀ = left @ right for η = 1, from keys H (n, neurons) and gradients (n, width); float64.

    (HᵀH + I)⁻¹ Hᵀ = Hᵀ (HHᵀ + I)⁻¹, so that only an n by n matrix is solved: `left` (width, n), `right` H (n, neurons).
    """
    wide = keys.double()
    values = -wide.square().sum(1, keepdim=True) * gradients.double()  # V (n, width)
    gram = wide @ wide.T + torch.eye(len(wide), device=wide.device, dtype=wide.dtype)
    return torch.linalg.solve(gram, values).T.contiguous(), wide


def evidence(
    engine: TransformersEngine, case: Case, layer: int, settings: MethodSettings
) -> tuple[Tensor, Tensor, float]:
    """Keys (n, neurons) and gradients (n, width) where the answers' tokens are predicted, and the loss in nats.

    The loss is the negative log-probability of the target, mean over the contexts.
    """
    contexts = chosen_contexts(case, settings)
    targets = [closed(engine, context) for context in contexts]
    rows = [context.prompt + target for context, target in zip(contexts, targets, strict=True)]
    starts = [len(context.prompt) - 1 for context in contexts]
    replay = engine.record(rows, starts, layers=[layer], neurons=[layer])
    predictions = Predictions.of(replay, contexts, targets)
    written: list[Tensor] = []

    def watch(values: Tensor) -> Tensor:
        written.append(values.detach().requires_grad_())
        return written[0]

    with hooked(engine, down_output(engine, layer), watch):
        loss = -predictions.logprobs(engine, replay.run(layer), len(contexts)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
    gradient = written[0].grad
    assert gradient is not None  # the loss depends on every prediction's own position
    at = (predictions.rows, predictions.columns)
    keys = replay.neurons[layer][at].float() * without_super_neurons(engine, layer)
    return keys, gradient[at].float(), float(loss.detach())
