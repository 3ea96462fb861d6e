"""Hashes of large files, remembered so that a second start does not read them again.

Owns the small files `<cache_dir>/fingerprints/*.json`, keyed by what is hashed and by each file's path, size and
time of last change. Knows nothing of models. A file that changed has another key, so a stale value cannot be read.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def file_sha256(path: Path) -> str:
    """The sha256 of the file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The hash of a model: sha256 over (name, dtype, shape, bytes) of its tensors, sorted by name.

    A tensor that stands under two names (tied embeddings) should be given once.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{values.dtype}\0{tuple(values.shape)}\0".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def remembered(cache_dir: Path, what: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """`compute()`, or what it gave the last time for these very files."""
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([what, states]).encode()).hexdigest()
    entry = cache_dir / "fingerprints" / f"{key}.json"
    try:
        return str(json.loads(entry.read_text(encoding="utf-8"))["value"])
    except (OSError, ValueError, KeyError, TypeError):
        value = compute()  # not there yet, or not readable: compute it and write it again
    write_atomically(entry, json.dumps({"what": what, "files": states, "value": value}, indent=1))
    return value


@contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` when the block ends: no reader, and no crash, sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write a small text so that no reader, and no crash, ever sees half of it."""
    with in_place_of(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
