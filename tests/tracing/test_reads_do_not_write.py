"""Invariant 6: whatever is read, everything is as it was."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liveweight.adjustments import Active, Adjustment, Gain, LowRank, Op, ScaleNeurons, Steer
from liveweight.engines.base import Message, Sampling
from liveweight.engines.transformers import TransformersEngine
from liveweight.tracing import (
    attribute,
    diff,
    find_features,
    find_super_weights,
    label_layer,
    label_neurons,
    rank_neurons,
    read_answer,
    why,
)
from liveweight.tracing.clamping import clamp
from liveweight.tracing.massive import massive
from liveweight.tracing.neuron_page import neuron_page
from liveweight.tracing.quantization import Scheme, quantization
from liveweight.tracing.sparsity import sparsity
from tests.tracing.test_super_weights import model_with_a_super_weight
from tests.tracing.tiny_engines import engine_around, tiny_engine
from tiny_models import NEURONS, WIDTH, bytes_of

QUESTION = [Message("user", "what is it?")]
OTHER = [Message("user", "what is at?")]
READS = (
    "find",
    "why",
    "why against",
    "rank",
    "read",
    "labels",
    "layer",
    "parts",
    "patched",
    "massive",
    "sparsity",
    "quantise",
    "page",
    "clamp",
    "features",
    "diff",
    "failing",
)


def everything(engine: TransformersEngine) -> dict[str, Any]:
    """All that a read might leave a mark on."""
    hooks = {
        name: [len(value) for key, value in vars(module).items() if key.endswith("_hooks")]
        for name, module in engine.model.named_modules()
    }
    return {
        "weights": bytes_of(engine.model),
        "places": [parameter.data_ptr() for parameter in engine.model.parameters()],
        "gradients": [(parameter.grad, parameter.requires_grad) for parameter in engine.model.parameters()],
        "buffers": {name: buffer.tolist() for name, buffer in engine.model.named_buffers()},
        "modes": [module.training for module in engine.model.modules()],
        "hooks": hooks,
        "active hooks": engine.activations.hooks,
        "state": (engine.state, engine.weights.state, engine.activations.state, engine.version),
        "pristine": engine.weights.pristine_bytes,
        "random": torch.get_rng_state().tolist(),
        "gradient mode": torch.is_grad_enabled(),
    }


def some_state(seed: int) -> tuple[Active, ...]:
    generator = torch.Generator().manual_seed(seed)
    ops: tuple[Op, ...] = (
        ScaleNeurons(layer=1, neurons=(19, 4), factors=torch.tensor([0.5, 1.5])),
        LowRank(
            site="layers.2.mlp.down.weight",
            left=torch.randn(WIDTH, 1, generator=generator),
            right=torch.randn(1, NEURONS, generator=generator),
        ),
        Gain(layer=0, neurons=(1,), gains=torch.tensor([1.5]), slopes=torch.tensor([1.2])),
        Steer(site="layers.0.resid", vector=torch.randn(WIDTH, generator=generator), when="generated"),
    )
    return tuple(
        Active(Adjustment(name=str(place), method="test", ops=(op,)), 0.7)
        for place, op in enumerate(ops)
        if seed >> place & 1
    )


def read(engine: TransformersEngine, what: str, answer: tuple[int, ...], cache: Path) -> None:
    prompt = engine.encode(QUESTION)
    match what:
        case "find":
            find_super_weights(engine, cache)
        case "why":
            why(engine, QUESTION, answer, top=3, cache_dir=cache)
        case "why against":
            why(engine, QUESTION, answer, against=(60 - answer[0],), top=3, cache_dir=cache, exclude=())
        case "rank":
            rank_neurons(engine, prompt, answer, exclude=())
        case "read":
            read_answer(engine, prompt, answer)
        case "labels":
            label_neurons(engine, [(0, 3), (2, 8)], cache_dir=cache)
        case "layer":
            label_layer(engine, 1, cache_dir=cache)
        case "parts":
            for by in ("gradient", "direct", "relp"):
                attribute(engine, QUESTION, answer, by=by, sites="heads", corrupted=OTHER)
            attribute(engine, QUESTION, answer, by="relp", sites="neurons", exclude=(), labels=False)
        case "patched":
            attribute(engine, QUESTION, answer, by="patching", sites="mlp", corrupted=OTHER)
        case "massive":
            massive(engine, "the cat sat", tokens=9)
        case "sparsity":
            sparsity(engine, tokens=8, layers=len(answer) == 1)
        case "quantise":
            quantization(engine, Scheme(4, (8, 8), "z", 3.0, activations=8), tokens=8, cache_dir=cache)
        case "page":
            neuron_page(engine, (1, 3), "the cat sat on it.", tokens=12, cache_dir=cache)
        case "clamp":
            clamp(engine, {(1, 3): 2.0}, prompt, max_tokens=2, cache_dir=cache)
        case "features":
            few = {"layer": 1, "k": 3, "share": 0.2, "tokens": 60, "rounds": 2}
            find_features(engine, **few, text="a cat sat on a mat. " * 5, cache_dir=cache)
        case "diff":
            diff(engine, engine)
        case _:
            with pytest.raises(ValueError, match="begin alike"):
                why(engine, QUESTION, answer, against=answer, exclude=())


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> list[TransformersEngine]:
    cache = tmp_path_factory.mktemp("cache")
    tiny = [tiny_engine(name, cache) for name in ("gpt2", "phi3", "gemma2", "llama_tied")]
    return [engine_around(model_with_a_super_weight(), cache), *tiny]


@settings(max_examples=50, deadline=None)
@given(
    place=st.integers(0, 4),
    what=st.lists(st.sampled_from(READS), min_size=1, max_size=3),
    answer=st.lists(st.integers(3, 29), min_size=1, max_size=4),
    seed=st.integers(0, 15),
)
def test_a_read_leaves_weights_hooks_caches_and_random_state_as_they_were(
    engines: list[TransformersEngine], place: int, what: list[str], answer: list[int], seed: int
) -> None:
    engine = engines[place]
    engine.become(some_state(seed))
    before = everything(engine)
    with tempfile.TemporaryDirectory() as cache:
        for each in what:
            read(engine, each, tuple(answer), Path(cache))
            assert everything(engine) == before, each


def test_a_reply_that_is_under_way_is_the_one_that_would_have_come_anyway(tmp_path: Path) -> None:
    engine = engine_around(model_with_a_super_weight(), tmp_path)
    sampling = Sampling(max_tokens=12, temperature=1.0, seed=5)
    undisturbed = [(token.id, token.logprob, token.version) for token in engine.generate(QUESTION, sampling)]
    disturbed = []
    for place, token in enumerate(engine.generate(QUESTION, sampling)):
        disturbed.append((token.id, token.logprob, token.version))
        read(engine, READS[place % len(READS)], (5, 9), tmp_path / str(place))
    assert disturbed == undisturbed
    assert len(undisturbed) > 3


def test_reading_twice_gives_the_same(tmp_path: Path) -> None:
    engine = tiny_engine("qwen3", tmp_path)
    first = why(engine, QUESTION, (9, 30, 12), cache_dir=tmp_path / "one")
    assert why(engine, QUESTION, (9, 30, 12), cache_dir=tmp_path / "two") == first
