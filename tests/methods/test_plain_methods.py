"""The plain methods on tiny models: what they propose works, is exact, and leaves everything else as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import peft
import pytest
import torch

from liveweight.adjustments import Active, Adjustment, Dense, Gain, LowRank, ScaleNeurons, ScalePaths, Steer, folded
from liveweight.engines.base import Message, ScoreItem
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import NoMendFound, UnknownSite, Unsupported
from liveweight.methods import (
    METHODS,
    alphaedit,
    constrained,
    covariance,
    finetune,
    gain,
    grace,
    lora,
    memit,
    one_shot,
    rome,
    scale,
    select,
)
from liveweight.methods.base import Case, CaseKind, Method
from liveweight.methods.trials import chosen_contexts, outcome
from liveweight.methods.values import edit_tokens, wished_values
from liveweight.settings import MethodSettings
from liveweight.tracing import SuperWeight, SuperWeights
from liveweight.tracing.super_weights import FORMAT
from tests.methods.tiny_cases import SUBJECT, tiny_case
from tests.tracing.tiny_engines import tiny_engine

FOUR = ("llama", "gpt2", "phi3", "qwen3")
LAST = MethodSettings(layer=2, max_steps=60)
TEACHING: dict[str, Method] = {
    "rome": rome.propose,
    "memit": memit.propose,
    "alphaedit": alphaedit.propose,
    "finetune": finetune.propose,
    "constrained": constrained.propose,
    "one-shot": one_shot.propose,
}
REMOVING: dict[str, Method] = {"select": select.propose, "scale": scale.propose, "gain": gain.propose}
ALL = TEACHING | REMOVING
ON_ALL_LAYERS = MethodSettings()


def settings_of(name: str) -> MethodSettings:
    return LAST if name in TEACHING else ON_ALL_LAYERS


def judged_logprob(engine: TransformersEngine, case: Case, trial: Adjustment | None = None) -> float:
    """Of the judged answer's first token, where the tiny cases part, to the question as asked."""
    item = ScoreItem(case.contexts[0].prompt, case.answer_tokens[:1])
    with engine.preview((Active(trial),) if trial else ()):
        return engine.score([item])[0].total


