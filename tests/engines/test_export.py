"""A written model is, loaded by transformers alone, the model that was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from liveweight.adjustments import Active, Adjustment, Quantize, ReplaceNeurons, Steer
from liveweight.engines.export import export
from liveweight.errors import InvalidInput, Unsupported
from liveweight.tracing.quantization import linear_sites
from tests.tracing.tiny_engines import tiny_engine
from tiny_models import ARCHITECTURES, LAYERS, NEURONS, WIDTH, bytes_of, logits_of, tiny_model, tiny_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_quantised_model_loads_with_the_same_weights_and_logits(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    engine = tiny_engine(name, tmp_path, dtype)
    op = Quantize(sites=linear_sites(engine.sites), bits=4, block=(8, 8))
    state = (Active(Adjustment(name="four", method="quantize", ops=(op,))),)
    before = bytes_of(engine.model)
    folder = export(engine, tmp_path / "out", state)
    assert bytes_of(engine.model) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert loaded.dtype == dtype
    assert {key: value.shape for key, value in loaded.state_dict().items()} == {
        key: value.shape for key, value in tiny_model(name, dtype).state_dict().items()
    }
    with engine.preview(state):
        wished = logits_of(engine.model, tiny_tokens())
    assert torch.allclose(logits_of(loaded, tiny_tokens()), wished, atol=1e-5 if dtype == torch.float32 else 0.1)
    site = engine.sites.weight("layers.1.attn.o.weight")
    with engine.preview(state):
        assert torch.equal(loaded.get_parameter(site.parameter_name), site.parameter)
    assert AutoTokenizer.from_pretrained(folder)("abc")["input_ids"] == engine.format.encode_text("abc")


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    with pytest.raises(InvalidInput, match="not empty"):
        export(engine, full)
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
    with pytest.raises(InvalidInput, match="not empty"):
        export(engine, full / "mine.txt")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert (export(engine, empty) / "model.safetensors").exists()


def test_what_a_checkpoint_cannot_say_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    steer = Adjustment(name="a steering", method="m", ops=(Steer(site="layers.1.resid", vector=torch.ones(WIDTH)),))
    with pytest.raises(Unsupported, match="'a steering' acts while the model runs"):
        export(engine, tmp_path / "out", (Active(steer),))
    layer = next(layer for layer in range(LAYERS) if engine.sites.spare_of(layer))
    new = ReplaceNeurons(
        layer=layer, neurons=(NEURONS,), gate=torch.ones(1, WIDTH), up=torch.ones(1, WIDTH), down=torch.ones(WIDTH, 1)
    )
    with pytest.raises(Unsupported, match="new neurons"):
        export(engine, tmp_path / "out", (Active(Adjustment(name="new", method="m", ops=(new,))),))
    assert not (tmp_path / "out").exists()
