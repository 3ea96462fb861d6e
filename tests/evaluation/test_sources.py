"""Public data sets are read in their published formats, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from liveweight.errors import InvalidInput
from liveweight.evaluation import instructions, plain_text


def test_instructions_and_text_are_read_from_where_they_lie(tmp_path: Path) -> None:
    (tmp_path / "refusal").mkdir()
    rows = [{"instruction": "Name a fruit.", "category": None}, {"instruction": "Say hello.", "category": None}]
    (tmp_path / "refusal" / "harmless_first1000.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "wikitext").mkdir()
    (tmp_path / "wikitext" / "wikitext2_raw_test_first_half.txt").write_text("plain", encoding="utf-8")
    assert instructions(tmp_path) == ["Name a fruit.", "Say hello."]
    assert plain_text(tmp_path) == "plain"


def test_what_is_not_there_or_not_of_that_form_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="wikitext2_raw"):
        plain_text(tmp_path)
    (tmp_path / "refusal").mkdir()
    (tmp_path / "refusal" / "harmless_first1000.json").write_text('[{"text": "x"}]', encoding="utf-8")
    with pytest.raises(InvalidInput, match="harmless_first1000"):
        instructions(tmp_path)
