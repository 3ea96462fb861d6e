"""A tiny engine that every evaluation test may change."""

from __future__ import annotations

from pathlib import Path

import pytest

from liveweight.engines.transformers import TransformersEngine
from tracing.tiny_engines import tiny_engine


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> TransformersEngine:
    return tiny_engine(request.param, tmp_path)
