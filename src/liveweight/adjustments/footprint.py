"""Where in a model two states part ways.

Owns the question "from which layer on must a forward pass be run again?". Knows nothing of values: a site counts as
different when other ops act on it, or at another strength.
"""

from __future__ import annotations

from liveweight.adjustments.activations import STREAM
from liveweight.adjustments.adjustment import State, effective
from liveweight.adjustments.ops import Ablate, ActivationOp, Affine, Codebook, RoundActivations, Steer
from liveweight.adjustments.weights import Origin, WeightState

EMBEDDINGS = -1


def first_layer(weights: WeightState, old: State, new: State) -> int | None:
    """The first block whose computation differs between two states.

    -1 when the embeddings do (so that the blocks' input is another), the number of layers when only the final norm or
    the unembedding does, None when nothing does. Raises as `WeightState.become` does for ops that do not fit.
    """
    return min(_places(weights, old, new), default=None)


def last_layer(weights: WeightState, old: State, new: State) -> int | None:
    """The last one, by the same numbers: behind it two states differ only in what they are given."""
    return max(_places(weights, old, new), default=None)


def _places(weights: WeightState, old: State, new: State) -> list[int]:
    before, after = _acting(weights, old), _acting(weights, new)
    sites = before.keys() | after.keys()
    return [_place(site, weights.sites.layers) for site in sites if before.get(site) != after.get(site)]


def _acting(weights: WeightState, state: State) -> dict[str, list[Origin]]:
    """Which ops act on which site, weights and activations."""
    acting = weights.touched(state)
    for active in effective(state):
        for number, op in enumerate(active.adjustment.ops):
            if isinstance(op, ActivationOp):
                origin = (active.adjustment.hash, number, float(active.strength))
                acting.setdefault(_site_of(op), []).append(origin)
    return acting


def _site_of(op: ActivationOp) -> str:
    return (
        op.site
        if isinstance(op, Steer | Ablate | Codebook | Affine | RoundActivations)
        else f"layers.{op.layer}.{op.kind}"
    )


def _place(site: str, layers: int) -> int:
    if site.startswith("layers."):
        return int(site.split(".")[1])
    return EMBEDDINGS if site in ("embed", STREAM, "embed.weight", "positions.weight") else layers
