"""Stepping through the embedded model: what is seen, changed, kept and undone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from liveweight.adjustments import Active, Adjustment, Gain, folded
from liveweight.engines.base import Message
from liveweight.live_model import LiveModel

QUESTION = "What is the capital of France?"

pytestmark = pytest.mark.real


def test_a_dampened_stream_is_seen_by_the_lens_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with LiveModel.load("smollm2", workspace=tmp_path, threads=1) as live:
        before = live.fingerprints()
        with live.step(QUESTION) as run:
            run.until("layers.29.resid")
            likeliest = run.look(position=-1).lens[0].top[0]
            plain = run.finish().before[0]
            assert (likeliest.id, likeliest.probability) == (plain.id, pytest.approx(plain.probability, rel=1e-4))
            run.restart().until("layers.20.resid").scale(0.2, positions=-1)
            ending = run.finish()
            assert ending.kl > 0.5
            assert "Paris" in run.generate(12, edited=False)
        assert live.fingerprints() == before and live.engine.activations.hooks == 0
        assert run.adjustment("damp").ops[0].kind == "affine"


def test_gains_folded_into_the_embedded_model_s_weights_give_the_same_logits(tmp_path: Path) -> None:
    with LiveModel.load("smollm2", workspace=tmp_path, threads=1) as live:
        engine = live.engine
        generator = torch.Generator().manual_seed(0)
        ops = tuple(
            Gain(
                layer=layer,
                neurons=tuple(torch.randperm(1200, generator=generator)[:40].tolist()),  # super neuron 1229 is left out
                gains=3 * torch.rand(40, generator=generator),
                slopes=torch.ones(40),
            )
            for layer in (3, 11, 20, 28)
        )
        acting = Adjustment(name="gains", method="gain", ops=ops)
        prompt = engine.encode([Message("user", QUESTION)])
        found = []
        for adjustment in (acting, folded(acting, engine.sites)):
            with engine.preview((Active(adjustment, 0.7),)):
                found.append(engine.logits(prompt, ()))
        plain = engine.logits(prompt, ())
        assert float((found[0] - plain).abs().max()) > 0.1
        assert float((found[0] - found[1]).abs().max()) < 1e-3
