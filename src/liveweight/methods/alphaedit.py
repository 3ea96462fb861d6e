"""alphaedit: memit inside the null space of what plain text shows.

Owns the projection: a change is only allowed in directions that hardly any key of plain text has, P of the small
eigenvalues of C, so that Δ = R KᵀP (Kₚ KₚᵀP + K KᵀP + I)⁻¹, after "AlphaEdit: Null-Space Constrained Knowledge Editing"
(Fang et al. 2025). Layers, keys and values are memit's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from liveweight.adjustments import Adjustment
from liveweight.engines.transformers import TransformersEngine
from liveweight.methods.base import Case, Joint
from liveweight.methods.memit import one_fact, right_factor, together
from liveweight.settings import MethodSettings

SMALL = 0.5  # of C's median eigenvalue: what is below this counts as nothing
RIDGE = 0.05  # of a key's own length in the null space, in place of the paper's I, so that no model's scale matters


def propose(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
    """A change of some `down` weights (width, neurons) that gives the targets.

    Raises NoMendFound when the layers together do not do it, Unsupported for layers of experts.
    """
    return one_fact("alphaedit", engine, case, settings, solve)


def propose_all(engine: TransformersEngine, cases: Iterable[Case], settings: MethodSettings) -> Joint:
    """The values for all the cases; what they need is solved for together. Raises Unsupported for layers of experts."""
    return together("alphaedit", engine, cases, settings, solve)


def solve(keys: Tensor, previous: Tensor, statistics: Tensor) -> Tensor:
    """KᵀP (Kₚ KₚᵀP + K KᵀP + ridge)⁻¹, (n, neurons) float64, solved in a basis of the null space."""
    values, vectors = torch.linalg.eigh(statistics)
    basis = vectors[:, values <= SMALL * values.median()]  # (neurons, r)
    own, before = keys @ basis, previous @ basis
    ridge = RIDGE * own.square().sum(1).median().clamp(min=torch.finfo(own.dtype).tiny)
    system = before.T @ before + ridge * torch.eye(basis.shape[1], device=own.device, dtype=own.dtype)
    factor: Tensor = right_factor(own, system) @ basis.T
    return factor