@pytest.mark.parametrize("name", TEACHING)
@pytest.mark.parametrize("architecture", FOUR)
def test_a_fix_gives_the_wished_answer_in_every_way_of_teaching(name: str, architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    case = tiny_case(engine)
    found = TEACHING[name](engine, case, LAST)
    before, after = outcome(engine, case), outcome(engine, case, found)
    assert not before.said[0]
    assert after.said[0]
    assert (after.logprobs > before.logprobs).all()
    assert [op.site for op in found.ops if isinstance(op, LowRank | Dense)] == ["layers.2.mlp.down.weight"]


@pytest.mark.parametrize("name", ["select", "gain"])
@pytest.mark.parametrize("architecture", FOUR)
def test_a_bad_answer_goes_in_every_way_of_removing(name: str, architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    case = tiny_case(engine, "bad")
    found = REMOVING[name](engine, case, ON_ALL_LAYERS)
    assert not outcome(engine, case).gone[0]
    assert outcome(engine, case, found).gone[0]
    assert judged_logprob(engine, case, found) < judged_logprob(engine, case)


@pytest.mark.parametrize(
    ("architecture", "form"), [("llama", "unit"), ("gpt2", "unit"), ("qwen3", "unit"), ("llama", "path")]
)
def test_scaling_what_fired_removes_a_bad_answer(architecture: str, form: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    case = tiny_case(engine, "bad")
    found = scale.propose(engine, case, MethodSettings.model_validate({"form": form, "eta": 1.0}))
    assert {type(op) for op in found.ops} == {ScalePaths if form == "path" else ScaleNeurons}
    assert outcome(engine, case, found).gone[0]
    assert judged_logprob(engine, case, found) < judged_logprob(engine, case)


@pytest.mark.parametrize("name", [*TEACHING, "select", "gain", "scale"])
def test_a_good_answer_becomes_surer(name: str, tmp_path: Path) -> None:
    engine = tiny_engine("gpt2", tmp_path)
    case = tiny_case(engine, "good")
    found = ALL[name](engine, case, settings_of(name))
    before, after = outcome(engine, case), outcome(engine, case, found)
    assert after.said[0]
    assert after.logprobs[0] > before.logprobs[0]
    assert (after.said >= before.said).all()


@pytest.mark.parametrize("name", ALL)
def test_proposing_leaves_weights_hooks_version_and_random_state_as_they_were(name: str, tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    case = tiny_case(engine, "bad")
    bytes_before, version = engine.fingerprints(), engine.version
    random_before = torch.get_rng_state()
    ALL[name](engine, case, settings_of(name))
    assert engine.fingerprints() == bytes_before
    assert engine.version == version
    assert torch.equal(torch.get_rng_state(), random_before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in engine.model.modules())
    assert all(parameter.grad is None for parameter in engine.model.parameters())


@pytest.mark.parametrize("name", ALL)
def test_the_same_case_gives_the_same_adjustment(name: str, tmp_path: Path) -> None:
    hashes = set()
    for folder in ("a", "b"):  # an engine and a cache of its own each: nothing can be remembered
        engine = tiny_engine("qwen3", tmp_path / folder)
        hashes.add(ALL[name](engine, tiny_case(engine, "bad"), settings_of(name)).hash)
    assert len(hashes) == 1


@pytest.mark.parametrize("name", TEACHING)
def test_a_method_works_on_top_of_what_is_active_and_leaves_it_active(name: str, tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    other = Adjustment(
        name="other", method="test", ops=(ScaleNeurons(layer=0, neurons=(1, 2), factors=torch.tensor([3.0, -2.0])),)
    )
    engine.become((Active(other),))
    bytes_before = engine.fingerprints()
    case = tiny_case(engine)
    found = TEACHING[name](engine, case, LAST)
    assert outcome(engine, case, found).said[0]
    assert engine.fingerprints() == bytes_before
    assert engine.state == (Active(other),)


# ------------------------------------------------------------------------------------------------ the formulas


@pytest.mark.parametrize("subject", [SUBJECT, None])
def test_rome_writes_its_value_at_its_one_key_and_nowhere_else(subject: str | None, tmp_path: Path) -> None:
    engine = tiny_engine("qwen3", tmp_path)
    case = tiny_case(engine, "bad", subject=subject)
    found = rome.propose(engine, case, MethodSettings(layer=1, max_steps=60, clamp_norm=20))
    (op,) = found.ops
    assert isinstance(op, LowRank)
    contexts, places = edit_tokens(engine, case, chosen_contexts(case, MethodSettings()))
    keys = [
        engine.trace(context.prompt, ["layers.1.mlp.neurons"]).values["layers.1.mlp.neurons"][place]
        for context, place in zip(contexts, places, strict=True)
    ]
    key = torch.stack(keys).double().mean(0)
    weight = engine.sites.weight("layers.1.mlp.down.weight")
    before = weight.read().double() @ key
    with engine.preview((Active(found),)):
        after = weight.read().double() @ key
        other = weight.read().double() @ (key - key.mean())
    torch.testing.assert_close(after, before + op.left[:, 0].double(), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(other, before + op.left[:, 0].double(), atol=1e-2)


def test_rome_edits_at_the_subjects_last_token_where_the_subject_is_known(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    case = tiny_case(engine, subject=SUBJECT)
    contexts, places = edit_tokens(engine, case, case.contexts)
    assert contexts == case.contexts
    assert [engine.format.decode(c.prompt[: p + 1])[-3:] for c, p in zip(contexts, places, strict=True)] == ["zed"] * 3
    _, last = edit_tokens(engine, replace(case, subject="nobody"), case.contexts)
    assert list(last) == [len(context.prompt) - 1 for context in case.contexts]


def test_memit_is_the_closed_form_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    facts, kept, text = (torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in (3, 5, 200))
    statistics = text.T @ text / 200
    found = memit.solve(facts, kept, statistics)
    usual = statistics + covariance._RIDGE * statistics.diagonal().median() * torch.eye(12, dtype=torch.float64)
    weights = torch.stack([key @ torch.linalg.inv(usual) @ key for key in facts])
    system = memit.RIDGE * weights.median() * usual + kept.T @ kept + facts.T @ facts
    torch.testing.assert_close(found, facts @ torch.linalg.inv(system))


def test_what_came_before_feels_less_of_memit_than_without_its_keys() -> None:
    generator = torch.Generator().manual_seed(1)
    facts, text = (torch.randn(n, 40, generator=generator, dtype=torch.float64) for n in (2, 400))
    kept = facts[:1] + 0.7 * torch.randn(3, 40, generator=generator, dtype=torch.float64)
    statistics = text.T @ text / 400
    without, beside = memit.solve(facts, kept[:0], statistics), memit.solve(facts, 10 * kept, statistics)
    assert float((beside @ kept.T).norm()) < 0.2 * float((without @ kept.T).norm())
    assert float((beside @ facts.T).diagonal().min()) > 0.3  # and the facts are still written


def test_alphaedit_moves_nothing_in_the_directions_of_plain_text() -> None:
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(300, 30, generator=generator, dtype=torch.float64)
    text[:, 20:] *= 0.05  # directions that the text hardly shows
    facts = torch.randn(2, 30, generator=generator, dtype=torch.float64)
    found = alphaedit.solve(facts, facts[:0], text.T @ text / 300)
    values, vectors = torch.linalg.eigh(text.T @ text / 300)
    shown = vectors[:, values > alphaedit.SMALL * values.median()]
    assert float((found @ shown).norm()) < 1e-9
    written = (found @ facts.T).diagonal()
    assert float(written.min()) > 0.8


@pytest.mark.parametrize("solve", [memit.solve, alphaedit.solve])
def test_two_facts_at_once_are_both_written(solve: memit.Solve, tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    one = tiny_case(engine)
    other = replace(one, contexts=tuple(replace(c, prompt=c.prompt[:-1]) for c in one.contexts[:1]))
    found = memit.together("memit", engine, [one, other], MethodSettings(layer=1, max_steps=60), solve)([0, 1])
    (op,) = found.ops
    assert isinstance(op, LowRank)
    assert op.left.shape[1] == 2
    for case in (one, other):
        before, after = outcome(engine, case), outcome(engine, case, found)
        assert after.logprobs[0] > before.logprobs[0] + 1.0


def test_memit_spreads_what_is_wished_over_its_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memit, "edit_layers", lambda *_: [0, 1])
    engine = tiny_engine("llama", tmp_path)
    case = tiny_case(engine)
    settings = MethodSettings(max_steps=60)
    found = memit.together("memit", engine, [case], settings, memit.solve)([0])
    assert [op.site for op in found.ops if isinstance(op, LowRank)] == [
        "layers.0.mlp.down.weight",
        "layers.1.mlp.down.weight",
    ]
    wished = wished_values(engine, [case], 1, settings)[0]
    _, before = memit._seen(engine, [wished], 1, 1)
    with engine.preview((Active(found),)):
        _, after = memit._seen(engine, [wished], 1, 1)
    lacking = wished.delta - (after - before)[0]
    assert float(lacking.norm()) < 0.5 * float(wished.delta.norm())


def test_one_shot_is_the_closed_form_written_out(tmp_path: Path) -> None:
    engine = tiny_engine("phi3", tmp_path)
    keys, gradients, _ = one_shot.evidence(engine, tiny_case(engine), 1, MethodSettings())
    left, right = one_shot.closed_form(keys, gradients)
    h, g = keys.double(), gradients.double()
    values = torch.stack([-float(key @ key) * gradient for key, gradient in zip(h, g, strict=True)])
    dense = torch.linalg.inv(h.T @ h + torch.eye(h.shape[1], dtype=torch.float64)) @ h.T @ values  # (neurons, width)
    torch.testing.assert_close(left @ right, dense.T, atol=1e-9, rtol=1e-7)


def test_one_shots_evidence_is_the_gradient_at_the_answers_positions(tmp_path: Path) -> None:
    engine = tiny_engine("qwen3", tmp_path)
    case = tiny_case(engine)
    case = replace(case, contexts=case.contexts[:1])
    keys, gradients, loss = one_shot.evidence(engine, case, 1, MethodSettings())
    weight = engine.sites.weight("layers.1.mlp.down.weight").parameter
    tokens = torch.tensor([case.contexts[0].prompt])
    weight.requires_grad_(True)
    logits = engine.model(tokens, use_cache=False).logits[0, -1].log_softmax(-1)
    nll = -logits[case.contexts[0].target[0]]
    (whole,) = torch.autograd.grad(nll, weight)
    weight.requires_grad_(False)
    whole = whole[:, : engine.sites.neurons]  # without the spare neurons
    assert loss == pytest.approx(float(nll.detach()), abs=1e-5)
    assert len(keys) == 1
    site = "layers.1.mlp.neurons"
    seen = engine.trace(case.contexts[0].prompt, [site]).values[site]  # (T, neurons)
    torch.testing.assert_close(keys[0], seen[-1], atol=1e-5, rtol=1e-4)
    # The whole weight's gradient is a sum over positions, sum_t g_t h_tᵀ: solved for g, its last row is ours.
    of_positions = torch.linalg.lstsq(seen.T.double(), whole.T.double()).solution  # (T, width)
    torch.testing.assert_close(gradients[0].double(), of_positions[-1], atol=1e-4, rtol=1e-3)


def test_a_delta_of_low_rank_is_kept_as_two_thin_matrices_and_any_other_whole() -> None:
    generator = torch.Generator().manual_seed(1)
    thin = torch.randn(24, 3, generator=generator) @ torch.randn(3, 40, generator=generator)
    op = finetune.compressed("layers.0.mlp.down.weight", thin)
    assert isinstance(op, LowRank)
    assert op.left.shape == (24, 3)
    torch.testing.assert_close(op.left @ op.right, thin, atol=1e-5, rtol=1e-5)
    full = torch.randn(24, 40, generator=generator)
    kept = finetune.compressed("layers.0.mlp.down.weight", full)
    assert isinstance(kept, Dense)
    assert torch.equal(kept.delta, full)


def test_what_is_held_feels_nothing_of_a_constrained_change(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    case = tiny_case(engine)
    other = tuple(engine.encode([Message("user", "who are you?")]))
    held = constrained._held(engine, replace(case, previous=((other, case.answer_tokens),)), 2)
    assert held is not None
    seen = engine.trace((*other, *case.answer_tokens), ["layers.2.mlp.neurons"]).values["layers.2.mlp.neurons"]
    torch.testing.assert_close(held @ held.T, (span := constrained.span(seen[len(other) - 1 :].float())) @ span.T)
    delta, _, _ = finetune._descended(engine, case, 2, LAST, held)
    assert float(delta.norm()) > 0
    assert float((delta @ held).norm()) < 1e-4 * float(delta.norm())


def test_the_held_span_has_most_of_each_key_and_leaves_room() -> None:
    generator = torch.Generator().manual_seed(4)
    keys = torch.randn(6, 3, generator=generator) @ torch.randn(3, 40, generator=generator)
    basis = constrained.span(keys)
    assert basis.shape[1] <= 3
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5, rtol=0)
    left = keys - keys @ basis @ basis.T
    assert float(left.square().sum() / keys.square().sum()) < 0.1
    assert constrained.span(torch.randn(90, 40, generator=generator)).shape[1] == 20


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gpt_neox", "olmoe"])
def test_lora_gives_the_wished_answer_and_leaves_no_adapter(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    case = tiny_case(engine)
    before, modules = engine.fingerprints(), [type(module) for module in engine.model.modules()]
    torch.manual_seed(5)
    number = torch.rand(1)
    torch.manual_seed(5)
    found = lora.propose(engine, case, MethodSettings(max_steps=200, target_probability=0.8))
    assert torch.equal(torch.rand(1), number)
    assert outcome(engine, case, found).said[0]
    assert {type(op) for op in found.ops} == {LowRank}
    assert engine.fingerprints() == before
    assert [type(module) for module in engine.model.modules()] == modules
    assert not any(parameter.requires_grad for parameter in engine.model.parameters())
    assert found.hash == lora.propose(engine, case, MethodSettings(max_steps=200, target_probability=0.8)).hash


def test_ctrl_c_while_adapters_are_put_in_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine("llama", tmp_path)
    before, modules = engine.fingerprints(), [type(module) for module in engine.model.modules()]
    views, put_in = lora.adapter_views(engine, MethodSettings(layer=1)), peft.LoraModel

    def interrupted(*given: Any) -> None:
        put_in(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(peft, "LoraModel", interrupted)
    with pytest.raises(KeyboardInterrupt), lora.adapted(engine, views):
        raise AssertionError
    assert engine.fingerprints() == before
    assert [type(module) for module in engine.model.modules()] == modules


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_loras_ops_are_what_the_adapters_add(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    prompt = engine.encode([Message("user", "what is tea?")])
    views = lora.adapter_views(engine, MethodSettings(layer=1))
    with engine.gate.step(), lora.adapted(engine, views) as adapters, torch.no_grad():
        for number, adapter in enumerate(adapters.values()):
            generator = torch.Generator().manual_seed(number)
            weight = adapter.lora_B[lora.ADAPTER].weight
            with torch.enable_grad():  # as training moves it
                (weight * torch.randn(weight.shape, generator=generator)).sum().backward()
            weight += weight.grad
        adapted = engine.model(torch.tensor([prompt])).logits
        ops = tuple(lora._ops(engine, views, adapters))
    assert not any(".spare." in op.site for op in ops) and engine.sites.spare_of(1)
    engine.become((Active(Adjustment(name="lora", method="lora", ops=ops)),))
    with torch.no_grad():
        torch.testing.assert_close(engine.model(torch.tensor([prompt])).logits, adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", [*FOUR, "olmoe"])
def test_grace_answers_near_its_keys_and_is_bit_for_bit_nothing_elsewhere(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    case = tiny_case(engine)
    other = tuple(engine.encode([Message("user", "nobody asked!")]))
    found = grace.propose(engine, replace(case, previous=((other, case.answer_tokens),)), MethodSettings(max_steps=60))
    assert outcome(engine, case, found).said[0]
    ids = torch.tensor([[*other, *case.answer_tokens]])
    with torch.no_grad():
        plain = engine.model(ids).logits
        with engine.preview((Active(found),)):
            assert torch.equal(engine.model(ids).logits, plain)


def test_grace_refuses_a_layer_with_nothing_behind_it(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    with pytest.raises(Unsupported, match="a layer behind"):
        grace.propose(engine, tiny_case(engine), MethodSettings(layer=engine.sites.layers - 1))


def test_graces_radius_is_half_the_way_to_what_is_left_alone() -> None:
    keys, alone = torch.tensor([[0.0, 0.0], [5.0, 0.0]]), torch.tensor([[3.0, 4.0], [5.0, 1.0]])
    torch.testing.assert_close(grace._radii(keys, alone), torch.tensor([2.5, 0.5]))
    torch.testing.assert_close(grace._radii(keys[1:], alone[:0]), torch.tensor([0.5]))


def test_select_takes_no_more_neurons_than_it_needs_and_says_that_it_only_removes(tmp_path: Path) -> None:
    engine = tiny_engine("phi3", tmp_path)
    case = tiny_case(engine)
    found = select.propose(engine, case, ON_ALL_LAYERS)
    ops = [op for op in found.ops if isinstance(op, ScaleNeurons)]
    ranked = select.responsible(engine, case, case.contexts, range(3), 1000)
    count = sum(len(op.neurons) for op in ops)
    assert {(op.layer, neuron) for op in ops for neuron in op.neurons} == set(ranked[:count])
    fewer = Adjustment(name="fewer", method="test", ops=select.scaling(ranked[: count - 1], float(ops[0].factors[0])))
    assert count > 1
    assert not outcome(engine, case, fewer).removes
    assert "does not teach" in found.note


def test_gains_move_down_what_pushed_the_answer_and_fold_into_weights(tmp_path: Path) -> None:
    engine = tiny_engine("gpt2", tmp_path)
    case = tiny_case(engine, "bad")
    found = gain.propose(engine, case, MethodSettings(max_neurons=30))
    gains = [op for op in found.ops if isinstance(op, Gain)]
    assert sum(len(op.neurons) for op in gains) <= 30
    assert all(bool((op.slopes == 1).all()) and bool((op.gains >= 0).all()) for op in gains)
    top = select.responsible(engine, case, case.contexts[:2], range(3), 1)[0]
    moved = {(op.layer, neuron): float(g) for op in gains for neuron, g in zip(op.neurons, op.gains, strict=True)}
    assert moved[top] < 1.0
    folded = Adjustment(
        name="folded",
        method="test",
        ops=tuple(ScaleNeurons(layer=op.layer, neurons=op.neurons, factors=op.gains) for op in gains),
    )
    torch.testing.assert_close(
        outcome(engine, case, folded).logprobs, outcome(engine, case, found).logprobs, atol=1e-4, rtol=1e-4
    )


def test_slopes_move_too_where_the_settings_say_so_and_the_note_says_what_fired(tmp_path: Path) -> None:
    engine = tiny_engine("gpt2", tmp_path)
    case = tiny_case(engine, "bad")
    found = gain.propose(engine, case, MethodSettings(max_neurons=30, slopes=True))
    gains = [op for op in found.ops if isinstance(op, Gain)]
    assert sum(len(op.neurons) for op in gains) <= 30
    assert any(bool((op.slopes != 1).any()) for op in gains)
    assert all(0.25 <= float(slope) <= 4 for op in gains for slope in op.slopes)
    assert "slopes of" in found.note and "fired" in found.note
    assert outcome(engine, case, found).removes
    with pytest.raises(Unsupported, match="slope of neuron"):
        folded(found, engine.sites)


# ------------------------------------------------------------------------------------------- limits and refusals


@pytest.mark.parametrize("name", ALL)
def test_no_method_touches_a_super_neuron(name: str, tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    case = tiny_case(engine, "bad")
    spared = {(layer, neuron) for layer, neuron in select.responsible(engine, case, case.contexts, range(3), 6)}
    weights = tuple(
        SuperWeight(
            layer=layer, row=0, column=neuron, value=1.0, activation=1.0, output=1.0,
            perplexity_zeroed=9.0, perplexity=1.0, tokens_measured=1, confirmed=True,
        )
        for layer, neuron in sorted(spared)
    )  # fmt: skip
    known = SuperWeights(model_hash=engine.info.hash, prompt="", weights=weights)
    file = tmp_path / "super_weights" / f"{engine.info.hash}-{FORMAT}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(known.model_dump_json(), encoding="utf-8")
    for op in ALL[name](engine, case, settings_of(name)).ops:
        if isinstance(op, LowRank | Dense):
            layer = int(op.site.split(".")[1])
            columns = [neuron for where, neuron in spared if where == layer]
            delta = op.left @ op.right if isinstance(op, LowRank) else op.delta
            assert columns
            assert not delta[:, columns].any()
        else:
            assert isinstance(op, ScaleNeurons | Gain)
            assert not spared & {(op.layer, neuron) for neuron in op.neurons}


@pytest.mark.parametrize("name", ALL)
def test_what_cannot_be_mended_is_said_with_what_was_tried(name: str, tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    case = tiny_case(engine, "bad")
    if name in TEACHING:  # one prompt that is to be answered in two ways
        first, second = case.contexts[0], replace(case.contexts[0], target=case.answer_tokens)
        case = replace(case, kind="fix", contexts=(first, second, second, second))
        settings = MethodSettings(layer=2, max_steps=2)
    else:
        settings = MethodSettings(max_neurons=1, layer=0, max_steps=1)
    bytes_before = engine.fingerprints()
    with pytest.raises(NoMendFound, match="it tried") as caught:
        ALL[name](engine, case, settings)
    assert caught.value.details["method"] == name
    assert caught.value.details["tried"]
    assert engine.fingerprints() == bytes_before


@pytest.mark.parametrize("name", ALL)
def test_a_model_of_experts_is_refused_with_its_architecture(name: str, tmp_path: Path) -> None:
    engine = tiny_engine("mixtral", tmp_path)
    with pytest.raises(Unsupported, match="mixtral"):
        ALL[name](engine, tiny_case(engine), MethodSettings())


@pytest.mark.parametrize("name", TEACHING)
def test_a_dense_layer_among_layers_of_experts_can_be_taught(name: str, tmp_path: Path) -> None:
    engine = tiny_engine("qwen3_moe", tmp_path)  # its layer 1 is dense
    case = tiny_case(engine, "bad", rank=1)
    found = TEACHING[name](engine, case, MethodSettings(max_steps=60, clamp_norm=20))
    assert [op.site for op in found.ops if isinstance(op, LowRank | Dense)] == ["layers.1.mlp.down.weight"]
    with pytest.raises(Unsupported, match="Layer 0"):
        TEACHING[name](engine, case, MethodSettings(layer=0))


@pytest.mark.parametrize("name", ALL)
def test_an_unknown_layer_is_refused(name: str, tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    with pytest.raises(UnknownSite, match="layer 7"):
        ALL[name](engine, tiny_case(engine), MethodSettings(layer=7))


@pytest.mark.parametrize("kind", ["fix", "bad"])
def test_outcomes_tell_said_from_gone(kind: CaseKind, tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    case = tiny_case(engine, kind)
    plain = outcome(engine, case)
    assert not plain.said[0]
    assert not plain.gone[0]
    as_answered = replace(case, contexts=tuple(replace(c, target=case.answer_tokens) for c in case.contexts))
    assert outcome(engine, as_answered).said[0]
    assert not outcome(engine, as_answered).gone.any()  # where nothing else is wished for, nothing can be gone


@pytest.mark.parametrize("when", ["prompt", "generated"])
@pytest.mark.parametrize(
    "name", ["patch", "implant", "rome", "memit", "alphaedit", "one-shot", "finetune", "constrained", "grace", "lora"]
)
def test_every_method_teaches_beside_a_steering_of_one_part_of_a_chat(
    name: str, when: Literal["prompt", "generated"], tmp_path: Path
) -> None:
    engine = tiny_engine("llama", tmp_path)
    vector = torch.ones(engine.sites.width)
    ops = tuple(Steer(site=f"layers.{layer}.resid", vector=vector, when=when, scale=0.1) for layer in (0, 2))
    engine.become((Active(Adjustment(name="steered", method="steer", ops=ops)),))
    case = tiny_case(engine, subject=SUBJECT)
    before = engine.fingerprints()
    try:
        found = METHODS[name].propose(engine, case, MethodSettings(max_steps=60, clamp_norm=20, layer=1))
    except NoMendFound:
        pass  # a random model of three layers need not be teachable; that it can be tried is what counts
    else:
        assert found.ops
    assert engine.fingerprints() == before
