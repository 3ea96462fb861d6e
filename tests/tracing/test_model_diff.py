"""Two tiny models compared: what is told of weights and neurons, and the difference as an adjustment, to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.linalg import subspace_angles
from torch import Tensor
from transformers import PreTrainedModel

from liveweight.adjustments import Active, Adjustment, Dense, Entries, LowRank
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, Unsupported
from liveweight.settings import Settings
from liveweight.tracing import ModelDiff, diff, label_neurons
from liveweight.tracing.two_models import TwoModels
from tests.tiny_workspace import save_tiny_model
from tests.tracing.tiny_engines import engine_around, tiny_engine
from tiny_models import ARCHITECTURES, DENSE_ARCHITECTURES, NEURONS, WIDTH, bytes_of, tiny_model

DOWN = "layers.1.mlp.down.weight"


def pair(
    tmp_path: Path, name: str = "llama", **changes: Any
) -> tuple[TransformersEngine, TransformersEngine, PreTrainedModel]:
    """An engine of a tiny model, one of a copy with some sites changed (function of the weight), and that copy."""
    one = engine_around(tiny_model(name), tmp_path, "one")
    model = tiny_model(name)
    other = engine_around(model, tmp_path, "other")
    for site, change in changes.items():
        view = other.sites.weight(site.replace("__", "."))
        view.write(change(view.read().clone()))
    return one, engine_around(model, tmp_path, "other"), model


def noise(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_weight_of_the_model_is_compared_and_the_sum_is_the_other_model_to_the_bit(
    architecture: str, tmp_path: Path
) -> None:
    one = tiny_engine(architecture, tmp_path)
    other = engine_around(tiny_model(architecture, seed=1), tmp_path, "other")
    before = bytes_of(one.model)
    found = diff(one, other, labels=False)
    assert found.entries == one.info.parameters == other.info.parameters
    assert len(found.changes) == found.sites
    one.become((Active(found.adjustment()),))
    for site in TwoModels(one, other).sites:
        assert torch.equal(one.sites.weight(site).read(), other.sites.weight(site).read()), site
    one.become(())
    assert bytes_of(one.model) == before


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[TransformersEngine, TransformersEngine]:
    """Two models that are equal; nothing is ever active in the second one, whose weights a test may set."""
    one, other, _ = pair(tmp_path_factory.mktemp("two"))
    return one, other


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), low=st.integers(-30, 30), high=st.integers(-30, 30), some=st.floats(0.01, 1.0))
def test_base_and_adjustment_are_the_other_s_bits_whatever_the_sizes(
    two: tuple[TransformersEngine, TransformersEngine], seed: int, low: int, high: int, some: float
) -> None:
    one, other = two
    one.become(())
    generator = torch.Generator().manual_seed(seed)
    shape = (WIDTH, NEURONS)
    exponents = torch.randint(min(low, high), max(low, high) + 1, shape, generator=generator)
    new = torch.randn(shape, generator=generator) * 2.0**exponents
    touched = torch.rand(shape, generator=generator) < some
    wished = torch.where(touched, new, one.sites.weight(DOWN).read())
    other.sites.weight(DOWN).write(wished)
    adjustment = TwoModels(one, other).adjustment([DOWN], "test")
    one.become((Active(adjustment),))
    assert one.sites.weight(DOWN).read().contiguous().view(torch.int32).equal(wished.view(torch.int32))
    kinds = {type(op) for op in adjustment.ops}
    assert kinds == {Entries} if float(touched.float().mean()) <= 1 / 8 else Dense in kinds


def test_half_of_the_difference_lies_half_way_also_where_entries_are_set(tmp_path: Path) -> None:
    tiny = 2.0**-20 * noise((WIDTH, NEURONS))
    one, other, _ = pair(tmp_path, layers__1__mlp__down__weight=lambda old: tiny)
    adjustment = diff(one, other, labels=False).adjustment()
    assert {type(op) for op in adjustment.ops} == {Dense, Entries}  # what is far smaller cannot be reached by adding
    assert "set rather than added" in adjustment.note
    old = one.sites.weight(DOWN).read().clone()
    one.become((Active(adjustment, 0.5),))
    assert torch.allclose(one.sites.weight(DOWN).read(), (old + tiny) / 2, atol=1e-6)


def test_measures_are_those_of_whole_decompositions(tmp_path: Path) -> None:
    change = 0.3 * noise((WIDTH, NEURONS))
    one, other, _ = pair(tmp_path, layers__1__mlp__down__weight=lambda old: old + change)
    found = diff(one, other, rank=3)
    assert [each.site for each in found.changes] == [DOWN]
    told = found.changes[0]
    old, new = one.sites.weight(DOWN).read(), other.sites.weight(DOWN).read()
    assert (told.layer, told.kind, told.changed) == (1, "mlp.down.weight", 1.0)
    assert told.norm == pytest.approx(float((new - old).norm()), rel=1e-5)
    assert told.share == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-5)
    values = torch.linalg.svdvals(new - old).pow(2)
    assert told.energy == pytest.approx(float(values[:3].sum() / values.sum()), rel=1e-2)
    (left_a, _, right_a), (left_b, _, right_b) = (torch.linalg.svd(each, full_matrices=False) for each in (old, new))
    for angle, a, b in ((told.writes, left_a, left_b), (told.reads, right_a.T, right_b.T)):
        exact = torch.rad2deg(torch.tensor(subspace_angles(a[:, :3].numpy(), b[:, :3].numpy()).max()))
        assert angle == pytest.approx(float(exact), abs=3.0)


def test_a_change_of_low_rank_is_seen_and_can_be_taken_as_one(tmp_path: Path) -> None:
    change = noise((WIDTH, 2), 1) @ noise((2, NEURONS), 2)
    one, other, _ = pair(tmp_path, layers__1__mlp__down__weight=lambda old: old + change)
    found = diff(one, other, rank=2, labels=False)
    assert found.changes[0].energy == pytest.approx(1.0, abs=1e-5)
    adjustment = found.adjustment(rank=2)
    assert [type(op) for op in adjustment.ops] == [LowRank]
    one.become((Active(adjustment),))
    assert torch.allclose(one.sites.weight(DOWN).read(), other.sites.weight(DOWN).read(), atol=1e-4)


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_neurons_that_write_otherwise_are_counted_and_the_furthest_are_named(architecture: str, tmp_path: Path) -> None:
    def swapped(old: Tensor) -> Tensor:
        new = old.clone()
        new[:, 4], new[:, 9] = -old[:, 4], 1.001 * old[:, 9]
        return new

    one, other, _ = pair(tmp_path, architecture, layers__1__mlp__down__weight=swapped)
    found = diff(one, other, settings=Settings(cache_dir=tmp_path))
    labels = [label_neurons(engine, [(1, n) for n in range(NEURONS)], cache_dir=tmp_path) for engine in (one, other)]
    tops = [[label.promotes.top[0].id for label in each.values()] for each in labels]
    same = sum(a == b for a, b in zip(*tops, strict=True))
    assert [(each.layer, each.looked_at) for each in found.labels] == [(1, 2)]
    assert found.labels[0].kept == pytest.approx(same / NEURONS) == pytest.approx(found.kept)
    assert [(each.layer, each.neuron) for each in found.moved[:2]] == [(1, 4), (1, 9)]
    assert found.moved[0].moved == pytest.approx(2.0, rel=1e-4)
    assert found.moved[0].after == labels[1][1, 4].text() != found.moved[0].before
    assert not found.moved[0].kept and found.moved[1].kept and len(found.moved) == 2


def test_where_the_unembedding_differs_all_neurons_are_looked_at(tmp_path: Path) -> None:
    one, other, _ = pair(tmp_path, lm_head__weight=lambda old: old.flip(0))
    found = diff(one, other, settings=Settings(cache_dir=tmp_path))
    assert [(each.layer, each.looked_at) for each in found.labels] == [(layer, NEURONS) for layer in range(3)]
    assert found.kept is not None and found.kept < 0.2
    assert found.moved == ()


def test_equal_models_are_said_to_be_equal_and_give_no_adjustment(tmp_path: Path) -> None:
    one, other, _ = pair(tmp_path)
    found = diff(one, other)
    assert (found.changes, found.changed, found.kept) == ((), 0, None)
    assert "are the same" in shown(found)
    with pytest.raises(InvalidInput, match="the same"):
        found.adjustment()


def test_what_is_active_makes_no_difference(tmp_path: Path) -> None:
    one, other, _ = pair(tmp_path, layers__1__mlp__down__weight=lambda old: 2 * old)
    found = diff(one, other, labels=False)
    op = Dense(site=DOWN, delta=torch.ones(WIDTH, NEURONS))
    one.become((Active(Adjustment(name="more", method="test", ops=(op,))),))
    before = bytes_of(one.model)
    again = diff(one, other, labels=False)
    assert again.model_dump() == found.model_dump()
    assert again.adjustment() == found.adjustment()
    assert bytes_of(one.model) == before


def test_names_are_loaded_as_everywhere_and_another_shape_is_said(tmp_path: Path) -> None:
    folder, other = save_tiny_model(tmp_path / "a"), save_tiny_model(tmp_path / "b", seed=1)
    found = diff(str(folder), str(other), settings=Settings(cache_dir=tmp_path), labels=False)
    assert found.a == str(folder) and len(found.changes) > 10
    with pytest.raises(InvalidInput, match="architecture is llama in the first and gpt2 in the second"):
        diff(tiny_engine("llama", tmp_path), tiny_engine("gpt2", tmp_path))
    with pytest.raises(InvalidInput, match="layers is 3 in the first and 2"):
        diff(tiny_engine("llama", tmp_path), str(folder), settings=Settings(cache_dir=tmp_path))
    shorter = copy.deepcopy(tiny_model("llama"))
    shorter.resize_token_embeddings(50)
    with pytest.raises(InvalidInput, match="vocabulary is 61 in the first and 50"):
        diff(tiny_engine("llama", tmp_path), engine_around(shorter, tmp_path))
    with pytest.raises(InvalidInput, match="rank of 0"):
        diff(str(folder), str(other), rank=0)


def test_a_tied_model_has_no_room_for_an_unembedding_of_its_own(tmp_path: Path) -> None:
    tied, own = tiny_engine("llama_tied", tmp_path), tiny_engine("llama", tmp_path)
    # The two differ in their biases as well, so these are left out of the comparison of shapes.
    with pytest.raises(InvalidInput, match="not of one shape"):
        diff(tied, own)
    with torch.no_grad():
        model = copy.deepcopy(tied.model)
        model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight, requires_grad=False)
    untied = engine_around(model, tmp_path, "untied")
    found = diff(tied, untied, labels=False)
    assert [each.site for each in found.changes] == ["lm_head.weight"] and "one tensor" in found.notes[0]
    with pytest.raises(Unsupported, match="one tensor"):
        found.adjustment()
    back = diff(untied, tied, labels=False).adjustment()
    untied.become((Active(back),))
    assert torch.equal(untied.sites.weight("lm_head.weight").read(), tied.sites.weight("lm_head.weight").read())


def test_the_report_is_json_a_view_and_a_picture(tmp_path: Path) -> None:
    one, other, _ = pair(
        tmp_path,
        layers__1__mlp__down__weight=lambda old: 1.1 * old,
        layers__2__attn__q__weight=lambda old: 1.2 * old,
        final_norm__weight=lambda old: old + 1,
    )
    found = diff(one, other, settings=Settings(cache_dir=tmp_path))
    read = ModelDiff.model_validate_json(found.model_dump_json())
    assert read.model_dump() == found.model_dump()
    with pytest.raises(InvalidInput, match="not at hand"):
        read.adjustment()
    assert max(map(len, shown(found).splitlines())) <= 80
    for word in ("mlp.down", "attn.q", "final_norm", "keep their token", "10.000%"):
        assert word in shown(found)
    figure = found.picture()
    bars = {trace.name: list(trace.y) for trace in figure.data}
    assert bars["mlp.down"] == pytest.approx([10.0, 0.0]) and bars["attn.q"] == pytest.approx([0.0, 20.0])


def test_the_random_state_stays(tmp_path: Path) -> None:
    one, other, _ = pair(tmp_path, layers__1__mlp__down__weight=lambda old: 2 * old)
    before = torch.get_rng_state()
    diff(one, other, settings=Settings(cache_dir=tmp_path))
    assert torch.equal(torch.get_rng_state(), before)


def shown(value: object) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(value)
    return capture.get()
