"""Changes as data, and what carries them out."""

from liveweight.adjustments.activations import STREAM, ActivationState
from liveweight.adjustments.adjustment import Active, Adjustment, State, effective, state_hash
from liveweight.adjustments.folding import fold, folded
from liveweight.adjustments.footprint import first_layer, last_layer
from liveweight.adjustments.ops import (
    Ablate,
    ActivationOp,
    Affine,
    BiasRouter,
    Clamp,
    Codebook,
    Dense,
    Entries,
    Gain,
    LowRank,
    MixHeads,
    Op,
    ReplaceNeurons,
    ScaleHeads,
    ScaleNeurons,
    ScalePaths,
    Steer,
    WeightOp,
    op_from,
)
from liveweight.adjustments.weights import WeightState

__all__ = [
    "STREAM",
    "Ablate",
    "ActivationOp",
    "ActivationState",
    "Active",
    "Adjustment",
    "Affine",
    "BiasRouter",
    "Clamp",
    "Codebook",
    "Dense",
    "Entries",
    "Gain",
    "LowRank",
    "MixHeads",
    "Op",
    "ReplaceNeurons",
    "ScaleHeads",
    "ScaleNeurons",
    "ScalePaths",
    "State",
    "Steer",
    "WeightOp",
    "WeightState",
    "effective",
    "first_layer",
    "fold",
    "folded",
    "last_layer",
    "op_from",
    "state_hash",
]
