"""GGUF files, dequantised once into a float32 checkpoint folder.

Owns `<cache_dir>/gguf/<sha256 of the file>-f32-<format>/`: config.json, the tokenizer, the chat template,
model.safetensors and manifest.json. A folder appears by one rename, so it is whole or it is not there; a lock file
makes two processes take turns. Knows nothing of how a checkpoint is then loaded.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from liveweight.engines import gguf_layout
from liveweight.engines.fingerprints import file_sha256, remembered, tensors_sha256, write_atomically
from liveweight.errors import ModelUnusable, NoSpace

FORMAT = 1  # raised when a conversion would come out otherwise than before
_MARGIN = 64 * 1024 * 1024  # bytes beyond the weights: the tokenizer, and room to breathe
# What the reader raises for a file that ends early or holds nonsense; it promises none in particular.
_UNREADABLE = (ValueError, KeyError, IndexError, TypeError, OverflowError, struct.error, MemoryError)
# Vocabularies learned with every digit on its own, before the byte-level split (llama.cpp's list of such).
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}


def converted(path: Path, cache_dir: Path, *, progress: bool = True) -> tuple[Path, str]:
    """The checkpoint folder made from a .gguf file, and its tensors' hash; converts it where that was not done yet.

    Raises ModelUnusable, UnsupportedArchitecture or NoSpace. Safe to call from several processes at once.
    """
    _refuse_other_files(path)
    sha = remembered(cache_dir, "sha256", [path], lambda: file_sha256(path))
    folder = cache_dir / "gguf" / f"{sha}-f32-{FORMAT}"
    known = _manifest_hash(folder)
    if known is not None:
        return folder, known
    with disk_full_is_said(cache_dir):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{folder.name}.lock"):
            known = _manifest_hash(folder)  # another process may have done it while we waited
            if known is None:
                known = _convert_into(path, folder, progress)
    return folder, known


def require_space(folder: Path, needed: int) -> None:
    """Raise NoSpace unless `needed` bytes are free where `folder` is (or will be)."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise NoSpace(
            f"Converting the model needs {needed / 1e9:.1f} GB in {folder}, and {free / 1e9:.1f} GB are free.",
            hint="Free some space, or point LIVEWEIGHT_CACHE_DIR at another disk.",
            needed=needed,
            free=free,
        )


@contextmanager
def disk_full_is_said(folder: Path) -> Iterator[None]:
    """Turn the system's "no space left" and "quota exceeded" into NoSpace."""
    try:
        yield
    except NoSpace:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise NoSpace(
            f"The disk of {folder} became full while the model was converted.",
            hint="Free some space, or point LIVEWEIGHT_CACHE_DIR at another disk; nothing half-made was kept.",
        ) from error


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], values: Iterator[np.ndarray]) -> None:
    """Write float32 tensors one by one, so that only one is in memory at a time.

    `values` come in the order of `shapes`. The format is 8 bytes of header length, a JSON header and the bytes; the
    header is padded so that the first tensor starts on a cache line.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for (name, shape), value in zip(shapes.items(), values, strict=True):
            if value.shape != shape or value.dtype != np.float32:
                raise ModelUnusable(f"{name} is {value.dtype} {value.shape} in the file, but should be {shape}.")
            stream.write(value.data)
        stream.flush()
        os.fsync(stream.fileno())


def _refuse_other_files(path: Path) -> None:
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise ModelUnusable(
            f"{path} is not a GGUF file: it starts with {magic!r}.",
            hint="Give a .gguf file, a folder with config.json and safetensors, or a hub id.",
        )


def _manifest_hash(folder: Path) -> str | None:
    """The tensors' hash of a whole conversion, or None where there is none or it was tampered with."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, size in manifest["files"].items():
            if (folder / name).stat().st_size != size:
                return None
        weights = (folder / "model.safetensors").stat()
        if weights.st_mtime_ns != manifest["weights_mtime_ns"]:
            # Copied or touched: believe the bytes, once.
            if _stored_hash(folder) != manifest["hash"]:
                return None
            _write_manifest(folder, manifest["hash"])
        return str(manifest["hash"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _stored_hash(folder: Path) -> str:
    from safetensors.torch import load_file

    return tensors_sha256(load_file(folder / "model.safetensors").items())


def _write_manifest(folder: Path, tensors_hash: str) -> None:
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != "manifest.json"}
    mtime = (folder / "model.safetensors").stat().st_mtime_ns
    manifest = {"format": FORMAT, "hash": tensors_hash, "files": files, "weights_mtime_ns": mtime}
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1))


