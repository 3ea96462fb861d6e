"""Reading the model, never writing: what fired, what pushed the answer, what it means, and what must not be touched."""

from liveweight.tracing.attribution import (
    AnswerToken,
    NeuronPush,
    Ranked,
    WhyReport,
    neuron_pushes,
    rank_neurons,
    why,
)
from liveweight.tracing.capture import AnswerReading, Neuron, read_answer
from liveweight.tracing.feature_report import Context, Feature, FeatureNeuron, Features, FeatureSettings
from liveweight.tracing.features import find_features, labelled, last_features, residual_directions
from liveweight.tracing.firing import Firing, read_firing
from liveweight.tracing.model_diff import diff
from liveweight.tracing.model_diff_report import LayerLabels, ModelDiff, NeuronMove, SiteChange
from liveweight.tracing.neuron_labels import (
    Decoded,
    NeuronLabel,
    TokenGuess,
    decode_directions,
    label_layer,
    label_neurons,
)
from liveweight.tracing.part_attribution import (
    Attribution,
    PartPush,
    attribute,
)
from liveweight.tracing.part_pushes import Measure
from liveweight.tracing.parts import PartKind
from liveweight.tracing.protection import Touch, protect, spare
from liveweight.tracing.stepping import Edit, Ending, Entry, LensRow, Run, View
from liveweight.tracing.super_weights import (
    SuperWeight,
    SuperWeights,
    find_super_weights,
    known_super_weights,
    super_neurons,
)

__all__ = [
    "AnswerReading",
    "AnswerToken",
    "Attribution",
    "Context",
    "Decoded",
    "Edit",
    "Ending",
    "Entry",
    "Feature",
    "FeatureNeuron",
    "FeatureSettings",
    "Features",
    "Firing",
    "LayerLabels",
    "LensRow",
    "Measure",
    "ModelDiff",
    "Neuron",
    "NeuronLabel",
    "NeuronMove",
    "NeuronPush",
    "PartKind",
    "PartPush",
    "Ranked",
    "Run",
    "SiteChange",
    "SuperWeight",
    "SuperWeights",
    "TokenGuess",
    "Touch",
    "View",
    "WhyReport",
    "attribute",
    "decode_directions",
    "diff",
    "find_features",
    "find_super_weights",
    "known_super_weights",
    "label_layer",
    "label_neurons",
    "labelled",
    "last_features",
    "neuron_pushes",
    "protect",
    "rank_neurons",
    "read_answer",
    "read_firing",
    "residual_directions",
    "spare",
    "super_neurons",
    "why",
]
