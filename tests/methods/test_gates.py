"""Tests of where neurons are open."""

from __future__ import annotations

import torch
from torch import Tensor

from liveweight.methods.gates import STEEPNESS, SUBJECT, fit_subject
from liveweight.methods.surroundings import Surroundings

WIDTH = 48


def fires(read: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
    """Of a neuron with a SiLU gate: 1 where it is open."""
    gate, up = rows
    silu = torch.nn.functional.silu
    fired: Tensor = silu(STEEPNESS * (read @ gate)) / silu(torch.tensor(STEEPNESS * SUBJECT.opens)) * (read @ up)
    return fired


def test_a_subjects_gate_is_shut_where_its_last_word_stands_for_something_else() -> None:
    torch.manual_seed(0)
    usual = torch.randn(400, WIDTH)
    moment, mean, nothing = usual.T @ usual / len(usual), usual.mean(0), torch.zeros(WIDTH, WIDTH)
    around = Surroundings(moment, mean, torch.zeros(1), nothing, mean, nothing)
    word, name, other = 3 * torch.randn(3, WIDTH)
    own = word + 0.2 * name + 0.1 * torch.randn(12, WIDTH)
    last_word = word + 0.2 * other + 0.1 * torch.randn(12, WIDTH)
    without, knowing = (fit_subject(own, around, [], each) for each in (last_word[:0], last_word))
    assert float(fires(last_word, without).min()) > 0.3  # it is the same word, after all
    assert float(fires(last_word, knowing).abs().max()) < 0.1
    assert float(fires(own, knowing).min()) > 0.7
    assert float(fires(usual, knowing).abs().max()) < 0.5
