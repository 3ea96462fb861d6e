"""Pictures: the page is whole in itself, the image is an image, and without a browser there is only the page."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go
import pytest

from liveweight import pictures
from tests.requirements_present import require


def test_a_picture_is_a_page_and_an_image(tmp_path: Path) -> None:
    require(pictures.has_browser(), "there is no Chrome or Chromium to draw images with")
    page, image = pictures.save(go.Figure(go.Scatter(x=[1, 2], y=[2, 1])), tmp_path / "deep" / "curve")
    assert (page.name, image.name) == ("curve.html", "curve.png")
    assert image.read_bytes().startswith(b"\x89PNG")
    assert "Plotly.newPlot" in page.read_text(encoding="utf-8")


def test_without_a_browser_there_is_only_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "has_browser", lambda: False)
    assert [each.name for each in pictures.save(go.Figure(), tmp_path / "empty.png")] == ["empty.html"]
