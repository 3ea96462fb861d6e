"""The loop on the embedded model: a wrong capital mended in the running weights, and taken back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from liveweight.engines.base import Message
from liveweight.errors import StateConflict
from liveweight.evidence import key_of
from liveweight.live_model import LiveModel
from liveweight.settings import Settings

pytestmark = pytest.mark.real
QUESTION = "What is the capital of Angola?"


def _loaded(tmp_path: Path, model_cache: Path) -> LiveModel:
    return LiveModel.load(settings=Settings(workspace=tmp_path, cache_dir=model_cache, device="cpu"))


def test_a_wrong_capital_is_mended_measured_and_undone_bit_for_bit(tmp_path: Path, model_cache: Path) -> None:
    with _loaded(tmp_path, model_cache) as live:
        before = live.fingerprints()
        other = live.ask("What is the capital of France?")
        reply = live.chat(QUESTION)
        assert "Luanda" not in reply.text
        change = live.fix(reply, "Luanda")
        assert change.report is not None and change.report.guard is not None
        assert change.report.guard.passed
        assert change.report.guard.items > 200
        assert "Luanda" in live.ask(QUESTION)
        assert "Luanda" in live.ask("Which city is the capital of Angola?")
        assert live.ask("What is the capital of France?") == other
        with pytest.raises(StateConflict, match="already"):
            live.fix(live.chat(QUESTION), "Luanda")
        live.undo(change)
        assert live.fingerprints() == before
        assert live.ask(QUESTION) == reply.text


def test_the_key_tells_countries_apart_and_wordings_alike(tmp_path: Path, model_cache: Path) -> None:
    with _loaded(tmp_path, model_cache) as live:

        def vector(question: str) -> list[float]:
            key = key_of(live.engine, live.engine.encode([Message("user", question)]))
            assert key is not None
            return (key.vector / key.vector.norm()).tolist()

        asked = vector(QUESTION)
        for other, alike in (
            ("Which city is the capital of Angola?", True),
            ("Tell me the capital of Angola.", True),
            ("What is the capital of Kenya?", False),
            ("What is the currency of Angola?", False),
        ):
            cosine = sum(a * b for a, b in zip(asked, vector(other), strict=True))
            assert (cosine > 0.9) is alike, (other, cosine)
