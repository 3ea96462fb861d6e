"""A given direction: its strength is the one whose KL was asked for, and what is told of it is so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from liveweight.adjustments import Active, Steer
from liveweight.engines.base import ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, NoMendFound, UnknownSite
from liveweight.methods.direction import directed
from tests.tracing.tiny_engines import tiny_engine
from tiny_models import VOCABULARY, WIDTH, bytes_of


def neutral(count: int = 5) -> list[ScoreItem]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCABULARY, (9,), generator=generator).tolist() for _ in range(count)]
    return [ScoreItem(tuple(row[:6]), tuple(row[6:])) for row in rows]


def some_vector() -> torch.Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(7))


def logprobs(engine: TransformersEngine, item: ScoreItem) -> torch.Tensor:
    """Of all tokens where the continuation's are due, by one plain forward."""
    ids = torch.tensor([[*item.prompt, *item.continuation]])
    with torch.no_grad():
        found: torch.Tensor = engine.model(ids, use_cache=False).logits[0].log_softmax(-1)
    return found[len(item.prompt) - 1 : -1]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("measure", ["mean", "p95"])
def test_the_strength_has_the_kl_that_a_plain_forward_measures(architecture: str, measure: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    before = bytes_of(engine.model)
    found = directed(
        engine,
        "some",
        1,
        some_vector(),
        neutral(),
        watched=[9, 12],
        target=0.1,
        measure=measure,  # type: ignore[arg-type]
    )
    assert bytes_of(engine.model) == before
    assert found.reached == pytest.approx(0.1, rel=0.1)
    old = [logprobs(engine, item) for item in neutral()]
    with engine.preview((Active(found.adjustment()),)):
        new = [logprobs(engine, item) for item in neutral()]
    kl = torch.stack([(a.exp() * (a - b)).sum(-1).mean() for a, b in zip(old, new, strict=True)])
    assert found.mean_kl == pytest.approx(float(kl.mean()), rel=1e-2)
    assert found.p95_kl == pytest.approx(float(kl.quantile(0.95)), rel=1e-2)
    rise = (torch.cat(new) - torch.cat(old))[:, [9, 12]].mean()
    assert found.effect == pytest.approx(float(rise), abs=1e-3)


def test_many_rows_are_first_tried_on_a_few(tmp_path: Path) -> None:
    found = directed(tiny_engine("llama", tmp_path), "some", 1, some_vector(), neutral(40), target=0.1, measure="mean")
    assert found.mean_kl == pytest.approx(0.1, rel=0.1) and found.neutral == 40


def test_the_adjustment_adds_so_many_times_the_vector(tmp_path: Path) -> None:
    found = directed(tiny_engine("llama", tmp_path), "some", 1, some_vector(), neutral(), target=0.1)
    op = found.adjustment(-2.0).ops[0]
    assert isinstance(op, Steer) and op.site == "layers.1.resid"
    assert op.scale == -2.0 * found.factor and torch.equal(op.vector, some_vector())
    assert found.as_dict()["norm"] == pytest.approx(found.factor * float(some_vector().norm()))
    with pytest.raises(InvalidInput, match="strength 0"):
        found.adjustment(0)


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    with pytest.raises(UnknownSite, match="layer 3"):
        directed(engine, "some", 3, some_vector(), neutral())
    with pytest.raises(InvalidInput, match="cannot be 0"):
        directed(engine, "some", 1, some_vector(), neutral(), target=0)
    with pytest.raises(InvalidInput, match="no neutral"):
        directed(engine, "some", 1, some_vector(), [])
    with pytest.raises(InvalidInput, match="is zero"):
        directed(engine, "some", 1, torch.zeros(WIDTH), neutral())
    with pytest.raises(NoMendFound, match="No strength"):
        directed(engine, "some", 1, some_vector(), neutral(), target=1e4)
