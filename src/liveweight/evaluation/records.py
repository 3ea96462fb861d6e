"""A long run's file: what was run on what, and every case that was measured, on disk as soon as it is done.

Owns going on with a run, and refusing a file that is another run's. Knows nothing of what the cases mean.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from liveweight.engines.fingerprints import write_atomically
from liveweight.errors import InvalidInput


class Records:
    """A run's file: what was run on what, and the cases of each part in order."""

    def __init__(self, file: Path, data: dict[str, Any]) -> None:
        """Take what the file holds, or is to hold."""
        self.file, self.data = file, data

    @classmethod
    def open(cls, file: Path, header: dict[str, Any], *, resume: bool) -> Records:
        """A new file, or the one to go on with. Raises InvalidInput where it was another run, or is in the way."""
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
        if not file.exists():
            return cls(file, {"run": header, "machine": machine})
        if not resume:
            raise InvalidInput(f"{file} is there already.", hint="Use --resume to go on with it, or name another file.")
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            before = data["run"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{file} is not a run's file: {error!r}.", hint="Name another one.") from error
        other = next((name for name in header if before.get(name) != header[name]), None)
        if other is not None:
            raise InvalidInput(
                f"{file} holds a run whose {other} was {before.get(other)!r}, not {header[other]!r}.",
                hint="Run with the same options, or name another file.",
            )
        return cls(file, data)

    def rows(self, part: str) -> list[dict[str, Any]]:
        """The cases of one part that are done."""
        found: list[dict[str, Any]] = self.data.get(part, [])
        return found

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Keep one more case, on disk too."""
        self.data.setdefault(part, []).append(row)
        self.save()

    def save(self) -> None:
        """Write the file as it is now."""
        write_atomically(self.file, json.dumps(self.data, indent=1, ensure_ascii=False))
