"""Text files that hold one thing a line.

Owns reading one: its encoding, what ends a line, and what is told where it cannot be read. Knows nothing of what the
lines mean.
"""

from __future__ import annotations

from pathlib import Path

from liveweight.errors import InvalidInput


def read_lines(path: Path, hint: str) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, without what ends them, each with its number from 1 on.

    Raises InvalidInput naming the file, with `hint` as the way out.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not UTF-8 text ({error}).", hint="Save it as UTF-8.") from error
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte in the name; a home that nobody has
        raise InvalidInput(f"{path} cannot be read: {error}.", hint=hint) from error
    # Newlines alone: str.splitlines would also break a line at U+2028, which JSON allows inside a string.
    return [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
