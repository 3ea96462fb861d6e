"""On the embedded model: its massive activations, and a quantisation that comes off bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from liveweight.adjustments import Active
from liveweight.engines.transformers import TransformersEngine
from liveweight.tracing.massive import massive
from liveweight.tracing.quantization import Scheme, quantization

if TYPE_CHECKING:
    from liveweight.engines.model_source import LoadedModel

pytestmark = pytest.mark.real
SUPER_WEIGHT = ("layers.11.mlp.down.weight", 507, 1229)


def test_the_super_weight_s_spike_stays_in_the_stream_to_the_last_layers(embedded: LoadedModel) -> None:
    found = massive(TransformersEngine(embedded), "The river was calm, and the boats lay still.")
    streams = {each.layer: each for each in found.values if each.site.endswith(".resid") and each.dimension == 507}
    assert set(range(11, 27)) <= set(streams) and min(streams) == 11
    assert all(each.largest > 20_000 and each.first_positions == 1 for layer, each in streams.items() if layer < 27)
    spike = next(each for each in found.values if each.site == "layers.11.mlp.neurons" and each.dimension == 1229)
    assert spike.where.position == 0 and spike.largest > 2000


def test_four_bits_cost_less_with_the_super_weights_held_out_and_every_bit_comes_back(
    embedded: LoadedModel, model_cache: Path
) -> None:
    engine = TransformersEngine(embedded)
    before = engine.fingerprints()
    scheme = Scheme(4, (512, 512), "z", 5.0)
    found = quantization(engine, scheme, keep_super_weights=True, tokens=256, cache_dir=model_cache)
    assert SUPER_WEIGHT in found.super_weights
    rounded, held = (row.perplexity for row in found.rows)
    assert found.perplexity < held < rounded
    engine.become((Active(found.adjustment, 0.5),))
    assert float(engine.sites.weight(SUPER_WEIGHT[0]).read()[507, 1229]) == pytest.approx(5.8757, abs=1e-4)
    halved = engine.fingerprints()
    engine.become((Active(found.adjustment),))
    engine.become((Active(found.adjustment, 0.5),))
    assert engine.fingerprints() == halved != before
    engine.become(())
    assert engine.fingerprints() == before
