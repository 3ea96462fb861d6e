"""Features on disk.

Owns a folder a model, `<cache_dir>/features/<model hash>/`, with one file for each version of the weights and set of
settings, and the note which of them was asked for last. What is there can be computed again: a file that cannot be read
counts as missing. Knows nothing of how features are made.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from liveweight.engines.fingerprints import write_atomically
from liveweight.errors import InvalidInput
from liveweight.tracing.feature_report import Features, FeatureSettings
from liveweight.tracing.label_cache import cannot_keep

FORMAT = 1  # raised when the same settings would give something else than before


class FeatureCache:
    """The features of one model that were made before."""

    def __init__(self, cache_dir: Path, model_hash: str) -> None:
        """Nothing is opened or made before the first use."""
        self.folder = cache_dir / "features" / model_hash

    def get(self, version: str, settings: FeatureSettings) -> Features | None:
        """What was kept for these settings at this version of the weights; it counts as asked for last."""
        file = self._file(version, settings)
        found = _read(file)
        if found is not None:
            self._note(version, file)
        return found

    def last(self, version: str) -> Features | None:
        """What was made or read last at this version of the weights."""
        try:
            name = (self.folder / f"{version[:16]}.last").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return _read(self.folder / name)

    def put(self, features: Features) -> None:
        """Keep features. Raises NoSpace, and LiveweightError where the folder cannot be written."""
        file = self._file(features.version, features.settings)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            features.save(file)
        except OSError as error:
            raise cannot_keep(file, error) from error
        self._note(features.version, file)

    def _note(self, version: str, file: Path) -> None:
        try:
            write_atomically(self.folder / f"{version[:16]}.last", file.name)
        except OSError as error:
            raise cannot_keep(file, error) from error

    def _file(self, version: str, settings: FeatureSettings) -> Path:
        # The text counts by its content, not by its name.
        told = settings.model_copy(update={"text": ""}).model_dump_json()
        digest = hashlib.sha256(f"{FORMAT} {version} {told}".encode()).hexdigest()
        return self.folder / f"{digest[:32]}.safetensors"


def _read(file: Path) -> Features | None:
    try:
        return Features.load(file)
    except InvalidInput:
        return None
