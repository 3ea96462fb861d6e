"""Labels against a plain recomputation, and their cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from liveweight.adjustments import Active, Adjustment, Dense
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import LiveweightError, UnknownSite, Unsupported
from liveweight.tracing import Decoded, NeuronLabel, label_cache, label_layer, label_neurons, unembedding
from liveweight.tracing.label_cache import LabelCache
from tests.tracing.tiny_engines import engine_around, tiny_engine
from tiny_models import DENSE_ARCHITECTURES, LAYERS, NEURONS, WIDTH, bytes_of, tiny_model

CENTRED = ("gpt2", "gpt_neox")
PLUS_ONE = ("gemma2", "gemma3_text")
POST_NORM = ("gemma2", "gemma3_text", "olmo2")
NO_PRE_NORM = ("olmo2",)


def scale_of(engine: TransformersEngine, site: str) -> Tensor:
    weight = engine.sites.weight(site).read()
    return weight + 1 if engine.sites.architecture in PLUS_ONE else weight


def plainly_decoded(engine: TransformersEngine, vector: Tensor) -> Tensor:
    """softmax(U · norm(v)), written out."""
    if engine.sites.architecture in CENTRED:
        vector = vector - vector.mean()
    normed = vector / vector.pow(2).mean().sqrt() * scale_of(engine, "final_norm.weight")
    return (engine.sites.weight("lm_head.weight").read() @ normed).softmax(0)


def check(decoded: Decoded, expected: Tensor) -> None:
    values, tokens = expected.sort(descending=True)
    assert [guess.probability for guess in decoded.top] == pytest.approx(values[: len(decoded.top)].tolist(), rel=1e-4)
    assert decoded.top[0].id == int(tokens[0])
    assert decoded.entropy == pytest.approx(float(-(expected * expected.log()).sum()), rel=1e-4)


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_labels_are_a_softmax_through_the_unembedding(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    name = engine.sites.architecture
    for (layer, neuron), label in label_neurons(engine, [(2, 11), (0, 39), (2, 0)]).items():
        written = engine.sites.neuron_write(layer, neuron)
        if name in POST_NORM:
            written = written * scale_of(engine, f"layers.{layer}.mlp_post_norm.weight")
        check(label.promotes, plainly_decoded(engine, written))
        check(label.suppresses, plainly_decoded(engine, -written))
        reads = engine.sites.neuron_read(layer, neuron)
        assert label.reads.keys() == reads.keys()
        for part, row in reads.items():
            seen = row if name in NO_PRE_NORM else row * scale_of(engine, f"layers.{layer}.mlp_norm.weight")
            check(label.reads[part], plainly_decoded(engine, seen))


def test_a_neuron_that_writes_a_tokens_own_direction_is_labelled_with_that_token(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        model.model.layers[1].mlp.down_proj.weight[:, 6] = model.lm_head.weight[3]  # the letter a
    label = label_neurons(engine_around(model, tmp_path), [(1, 6)])[1, 6]
    assert label.promotes.top[0].text == "a"
    assert label.promotes.top[0].probability > 0.4
    assert label.text(tokens=1) == "a"
    assert label.text(negative=True, tokens=1) == label.suppresses.top[0].text.strip() != "a"


def test_labels_come_from_the_base_whatever_is_active(tmp_path: Path) -> None:
    engine = tiny_engine("llama_tied", tmp_path)
    expected = label_neurons(engine, [(1, 4)], cache_dir=tmp_path / "before")
    generator = torch.Generator().manual_seed(3)
    ops = tuple(
        Dense(site=site, delta=torch.randn(engine.sites.weight(site).shape, generator=generator))
        for site in ("layers.1.mlp.down.weight", "layers.1.mlp.up.weight", "lm_head.weight", "final_norm.weight")
    )
    engine.become((Active(Adjustment(name="noise", method="test", ops=ops)),))
    assert label_neurons(engine, [(1, 4)], cache_dir=tmp_path / "after") == expected


def test_a_whole_layer_in_small_pieces_equals_its_neurons_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine("phi3", tmp_path)
    alone = {
        (1, neuron): label_neurons(engine, [(1, neuron)], cache_dir=tmp_path / "alone")[1, neuron]
        for neuron in range(NEURONS)
    }
    monkeypatch.setattr(unembedding, "_LOGITS", 7 * engine.sites.vocabulary)
    monkeypatch.setattr(unembedding, "_BLOCK", 16)
    monkeypatch.setattr(unembedding, "_GROUP", 4)
    steps: list[tuple[int, int]] = []
    whole = label_layer(engine, 1, progress=lambda done, of: steps.append((done, of)))
    assert list(whole) == [(1, neuron) for neuron in range(NEURONS)]
    for pair, label in whole.items():
        assert label.promotes.top[0].id == alone[pair].promotes.top[0].id
        assert label.promotes.entropy == pytest.approx(alone[pair].promotes.entropy, rel=1e-4)
    assert steps == [(done, NEURONS) for done in (0, 7, 14, 21, 28, 34, 40)]


def test_only_what_is_asked_is_computed_and_only_once(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    first = label_neurons(engine, [(0, 1), (2, 5), (0, 1)])
    assert list(first) == [(0, 1), (2, 5)]
    cache = LabelCache(tmp_path, engine.info.hash)
    every = [(layer, neuron) for layer in range(LAYERS) for neuron in range(NEURONS)]
    assert cache.get(every).keys() == {(0, 1), (2, 5)}
    changed = first[2, 5].model_copy(update={"layer": 0, "neuron": 1})
    cache.put({(0, 1): cache.get([(2, 5)])[2, 5]})
    assert label_neurons(engine, [(0, 1)])[0, 1] == changed  # read from disk
    other = tiny_engine("llama", tmp_path, seed=1)
    assert label_neurons(other, [(0, 1)])[0, 1] != changed  # another model has labels of its own
    assert NeuronLabel.model_validate_json(changed.model_dump_json()) == changed


def test_a_damaged_cache_is_made_anew(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    expected = label_layer(engine, 0)
    cache = LabelCache(tmp_path, engine.info.hash)
    whole = cache.path.read_bytes()
    for content in (b"not a database at all, but long enough to be looked at" * 20, whole[:4096] + b"\xff" * 8192):
        cache.path.write_bytes(content)
        assert label_layer(engine, 0) == expected
        assert len(cache.get(list(expected))) == NEURONS


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LiveweightError, match="cannot be kept") as caught:
        label_neurons(engine, [(0, 0)], cache_dir=tmp_path / "file")
    assert "LIVEWEIGHT_CACHE_DIR" in caught.value.hint


def test_two_processes_keep_labels_at_once(tmp_path: Path) -> None:
    program = (
        "import importlib.util, pathlib, sys\n"
        "spec = importlib.util.spec_from_file_location('label_cache', sys.argv[3])\n"  # without torch, in no time
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "cache, layer = module.LabelCache(pathlib.Path(sys.argv[1]), 'model'), int(sys.argv[2])\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for neuron in range(25):\n"
        "    cache.put({(layer, neuron): b'own', (9, neuron): b'shared'})\n"
        "    assert cache.get([(layer, neuron)]) == {(layer, neuron): b'own'}\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), str(layer), str(label_cache.__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for layer in (0, 1)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        process.communicate("go\n", timeout=60)
    assert [process.returncode for process in processes] == [0, 0]
    kept = LabelCache(tmp_path, "model").get([(layer, neuron) for layer in (0, 1, 9) for neuron in range(25)])
    assert len(kept) == 75


def test_a_neuron_that_is_not_there_is_refused_and_nothing_is_kept(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    before = bytes_of(engine.model)
    with pytest.raises(UnknownSite, match="neuron 40"):
        label_neurons(engine, [(0, 1), (0, NEURONS)])
    with pytest.raises(UnknownSite, match="layer 3"):
        label_layer(engine, LAYERS)
    assert not (tmp_path / "neuron_labels").exists()
    assert bytes_of(engine.model) == before
    with pytest.raises(Unsupported, match="experts"):
        label_neurons(tiny_engine("olmoe", tmp_path), [(0, 0)])


def test_a_neuron_that_writes_nothing_decodes_into_every_token_alike(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 2] = 0.0
    engine = engine_around(model, tmp_path)
    label = label_neurons(engine, [(0, 2)])[0, 2]
    assert label.promotes.entropy == pytest.approx(float(torch.tensor(engine.sites.vocabulary).float().log()), rel=1e-5)
    assert engine.sites.width == WIDTH
