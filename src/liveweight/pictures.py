"""Pictures as files: a page that can be moved in, and an image for a document.

Owns writing a plotly figure, and knowing whether this machine can draw images. Knows nothing of what is drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from liveweight.errors import Unsupported

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_WIDTH, _HEIGHT, _SCALE = 900, 560, 2


def save(figure: Figure, path: Path) -> list[Path]:
    """Write `path` with the endings .html (whole in itself) and .png; what was written, in this order.

    The image needs Chrome or Chromium on this machine; without one only the page is written. Raises Unsupported where
    the browser is there and fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    page, image = path.with_suffix(".html"), path.with_suffix(".png")
    figure.write_html(page, include_plotlyjs=True)
    if not has_browser():
        return [page]
    try:
        width, height = figure.layout.width or _WIDTH, figure.layout.height or _HEIGHT
        figure.write_image(image, width=width, height=height, scale=_SCALE)
    except (RuntimeError, ValueError, OSError) as error:
        raise Unsupported(f"{image} could not be drawn: {error}", hint=f"The page {page} is there.") from error
    return [page, image]


def has_browser() -> bool:
    """Whether there is a Chrome or Chromium, which images are drawn with."""
    from choreographer.browsers import chromium

    return bool(chromium.Chromium.find_browser(skip_local=False))
