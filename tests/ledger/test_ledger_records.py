"""Ids as people write them, and values as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from liveweight.errors import InvalidInput, UnknownChange, UnknownReply
from liveweight.ledger import Turn, parse_id
from liveweight.ledger.records import plain, to_json, turns_as_json


@pytest.mark.parametrize("written", ["c3", "C3", " c3 ", "3", 3, "c003"])
def test_an_id_can_be_written_in_several_ways(written: str | int) -> None:
    assert parse_id(written, "c") == 3


@pytest.mark.parametrize("written", ["r3", "c", "", "c-3", "c3.0", "three", "c3 4", "c٣"])
def test_what_is_no_id_of_a_change_is_named_in_the_error(written: str) -> None:
    with pytest.raises(UnknownChange) as caught:
        parse_id(written, "c")
    assert repr(written.strip()) in caught.value.message
    assert "c3" in caught.value.hint


def test_each_letter_has_its_own_error() -> None:
    with pytest.raises(UnknownReply):
        parse_id("c1", "r")
    with pytest.raises(InvalidInput):
        parse_id("c1", "p")


@dataclass(frozen=True)
class _Measured:
    kl: float
    texts: tuple[str, ...]


def test_reports_may_hold_dataclasses_records_tensors_and_numbers_that_json_lacks() -> None:
    value = {"guard": _Measured(math.inf, ("a", "b")), 3: [math.nan, -math.inf, None, True], "t": torch.ones(2)}
    assert plain(value) == {
        "guard": {"kl": "Infinity", "texts": ["a", "b"]},
        "3": ["NaN", "-Infinity", None, True],
        "t": [1.0, 1.0],
    }
    assert plain(Turn(role="user", content="x")) == {"role": "user", "content": "x"}


def test_what_json_cannot_hold_is_refused_by_its_type() -> None:
    with pytest.raises(InvalidInput, match="bytes"):
        plain({"x": b"raw"})


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(InvalidInput, match="tool"):
        turns_as_json([{"role": "tool", "content": "x"}])


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_becomes_json_that_utf8_can_hold(text: str) -> None:
    written = to_json(text)
    assert json.loads(written.encode()) == text
    assert "\x00" not in written
