"""What fired, and the derivatives of the margin by gain and slope, against finite differences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from liveweight.adjustments import Active, Adjustment, Gain
from liveweight.engines.base import Objective
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import Unsupported
from liveweight.tracing import neuron_pushes, read_firing
from tests.tracing.test_reads_do_not_write import everything
from tests.tracing.tiny_engines import tiny_engine
from tiny_models import LAYERS, NEURONS

PROMPT, ANSWER, AGAINST = (7,), (9, 30, 12), (9, 30, 40)  # every position counts, since the prompt is one token


def gains_of(layer: int, neuron: int, gain: float, slope: float) -> Active:
    op = Gain(layer=layer, neurons=(neuron,), gains=torch.tensor([gain]), slopes=torch.tensor([slope]))
    return Active(Adjustment(name="g", method="test", ops=(op,)))


def margin(engine: TransformersEngine, *more: Active) -> float:
    with engine.preview((*engine.state, *more)):
        found = engine.trace(PROMPT, ["embed"], Objective(ANSWER, AGAINST)).objective
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi3"])
def test_the_pushes_of_gains_and_slopes_are_the_derivatives_of_the_margin(name: str, tmp_path: Path) -> None:
    engine = tiny_engine(name, tmp_path)
    engine.become((gains_of(1, 4, 1.5, 1.3), gains_of(1, 4, 0.9, 0.8)))
    before = everything(engine)
    found = read_firing(engine, PROMPT, ANSWER, AGAINST)
    assert everything(engine) == before
    assert found.fired.shape == found.gain_pushes.shape == found.slope_pushes.shape == (LAYERS, NEURONS)
    torch.testing.assert_close(found.gain_pushes, neuron_pushes(engine, PROMPT, ANSWER, AGAINST), atol=1e-5, rtol=1e-3)
    step = 0.02
    for layer, neuron in ((0, 3), (1, 4), (1, 20), (2, 8)):
        for pushes, high, low in (
            (found.gain_pushes, (1 + step, 1.0), (1 - step, 1.0)),
            (found.slope_pushes, (1.0, 1 + step), (1.0, 1 - step)),
        ):
            apart = margin(engine, gains_of(layer, neuron, *high)) - margin(engine, gains_of(layer, neuron, *low))
            assert float(pushes[layer, neuron]) == pytest.approx(apart / (2 * step), abs=2e-3, rel=0.05)


def test_a_neuron_fires_where_its_pre_activation_is_above_zero(tmp_path: Path) -> None:
    engine = tiny_engine("gpt2", tmp_path)
    fired = read_firing(engine, PROMPT, ANSWER).fired
    active = engine.trace([*PROMPT, *ANSWER[:-1]], ["layers.1.mlp.neurons"]).values["layers.1.mlp.neurons"]
    assert torch.equal(fired[1], (active > 0).sum(0))  # gelu keeps the sign


def test_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="experts"):
        read_firing(tiny_engine("mixtral", tmp_path), PROMPT, ANSWER)
