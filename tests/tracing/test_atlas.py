"""All labels of a model: searched, put together, compared; neurons' pages and clamps against plain recomputations."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from liveweight.adjustments import Active
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, UnknownSite, Unsupported
from liveweight.tracing import label_layer, label_neurons
from liveweight.tracing.atlas import coverage, layer_range, merge, read_atlas
from liveweight.tracing.clamping import adjustment, clamp, clamp_curve, parse_clamps, parse_neuron
from liveweight.tracing.neuron_page import neuron_page
from tests.tracing.tiny_engines import engine_around, tiny_engine
from tiny_models import DENSE_ARCHITECTURES, LAYERS, NEURONS, tiny_model

TEXT = "what is the capital of austria? it is vienna, said the man from the north. " * 6


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_an_atlas_holds_what_each_layer_s_labels_say(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    atlas = read_atlas(engine)
    for layer in range(LAYERS):
        for (_, neuron), label in label_layer(engine, layer).items():
            assert atlas.label(layer, neuron) == label
    assert set(atlas.sides) == {"promotes", "suppresses", *label.reads}
    surest = [atlas.label(*pair).promotes.top[0].probability for pair in atlas.surest()]
    assert len(surest) == LAYERS * NEURONS and surest == sorted(surest, reverse=True)


def test_a_search_finds_every_neuron_whose_top_tokens_hold_the_text_and_no_other(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    atlas = read_atlas(engine)
    expected: dict[tuple[int, int, str], float] = {}
    for layer in range(LAYERS):
        for (_, neuron), label in label_layer(engine, layer).items():
            for side in atlas.sides:
                share = sum(guess.probability for guess in label.side(side).top if guess.text in "0123456789")
                if share:
                    expected[layer, neuron, side] = share
    found = atlas.find("[0-9]", how="regex", top=10_000)
    assert {(hit.layer, hit.neuron, hit.side): hit.probability for hit in found.hits} == pytest.approx(expected)
    assert found.found == len(expected)
    shares = [hit.probability for hit in found.hits]
    assert shares == sorted(shares, reverse=True)
    some = atlas.find("7", layers=[2, 0], sides=["up"], top=10_000)
    wanted = {key for key in expected if key[0] != 1 and key[2] == "up"}
    assert {(hit.layer, hit.neuron, hit.side) for hit in some.hits} <= wanted and some.hits
    assert atlas.find("Q").hits == atlas.find("q", how="token").hits  # text ignores case
    with pytest.raises(InvalidInput, match="token 'Q'"):
        atlas.find("Q", how="token")


def test_a_search_for_what_is_not_there_says_so(tmp_path: Path) -> None:
    atlas = read_atlas(tiny_engine("gpt2", tmp_path))
    for what, how in (("", "text"), ("(", "regex"), ("unheard", "text")):
        with pytest.raises(InvalidInput):
            atlas.find(what, how=how)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="gate"):
        atlas.find("a", sides=["gate"])  # GPT-2 has none
    with pytest.raises(UnknownSite, match="layer 9"):
        atlas.find("a", layers=[9])
    with pytest.raises(Unsupported, match="experts"):
        read_atlas(tiny_engine("olmoe", tmp_path))


def test_parts_that_two_machines_made_are_put_together(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path / "whole")
    whole = read_atlas(engine)
    for name, layers in (("one", [0]), ("two", [1, 2])):
        read_atlas(engine, layers, cache_dir=tmp_path / name)
    assert not coverage(engine, tmp_path / "one").whole
    (file,) = (tmp_path / "two").rglob("*.sqlite")
    assert merge(engine, [file], tmp_path / "one") == 2 * NEURONS
    assert merge(engine, [file], tmp_path / "one") == 0
    assert coverage(engine, tmp_path / "one").whole
    again = read_atlas(engine, cache_dir=tmp_path / "one")
    assert (again.packed == whole.packed).all()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "olmo2"])
def test_fast_labels_have_the_same_first_tokens_and_are_kept_apart(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    exact, fast = read_atlas(engine), read_atlas(engine, fast=True)
    assert not (exact.packed == fast.packed).all()  # another product
    assert (exact.packed["ids"][..., 0] == fast.packed["ids"][..., 0]).mean() >= 0.999
    assert np.abs(exact.packed["probabilities"][..., 0] / fast.packed["probabilities"][..., 0] - 1).max() < 0.05
    assert np.abs(exact.packed["entropy"] - fast.packed["entropy"]).max() < 0.05
    assert (read_atlas(engine).packed == exact.packed).all() and len(list(tmp_path.rglob("*.sqlite"))) == 2


def test_a_copy_that_is_damaged_further_on_costs_no_label_of_ones_own(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path / "whole")
    read_atlas(engine, [0], cache_dir=tmp_path / "one")
    read_atlas(engine, [1, 2], cache_dir=tmp_path / "two")
    (file,) = (tmp_path / "two").rglob("*.sqlite")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 3 // 4] + b"\xff" * (len(content) // 4))
    with pytest.raises(InvalidInput, match="cannot be read as labels"):
        merge(engine, [file], tmp_path / "one")
    assert coverage(engine, tmp_path / "one").layers[0] == NEURONS


def test_a_file_that_is_no_part_of_this_model_is_refused(tmp_path: Path) -> None:
    engine, other = tiny_engine("llama", tmp_path / "a"), tiny_engine("llama", tmp_path / "b", seed=1)
    read_atlas(other, [0])
    (file,) = (tmp_path / "b").rglob("*.sqlite")
    with pytest.raises(InvalidInput, match="does not hold labels"):
        merge(engine, [file])
    wrong = tmp_path / "c" / f"{engine.info.hash}{file.name[-9:]}"
    wrong.parent.mkdir()
    with pytest.raises(InvalidInput, match="There is no file"):
        merge(engine, [wrong])
    wrong.write_text("no database")
    with pytest.raises(InvalidInput, match="cannot be read as labels"):
        merge(engine, [wrong])
    shutil.rmtree(tmp_path / "c")


def test_two_models_are_compared_neuron_by_neuron(tmp_path: Path) -> None:
    model = tiny_model("llama")
    base = read_atlas(engine_around(model, tmp_path, "base"))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, :10] *= -1
    other = read_atlas(engine_around(model, tmp_path, "other"))
    found = base.compare(other)
    assert found.layers[0].kept == {"promotes": 1.0, "suppresses": 1.0, "gate": 1.0, "up": 1.0}
    assert found.layers[1].kept == {"promotes": 0.75, "suppresses": 0.75, "gate": 1.0, "up": 1.0}
    assert found.kept["promotes"] == pytest.approx(1 - 10 / (LAYERS * NEURONS))
    assert len(found.picture().data) == 4
    with pytest.raises(InvalidInput, match="other layers or neurons"):
        base.compare(read_atlas(tiny_engine("llama", tmp_path), [0, 1]))
    with pytest.raises(InvalidInput, match="other layers or neurons"):
        base.compare(read_atlas(tiny_engine("gpt2", tmp_path)))


@pytest.mark.parametrize(("text", "layers"), [("5", (5,)), ("0-2", (0, 1, 2)), (" 3 - 4 ", (3, 4))])
def test_layers_are_written_as_a_number_or_a_range(text: str, layers: tuple[int, ...]) -> None:
    assert layer_range(text) == layers
    for wrong in ("", "a", "3-1", "1-", "-2", "1,2"):
        with pytest.raises(InvalidInput):
            layer_range(wrong)


def next_token(engine: TransformersEngine, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return engine.model(torch.tensor([ids])).logits[0, -1].softmax(-1)


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_a_clamp_curve_is_the_model_s_own_answer_with_the_neuron_held(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    prompts = [engine.format.encode_text(text, special=True) for text in ("what is", "hello there")]
    curve = clamp_curve(engine, (1, 5), prompts, [-3.0, 4.0])
    label = label_neurons(engine, [(1, 5)])[1, 5]
    token = label.promotes.top[0].id
    down = engine.sites.activation("layers.1.mlp.neurons").module

    def held(value: float) -> float:
        def hold(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            values = args[0].clone()
            values[..., 5] = value
            return (values, *args[1:])

        handle = down.register_forward_pre_hook(hold)
        try:
            return float(sum(next_token(engine, ids)[token] for ids in prompts) / 2)
        finally:
            handle.remove()

    assert [point.promoted for point in curve.points] == pytest.approx([held(-3.0), held(4.0)], rel=1e-3)
    plain = float(sum(next_token(engine, ids)[token] for ids in prompts) / 2)
    assert curve.unclamped.promoted == pytest.approx(plain, rel=1e-3)
    assert len(curve.picture().data) == 2


def test_a_clamp_tells_both_answers_and_changes_nothing(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    before = engine.fingerprints()
    prompt = engine.format.encode_text("what is", special=True)
    values = {(2, 4): 25.0, (0, 1): -4.0}
    found = clamp(engine, values, prompt, question="what is", max_tokens=5)
    label = label_neurons(engine, [(2, 4), (0, 1)])
    assert found.neurons[0].token == label[2, 4].promotes.top[0]
    assert found.neurons[1].token == label[0, 1].suppresses.top[0]
    assert found.neurons[0].before == pytest.approx(
        float(next_token(engine, prompt)[found.neurons[0].token.id]), rel=1e-4
    )
    assert engine.fingerprints() == before and not engine.activations.hooks
    engine.become((Active(adjustment(engine, values)),))
    with engine.preview(engine.state):
        kept = "".join(token.text for token in engine.continue_from(prompt)).strip()
    assert kept.startswith(found.after[:5].strip()) and found.after != found.before
    console = Console(width=80, record=True)
    console.print(found)
    assert "2:4" in console.export_text()
    assert "<pre" in found._repr_html_()


def test_a_page_finds_the_places_where_the_neuron_is_strongest(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    ids = engine.format.encode_text(TEXT, special=True)[: engine.info.context]  # the first piece
    seen: list[Tensor] = []
    handle = engine.sites.activation("layers.1.mlp.neurons").on(lambda value: seen.append(value[0, 1:]))
    next_token(engine, ids)
    handle.remove()
    both_signs = (seen[0] > 0.1).any(0) & (seen[0] < -0.1).any(0)
    index = int(both_signs.nonzero()[0])
    values = seen[0][:, index]
    page = neuron_page(engine, (1, index), TEXT, tokens=400)
    assert page.tokens_read == pytest.approx(400, abs=8)  # but for the first of each piece
    assert page.strongest[0].activation >= float(values.max()) - 1e-4
    assert page.lowest[0].activation <= float(values.min()) + 1e-4
    assert [place.activation for place in page.strongest] == sorted(
        (place.activation for place in page.strongest), reverse=True
    )
    short = neuron_page(engine, (1, index), TEXT, tokens=len(ids) - len(engine.format.encode_text("", special=True)))
    assert short.mean == pytest.approx(float(values.mean()), rel=1e-3)
    assert short.positive == pytest.approx(float((values > 0).float().mean()))
    (best, *_) = page.neighbours["write"]
    columns = torch.cat([engine.sites.weight(f"layers.{layer}.mlp.down.weight").read().T for layer in range(LAYERS)])
    cosines = torch.nn.functional.cosine_similarity(columns, columns[NEURONS + index], dim=1)
    cosines[NEURONS + index] = 0
    assert best.layer * NEURONS + best.neuron == int(cosines.abs().argmax())
    assert abs(best.cosine) == pytest.approx(float(cosines.abs().max()), rel=1e-4)
    with pytest.raises(InvalidInput, match="too short"):
        neuron_page(engine, (1, index), "")
    with pytest.raises(UnknownSite, match="neuron 40"):
        neuron_page(engine, (1, NEURONS), TEXT)


def test_neurons_and_clamps_are_written_with_a_colon() -> None:
    assert parse_neuron(" 20:1114 ") == (20, 1114)
    assert parse_clamps(["20:1114=8", "1:2=-0.5"]) == {(20, 1114): 8.0, (1, 2): -0.5}
    for wrong in ("20", "a:b", "1:2:3", "-1:2"):
        with pytest.raises(InvalidInput, match="names no neuron"):
            parse_neuron(wrong)
    for clamps in (["1:2"], ["1:2="], ["1:2=x"], ["1:2=nan"], ["1:2=inf"], ["1:2=1", "1:2=2"]):
        with pytest.raises(InvalidInput):
            parse_clamps(clamps)
