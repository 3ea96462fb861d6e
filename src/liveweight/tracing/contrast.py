"""Which neurons tell two sets of answers apart.

Owns reading the neurons where answers are due, and the statistics of the difference: effect size, p-value, the p-value
after correction for so many neurons, consistency, and how much each neuron pushes its side's answers and the other
side's. Knows nothing of what is then changed. Nothing here writes.

Sources: the effect size is Cohen's d (1988), the difference of means over the pooled deviation; the test is Welch's
(1947); the correction is Benjamini and Hochberg's (1995); what a neuron pushes is gradient times activation of an
answer's margin, as in `attribution.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from liveweight.engines.base import ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from liveweight.tracing.capture import read_answer, require_dense
from liveweight.tracing.super_weights import super_neurons

LEAST = 4  # examples a side: with fewer, no spread can be told
SPARED = 2.0  # times what a neuron does for the other side's answers weighs, which are to stay

Progress = Callable[[int, int], None]  # done, of how many


@dataclass(frozen=True, eq=False)
class Separation:
    """How every neuron tells side a from side b. All tensors are (layers, neurons), float32 on the CPU.

    A neuron that never varies, and a super neuron, tells nothing: effect size and push 0, p and q 1.
    """

    mean_a: Tensor
    mean_b: Tensor
    effect_size: Tensor  # (mean_a - mean_b) / pooled deviation
    p: Tensor  # Welch's t-test, two-sided
    q: Tensor  # the same after Benjamini and Hochberg's correction over all neurons that vary
    consistency: Tensor  # share of the examples on their own side of the middle between the means, each side half
    push: Tensor  # nats: what the neuron does for its own side's answers, less SPARED times that for the other's
    tested: int  # neurons


def separate(
    engine: TransformersEngine, a: Sequence[ScoreItem], b: Sequence[ScoreItem], progress: Progress | None = None
) -> Separation:
    """Compare two sides of prompts and answers, as tokens, under the present weights.

    A neuron's value on one example is its activation where the answer is due: at the prompt's last token and, for an
    answer of several tokens, its mean over the positions that predict them. Raises InvalidInput for fewer than `LEAST`
    examples on a side, Unsupported where neurons are spread over experts.
    """
    from scipy import stats  # half a second to import, which no other start should wait for

    require_dense(engine)
    for name, side in (("first", a), ("second", b)):
        if len(side) < LEAST:
            raise InvalidInput(
                f"The {name} side has {len(side)} prompts, and statistics need {LEAST} or more.",
                hint="Give more prompts; twenty or more a side make it sure.",
            )
    values, pushes = read(engine, [*a, *b], progress)
    values_a, values_b = values[: len(a)], values[len(a) :]
    pushes_a, pushes_b = pushes[: len(a)], pushes[len(a) :]
    mean_a, mean_b = values_a.mean(0), values_b.mean(0)
    spread_a, spread_b = values_a.std(0), values_b.std(0)
    freedom_a, freedom_b = len(a) - 1, len(b) - 1
    pooled = ((spread_a**2 * freedom_a + spread_b**2 * freedom_b) / (freedom_a + freedom_b)).sqrt()
    told = pooled > 1e-12
    for layer, neuron in super_neurons(engine):
        told[layer, neuron] = False
    difference = torch.where(told, mean_a - mean_b, 0.0)
    p, q = torch.ones(told.shape, dtype=torch.float64), torch.ones(told.shape, dtype=torch.float64)
    if bool(told.any()):
        moments = [each[told].double().numpy() for each in (mean_a, spread_a, mean_b, spread_b)]
        welch = stats.ttest_ind_from_stats(*moments[:2], len(a), *moments[2:], len(b), equal_var=False)
        p[told] = torch.from_numpy(np.asarray(welch.pvalue))
        q[told] = torch.from_numpy(stats.false_discovery_control(welch.pvalue, method="bh"))
    middle = (mean_a + mean_b) / 2
    sides = ((values_a, difference.sign()), (values_b, -difference.sign()))
    right = [((values - middle) * sign > 0).float().mean(0) for values, sign in sides]
    push = torch.where(
        mean_a.abs() >= mean_b.abs(),
        pushes_a.mean(0) - SPARED * pushes_b.clamp_min(0.0).mean(0),
        pushes_b.mean(0) - SPARED * pushes_a.clamp_min(0.0).mean(0),
    )
    return Separation(
        mean_a=mean_a,
        mean_b=mean_b,
        effect_size=torch.where(told, difference / pooled.clamp_min(1e-12), 0.0),
        p=p.float(),
        q=q.float(),
        consistency=(right[0] + right[1]) / 2,
        push=torch.where(told, push, 0.0),
        tested=int(told.sum()),
    )


def read(
    engine: TransformersEngine, items: Sequence[ScoreItem], progress: Progress | None = None
) -> tuple[Tensor, Tensor]:
    """Each example's neurons where its answer is due, and what they push it: twice (n, layers, neurons).

    Activations are averaged over the answer's tokens; pushes, in nats, are summed over them, the margin being each
    token's over its runner-up.
    """
    values = torch.empty(len(items), engine.sites.layers, engine.sites.neurons)
    pushes = torch.empty_like(values)
    for row, item in enumerate(items):
        reading = read_answer(engine, item.prompt, item.continuation, gradients=True)
        values[row], pushes[row] = reading.activations.mean(1), reading.pushes().sum(1)
        if progress is not None:
            progress(row + 1, len(items))
    return values, pushes
