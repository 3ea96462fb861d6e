"""The plain English that ships with the package, and texts that a person gives.

Owns reading both. Knows nothing of what is read for.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from liveweight.errors import InvalidInput


def plain_text() -> str:
    """Some 70,000 characters of plain English, written for this package."""
    return resources.files("liveweight.methods").joinpath("plain_text.txt").read_text(encoding="utf-8")


def text_of(path: Path | None) -> str:
    """A text file's content; the text that ships where there is none. Raises InvalidInput for what is no text."""
    if path is None:
        return plain_text()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read as text: {error}.", hint="Give a UTF-8 text file.") from error
    if not text.strip():
        raise InvalidInput(f"{path} is empty.", hint="Give a text of some sentences.")
    return text
