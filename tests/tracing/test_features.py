"""Features of tiny models: read, decoded, kept on disk, at whatever weights are active."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from liveweight.adjustments import Active, Adjustment, ScaleNeurons
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, LiveweightError, UnknownSite, Unsupported
from liveweight.tracing import Features, find_features, labelled, last_features
from liveweight.tracing.passages import LENGTH, passages, read_neurons
from tests.tracing.test_super_weights import COLUMN, LAYER, model_with_a_super_weight
from tests.tracing.tiny_engines import engine_around, tiny_engine
from tiny_models import DENSE_ARCHITECTURES, NEURONS, WIDTH

TEXT = "The cat sat on the mat. The dog lay by the door, and it rained all day long. " * 6
FEW: dict[str, Any] = {"layer": 1, "k": 5, "share": 0.2, "text": TEXT, "tokens": 200, "rounds": 8}


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_every_token_s_neurons_are_those_of_a_plain_forward_pass(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    read = passages(engine, TEXT, 100)
    values = read_neurons(engine, 2, read)
    kept: list[torch.Tensor] = []
    for passage in read:
        trace = engine.trace(passage.ids, ["layers.2.mlp.neurons"])
        kept.append(trace.values["layers.2.mlp.neurons"][passage.start :])
    assert values.shape == (NEURONS, sum(each.read for each in read))
    assert torch.allclose(values, torch.cat(kept).T, atol=1e-4)


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_features_hold_what_their_matrices_say(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    found = find_features(engine, **FEW)
    assert len(found) == 5 and found.tokens <= 200 and found.settings.layer == 1
    assert found.directions.shape == (NEURONS, 5) and found.coefficients.shape == (5, found.tokens)
    down = engine.sites.weight("layers.1.mlp.down.weight").read()
    written = found.directions.T @ down.T
    norm = engine.sites.write_norm(1)
    if norm is not None:
        written = norm.direction(written, engine.sites.weight(norm.site).read())
    assert torch.allclose(found.written, written, atol=1e-4)
    read = passages(engine, TEXT, 200)
    values = read_neurons(engine, 1, read)
    assert found.error == pytest.approx(
        float((values - found.directions @ found.coefficients).norm() / values.norm()), abs=1e-3
    )
    for number, feature in enumerate(found.features):
        assert feature.number == number and feature.layer == 1
        weights = [abs(each.weight) for each in feature.neurons]
        assert weights == sorted(weights, reverse=True) and len(weights) <= 8
        assert feature.neurons[0].neuron == int(found.directions[:, number].abs().argmax())
        assert feature.contexts[0].coefficient == pytest.approx(float(found.coefficients[number].max()))
        assert feature.promotes.top and feature.suppresses.top


def test_the_place_of_the_largest_coefficient_is_marked_in_its_text(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    found = find_features(engine, **FEW)
    ids = [token for passage in passages(engine, TEXT, 200) for token in passage.ids[passage.start :]]
    for feature in found.features:
        context = feature.contexts[0]
        token = ids[int(found.coefficients[feature.number].argmax())]
        assert context.token == engine.format.tokenizer.decode([token])
        assert (context.before + context.token + context.after) in TEXT.lower()
        assert f"[{context.token.strip() or context.token}]" in context.marked().plain


def test_they_are_kept_by_weights_and_settings_and_read_again(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    assert last_features(engine) is None
    told: list[str] = []
    found = find_features(engine, **FEW, progress=lambda what, done, of: told.append(what))
    assert set(told) == {"Reading the text", "Factorising"}
    again = find_features(engine, **FEW, progress=lambda what, done, of: told.append("again"))
    assert "again" not in told
    assert again.model_dump() == found.model_dump() and torch.equal(again.coefficients, found.coefficients)
    other = find_features(engine, **(FEW | {"seed": 1}))
    last = last_features(engine)
    assert last is not None and last.settings == other.settings != found.settings
    find_features(engine, **FEW)
    assert (last := last_features(engine)) is not None and last.settings == found.settings
    for file in (tmp_path / "features").rglob("*.safetensors"):
        file.write_bytes(b"half a file")
    assert last_features(engine) is None
    assert find_features(engine, **FEW).model_dump() == found.model_dump()


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    found = find_features(tiny_engine("qwen3", tmp_path), **FEW)
    found.save(tmp_path / "mine.safetensors")
    loaded = Features.load(tmp_path / "mine.safetensors")
    assert loaded.model_dump() == found.model_dump() and torch.equal(loaded.directions, found.directions)
    assert [file.name for file in tmp_path.glob("*mine*")] == ["mine.safetensors"]
    with pytest.raises(InvalidInput, match="No features can be read"):
        Features.load(tmp_path / "none")


def test_they_are_those_of_the_weights_that_are_active(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    base = find_features(engine, **FEW)
    op = ScaleNeurons(layer=0, neurons=tuple(range(8)), factors=torch.full((8,), 4.0))
    engine.become((Active(Adjustment(name="louder", method="test", ops=(op,))),))
    assert last_features(engine) is None
    changed = find_features(engine, **FEW)
    assert changed.version == engine.version.hash != base.version
    assert not torch.equal(changed.coefficients, base.coefficients)


def test_super_neurons_are_in_no_feature(tmp_path: Path) -> None:
    engine = engine_around(model_with_a_super_weight(), tmp_path)
    found = find_features(engine, **(FEW | {"layer": LAYER, "share": 1.0}))
    assert found.left_out == (COLUMN,)
    assert not bool(found.directions[COLUMN].any())
    assert "super neurons 19" in shown(found)


def test_neurons_get_their_labels_on_demand(tmp_path: Path) -> None:
    engine = tiny_engine("gpt2", tmp_path)
    feature = find_features(engine, **FEW)[2]
    assert all(not each.label for each in feature.neurons)
    assert all(each.label for each in labelled(engine, feature).neurons)


def test_a_long_text_is_read_in_passages_spread_over_it(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    text = "".join(f"line {number} of the book.\n" for number in range(20_000))
    read = passages(engine, text, 300)
    assert sum(each.read for each in read) == 300
    assert max(len(each.ids) for each in read) <= min(LENGTH, engine.info.context)
    seen = [engine.format.decode(each.ids) for each in read]
    numbers = [int(word) for part in seen for word in part.split() if word.isdigit()]
    assert max(numbers) - min(numbers) > 12_000


def test_views_fit_80_columns_and_the_picture_has_both_panels(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    found = find_features(engine, **FEW)
    for each in (found, labelled(engine, found[0])):
        assert max(map(len, shown(each).splitlines())) <= 80
    assert "error" in shown(found) and "neuron" in shown(found[1])
    figure = found.picture()
    assert [trace.type for trace in figure.data] == ["scatter", "heatmap"]
    assert list(figure.data[0].y) == list(found.errors)
    assert found.explained == pytest.approx(1 - found.error**2)
    with pytest.raises(InvalidInput, match="no feature 5"):
        found[5]


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    for options, error, said in (
        ({"layer": 3}, UnknownSite, "layer 3"),
        ({"text": " "}, InvalidInput, "no text"),
        ({"text": "a"}, InvalidInput, "no text"),
        ({"tokens": 0}, InvalidInput, "0 tokens"),
        ({"k": 41}, InvalidInput, "41 features"),
    ):
        with pytest.raises(error, match=said):
            find_features(engine, **(FEW | options))
    with pytest.raises(Unsupported, match="experts"):
        find_features(tiny_engine("mixtral", tmp_path), **FEW)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LiveweightError, match="cannot be kept"):
        find_features(engine, **FEW, cache_dir=tmp_path / "file")


def test_a_layer_is_chosen_by_depth_where_none_is_named(tmp_path: Path) -> None:
    engine: TransformersEngine = tiny_engine("llama", tmp_path)
    assert find_features(engine, **(FEW | {"layer": None})).settings.layer == 2
    assert engine.sites.width == WIDTH


def shown(value: object) -> str:
    console = Console(width=80, file=None, record=True, quiet=False)
    with console.capture() as capture:
        console.print(value)
    return capture.get()
