"""Folding a change of a running model: the same function, in the ledger, and back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from liveweight.adjustments import Adjustment, Dense, Entries, Gain, MixHeads, Op
from liveweight.errors import InvalidInput, StateConflict, UnknownChange, Unsupported
from liveweight.live_model import LiveModel
from tests.tiny_workspace import QUESTION, tiny_settings

NEURONS = (3, 8, 20)


def gains(slope: float = 1.0) -> Gain:
    return Gain(layer=1, neurons=NEURONS, gains=torch.tensor([3.0, 0.0, 2.5]), slopes=torch.full((3,), slope))


def adjustment(*ops: Op, name: str = "gains") -> Adjustment:
    return Adjustment(name=name, method="gain", ops=ops)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveModel]:
    with LiveModel.load(settings=tiny_settings(tmp_path)) as model:
        yield model


def logits(live: LiveModel) -> Tensor:
    return live.engine.logits((1, 5, 9, 12), (7, 8, 20))


def test_a_folded_change_is_the_same_function_without_a_hook_and_undo_brings_the_old_one_back(live: LiveModel) -> None:
    base = live.fingerprints()
    live.apply(adjustment(gains()), prompt=QUESTION)
    live.set_strength("c1", 0.5)
    hooks, acting, answer = live.engine.activations.hooks, logits(live), live.ask(QUESTION)
    assert hooks == 1 and live.fingerprints() == base
    change = live.fold("c1")
    assert (change.label, change.state, change.strength, change.method) == ("c2", "active", 0.5, "gain")
    assert live.change("c1").state == "off" and live.change("c1").replaced_by == "c2"
    assert live.engine.activations.hooks == 0 and live.fingerprints() != base
    torch.testing.assert_close(logits(live), acting, atol=1e-5, rtol=1e-4)
    assert live.ask(QUESTION) == answer
    assert change.report is not None and "Folded into weights from c1" in change.report.note
    assert change.report.weights is not None and change.report.weights.sites == ("layers.1.mlp.down.weight",)
    with pytest.raises(StateConflict, match="was folded into c2"):
        live.on("c1")
    live.undo("c2")
    assert live.change("c1").state == "active" and live.engine.activations.hooks == 1
    assert torch.equal(logits(live), acting) and live.fingerprints() == base


def test_a_fold_survives_a_restart_and_is_a_function_of_the_ledger(live: LiveModel, tmp_path: Path) -> None:
    live.apply(adjustment(gains()), prompt=QUESTION)
    live.fold("c1")
    found = live.fingerprints()
    live.close()
    with LiveModel.load(settings=tiny_settings(tmp_path)) as again:
        assert again.fingerprints() == found
        assert [change.state for change in again.changes()] == ["off", "active"]


def test_a_fold_keeps_the_protected_answer_of_its_change(live: LiveModel) -> None:
    live.apply(adjustment(gains()), prompt=QUESTION)
    live.ledger.protect(live.engine.info.hash, [{"role": "user", "content": QUESTION}], "z", [29], change="c1")
    live.fold("c1")
    assert [each.answer for each in live.protected()] == ["z"]


def test_a_fold_overrules_what_its_change_did(live: LiveModel) -> None:
    live.apply(adjustment(gains()), prompt=QUESTION)
    model = live.engine.info.hash
    kept = live.ledger.protect(model, [{"role": "user", "content": QUESTION}], "z", [29])
    live.ledger.release(kept.label, "c1")
    live.fold("c1")
    assert live.protected() == []
    live.undo("c2")
    assert live.protected() == []
    live.undo("c1")
    assert live.protected() == [kept]


def test_what_cannot_be_folded_is_an_error_and_nothing_is_changed(live: LiveModel) -> None:
    live.apply(adjustment(gains(slope=1.5)), prompt=QUESTION)
    live.apply(adjustment(Dense(site="final_norm.weight", delta=torch.ones(24)), name="norm"), prompt=QUESTION)
    before, journal = live.fingerprints(), [change.state for change in live.changes()]
    with pytest.raises(Unsupported, match=r"slope of neuron 3 in layer 1 is 1\.5"):
        live.fold("c1")
    with pytest.raises(InvalidInput, match="nothing to fold"):
        live.fold("c2")
    live.off("c1")
    with pytest.raises(StateConflict, match="only what is on"):
        live.fold("c1")
    live.on("c1")
    with pytest.raises(UnknownChange):
        live.fold("c9")
    assert live.fingerprints() == before and [change.state for change in live.changes()] == journal


def test_a_fold_that_would_be_another_function_is_refused(live: LiveModel) -> None:
    # Moved behind c2, which sets what c1's own weight op set before, c1 would win.
    indices = torch.tensor([[row, 0] for row in range(24)])
    site = "layers.0.mlp.down.weight"
    live.apply(
        adjustment(
            Entries(site=site, indices=indices, values=torch.full((24,), 9.0)),
            MixHeads(layer=0, matrix=torch.ones(4, 4)),
        ),
        prompt=QUESTION,
    )
    live.apply(
        adjustment(Entries(site=site, indices=indices, values=torch.full((24,), -9.0)), name="later"), prompt=QUESTION
    )
    before = live.fingerprints()
    with pytest.raises(Unsupported, match="not be the same function"):
        live.fold("c1")
    assert live.fingerprints() == before and len(live.changes()) == 2
