"""Public data sets in their published formats.

Owns reading a folder of them. Knows nothing of models.
"""

from __future__ import annotations

import json
from pathlib import Path

from liveweight.errors import InvalidInput

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


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{file} cannot be read: {error}.", hint="Name the folder that holds it.") from error
