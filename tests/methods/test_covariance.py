"""Key statistics: what they are, of what, and what the cache may and may not do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from liveweight.adjustments import Active, Adjustment, ScaleNeurons
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, Unsupported
from liveweight.methods.covariance import covariance, covariances, plain_text, whitened
from liveweight.settings import MethodSettings
from tests.tracing.tiny_engines import tiny_engine

TEXT = "a river runs to the sea, and the sea runs nowhere.\n" * 7


@pytest.fixture
def settings(tmp_path: Path) -> MethodSettings:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return MethodSettings(covariance_text=file)


def written_out(engine: TransformersEngine, layer: int) -> torch.Tensor:
    """The mean outer product over the text, by the engine's own trace: rows of 63 tokens behind a beginning of text."""
    site = f"layers.{layer}.mlp.neurons"
    ids = engine.format.encode_text(TEXT)
    step = engine.info.context
    values = torch.cat([engine.trace(ids[at : at + step], [site]).values[site] for at in range(0, len(ids), step)])
    return values.T.double() @ values.double() / len(values)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "qwen3"])
def test_the_covariance_is_the_mean_outer_product_of_activations(
    architecture: str, settings: MethodSettings, tmp_path: Path
) -> None:
    engine = tiny_engine(architecture, tmp_path)
    found = covariances(engine, [0, 2], settings, progress=False)
    for layer, values in found.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values.double(), written_out(engine, layer), atol=1e-4, rtol=1e-3)


def test_it_is_of_the_base_whatever_is_active(settings: MethodSettings, tmp_path: Path) -> None:
    plain = covariance(tiny_engine("llama", tmp_path / "a"), 2, settings, progress=False)
    engine = tiny_engine("llama", tmp_path / "b")
    scaled = ScaleNeurons(layer=0, neurons=tuple(range(40)), factors=torch.full((40,), -3.0))
    state = (Active(Adjustment(name="other", method="test", ops=(scaled,))),)
    engine.become(state)
    assert torch.equal(covariance(engine, 2, settings, progress=False), plain)
    assert engine.state == state


def test_a_second_call_reads_the_file_and_runs_nothing(settings: MethodSettings, tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    first = covariance(engine, 1, settings, progress=False)
    calls: list[int] = []
    handle = engine.sites.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(covariance(engine, 1, settings, progress=False), first)
    handle.remove()
    assert not calls
    (file,) = (tmp_path / "covariance").iterdir()
    assert file.suffix == ".safetensors"


def test_another_text_another_model_and_another_layer_have_files_of_their_own(
    settings: MethodSettings, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("nothing of the sort", encoding="utf-8")
    engine = tiny_engine("llama", tmp_path)
    covariances(engine, [0, 1], settings, progress=False)
    covariance(engine, 0, MethodSettings(covariance_text=other), progress=False)
    covariance(tiny_engine("llama", tmp_path, seed=1), 0, settings, progress=False)
    assert len(list((tmp_path / "covariance").iterdir())) == 4


def test_a_half_written_file_is_made_anew(settings: MethodSettings, tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    first = covariance(engine, 1, settings, progress=False)
    (file,) = (tmp_path / "covariance").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(covariance(engine, 1, settings, progress=False), first)
    assert len(file.read_bytes()) > 100


def test_only_the_layers_up_to_the_deepest_one_run(settings: MethodSettings, tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    calls: list[int] = []
    handle = engine.sites.blocks[2].register_forward_pre_hook(lambda *_: calls.append(1))
    covariance(engine, 1, settings, progress=False)
    handle.remove()
    assert not calls


def test_whitening_solves_for_one_key_and_for_many(settings: MethodSettings, tmp_path: Path) -> None:
    statistics = covariance(tiny_engine("llama", tmp_path), 1, settings, progress=False)
    keys = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    many = whitened(statistics, keys)
    torch.testing.assert_close(many[:, 1], whitened(statistics, keys[:, 1]))
    ridge = 0.01 * statistics.double().diagonal().median()
    torch.testing.assert_close(statistics.double() @ many + ridge * many, keys.double(), atol=1e-6, rtol=1e-6)


def test_our_own_text_is_long_enough_to_know_a_model_by() -> None:
    assert len(plain_text(MethodSettings()).split()) > 10_000


def test_a_text_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    for name, content in (("missing.txt", None), ("empty.txt", b" \n"), ("bytes.txt", b"\xff\xfe\x00")):
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InvalidInput, match=name):
            plain_text(MethodSettings(covariance_text=file))


def test_layers_of_experts_have_no_covariance(settings: MethodSettings, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="experts"):
        covariance(tiny_engine("mixtral", tmp_path), 0, settings, progress=False)
