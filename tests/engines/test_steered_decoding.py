"""Under a steering that counts positions, decoding with a cache says what a whole pass at every step says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liveweight.adjustments import Active, Adjustment, Steer
from liveweight.engines.base import Message, Sampling
from liveweight.engines.transformers import TransformersEngine
from tests.tracing.tiny_engines import tiny_engine

ARCHITECTURES = ("llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "olmo2", "mixtral")
MADE = 5
WHENS = ("always", "prompt", "generated")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TransformersEngine]:
    folder = tmp_path_factory.mktemp("engines")
    return {name: tiny_engine(name, folder) for name in ARCHITECTURES}


def steered(
    engine: TransformersEngine, site: str, when: str, positions: tuple[int, ...] | None, seed: int, scale: float
) -> Active:
    vector = torch.randn(engine.sites.activation(site).size, generator=torch.Generator().manual_seed(seed))
    op = Steer(site=site, vector=vector, scale=scale, when=when, positions=positions)
    return Active(Adjustment(name="steer", method="test", ops=(op,)))


def uncached(engine: TransformersEngine, prompt: Sequence[int]) -> list[int]:
    """Greedy tokens, the whole text run anew for each."""
    ids = list(prompt)
    with engine.activations.prompt(len(prompt)), torch.inference_mode():
        while len(ids) - len(prompt) < MADE:
            ids.append(int(engine.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in engine.format.end_tokens:
                break
    return ids[len(prompt) :]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    prompt=st.lists(st.integers(3, 60), min_size=2, max_size=8),
    other=st.lists(st.integers(3, 60), min_size=2, max_size=8),
    site=st.sampled_from(["embed", "layers.0.resid", "layers.1.resid", "layers.1.attn.heads"]),
    when=st.sampled_from(WHENS),
    positions=st.none() | st.lists(st.integers(0, 14), min_size=1, max_size=6, unique=True).map(tuple),
    seed=st.integers(0, 9),
)
def test_cached_decoding_is_uncached_decoding_token_for_token(
    engines: dict[str, TransformersEngine],
    architecture: str,
    prompt: list[int],
    other: list[int],
    site: str,
    when: str,
    positions: tuple[int, ...] | None,
    seed: int,
) -> None:
    engine = engines[architecture]
    engine.become((steered(engine, site, when, positions, seed, 4.0),))
    try:
        wished = [uncached(engine, each) for each in (prompt, other)]
        said = [token.id for token in engine.continue_from(prompt, Sampling(max_tokens=MADE))]
        assert said == wished[0]
        assert engine.greedy([prompt, other], MADE) == wished
    finally:
        engine.become(())


@pytest.mark.parametrize("when", ["prompt", "generated"])
def test_a_steering_that_is_seen_changes_what_is_said(engines: dict[str, TransformersEngine], when: str) -> None:
    engine = engines["llama"]
    messages = [Message("user", "hello there")]
    plain = [token.id for token in engine.generate(messages, Sampling(max_tokens=MADE))]
    engine.become((steered(engine, "layers.1.resid", when, None, 0, 20.0),))
    said = [token.id for token in engine.generate(messages, Sampling(max_tokens=MADE))]
    assert said == uncached(engine, engine.encode(messages))
    engine.become(())
    assert said != plain
    # The first token is predicted at the prompt's last one, which "generated" leaves alone.
    assert (said[0] == plain[0]) == (when == "generated")
