"""The benchmark's table, from cases written by hand."""

from __future__ import annotations

from typing import Any

from benchmarks.figures import table

HEAD: dict[str, Any] = {"run": {"model": "abc", "cases": 2}, "machine": {"threads": 2}}
MENDED = {
    "question": "q1",
    "state": "active",
    "method": "patch",
    "right": True,
    "held_out": [True, True, True, False],
    "unseen": [True, True, True, False],
    "neighbours": 100,
    "unchanged": 99,
    "still_right": 100,
    "kl": 0.004,
    "perplexity": 1.002,
    "propose": 2.0,
    "wall": 8.0,
}
REFUSED = {
    "question": "q2",
    "state": "guard_refused",
    "right": False,
    "held_out": [False] * 4,
    "unseen": [False] * 4,
    "neighbours": 100,
    "unchanged": 100,
    "still_right": 100,
    "kl": 0.0,
    "perplexity": 1.0,
    "wall": 99.0,
}


def line(text: str, beginning: str) -> list[str]:
    """The cells of the row whose first cell begins so."""
    row = next(each for each in text.splitlines() if each.startswith(f"| {beginning}"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_refused_cases_count_as_not_mended_and_do_not_dilute_the_damage() -> None:
    text = table(HEAD | {"single": [MENDED, REFUSED]})
    assert line(text, "`fix`, one at a time")[1:] == ["≥ 98%", "50.0% (1 of 2)", "**no**"]
    assert line(text, "the same in 4 wordings")[2] == "37.5% (3 of 8)"
    assert line(text, "answers to the neighbours unchanged")[2:] == ["99.0% (99 of 100)", "yes"]
    assert line(text, "mean KL")[2:] == ["0.00400", "yes"]
    assert line(text, "seconds with the full guard")[2:] == ["8.00", "yes"]
    assert line(text, "not changed")[2] == "q2 (guard_refused)"


def test_lora_is_compared_on_the_same_cases_only() -> None:
    lora = {
        "question": "q1",
        "seconds": 8.0,
        "right": True,
        "held_out": [True] * 2 + [False] * 2,
        "unseen": [True] * 4,
        "contexts": 8,
    }
    slow = MENDED | {"question": "q3", "propose": 50.0}
    text = table(HEAD | {"single": [MENDED, slow], "lora": [lora]})
    assert line(text, "our proposal, 1 of the same cases")[2].startswith("2.00 s")
    assert line(text, "our seconds / LoRA's")[2:] == ["0.25", "yes"]
    better = table(HEAD | {"single": [MENDED], "lora": [lora | {"held_out": [True] * 4}]})
    assert line(better, "our seconds / LoRA's")[3] == "**no**"
    refused = table(HEAD | {"single": [MENDED, REFUSED], "lora": [lora, lora | {"question": "q2"}]})
    assert line(refused, "our seconds / LoRA's")[3] == "**no**"  # 3 of 8 in other wordings, against 4 of 8


def test_one_tensor_that_differs_is_not_an_exact_undo() -> None:
    run = {
        "right": [True] * 19 + [False],
        "held_out": [True],
        "unseen": [True],
        "unchanged": 97,
        "still_right": 98,
        "neighbours": 100,
        "kl": 0.02,
        "perplexity": 1.01,
        "goods_same": [True] * 29 + [False],
        "undone": 60,
        "tensors": 272,
        "tensors_equal": 271,
    }
    text = table(HEAD | {"all": [run]})
    assert line(text, "all 20 fixes in one model")[2:] == ["95.0% (19 of 20)", "yes"]
    assert line(text, "neighbours unchanged")[3] == "yes"
    assert line(text, "`good` answers")[3] == "**no**"
    assert line(text, "undo of all 60 changes")[2:] == ["271 of 272", "**no**"]


def test_bad_counts_the_question_and_its_wordings_apart() -> None:
    row = {
        "state": "active",
        "another_before": [False, True, False, False],
        "another": [True, True, False, True],
        "babble": [False, False, False, True],
        "babble_before": [False] * 4,
        "fluency": [300.0] * 4,
        "fluency_before": [310.0] * 4,
    }
    text = table(HEAD | {"bad": [row]})
    assert line(text, "`bad`: another answer")[2:] == ["100.0% (1 of 1)", "yes"]
    assert line(text, "and in 3 wordings too")[2:] == ["66.7% (2 of 3)", "**no**"]
    assert line(text, "babble among")[2:] == ["25.0% (1 of 4)", "**no**"]
    assert line(text, "fluency")[2] == "300 / 310"
    refused = table(HEAD | {"bad": [row | {"state": "guard_refused"}]})
    assert line(refused, "and in 3 wordings too")[2] == "0.0% (0 of 3)"


def test_a_part_that_was_not_run_has_no_line() -> None:
    assert len(table(HEAD).splitlines()) == 4
