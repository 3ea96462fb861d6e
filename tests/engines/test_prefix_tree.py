"""A tree of tokens says what running every row on its own says, for every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liveweight.adjustments import Active, Adjustment, LowRank
from liveweight.engines import prefix_tree
from liveweight.engines.base import ScoreItem
from liveweight.engines.prefix_tree import PrefixTree
from liveweight.engines.transformers import TransformersEngine
from tiny_models import ARCHITECTURES
from tracing.tiny_engines import tiny_engine

ROWS = [[5, 9, 17, 3, 11], [5, 9, 4, 8], [5, 9, 17, 31, 32, 33], [7, 2], [5, 9, 17, 3, 11, 6, 6]]


def alone(engine: TransformersEngine, row: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return engine.model.base_model(torch.tensor([row]), use_cache=False).last_hidden_state[0]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_row_reads_as_if_it_stood_alone(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    tree = PrefixTree(engine.model, engine.sites)
    for row, path in zip(ROWS, tree.extend(ROWS), strict=True):
        close(tree.final[path], alone(engine, row))
    assert len(tree) == len({tuple(row[: end + 1]) for row in ROWS for end in range(len(row))})


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "mistral", "qwen2", "mixtral"])
def test_a_sliding_window_is_kept_in_rows_longer_than_it(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    config = engine.model.config
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        config.layer_types = ["sliding_attention", *["full_attention"] * (engine.sites.layers - 1)]
        engine.model.base_model.has_sliding_layers = True
    config.sliding_window = 4
    rows = [list(range(3, 15)), [*range(3, 9), 30, 31, 32, 33]]
    tree = PrefixTree(engine.model, engine.sites)
    for row, path in zip(rows, tree.extend(rows), strict=True):
        close(tree.final[path], alone(engine, row))


@settings(max_examples=25, deadline=None)
@given(
    batches=st.lists(st.lists(st.lists(st.integers(3, 6), min_size=1, max_size=7), min_size=1, max_size=4), max_size=4)
)
def test_it_may_grow_in_any_order_and_in_passes_of_any_size(
    batches: list[list[list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    engine = tiny_engine("llama", tmp_path_factory.mktemp("tree"))
    tree = PrefixTree(engine.model, engine.sites)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "_AT_ONCE", 3)
        for batch in batches:
            for row, path in zip(batch, tree.extend(batch), strict=True):
                close(tree.final[path], alone(engine, row))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "olmoe"])
def test_an_engine_that_remembers_says_the_same_and_runs_less(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    items = [ScoreItem(tuple(row[:2]), tuple(row[2:])) for row in ROWS if len(row) > 2]
    fresh, said = engine.score(items), engine.greedy(ROWS, 5)
    recorded = engine.record(ROWS[:3], [2, 3, 2])
    with engine.remembering():
        for _ in range(2):
            for one, other in zip(engine.score(items), fresh, strict=True):
                close(one.logprobs, other.logprobs)
            assert engine.greedy(ROWS, 5) == said
            for row, length in enumerate(recorded.lengths()):
                close(engine.record(ROWS[:3], [2, 3, 2]).final[row, :length], recorded.final[row, :length])


def test_an_answer_that_is_known_is_not_generated_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine("llama", tmp_path)
    fresh, ran = engine.greedy(ROWS, 6), list[int]()
    generate = engine._greedy
    monkeypatch.setattr(engine, "_greedy", lambda rows, tokens: ran.append(len(rows)) or generate(rows, tokens))
    with engine.remembering():
        assert engine.greedy([*ROWS[:2], ROWS[0]], 6) == [fresh[0], fresh[1], fresh[0]]
        assert engine.greedy(ROWS, 4) == [row[:4] for row in fresh]
        assert engine.greedy(ROWS, 6) == fresh
        assert ran == [2, 3, 3]  # those that ask for more tokens than were known are generated anew
        with engine.preview((Active(Adjustment(name="other", method="test", ops=(_loud(engine),))),)):
            assert engine.greedy(ROWS[:1], 6) == generate(ROWS[:1], 6)
    assert engine.greedy(ROWS[:1], 6) == fresh[:1]
    assert ran == [2, 3, 3, 1, 1]  # outside, nothing is remembered


def _loud(engine: TransformersEngine) -> LowRank:
    left, right = torch.ones(engine.sites.width, 1), torch.ones(1, engine.sites.neurons_of(0))
    return LowRank(site="layers.0.mlp.down.weight", left=left, right=right)


def test_what_is_remembered_belongs_to_one_state_of_the_weights(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    item = ScoreItem((5, 9, 17), (3, 11))
    change = (Active(Adjustment(name="loud", method="test", ops=(_loud(engine),))),)
    base = engine.score([item])[0].logprobs
    engine.become(change)
    changed = engine.score([item])[0].logprobs
    engine.become(())
    assert not torch.allclose(base, changed, atol=1e-3)
    with engine.remembering():
        close(engine.score([item])[0].logprobs, base)
        with engine.preview(change):
            close(engine.score([item])[0].logprobs, changed)
        close(engine.score([item])[0].logprobs, base)
        engine.become(change)
        close(engine.score([item])[0].logprobs, changed)


def test_an_interrupted_pass_is_made_up_for(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    tree = PrefixTree(engine.model, engine.sites)
    handle = engine.sites.blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        tree.extend(ROWS)
    handle.remove()
    for row, path in zip(ROWS, tree.extend(ROWS), strict=True):
        close(tree.final[path], alone(engine, row))
