"""Semi-nonnegative factorisation: what a round may do to the error, and what is found in data made of features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import Tensor

from liveweight.errors import InvalidInput
from liveweight.tracing.factorisation import encode, factorise, peakedness


def some_values(neurons: int, tokens: int, seed: int) -> Tensor:
    return torch.randn(neurons, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Directions (30, 4) of 3 neurons each, and coefficients (4, 200) of which most are zero."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.zeros(30, 4, dtype=torch.float64)
    for feature in range(4):
        directions[7 * feature : 7 * feature + 3, feature] = torch.randn(3, generator=generator, dtype=torch.float64)
    directions /= directions.norm(dim=0)
    amounts = torch.rand(4, 200, generator=generator, dtype=torch.float64) + 0.5
    return directions, amounts * (torch.rand(4, 200, generator=generator, dtype=torch.float64) < 0.2)


@settings(max_examples=40, deadline=None)
@given(
    neurons=st.integers(2, 20),
    tokens=st.integers(2, 40),
    share=st.floats(0.05, 1.0),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
)
def test_without_sparsity_no_round_raises_the_error_which_is_that_of_the_product(
    neurons: int, tokens: int, share: float, seed: int, scale: float
) -> None:
    values = scale * some_values(neurons, tokens, seed)
    found = factorise(values, max(1, round(share * min(neurons, tokens))), rounds=30, seed=seed)
    assert all(later**2 <= earlier**2 + 1e-9 for earlier, later in zip(found.errors, found.errors[1:], strict=False))
    left = values - found.directions @ found.coefficients
    assert found.error == pytest.approx(float(left.norm() / values.norm()), abs=3e-5)
    assert bool((found.coefficients >= 0).all())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), share=st.floats(0.01, 0.9))
def test_each_direction_keeps_its_share_of_neurons_and_has_length_one(seed: int, share: float) -> None:
    values = some_values(30, 50, seed).float()
    found = factorise(values, 5, share=share, rounds=5, seed=seed)
    assert (found.directions != 0).sum(dim=0).max() <= max(1, round(share * 30))
    lengths = found.directions.norm(dim=0)
    assert bool(((lengths - 1).abs() < 1e-5)[found.coefficients.norm(dim=1) > 0].all())
    left = (values - found.directions @ found.coefficients).norm() / values.norm()
    assert found.error == pytest.approx(float(left), abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_features_that_the_data_were_made_of_are_found_again_from_one_start_of_three_at_least(seed: int) -> None:
    directions, coefficients = planted(seed)
    tries = [factorise(directions @ coefficients, 4, share=0.1, rounds=400, seed=start) for start in range(3)]
    found = min(tries, key=lambda each: each.error)  # a start may end where no small step leads on
    assert found.error < 0.01
    alike = directions.T @ found.directions  # (planted, found) cosines
    assert bool((alike.max(dim=1).values > 0.99).all())
    assert sorted(alike.argmax(dim=1).tolist()) == [0, 1, 2, 3]


def test_fitting_again_what_is_kept_leaves_no_more_than_the_masked_least_squares_solution() -> None:
    values = some_values(40, 120, 3)
    found = factorise(values, 6, share=0.1, rounds=40)
    rows = found.coefficients.numpy()
    plain = torch.linalg.lstsq(found.coefficients.T, values.T).solution.T
    masked = torch.where(found.directions != 0, plain, 0.0)
    assert found.error < float((values - masked @ torch.from_numpy(rows)).norm() / values.norm())


def test_new_tokens_get_the_coefficients_of_non_negative_least_squares() -> None:
    directions, _ = planted()
    values = some_values(30, 15, 5)
    found = encode(directions, values)
    exact = torch.from_numpy(np.stack([nnls(directions.numpy(), column.numpy())[0] for column in values.T], axis=1))
    assert torch.allclose(found, exact, atol=2e-3)


def test_the_same_seed_gives_the_same_bits_and_the_random_state_stays() -> None:
    values = some_values(20, 60, 1).float()
    before = torch.get_rng_state()
    one, two = factorise(values, 7, share=0.2, rounds=9, seed=4), factorise(values, 7, share=0.2, rounds=9, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.directions, two.directions) and torch.equal(one.coefficients, two.coefficients)
    assert one.errors == two.errors
    assert not torch.equal(one.directions, factorise(values, 7, share=0.2, rounds=9, seed=5).directions)


def test_the_most_peaked_features_come_first_and_progress_is_told() -> None:
    steps: list[tuple[int, int]] = []
    found = factorise(some_values(12, 40, 2), 6, rounds=3, progress=lambda *step: steps.append(step))
    peaks = peakedness(found.coefficients)
    assert torch.equal(peaks, peaks.sort(descending=True).values)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert peakedness(torch.tensor([[0.0, 0, 0, 2], [1, 1, 1, 1], [0, 0, 0, 0]])).tolist() == [4.0, 1.0, 0.0]


def test_fewer_directions_than_features_are_no_trouble() -> None:
    values = torch.outer(torch.arange(1.0, 9.0), torch.ones(12))  # one token, twelve times
    assert factorise(values, 3, rounds=5).error < 1e-3


@pytest.mark.parametrize(
    ("values", "options", "said"),
    [
        (torch.ones(4, 3), {"count": 4}, "4 features"),
        (torch.ones(4, 3), {"count": 0}, "0 features"),
        (torch.ones(4, 3), {"count": 1, "share": 0.0}, "share of 0"),
        (torch.ones(4, 3), {"count": 1, "share": 1.5}, "share of 1.5"),
        (torch.ones(4, 3), {"count": 1, "rounds": 0}, "0 rounds"),
        (torch.zeros(4, 3), {"count": 1}, "all zero"),
    ],
)
def test_what_cannot_be_factorised_is_said(values: Tensor, options: dict[str, float], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        factorise(values, **options)  # type: ignore[arg-type]
