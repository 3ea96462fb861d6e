"""Plain text as a yardstick: windows of tokens, and the perplexity of a model in any state on them.

Owns cutting a text (the user's, or the English that ships with the package) into windows, and scoring them. Knows
nothing of what a state is for. Reads only.
"""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Sequence
from pathlib import Path

from liveweight.adjustments import State
from liveweight.engines.base import ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput

LENGTH = 256  # tokens of a window
_CHARACTERS = 8  # of plain text a token, more than any tokenizer needs on English


def packaged(*parts: str) -> str:
    """A text file that ships with the package, by its path in it."""
    file = importlib.resources.files("liveweight")
    for part in parts:
        file = file / part
    return file.read_text(encoding="utf-8")


def plain_text() -> str:
    """Some 70,000 characters of plain English, written for this package."""
    return packaged("methods", "plain_text.txt")


def text_of(path: Path | None) -> str:
    """A text file of the user's, or the text that ships. Raises InvalidInput for one that is empty or no text."""
    if path is None:
        return plain_text()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"{path} cannot be read as text: {error}.", hint="Give a file of plain UTF-8 text."
        ) from error
    if not text.strip():
        raise InvalidInput(f"{path} is empty.", hint="Give a file with some text.")
    return text


def window_length(engine: TransformersEngine, length: int = LENGTH) -> int:
    """`length` tokens, or the model's context where that is less."""
    return min(length, engine.info.context or length)


def windows_of(
    engine: TransformersEngine, text: str | None = None, *, tokens: int = 1280, length: int = LENGTH
) -> list[ScoreItem]:
    """The first `tokens` tokens of a text (None: the text that ships) in windows; each is scored from its third on.

    A window has `length` tokens, or the model's context where that is less, and begins with what the tokenizer puts
    before a text. Raises InvalidInput for a text of fewer than three tokens.
    """
    begin = engine.format.before_text
    length = max(3, window_length(engine, length) - len(begin))
    given = plain_text() if text is None else text
    ids: list[int] = []
    # Piecewise, since tokenizers warn of a text longer than the model's context.
    for paragraph in given[: tokens * _CHARACTERS].split("\n"):
        if len(ids) >= tokens:
            break
        ids += engine.format.encode_text(paragraph + "\n")
    pieces = [ids[start : min(start + length, tokens)] for start in range(0, min(len(ids), tokens), length)]
    found = [ScoreItem((*begin, *piece[:2]), tuple(piece[2:])) for piece in pieces if len(piece) > 2]
    if not found:
        raise InvalidInput(f"The text has {len(ids)} tokens, too few to measure on.", hint="Give a longer text.")
    return found


def loss(engine: TransformersEngine, window: ScoreItem, state: State) -> float:
    """Nats of a window's continuation under `state`, previewed: a running chat waits for no more than one window."""
    with engine.preview(state):
        return -engine.score([window])[0].total


def perplexity(engine: TransformersEngine, windows: Sequence[ScoreItem], state: State | None = None) -> float:
    """The exponential of the mean nats a token over all windows, under `state`; None is the present one.

    One preview for all windows, for a state that takes long to become.
    """
    with engine.preview(engine.state if state is None else state):
        total = -sum(engine.score([window])[0].total for window in windows)
    mean = total / counted(windows)
    return math.exp(mean) if mean < 700 else math.inf


def counted(windows: Sequence[ScoreItem]) -> int:
    """How many tokens are scored in windows."""
    return sum(len(window.continuation) for window in windows)