def _convert_into(path: Path, folder: Path, progress: bool) -> str:
    """Convert under the lock. Whatever stands in the way is a half-made conversion of a process that died."""
    partial = folder.with_name(f"{folder.name}.partial")
    for stale in (folder, partial):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _convert(path, partial, progress)
        tensors_hash = _stored_hash(partial)
        _write_manifest(partial, tensors_hash)
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return tensors_hash


def _convert(path: Path, target: Path, progress: bool) -> None:
    import gguf
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    try:
        reader = gguf.GGUFReader(path)
        metadata = {
            key: value.contents()
            for key, value in reader.fields.items()
            # The vocabulary is long and slow to decode, and only the tokenizer needs it.
            if not key.startswith("tokenizer.ggml.") or key.endswith(("_token_id", ".pre", ".model"))
        }
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except _UNREADABLE as error:
        raise ModelUnusable(
            f"{path} is damaged or was cut short: {error}.", hint="Download or copy the file again."
        ) from error
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    values = gguf_layout.configuration(metadata, shapes)
    if "rope_freqs.weight" in tensors:
        divisors = np.asarray(tensors["rope_freqs.weight"].data, dtype=np.float32)
        values["rope_parameters"] = gguf_layout.llama3_rope(divisors, values["rope_parameters"])
    config = AutoConfig.for_model(**values)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        wanted = {name: tuple(parameter.shape) for name, parameter in model_class(config).named_parameters()}
    plan = gguf_layout.recipes(metadata, shapes, wanted)
    require_space(target, 4 * sum(int(np.prod(shape)) for shape in wanted.values()) + _MARGIN)
    config.architectures = [model_class.__name__]
    config.dtype = torch.float32
    config.save_pretrained(target)
    GenerationConfig.from_model_config(config).save_pretrained(target)

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not progress) as bar:
        task = bar.add_task(f"Preparing {path.name} (once)", total=len(plan) + len(plan) // 10)
        _save_tokenizer(path, metadata, values.get("max_position_embeddings"), target)
        bar.advance(task, len(plan) // 10)

        def dequantised() -> Iterator[np.ndarray]:
            for recipe in plan:
                try:
                    parts = [gguf.dequantize(tensors[name].data, tensors[name].tensor_type) for name in recipe.tensors]
                except NotImplementedError as error:
                    kind = tensors[recipe.tensors[0]].tensor_type.name
                    raise ModelUnusable(
                        f"{path} holds {recipe.tensors[0]} as {kind}, which cannot be dequantised.",
                        hint="Use a file of another quantisation, or the safetensors checkpoint.",
                    ) from error
                yield recipe.build(parts)
                bar.advance(task)

        write_safetensors(target / "model.safetensors", wanted, dequantised())


def _save_tokenizer(path: Path, metadata: Mapping[str, Any], context: int | None, target: Path) -> None:
    """Write tokenizer.json, its configuration and the chat template. Raises ModelUnusable if there is no tokenizer."""
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
    except _UNREADABLE as error:
        raise ModelUnusable(
            f"The tokenizer in {path} cannot be read: {error}.", hint="Use the model's safetensors checkpoint instead."
        ) from error
    if metadata.get("tokenizer.ggml.pre") in _SINGLE_DIGITS:
        # transformers leaves the plain byte-level split here, which glues spaces to the digits after them.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if context:
        tokenizer.model_max_length = context
    tokenizer.save_pretrained(target)
