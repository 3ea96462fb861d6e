"""One naming of places over every architecture: where to read, where to write."""

from liveweight.sites.architectures import ARCHITECTURES, Architecture, Piece
from liveweight.sites.model_sites import ModelSites, Norm, model_sites
from liveweight.sites.points import ActivationPoint
from liveweight.sites.runtimes import obstacles, require_writable
from liveweight.sites.spare_neurons import EARLY, SPARE, patchable_layers, subject_layers, with_spare_neurons
from liveweight.sites.views import Region, WeightView

__all__ = [
    "ARCHITECTURES",
    "EARLY",
    "SPARE",
    "ActivationPoint",
    "Architecture",
    "ModelSites",
    "Norm",
    "Piece",
    "Region",
    "WeightView",
    "model_sites",
    "obstacles",
    "patchable_layers",
    "require_writable",
    "subject_layers",
    "with_spare_neurons",
]
