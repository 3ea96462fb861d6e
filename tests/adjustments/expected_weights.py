"""What the tests of weight ops share: states of ops, and the check that an op changes what it names and no more."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from liveweight.adjustments import Active, Adjustment, State, Steer, WeightOp, WeightState
from liveweight.sites import ModelSites
from tiny_models import bytes_of

STRENGTHS = (1.0, 0.3, 2.0, -1.0)


def expert_in(sites: ModelSites, layer: int) -> int | None:
    return 2 if sites.experts_of(layer) else None


def state_of(*ops: WeightOp | Steer, strength: float = 1.0) -> State:
    return (Active(Adjustment(name="test", method="test", ops=ops), strength),)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expect_only(sites: ModelSites, op: WeightOp, wished: dict[str, Callable[[Tensor, float], Tensor]]) -> None:
    """`op` makes of each named site what its function of (base, strength) says, and leaves all other bytes."""
    weights = WeightState(sites)
    base = {site: sites.weight(site).read().clone() for site in sites.weight_names()}
    before = bytes_of(sites.model)
    canonical = {sites.canonical(site): function for site, function in wished.items()}
    for strength in STRENGTHS:
        assert set(weights.become(state_of(op, strength=strength))) == set(canonical)
        for site in sites.weight_names():
            found, function = sites.weight(site).read(), canonical.get(sites.canonical(site))
            if function is None:
                assert torch.equal(found, base[site]), site
            else:
                assert torch.allclose(found, function(base[site], strength), atol=1e-5), (site, strength)
                assert not torch.equal(found, base[site])
    weights.become(state_of(op, strength=0.0))
    assert bytes_of(sites.model) == before
    assert weights.pristine_bytes == 0
