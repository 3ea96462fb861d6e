"""constrained: finetune, with no effect on what is to be held.

Owns which directions of the keys are held: the span of what the neurons do while the case's neighbours and the
protected answers are said, as far as it makes up most of them. Every gradient is projected away from it, so that the
change is exactly nothing there (gradient projection: Farajtabar et al., "Orthogonal Gradient Descent for Continual
Learning", 2020; on a layer's inputs: Saha et al., "Gradient Projection Memory", 2021). Training is finetune's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liveweight.adjustments import Adjustment
from liveweight.engines.transformers import TransformersEngine
from liveweight.methods.base import Case
from liveweight.methods.finetune import DEPTH, trained
from liveweight.methods.keys import answer_keys
from liveweight.methods.trials import layer_at, without_super_neurons
from liveweight.settings import MethodSettings

MOST = 0.95  # of the squared length of what is held that lies in the held span
ROOM = 0.5  # of the neurons' directions that the span may take, so that something is left to change


def propose(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
    """A change of one `down` weight (width, neurons) that gives the targets and is nothing on the held span.

    Raises NoMendFound when the answer does not become likely enough, Unsupported for layers of experts.
    """
    layer = layer_at(engine, settings, DEPTH)
    return trained("constrained", engine, case, settings, layer, _held(engine, case, layer))


def _held(engine: TransformersEngine, case: Case, layer: int) -> Tensor | None:
    """An orthonormal basis (neurons, r) of what is to feel nothing; None where there is nothing to hold."""
    rows = [(each.prompt, each.target) for each in (*case.others, *case.about)] + list(case.previous)
    if not rows:
        return None
    keys = answer_keys(engine, rows, layer) * without_super_neurons(engine, layer)
    return span(keys)


def span(keys: Tensor) -> Tensor:
    """The directions (neurons, r) that hold MOST of what the keys (n, neurons) are, each key counting alike."""
    alike = keys / keys.norm(dim=1, keepdim=True).clamp(min=torch.finfo(keys.dtype).tiny)
    _, values, right = torch.linalg.svd(alike, full_matrices=False)
    held = values.square().cumsum(0) / values.square().sum().clamp(min=torch.finfo(keys.dtype).tiny)
    rank = min(int((held < MOST).sum()) + 1, max(1, int(ROOM * keys.shape[1])))
    basis: Tensor = right[:rank].T.contiguous()
    return basis
