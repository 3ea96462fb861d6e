"""What tests of methods on tiny models share."""

from __future__ import annotations

import pytest

from liveweight.methods import surroundings


@pytest.fixture
def a_few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tiny model usually reads is read in a second."""
    monkeypatch.setattr(surroundings, "everyday_questions", lambda: ["how are you?", "what is two?", "say hello"])
    monkeypatch.setattr(surroundings, "same_questions", lambda: [["what is two?", "say: what is two?"]])
    monkeypatch.setattr(surroundings, "_PLAIN_TOKENS", 512)
