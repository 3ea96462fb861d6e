"""finetune: one layer's write matrix, trained on the answer alone.

Owns the plain baseline that is known as FT-M: Adam on one weight, the loss on the answer's tokens only, stopped as
soon as the answer is likely enough. Training happens on a delta that a temporary hook adds; no weight is written.
Knows nothing of whether the change is worth its damage.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from liveweight.adjustments import Adjustment, Dense, LowRank
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
    stalled,
    without_super_neurons,
    works,
)
from liveweight.settings import MethodSettings

DEPTH = 1 / 6  # the layer by relative depth
_RATE = 0.01  # Adam's step an entry, as a share of the weight's root mean square
_WINDOW = 24  # tokens of the prompt, template included, that training sees the change at
_EXACT = 1e-6  # a low rank that leaves less than this share of the delta's norm is the delta
_SVD_LIMIT = 2048  # the smaller side of a matrix beyond which looking for a low rank takes minutes


def propose(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
    """A change of one `down` weight (width, neurons) that gives the targets.

    Raises NoMendFound when the answer does not become likely enough, Unsupported for layers of experts.
    """
    return trained("finetune", engine, case, settings, layer_at(engine, settings, DEPTH))


def trained(
    method: str,
    engine: TransformersEngine,
    case: Case,
    settings: MethodSettings,
    layer: int,
    held: Tensor | None = None,
) -> Adjustment:
    """As `propose`, on one layer, with no effect on keys in the span of `held` (neurons, r), which is orthonormal."""
    before = outcome(engine, case)
    delta, steps, reached = _descended(engine, case, layer, settings, held)
    site = f"layers.{layer}.mlp.down.weight"
    op = compressed(site, delta)
    kind = f"rank {op.left.shape[1]}" if isinstance(op, LowRank) else "dense"
    beside = "" if held is None else f" beside {held.shape[1]} held directions"
    found = Adjustment(
        name=named(method, case),
        method=method,
        ops=(op,),
        note=f"{site}, {kind}, {steps} steps on the answer's tokens alone{beside}.",
    )
    if not works(case, outcome(engine, case, found), before):
        raise no_mend(method, case, [f"layer {layer}, {steps} steps, probability {reached:.2f}"])
    return found


def compressed(site: str, delta: Tensor) -> LowRank | Dense:
    """`delta` (out, in) as the product of two thin matrices where that is smaller and the same to 1e-6, else whole."""
    if min(delta.shape) <= _SVD_LIMIT:
        left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
        # What the singular values from number r on leave out, for every r.
        left_out = values.square().flip(0).cumsum(0).flip(0).sqrt()
        rank = max(1, int((left_out > _EXACT * float(values.norm())).sum()))
        if 2 * rank * sum(delta.shape) <= delta.numel():
            return LowRank(site=site, left=left[:, :rank] * values[:rank], right=right[:rank])
    return Dense(site=site, delta=delta)


def _descended(
    engine: TransformersEngine, case: Case, layer: int, settings: MethodSettings, held: Tensor | None
) -> tuple[Tensor, int, float]:
    """The delta (width, neurons), the steps taken and the mean probability of the targets that it reaches."""
    contexts = chosen_contexts(case, settings)
    targets = [closed(engine, context) for context in contexts]
    rows = [context.prompt + target for context, target in zip(contexts, targets, strict=True)]
    prompts = [len(context.prompt) for context in contexts]
    replay = engine.record(rows, _starts(rows, prompts), layers=[layer], prompts=prompts)
    predictions = Predictions.of(replay, contexts, targets)
    point = down_output(engine, layer)
    neurons = engine.sites.activation(f"layers.{layer}.mlp.neurons")
    weight = engine.sites.weight(f"layers.{layer}.mlp.down.weight").read()
    delta = torch.zeros(weight.shape, device=weight.device, dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=_RATE * float(weight.float().square().mean().sqrt()))
    kept = without_super_neurons(engine, layer)  # columns that training does not see keep a delta of zero
    read: list[Tensor] = []

    def keep(values: Tensor) -> None:
        read[:] = [values]

    def free(keys: Tensor) -> Tensor:
        """Keys (…, neurons) without super neurons and without what is held."""
        return keys * kept if held is None else keys * kept - (keys @ held) @ held.T

    def add(values: Tensor) -> Tensor:
        return values + functional.linear(free(read[0].float()), delta).to(values.dtype)

    losses: list[float] = []
    best, best_probability = delta.detach().clone(), 0.0
    for step in range(settings.max_steps + 1):
        with hooked(engine, neurons, keep), hooked(engine, point, add):
            logprobs = predictions.logprobs(engine, replay.run(layer), len(contexts))
            loss = -logprobs.mean()
            losses.append(float(loss.detach()))
            probability = float(logprobs.detach().exp().mean())
            if losses[-1] == min(losses):
                best, best_probability = delta.detach().clone(), probability
            if probability >= settings.target_probability or step == settings.max_steps or stalled(losses):
                break
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return free(best), step, best_probability


def _starts(rows: list[tuple[int, ...]], prompts: list[int]) -> list[int]:
    """Where training begins in each row: behind what all rows share, and at most `_WINDOW` tokens before the answer.

    What comes before is run once; that the change also moves it a little is left out of training, not of the check.
    """
    shared = 1
    while len(rows) > 1 and shared < min(map(len, rows)) and len({row[:shared] for row in rows}) == 1:
        shared += 1
    return [max(1, min(max(shared - 1, prompt - _WINDOW), prompt - 1)) for prompt in prompts]
