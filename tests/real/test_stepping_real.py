"""Stepping through the embedded model: what is seen, changed, kept and undone."""

from __future__ import annotations

from pathlib import Path

import pytest

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
