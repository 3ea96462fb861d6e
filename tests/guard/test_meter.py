"""The guard's measuring on a tiny model: figures against plain sums, cost of nothing, protection, the cache."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from liveweight.adjustments import Active, Adjustment, Entries, LowRank, State, Steer
from liveweight.engines.base import Message
from liveweight.engines.transformers import TransformersEngine
from liveweight.guard import Guard, GuardReport, Probe, ProbeSet, ProtectedItem
from liveweight.guard.budget import budget_of, over_budget
from liveweight.guard.reference import Row
from liveweight.settings import GuardSettings
from tracing.tiny_engines import tiny_engine

PROBES = ProbeSet(
    (
        Probe("a", "fact", (Message("user", "ask one"),)),
        Probe("b", "fact", (Message("user", "ask another thing"),)),
        Probe("c", "small_talk", (Message("user", "hi"),)),
        Probe("t", "text", text="some plain text here"),
    )
)
SETTINGS = GuardSettings(tokens=4, screen_items=2)


def change(engine: TransformersEngine, size: float, layer: int = 1) -> State:
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(engine.sites.width, 1, generator=generator) * size
    right = torch.randn(1, engine.sites.neurons_of(layer), generator=generator)
    op = LowRank(site=f"layers.{layer}.mlp.down.weight", left=left, right=right)
    return (Active(Adjustment(name="change", method="test", ops=(op,))),)


@pytest.fixture
def engine(tmp_path: Path) -> TransformersEngine:
    return tiny_engine("llama", tmp_path)


@pytest.mark.parametrize("layer", [0, 1])
def test_kl_and_perplexity_are_those_of_plain_forward_passes(
    engine: TransformersEngine, tmp_path: Path, layer: int
) -> None:
    after = change(engine, 0.5, layer)
    report = Guard(engine, SETTINGS, tmp_path, PROBES).measure(after, progress=False)
    kls = []
    for probe in PROBES.chats:
        prompt = engine.encode(probe.messages)
        answer = engine.greedy([prompt], 4)[0]
        ids = torch.tensor([[*prompt, *answer]])
        span = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        with torch.no_grad():
            old = engine.model(ids).logits[0, span].log_softmax(-1)
            with engine.preview(after):
                new = engine.model(ids).logits[0, span].log_softmax(-1)
        kls.append(float((old.exp() * (old - new)).sum(-1).mean()))
    assert report.mean_kl == pytest.approx(sum(kls) / 3, rel=1e-3, abs=1e-6)
    assert report.worst_kl == pytest.approx(max(kls), rel=1e-3, abs=1e-6)
    ids = torch.tensor([engine.format.encode_text(PROBES.texts[0].text, special=True)])
    nll = []
    for state in ((), after):
        with engine.preview(state), torch.no_grad():
            logits = engine.model(ids).logits[0, :-1].log_softmax(-1)
        nll.append(float(-logits.gather(1, ids[0, 1:, None]).mean()))
    assert report.perplexity_ratio == pytest.approx(torch.tensor(nll[1] - nll[0]).exp().item(), rel=1e-3)


@pytest.mark.parametrize("when", ["prompt", "generated"])
def test_a_steering_that_tells_the_prompt_from_the_answer_is_measured(
    engine: TransformersEngine, tmp_path: Path, when: str
) -> None:
    vector = torch.randn(engine.sites.width, generator=torch.Generator().manual_seed(5))
    op = Steer(site="layers.0.resid", vector=vector, when=when)
    after = (Active(Adjustment(name="steer", method="test", ops=(op,))),)
    report = Guard(engine, SETTINGS, tmp_path, PROBES).measure(after, progress=False)
    kls = []
    for probe in PROBES.chats:
        prompt = engine.encode(probe.messages)
        answer = engine.greedy([prompt], 4)[0]
        ids = torch.tensor([[*prompt, *answer]])
        span = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        with torch.no_grad(), engine.activations.prompt(len(prompt)):
            old = engine.model(ids).logits[0, span].log_softmax(-1)
            with engine.preview(after):
                new = engine.model(ids).logits[0, span].log_softmax(-1)
        kls.append(float((old.exp() * (old - new)).sum(-1).mean()))
    assert min(kls) > 0
    assert report.mean_kl == pytest.approx(sum(kls) / 3, rel=1e-3, abs=1e-6)


def test_changing_nothing_costs_nothing(engine: TransformersEngine, tmp_path: Path) -> None:
    report = Guard(engine, SETTINGS, tmp_path, PROBES).measure((), progress=False)
    assert (report.mean_kl, report.changed, report.perplexity_ratio) == (0.0, (), 1.0)
    assert report.passed
    told = report.model_dump(mode="json")
    assert told["passed"] is True
    assert GuardReport.model_validate(told) == report


def test_a_loud_change_is_over_budget_and_says_what_breaks(engine: TransformersEngine, tmp_path: Path) -> None:
    report = Guard(engine, SETTINGS, tmp_path, PROBES).measure(change(engine, 50.0), progress=False)
    assert not report.passed
    assert any("mean KL" in reason for reason in report.reasons)
    assert report.changed
    assert report.changed[0].before != report.changed[0].after


def test_what_a_change_does_not_reach_shows_what_it_showed_and_is_not_run_again(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = Guard(engine, SETTINGS, tmp_path, PROBES)
    row = next(each for each in guard._reference.rows(False) if each.id == "c")
    site = "layers.0.mlp.neurons"
    read = engine.trace(row.tokens, [site]).values[site].double()
    left = torch.randn(engine.sites.width, 1, generator=torch.Generator().manual_seed(3))
    unread = torch.linalg.svd(read)[2][-1:]  # what no token of that row has anything of
    assert float((read @ unread.T).abs().max()) < 1e-9
    op = LowRank(site="layers.0.mlp.down.weight", left=left, right=unread.float() * 50)
    below = change(engine, 2.0)  # is active, in the last layer
    for before in ((), below):
        engine.become(before)
        after = (*before, Active(Adjustment(name="change", method="test", ops=(op,))))
        whole = Guard(engine, SETTINGS, tmp_path / f"whole{len(before)}", PROBES)
        monkeypatch.setattr(whole, "_behind", lambda *_: None)
        expected = whole.measure(after, progress=False)
        guard = Guard(engine, SETTINGS, tmp_path / f"quick{len(before)}", PROBES)
        guard.measure(before, progress=False)
        with patch.object(guard, "_judge", wraps=guard._judge) as judge:
            found = guard.measure(after, progress=False)
        judged = {each.id for call in judge.call_args_list for each in call.args[0]}
        assert judged and "c" not in judged
        for name in ("mean_kl", "p95_kl", "worst_kl", "perplexity_ratio", "changed_share"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4, abs=1e-6), name
        assert found.changed == expected.changed


def test_items_that_are_moved_too_far_are_named_and_can_be_measured_alone(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    loose = {"max_mean_kl": 1e6, "max_p95_kl": 1e6, "max_changed_answers": 1.0, "max_perplexity_ratio": 1e9}
    every = Guard(engine, SETTINGS.model_copy(update=loose), tmp_path, PROBES)
    state = change(engine, 50.0)
    worst = every.measure(state, progress=False)
    limit = worst.worst_kl * 0.999
    guard = Guard(engine, SETTINGS.model_copy(update=loose | {"max_worst_kl": limit}), tmp_path, PROBES)
    report = guard.measure(state, progress=False)
    assert report.too_far == (worst.worst_text,)
    assert report.on_the_whole and not report.passed
    alone = guard.measure(state, only=report.too_far, progress=False)
    assert (alone.items, alone.too_far) == (1, report.too_far)
    assert alone.mean_kl == pytest.approx(report.worst_kl)
    strict = Guard(engine, SETTINGS.model_copy(update={"max_mean_kl": 0.0}), tmp_path, PROBES)
    assert not strict.measure(state, progress=False).on_the_whole


def test_a_change_is_charged_only_for_what_it_adds(engine: TransformersEngine, tmp_path: Path) -> None:
    first = change(engine, 50.0)
    guard = Guard(engine, SETTINGS, tmp_path, PROBES)
    engine.become(first)
    report = guard.measure(first, progress=False)
    assert (report.mean_kl, report.changed) == (0.0, ())
    assert report.total_mean_kl > 0


def test_a_protected_answer_that_would_change_is_named(engine: TransformersEngine, tmp_path: Path) -> None:
    prompt = tuple(engine.encode((Message("user", "keep this"),)))
    item = ProtectedItem("keep this", prompt, tuple(engine.greedy([prompt], 6)[0]))
    guard = Guard(engine, SETTINGS, tmp_path, PROBES)
    held = guard.measure(change(engine, 0.0001), protected=[item], progress=False)
    broken = guard.measure(change(engine, 50.0), protected=[item], progress=False)
    assert held.protected_changed == ()
    assert [changed.text for changed in broken.protected_changed] == ["keep this"]
    assert any("protected" in reason for reason in broken.reasons)


def test_a_protected_answer_is_judged_on_what_earlier_changes_made_of_it(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    prompt = tuple(engine.encode((Message("user", "keep this"),)))
    below, above = change(engine, 50.0, 0), change(engine, 80.0, 1)
    with engine.preview(below):
        item = ProtectedItem("keep this", prompt, tuple(engine.greedy([prompt], 6)[0]))
    with engine.preview((*below, *above)):
        broken = item.answer != tuple(engine.greedy([prompt], 6)[0])
    assert broken and item.answer != tuple(engine.greedy([prompt], 6)[0])
    guard = Guard(engine, SETTINGS, tmp_path, PROBES)
    guard.measure(above, protected=[item], progress=False)  # what a layer read then is not what it reads later
    engine.become(below)
    report = guard.measure((*below, *above), protected=[item], progress=False)
    assert [changed.text for changed in report.protected_changed] == ["keep this"]
    engine.become((*below, *above))
    assert guard.measure((*below, *above), protected=[item], progress=False).protected_changed == ()


def test_the_question_itself_is_left_out(engine: TransformersEngine, tmp_path: Path) -> None:
    report = Guard(engine, SETTINGS, tmp_path, PROBES).measure((), leave_out=["Ask one"], progress=False)
    assert report.items == len(PROBES) - 1


def test_a_second_guard_reads_the_cache_and_agrees(engine: TransformersEngine, tmp_path: Path) -> None:
    after = change(engine, 1.0)
    first = Guard(engine, SETTINGS, tmp_path, PROBES).measure(after, progress=False)
    again = Guard(engine, SETTINGS, tmp_path, PROBES)
    assert again.measure(after, progress=False).mean_kl == first.mean_kl
    assert again.screen(after, "ask something").items == 2


def test_measuring_leaves_the_model_as_it_was(engine: TransformersEngine, tmp_path: Path) -> None:
    before, random_state = engine.fingerprints(), torch.get_rng_state()
    Guard(engine, SETTINGS, tmp_path, PROBES).measure(change(engine, 5.0), progress=False)
    assert engine.fingerprints() == before
    assert torch.equal(torch.get_rng_state(), random_state)


def test_another_template_has_a_reference_of_its_own(engine: TransformersEngine, tmp_path: Path) -> None:
    after = change(engine, 1.0)
    Guard(engine, SETTINGS, tmp_path, PROBES).measure(after, progress=False)
    engine.format.tokenizer.chat_template = "{% for turn in messages %}x {{ turn.content }}{% endfor %}"
    found = Guard(engine, SETTINGS, tmp_path, PROBES).measure(after, progress=False)
    assert found == Guard(engine, SETTINGS, tmp_path / "new", PROBES).measure(after, progress=False).model_copy(
        update={"seconds": found.seconds}
    )


def test_what_is_no_number_is_over_every_budget() -> None:
    figures = dict.fromkeys(budget_of(SETTINGS), float("nan"))
    assert len(over_budget(figures, budget_of(SETTINGS), 0)) == len(figures)


def test_a_change_that_makes_noise_is_refused(engine: TransformersEngine, tmp_path: Path) -> None:
    with patch.object(engine, "unembed", lambda final: torch.full((*final.shape[:-1], 61), float("nan"))):
        guard = Guard(engine, SETTINGS, tmp_path, PROBES)
        seen = guard._judge([Row("a", (1, 2, 3), 1, PROBES.chats[0])], [torch.zeros(2, 24)], [torch.zeros(2, 24)])
    assert seen[0].kl == float("inf")


def test_an_answer_that_becomes_what_it_is_to_be_is_not_broken(engine: TransformersEngine, tmp_path: Path) -> None:
    taught = change(engine, 5.0)
    prompt = engine.encode([Message("user", "ask one")])
    with engine.preview(taught):
        answer = engine.greedy([prompt], 4)[0]
    assert answer != engine.greedy([prompt], 4)[0]
    item = ProtectedItem("p1", tuple(prompt), tuple(answer))
    guard = Guard(engine, SETTINGS, tmp_path, PROBES)
    assert guard.measure(taught, protected=[item], before=(), progress=False).protected_changed == ()
    assert len(guard.measure((), protected=[item], before=taught, progress=False).protected_changed) == 1


def test_what_is_known_of_a_state_and_cannot_be_read_is_looked_at_anew(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    after = change(engine, 1.0)
    first = Guard(engine, SETTINGS, tmp_path, PROBES).measure(after, progress=False)
    files = list(tmp_path.rglob("states/*.safetensors"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:-9])
    again = Guard(engine, SETTINGS, tmp_path, PROBES).measure(after, progress=False)
    assert again.mean_kl == pytest.approx(first.mean_kl, abs=1e-6)


@pytest.mark.parametrize("architecture", ["gemma2", "llama_tied", "phi3"])
def test_writing_what_is_there_into_the_unembedding_is_no_change(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    value = engine.weights.base("lm_head.weight")[3, 5].reshape(1)
    op = Entries(site="lm_head.weight", indices=torch.tensor([[3, 5]]), values=value)
    after = (Active(Adjustment(name="same", method="test", ops=(op,))),)
    report = Guard(engine, SETTINGS, tmp_path, PROBES).measure(after, progress=False)
    assert report.worst_kl == pytest.approx(0.0, abs=1e-6)
