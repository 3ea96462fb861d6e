"""Semi-nonnegative matrix factorisation: a signed matrix as directions times coefficients that are never below zero.

Owns the arithmetic: A (neurons, tokens) ≈ Z (neurons, k) Y (k, tokens) with Y ≥ 0, so that a token is a sum of
directions and never a difference of them. Z is a least-squares solution, Y moves by the multiplicative rule of Ding, Li
and Jordan, "Convex and Semi-Nonnegative Matrix Factorizations" (IEEE TPAMI 32, 2010), neither of which can raise the
error. Of each direction only the largest entries may be kept, after every step, as Shafran, Geiger and Geva do with
MLPs ("Decomposing MLP Activations into Interpretable Features via Semi-Nonnegative Matrix Factorization", 2025,
arXiv:2506.10920); with that the error can rise. Here what is kept is then fitted again, without which the error of the
embedded model's factors could rise above 1. Knows nothing of models. Draws from a generator of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from liveweight.errors import InvalidInput

FLOOR = 0.2  # of the mean coefficient, added to the first ones
LEAST = 1e-16  # of the largest coefficient: none is smaller while the rule is at work
TOLERANCE = 1e-3  # a fit has settled when its error moved by less than this share of itself …
_WATCHED = 10  # … in so many rounds
_SWEEPS = 2  # over the columns of Z, to fit again what was kept
_ENCODING = 200  # steps of the rule for new tokens; the problem has no other minimum to be caught in

Progress = Callable[[int, int], None]  # done, of how many


@dataclass(frozen=True, eq=False)
class Factors:
    """A factorisation. Directions have length 1, so that a coefficient is in the units of what was factorised.

    The features are in the order of their peakedness, the kurtosis of their coefficients: those that few tokens have
    come first. A feature that no token has is all zero, and comes last.
    """

    directions: Tensor  # Z (neurons, k)
    coefficients: Tensor  # Y (k, tokens), ≥ 0
    errors: tuple[float, ...]  # |A - ZY| / |A| (Frobenius) at the start and after every round

    @property
    def error(self) -> float:
        """What is left of A, as a share of its length."""
        return self.errors[-1]


def factorise(
    values: Tensor,
    count: int,
    *,
    share: float = 1.0,
    rounds: int = 200,
    seed: int = 0,
    progress: Progress | None = None,
) -> Factors:
    """Factorise `values` (neurons, tokens) into `count` features; in its dtype, on its device.

    `share` of each direction's entries is kept, the largest by magnitude, at least one; 1 keeps all, and then no round
    raises the error. A round is the rule for Y and a new Z. Ends after `rounds`, or where the error has settled before.
    Raises InvalidInput for a number of features above that of neurons or tokens, a share outside (0, 1], no rounds, and
    values that are all zero.
    """
    neurons, tokens = values.shape
    if not 1 <= count <= min(neurons, tokens):
        raise InvalidInput(
            f"{count} features cannot be made of {neurons} neurons and {tokens} tokens.",
            hint=f"Give 1 to {min(neurons, tokens)}, or a longer text.",
        )
    if not 0 < share <= 1:
        raise InvalidInput(f"A share of {share:g} of the neurons cannot be kept.", hint="Give more than 0, at most 1.")
    if rounds < 1:
        raise InvalidInput(f"{rounds} rounds fit nothing.", hint="Give 1 or more.")
    total = float(values.double().pow(2).sum())
    if not total > 0:
        raise InvalidInput("The activations are all zero, so there is nothing to factorise.", hint="Another layer?")
    kept = max(1, round(share * neurons))
    starts = _starts(values, count, torch.Generator().manual_seed(seed))
    coefficients = _first(starts.T @ values)
    directions = _directions(values, coefficients, kept)
    seen = directions.T @ values  # (k, tokens), always of the present directions
    errors = [_error(seen, directions, coefficients, total)]
    for done in range(rounds):
        coefficients = _moved(coefficients, seen, directions.T @ directions)
        held = _error(seen, directions, coefficients, total)
        nearest = _directions(values, coefficients, kept)
        seen_by_nearest = nearest.T @ values
        error = _error(seen_by_nearest, nearest, coefficients, total)
        # Where YYᵀ is nearly singular, what is found is not the nearest.
        if kept < neurons or error <= held:
            directions, seen, held = nearest, seen_by_nearest, error
        errors.append(held)
        if progress is not None:
            progress(done + 1, rounds)
        if len(errors) > _WATCHED and abs(errors[-1 - _WATCHED] - errors[-1]) < TOLERANCE * errors[-1]:
            break
    lengths = directions.norm(dim=0)
    directions = directions / lengths.clamp_min(torch.finfo(values.dtype).tiny)
    coefficients = coefficients * lengths[:, None]
    order = peakedness(coefficients).argsort(descending=True, stable=True)
    return Factors(directions[:, order].contiguous(), coefficients[order].contiguous(), tuple(errors))


def encode(directions: Tensor, values: Tensor) -> Tensor:
    """The coefficients (k, tokens) ≥ 0 of other `values` (neurons, tokens) along given directions (neurons, k).

    The same rule with Z held, from coefficients that are the products clipped at zero.
    """
    seen, gram = directions.T @ values, directions.T @ directions
    coefficients = _first(seen)
    for _ in range(_ENCODING):
        coefficients = _moved(coefficients, seen, gram)
    return coefficients


def peakedness(coefficients: Tensor) -> Tensor:
    """Kurtosis of each feature's coefficients (k, tokens) about zero: (k,), at least 1; 0 where all are zero."""
    squares = coefficients.double().pow(2)
    return squares.pow(2).mean(1) / squares.mean(1).pow(2).clamp_min(torch.finfo(torch.float64).tiny)


