"""rome: one fact, one layer, one rank.

Owns the closed-form edit of one write matrix, W += δ uᵀ/(uᵀk) with u = C⁻¹k, after "Locating and Editing Factual
Associations in GPT" (Meng et al. 2022). One key k, the mean over the contexts, serves everywhere; what is to be written
at it is looked for in values.py. Knows nothing of whether the change is worth its damage.
"""

from __future__ import annotations

from liveweight.adjustments import Adjustment, LowRank
from liveweight.engines.transformers import TransformersEngine
from liveweight.methods.base import Case
from liveweight.methods.covariance import covariance, whitened
from liveweight.methods.trials import layer_at, named, no_mend, outcome, without_super_neurons, works
from liveweight.methods.values import wished_values
from liveweight.settings import MethodSettings

DEPTH = 1 / 6  # the layer by relative depth: early, where facts about a subject are gathered


def propose(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
    """A rank-one change of one `down` weight (width, neurons) that gives the targets.

    Raises NoMendFound when the best δ within the norm and the steps does not do it, Unsupported for layers of experts.
    """
    layer = layer_at(engine, settings, DEPTH)
    statistics = covariance(engine, layer, settings)
    before = outcome(engine, case)
    wished = wished_values(engine, [case], layer, settings)[0]
    key, value, delta = wished.key, wished.value, wished.delta
    reader = whitened(statistics, key) * without_super_neurons(engine, layer)
    site = f"layers.{layer}.mlp.down.weight"
    right = (reader / (reader @ key))[None]  # (1, neurons)
    found = Adjustment(
        name=named("rome", case),
        method="rome",
        ops=(LowRank(site=site, left=delta[:, None], right=right),),
        note=f"Rank one at {site}, |δ| {float(delta.norm() / value.norm()):.2f} |Wk|, {wished.steps} steps.",
    )
    if not works(case, outcome(engine, case, found), before):
        share = float(delta.norm() / value.norm())
        tried = f"layer {layer}, {wished.steps} steps, |δ| up to {share:.1f} |Wk|, short by {wished.short:.1f} nats"
        raise no_mend("rome", case, [tried])
    return found
