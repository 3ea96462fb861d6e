"""Products in bfloat16: near the exact ones, with gradients, and only inside the context."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from liveweight.engines import half
from liveweight.engines.half import half_products


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 8, bias=False)).requires_grad_(False)


def test_outputs_and_gradients_are_near_and_of_the_same_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "_pays", lambda weight: True)
    model = blocks()
    values = torch.randn(5, 16, requires_grad=True)
    exact = model(values)
    (slope,) = torch.autograd.grad(exact.sum(), [values])
    context = half_products([model])
    for _ in range(2):  # it may be entered again
        with context:
            rounded = model(values)
        (rough,) = torch.autograd.grad(rounded.sum(), [values])
        assert rounded.dtype == rough.dtype == torch.float32
        assert not torch.equal(rounded, exact)
        torch.testing.assert_close(rounded, exact, atol=0.02, rtol=0.02)
        torch.testing.assert_close(rough, slope, atol=0.02, rtol=0.02)
    assert torch.equal(model(values), exact)


def test_what_is_not_named_is_multiplied_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "_pays", lambda weight: True)
    model, other = blocks(), nn.Linear(16, 4)
    values = torch.randn(3, 16)
    with half_products([model]):
        assert torch.equal(other(values), values @ other.weight.T + other.bias)


def test_nothing_happens_where_it_would_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    model = blocks()
    values = torch.randn(3, 16)
    exact = model(values)
    with half_products([model]):
        assert torch.equal(model(values), exact)
    with half_products([]):
        assert torch.equal(model(values), exact)