# ------------------------------------------------------------------------------------------------------- one step


def _moved(coefficients: Tensor, seen: Tensor, gram: Tensor) -> Tensor:
    """One step of the rule: Y √(((ZᵀA)⁺ + (ZᵀZ)⁻Y) / ((ZᵀA)⁻ + (ZᵀZ)⁺Y)), with x⁺ and x⁻ the parts of x = x⁺ - x⁻."""
    raised = seen.clamp(min=0) + (-gram).clamp(min=0) @ coefficients
    lowered = (-seen).clamp(min=0) + gram.clamp(min=0) @ coefficients
    ratio: Tensor = raised / lowered.clamp_min(torch.finfo(seen.dtype).tiny)
    moved = coefficients * ratio.sqrt()
    return moved.clamp_min(LEAST * float(moved.max()))  # what is zero would stay so, whatever becomes of Z


def _directions(values: Tensor, coefficients: Tensor, kept: int) -> Tensor:
    """Z = A Yᵀ (YYᵀ)⁺, the nearest for these coefficients; of each column the `kept` largest entries.

    What is kept of one column is then fitted again to what the others leave, column by column.
    """
    gram = (coefficients @ coefficients.T).double()
    products = (values @ coefficients.T).double()  # (neurons, k)
    found: Tensor = products @ torch.linalg.pinv(gram, hermitian=True)
    if kept < len(found):
        mask = torch.zeros_like(found).scatter(0, found.abs().topk(kept, dim=0).indices, 1.0)
        found = found * mask
        for feature in list(range(found.shape[1])) * _SWEEPS:
            own = gram[feature, feature].clamp_min(torch.finfo(torch.float64).tiny)
            missing = products[:, feature] - found @ gram[:, feature]
            found[:, feature] += missing / own * mask[:, feature]
    return found.to(values.dtype)


def _error(seen: Tensor, directions: Tensor, coefficients: Tensor, total: float) -> float:
    """|A - ZY| / |A| from products that are there already: |A|² - 2⟨ZᵀA, Y⟩ + ⟨ZᵀZ, YYᵀ⟩."""
    fitted = float((seen * coefficients).sum(dtype=torch.float64))
    gram = (directions.T @ directions).double()
    own = float((gram * (coefficients @ coefficients.T).double()).sum())
    return math.sqrt(max(total - 2 * fitted + own, 0.0) / total)


def _first(seen: Tensor) -> Tensor:
    """Coefficients to begin with: products clipped at zero, and a floor."""
    clipped: Tensor = seen.clamp(min=0)
    return clipped + (FLOOR * clipped.mean()).clamp_min(torch.finfo(seen.dtype).eps)


def _starts(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Directions (neurons, k) of some tokens, each drawn by how much of it those before leave.

    As k-means++ seeds its centres (Arthur and Vassilvitskii, 2007), with what a ray leaves of a token as the distance.
    """
    lengths = values.norm(dim=0)
    directions = values / lengths.clamp_min(torch.finfo(values.dtype).tiny)
    left = lengths.double().pow(2).cpu()
    chosen: list[int] = []
    for _ in range(count):
        some = left if bool((left > 0).any()) else torch.ones_like(left)  # fewer directions than features
        chosen.append(int(torch.multinomial(some / some.sum(), 1, generator=generator)))
        along = (directions[:, chosen[-1]] @ values).clamp(min=0).double().cpu()
        left = torch.minimum(left, (lengths.double().cpu().pow(2) - along.pow(2)).clamp(min=0))
        left[chosen[-1]] = 0.0
    picked: Tensor = directions[:, chosen]
    return picked
