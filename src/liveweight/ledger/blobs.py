"""Tensors on disk, named by what they hold.

Owns the folder of content-addressed safetensors files: a blob is written whole or not at all, never changed, and
checked against its name when read. Knows nothing of the database: who refers to a blob is told to `prune`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from liveweight.errors import LedgerDamaged, LedgerUnavailable, LiveweightError, NoSpace

_SUFFIX = ".safetensors"
_NAME = re.compile(r"[0-9a-f]{64}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BlobStore:
    """The blobs under one folder, as `ab/abcdef….safetensors`."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made when the first blob is written."""
        self.folder = folder

    def path(self, name: str) -> Path:
        """Where the blob of that sha256 is, or would be."""
        return self.folder / name[:2] / f"{name}{_SUFFIX}"

    def write(self, tensors: Mapping[str, Tensor]) -> str:
        """Keep the tensors durably and give their sha256.

        Raises NoSpace when the disk is full, LedgerUnavailable when the folder cannot be written.
        """
        content = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
        name = hashlib.sha256(content).hexdigest()
        target = self.path(name)
        try:
            if target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() == name:
                return name
            target.parent.mkdir(parents=True, exist_ok=True)
            _write_durably(target, content)
            for folder in (target.parent, self.folder, self.folder.parent):
                _fsync_folder(folder)
        except OSError as error:
            raise _explained(error, f"The blob {name[:12]} cannot be written to {self.folder}") from error
        return name

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of a blob. Raises LedgerDamaged when it is missing or not what its name says."""
        target = self.path(name)
        hint = f"Restore {target} from a backup."
        try:
            content = target.read_bytes()
        except FileNotFoundError as error:
            raise LedgerDamaged(f"The blob {name} is missing.", hint=hint, blob=name, path=str(target)) from error
        except OSError as error:
            raise _explained(error, f"The blob {name[:12]} cannot be read") from error
        found = hashlib.sha256(content).hexdigest()
        if found != name:
            raise LedgerDamaged(
                f"The blob {name} is damaged: its bytes have the sha256 {found}.",
                hint=hint,
                blob=name,
                path=str(target),
            )
        try:
            return load(content)
        except SafetensorError as error:
            raise LedgerDamaged(f"The blob {name} holds no tensors.", hint=hint, blob=name) from error

    def names(self) -> Iterator[str]:
        """The sha256 of every blob that is there, in order."""
        for file in sorted(self.folder.glob(f"??/*{_SUFFIX}")):
            if _NAME.fullmatch(file.stem):
                yield file.stem

    def prune(self, needed: Set[str]) -> list[str]:
        """Remove what nobody refers to, and what a killed process left half-written. Gives the names removed."""
        removed = [name for name in self.names() if name not in needed]
        try:
            for name in removed:
                self.path(name).unlink(missing_ok=True)
            for file in self.folder.glob("??/*.part"):
                file.unlink(missing_ok=True)
        except OSError as error:
            raise _explained(error, f"A blob in {self.folder} cannot be removed") from error
        return removed


def _write_durably(target: Path, content: bytes) -> None:
    """A reader sees the whole file or none: written beside its place, forced to disk, then renamed."""
    part = target.with_name(f"{target.stem}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system lets a folder be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: OSError, what: str) -> LiveweightError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in _FULL:
        return NoSpace(f"{what}: {reason}.", hint="Free some space and try again; nothing was changed.")
    return LedgerUnavailable(f"{what}: {reason}.", hint="Check the folder and its permissions.")
