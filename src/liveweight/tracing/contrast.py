"""Which neurons tell two sets of answers apart.

Owns reading the neurons where answers are due, and the statistics of the difference: effect size, p-value, the p-value
after correction for so many neurons, consistency, and how much each neuron writes towards the one side's answers.
Knows nothing of what is then changed. Nothing here writes.

Sources: the effect size is Cohen's d (1988), the difference of means over the pooled deviation; the test is Welch's
(1947); the correction is Benjamini and Hochberg's (1995); what a neuron writes towards a token is direct logit
attribution, its activation times its write column's product with the token's unembedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from liveweight.engines.base import ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput
from liveweight.sites import Norm, Region
from liveweight.tracing.capture import require_dense
from liveweight.tracing.neuron_labels import write_directions
from liveweight.tracing.super_weights import super_neurons

LEAST = 4  # examples a side: with fewer, no spread can be told
_ROWS = 16  # sequences of one pass

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
    push: Tensor  # what a's answers gain over b's by the neuron's difference, in logits up to one positive factor
    tested: int  # neurons


def separate(
    engine: TransformersEngine, a: Sequence[ScoreItem], b: Sequence[ScoreItem], progress: Progress | None = None
) -> Separation:
    """Compare two sides of prompts and answers, as tokens, under the present weights.

    A neuron's value on one example is its activation where the answer is due: at the prompt's last token and, for an
    answer of several tokens, its mean over the positions that predict them. Raises InvalidInput for fewer than `LEAST`
    examples on a side, Unsupported where neurons are spread over experts.
    """
    require_dense(engine)
    for name, side in (("first", a), ("second", b)):
        if len(side) < LEAST:
            raise InvalidInput(
                f"The {name} side has {len(side)} prompts, and statistics need {LEAST} or more.",
                hint="Give more prompts; twenty or more a side make it sure.",
            )
    found = activations(engine, [*a, *b], progress)
    values_a, values_b = found[: len(a)], found[len(a) :]
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
    return Separation(
        mean_a=mean_a,
        mean_b=mean_b,
        effect_size=torch.where(told, difference / pooled.clamp_min(1e-12), 0.0),
        p=p.float(),
        q=q.float(),
        consistency=(right[0] + right[1]) / 2,
        push=difference * _towards(engine, a, b),
        tested=int(told.sum()),
    )


def activations(engine: TransformersEngine, items: Sequence[ScoreItem], progress: Progress | None = None) -> Tensor:
    """Each example's neurons where its answer is due, averaged over the answer's tokens: (n, layers, neurons)."""
    layers = range(engine.sites.layers)
    found = torch.empty(len(items), len(layers), engine.sites.neurons)
    order = sorted(range(len(items)), key=lambda i: len(items[i].prompt) + len(items[i].continuation))
    for first in range(0, len(order), _ROWS):
        batch = order[first : first + _ROWS]
        rows = [[*items[i].prompt, *items[i].continuation[:-1]] for i in batch]
        replay = engine.record(rows, [len(items[i].prompt) - 1 for i in batch], neurons=layers, final=False)
        for layer in layers:
            for row, (index, length) in enumerate(zip(batch, replay.lengths(), strict=True)):
                found[index, layer] = replay.neurons[layer][row, :length].float().mean(0).cpu()
        if progress is not None:
            progress(first + len(batch), len(items))
    return found


def _towards(engine: TransformersEngine, a: Sequence[ScoreItem], b: Sequence[ScoreItem]) -> Tensor:
    """What a unit of each neuron's activation adds to a's answers over b's, (layers, neurons), past the final norm.

    Where both sides have the same answers there is no such direction: then the sign of 1 and the column's length, so
    that what a neuron writes otherwise on the two sides still counts.
    """
    sites, kind = engine.sites, engine.sites.map.norm_kind
    with engine.gate.step():
        wished, other = (_mean_unembedding(engine, side) for side in (a, b))
        direction = wished - other
        norm = Norm("final_norm.weight", kind == "rms_plus_one", kind == "layer")
        scale = engine.weights.base(norm.site).float()
        rows = []
        for layer in range(sites.layers):
            written = write_directions(engine, layer, list(range(sites.neurons_of(layer)))).float()  # (neurons, width)
            rows.append(norm.direction(written, scale) @ direction if bool(direction.any()) else written.norm(dim=1))
        return torch.stack(rows).cpu()


def _mean_unembedding(engine: TransformersEngine, items: Sequence[ScoreItem]) -> Tensor:
    """The mean unembedding (width,) of the answers' tokens, each example counting the same."""
    found = []
    for item in items:
        rows = torch.tensor(item.continuation)
        found.append(engine.weights.base("lm_head.weight", Region("rows", rows)).float().mean(0))
    return torch.stack(found).mean(0)
