"""Public data sets in their published formats.

Owns reading a folder of them. Knows nothing of models.
"""

from __future__ import annotations

import json
from pathlib import Path

from liveweight.errors import InvalidInput
from liveweight.guard.probe_set import ProbeSet

_INSTRUCTIONS = Path("refusal") / "harmless_first1000.json"
_TEXT = Path("wikitext") / "wikitext2_raw_test_first_half.txt"


def instructions(folder: Path) -> list[str]:
    """Neutral instructions, in the format of andyrdt/refusal_direction. Raises InvalidInput."""
    file = folder / _INSTRUCTIONS
    try:
        return [str(each["instruction"]) for each in json.loads(_read(file))]
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidInput(
            f"{file} does not hold instructions: {error!r}.", hint='It is a list of {"instruction": "..."}.'
        ) from error


def plain_text(folder: Path) -> str:
    """Plain English: WikiText-2. Raises InvalidInput."""
    return _read(folder / _TEXT)


def neutral_ground(folder: Path | None, probes: ProbeSet, *, questions: int = 100) -> tuple[list[str], str]:
    """Neutral instructions and plain text to measure damage on: the folder's public ones, or the guard's probes.

    No method is fitted to either.
    """
    if folder is not None and (folder / _INSTRUCTIONS).is_file() and (folder / _TEXT).is_file():
        return instructions(folder)[:questions], plain_text(folder)
    texts = "\n\n".join(probe.text for probe in probes.texts)
    return [probe.question for probe in probes.chats][:questions], texts


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{file} cannot be read: {error}.", hint="Name the folder that holds it.") from error
