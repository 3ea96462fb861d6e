"""GGUF files become float32 checkpoints: the right weights, once, whole, whoever asks at the same time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from liveweight.engines import gguf_cache
from liveweight.engines.fingerprints import tensors_sha256
from liveweight.engines.gguf_cache import converted, disk_full_is_said, require_space, write_safetensors
from liveweight.engines.gguf_layout import LAYOUTS, llama3_rope
from liveweight.engines.model_source import LoadedModel, load, resolve
from liveweight.errors import ModelUnusable, NoSpace, UnsupportedArchitecture
from liveweight.settings import Settings
from tests.engines import gguf_files

TOKENS = torch.tensor([[1, 9, 40, 77, 33, 250, 12, 8, 8, 8, 101, 64]])


def loaded(path: Path, tmp_path: Path) -> LoadedModel:
    return load(resolve(str(path), settings=Settings(cache_dir=tmp_path / "cache")), device="cpu", progress=False)


@pytest.mark.parametrize("name", gguf_files.CONFIGS)
def test_a_gguf_file_gives_back_the_model_it_was_written_from(name: str, tmp_path: Path) -> None:
    written = gguf_files.write(tmp_path / "m.gguf", name)
    read = loaded(tmp_path / "m.gguf", tmp_path).model
    assert type(read) is type(written)
    for (wanted, parameter), (found, value) in zip(written.named_parameters(), read.named_parameters(), strict=True):
        assert wanted == found
        # one is added to Gemma's norms and taken off again, which rounds
        exact = name.startswith("gemma") and wanted.endswith("norm.weight")
        assert torch.allclose(parameter, value, atol=1e-6 if exact else 0, rtol=0), wanted
    with torch.no_grad():
        torch.testing.assert_close(read(TOKENS).logits, written(TOKENS).logits, atol=2e-5, rtol=1e-4)


def test_every_readable_architecture_is_tried_here() -> None:
    assert set(gguf_files.ARCHITECTURES.values()) == set(LAYOUTS)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi3"])
def test_the_weights_are_those_that_transformers_reads(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    gguf_files.write(tmp_path / "m.gguf", name)
    ours = loaded(tmp_path / "m.gguf", tmp_path).model
    logging.set_verbosity_error()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    for parameter, (found, value) in zip(ours.parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(parameter, value), found


@pytest.mark.parametrize(
    "kind", [gguf.GGMLQuantizationType[name] for name in ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")]
)
def test_each_float_type_and_quantisation_is_read(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    written = gguf_files.write(tmp_path / "m.gguf", kind=kind)
    read = loaded(tmp_path / "m.gguf", tmp_path).model
    assert read.dtype is torch.float32
    weight = written.model.layers[0].mlp.down_proj.weight.detach().numpy()
    expected = gguf.dequantize(gguf.quantize(weight, kind), kind)
    assert np.array_equal(read.model.layers[0].mlp.down_proj.weight.numpy(), expected)


def test_a_k_quantised_file_is_read(tmp_path: Path) -> None:
    # The package cannot write K-quants, but every pattern of bits is one: 256 numbers in 144 bytes.
    kind = gguf.GGMLQuantizationType.Q4_K
    blocks = np.random.default_rng(0).integers(0, 50, size=(3, 144), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("t", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = gguf.GGUFReader(tmp_path / "k.gguf").tensors[0]
    assert gguf.dequantize(tensor.data, tensor.tensor_type).shape == (3, 256)


def test_the_second_start_converts_nothing(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "m.gguf")
    folder, first = converted(tmp_path / "m.gguf", tmp_path / "cache", progress=False)
    made = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    again, second = converted(tmp_path / "m.gguf", tmp_path / "cache", progress=False)
    assert (again, second) == (folder, first)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == made
    assert first == tensors_sha256(load_file(folder / "model.safetensors").items())


@pytest.mark.parametrize("damage", ["cut weights", "no manifest", "bad manifest", "no tokenizer", "other bytes"])
def test_a_half_written_or_altered_conversion_is_made_again(damage: str, tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "m.gguf")
    folder, first = converted(tmp_path / "m.gguf", tmp_path / "cache", progress=False)
    whole = (folder / "model.safetensors").read_bytes()
    if damage == "cut weights":
        os.truncate(folder / "model.safetensors", len(whole) // 2)
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    elif damage == "bad manifest":
        (folder / "manifest.json").write_text("[")
    elif damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "model.safetensors").write_bytes(whole[:-4] + b"\0\0\0\1")
        os.utime(folder / "model.safetensors", ns=(1, 1))
    assert converted(tmp_path / "m.gguf", tmp_path / "cache", progress=False) == (folder, first)
    assert (folder / "model.safetensors").read_bytes() == whole
    assert (folder / "tokenizer.json").is_file()


def test_a_copied_cache_is_believed_after_one_look(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "m.gguf")
    folder, first = converted(tmp_path / "m.gguf", tmp_path / "cache", progress=False)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    inode = (folder / "model.safetensors").stat().st_ino
    assert converted(tmp_path / "m.gguf", tmp_path / "cache", progress=False) == (folder, first)
    assert (folder / "model.safetensors").stat().st_ino == inode
    assert json.loads((folder / "manifest.json").read_text())["weights_mtime_ns"] == 1


def test_what_a_process_that_died_left_behind_is_cleared(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "m.gguf")
    folder, _ = converted(tmp_path / "m.gguf", tmp_path / "cache", progress=False)
    partial = folder.with_name(folder.name + ".partial")
    folder.rename(partial)
    (partial / "manifest.json").unlink()
    converted(tmp_path / "m.gguf", tmp_path / "cache", progress=False)
    assert folder.is_dir() and not partial.exists()


def test_processes_that_start_together_make_one_conversion(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "m.gguf")
    program = (
        "import sys; from pathlib import Path; from liveweight.engines.gguf_cache import converted;"
        "folder, found = converted(Path(sys.argv[1]), Path(sys.argv[2]), progress=False);"
        "print(found, (folder / 'model.safetensors').stat().st_ino)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "m.gguf"), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(said) == 1
    assert len([entry for entry in (tmp_path / "cache" / "gguf").iterdir() if entry.is_dir()]) == 1


def test_a_changed_file_is_another_model(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "m.gguf")
    first = converted(tmp_path / "m.gguf", tmp_path / "cache", progress=False)
    gguf_files.write(tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType.F16)
    second = converted(tmp_path / "m.gguf", tmp_path / "cache", progress=False)
    assert first[0] != second[0] and first[1] != second[1]


def test_digits_and_spaces_are_split_as_the_vocabulary_was_learned(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "digits.gguf", pre_tokenizer="smollm")
    gguf_files.write(tmp_path / "plain.gguf", pre_tokenizer="gpt-2")
    digits, plain = (loaded(tmp_path / name, tmp_path).tokenizer for name in ("digits.gguf", "plain.gguf"))
    assert [digits.convert_ids_to_tokens(i) for i in digits.encode("x  12")] == ["x", "ĠĠ", "1", "2"]
    assert [plain.convert_ids_to_tokens(i) for i in plain.encode("x  12")] == ["x", "Ġ", "Ġ", "1", "2"]
    text = "Ünïcödé 1234\n\n  x\t<|im_end|>"
    assert digits.decode(digits.encode(text)) == text
    assert digits.chat_template == gguf_files.TEMPLATE
    assert digits.model_max_length == 128


def test_a_text_file_is_not_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("hello")
    with pytest.raises(ModelUnusable, match=r"is not a GGUF file: it starts with b'hell'"):
        loaded(tmp_path / "m.gguf", tmp_path)


@pytest.mark.parametrize("share", [0.0001, 0.02, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_told(share: float, tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "m.gguf")
    size = (tmp_path / "m.gguf").stat().st_size
    os.truncate(tmp_path / "m.gguf", max(5, int(size * share)))
    with pytest.raises(ModelUnusable, match=r"damaged or was cut short.*again"):
        loaded(tmp_path / "m.gguf", tmp_path)
    assert not [entry for entry in (tmp_path / "cache" / "gguf").iterdir() if entry.is_dir()]


def test_an_architecture_without_a_layout_is_told_with_the_readable_ones(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedArchitecture, match=r"'mamba' cannot be read.*gemma2.*llama.*qwen3"):
        loaded(tmp_path / "m.gguf", tmp_path)


def test_a_missing_tensor_and_one_without_a_place_are_named(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "a.gguf", leave_out="blk.1.ffn_up.weight")
    with pytest.raises(ModelUnusable, match=r"missing \['blk\.1\.ffn_up\.weight'\]"):
        loaded(tmp_path / "a.gguf", tmp_path)
    gguf_files.write(tmp_path / "b.gguf", extra={"blk.0.surprise.weight": np.zeros(4, dtype=np.float32)})
    with pytest.raises(ModelUnusable, match=r"without a place \['blk\.0\.surprise\.weight'\]"):
        loaded(tmp_path / "b.gguf", tmp_path)


def test_llama_3_frequency_divisors_become_rope_parameters(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    wanted = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(head_dim=128, max_position_embeddings=131_072, rope_parameters=wanted)
    plain = 500_000.0 ** -(torch.arange(64) / 64)
    divisors = (plain / LlamaRotaryEmbedding(config).inv_freq).numpy().astype(np.float32)
    found = llama3_rope(divisors, rope)
    assert found | {"factor": round(found["factor"], 3)} == wanted
    with pytest.raises(ModelUnusable, match="not of the Llama 3 form"):
        llama3_rope(divisors[::-1].copy(), rope)


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(NoSpace, match=r"needs 1000000000\.0 GB .*LIVEWEIGHT_CACHE_DIR"):
        require_space(tmp_path / "not" / "there", 10**18)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_becomes_full_is_told(tmp_path: Path) -> None:
    values = iter([np.zeros((1 << 16,), dtype=np.float32)])
    with pytest.raises(NoSpace, match="became full"), disk_full_is_said(tmp_path):
        write_safetensors(Path("/dev/full"), {"a": (1 << 16,)}, values)


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "m.gguf")
    program = (
        "import resource, sys; from pathlib import Path; from liveweight.engines.gguf_cache import converted;"
        "from liveweight.errors import NoSpace\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: converted(Path(sys.argv[1]), Path(sys.argv[2]), progress=False)\n"
        "except NoSpace as error: print(error)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "m.gguf"), str(tmp_path / "cache")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "became full" in said and "nothing half-made was kept" in said
    assert not [entry for entry in (tmp_path / "cache" / "gguf").iterdir() if entry.is_dir()]


def test_the_weights_start_on_a_cache_line(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w", {"a": (3,)}, iter([np.arange(3, dtype=np.float32)]))
    header = int.from_bytes((tmp_path / "w").read_bytes()[:8], "little")
    assert (header + 8) % 64 == 0
    assert torch.equal(load_file(tmp_path / "w")["a"], torch.arange(3.0))


@pytest.mark.real
def test_the_embedded_model_answers_a_question(embedded: LoadedModel) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = embedded.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = embedded.model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answer = embedded.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
    assert embedded.model.lm_head.weight is embedded.model.model.embed_tokens.weight
    assert not any(parameter.requires_grad for parameter in embedded.model.parameters())
    assert not embedded.model.training


@pytest.mark.real
@pytest.mark.slow
def test_the_embedded_model_s_weights_are_those_that_transformers_reads(embedded: LoadedModel) -> None:
    from transformers import AutoModelForCausalLM

    path = embedded.source.path
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    for parameter, (name, value) in zip(embedded.model.parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(parameter, value), name
    assert gguf_cache.FORMAT == 1
