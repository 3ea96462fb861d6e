"""Attribution of parts against forward passes written by hand: replaced for true, frozen for relevance, summed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from liveweight.adjustments import Active, Adjustment, Dense, Steer
from liveweight.engines.base import Message
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, Unsupported
from liveweight.tracing import Attribution, attribute
from liveweight.tracing import part_attribution as reports
from liveweight.tracing.part_pushes import Comparison, comparison, part_pushes, parts_of, patched_pushes
from liveweight.tracing.parts import KINDS, PartKind, margin_of, read
from liveweight.tracing.relevance import rules
from reference_forward import Act, Reference
from tests.tracing.tiny_engines import tiny_engine
from tiny_models import DENSE_ARCHITECTURES, HEADS, LAYERS, NEURONS, VOCABULARY, WIDTH

PROMPT, CORRUPTED = (1, 12, 33, 7, 25, 18), (1, 12, 50, 7, 41, 18)
ANSWER, AGAINST = (40, 9, 21), (40, 31, 5)
QUESTION, OTHER = [Message("user", "what is it?")], [Message("user", "what is at?")]
BIAS_FREE = ("mistral", "qwen3", "phi3", "gemma2", "gemma3_text", "olmo2")  # and with RMS norms
Place = tuple[int, int, int]  # layer, position, number


def site_of(kind: PartKind, layer: int) -> str:
    """The name that the pass by hand gives to where a kind of part is."""
    named = {"neurons": "mlp.neurons", "mlp": "mlp.write", "heads": "attn.heads", "resid": "resid"}
    return f"layers.{layer}.{named[kind]}"


def size_of(engine: TransformersEngine, kind: PartKind) -> int:
    return {"neurons": 1, "heads": engine.sites.head_dim}.get(kind, WIDTH)


class Frozen(Reference):
    """A forward pass whose denominators, ratios, patterns and partners of products are those of its first run.

    It is affine in whatever changes, so that what a relevance says is what it really loses.
    """

    def __init__(self, engine: TransformersEngine) -> None:
        super().__init__(engine.model, engine.sites, act=self._held)
        self.kept: dict[str, Tensor] = {}

    def _held(self, layer: int, _: int | None, gate: Tensor, act: Act) -> Tensor:
        return gate * self.kept.setdefault(f"act {layer}", act(gate) / gate)

    def _linear(self, site: str, read: Tensor) -> Tensor:
        if site.endswith(("attn.q", "attn.k")):
            read = self.kept.setdefault(site, read)
        return super()._linear(site, read)

    def _norm(self, site: str, values: Tensor) -> Tensor:
        if site.endswith(("q_norm", "k_norm")) or not self.sites.has_weight(f"{site}.weight"):
            return super()._norm(site, values)
        if site not in self.kept:
            centred = values - values.mean(-1, keepdim=True) if self.sites.map.norm_kind == "layer" else values
            bias = self.sites.weight(f"{site}.bias").read() if self.sites.has_weight(f"{site}.bias") else 0.0
            self.kept[site] = (super()._norm(site, values) - bias) / centred
            self.kept[f"{site} bias"] = torch.as_tensor(bias)
        centred = values - values.mean(-1, keepdim=True) if self.sites.map.norm_kind == "layer" else values
        return centred * self.kept[site] + self.kept[f"{site} bias"]

    def _mlp(self, layer: int, expert: int | None, read: Tensor) -> Tensor:
        if not self.sites.gated:
            return super()._mlp(layer, expert, read)
        prefix = f"layers.{layer}.mlp"
        gate = self.act(layer, None, self._linear(f"{prefix}.gate", read), self._function())
        up = self._linear(f"{prefix}.up", read)
        gate_then, up_then = self.kept.setdefault(f"gate {layer}", gate), self.kept.setdefault(f"up {layer}", up)
        return self._linear(f"{prefix}.down", self.at(f"{prefix}.neurons", (gate * up_then + gate_then * up) / 2))


def margin(engine: TransformersEngine, asked: Comparison, reference: Reference, tokens: tuple[int, ...]) -> float:
    """The margin of a pass by hand; a capped logit is held at its ratio to the uncapped one where all else is."""
    seen: list[Tensor] = []
    before = reference.at

    def at(site: str, value: Tensor) -> Tensor:
        value = before(site, value)
        if site == "final.resid":
            seen.append(value)
        return value

    reference.at = at
    capped = reference.logits(torch.tensor([tokens]))[0]
    reference.at = before
    plain, logits = seen[0][0] @ engine.sites.weight("lm_head.weight").read().T, capped
    if isinstance(reference, Frozen):
        logits = plain * reference.kept.setdefault("logits", capped / plain)
    wanted = zip(asked.margin.rows, asked.margin.tokens, asked.margin.rivals, strict=True)
    return float(sum(logits[row, token] - logits[row, rival] for row, token, rival in wanted))


def values_of(engine: TransformersEngine, tokens: tuple[int, ...]) -> dict[str, Tensor]:
    """What stands at every site of a pass by hand, (T, size)."""
    found: dict[str, Tensor] = {}
    Reference(engine.model, engine.sites, lambda site, value: found.setdefault(site, value)).logits(
        torch.tensor([tokens])
    )
    return {site: value[0] for site, value in found.items()}


def replacing(
    engine: TransformersEngine, kind: PartKind, place: Place, other: dict[str, Tensor]
) -> Callable[[str, Tensor], Tensor]:
    """Put one part's other value in: from `other`, or zero."""
    layer, position, number = place
    size = size_of(engine, kind)
    columns = slice(number * size, (number + 1) * size)

    def at(site: str, value: Tensor) -> Tensor:
        if site != site_of(kind, layer):
            return value
        value = value.clone()
        value[0, position, columns] = other[site][position, columns] if other else 0.0
        return value

    return at


def places(engine: TransformersEngine, asked: Comparison, kind: PartKind) -> list[Place]:
    """A few parts of every layer, at two positions."""
    last = len(asked.tokens) - 1
    number = {"neurons": 17, "heads": 2}.get(kind, 0)
    return [(layer, position, number) for layer in range(LAYERS) for position in (2, last)]


def asked_of(engine: TransformersEngine, *, corrupted: bool, against: bool = True) -> Comparison:
    return comparison(engine, PROMPT, ANSWER, AGAINST if against else (), CORRUPTED if corrupted else None)


# ---------------------------------------------------------------------------------------------- the measures


@pytest.mark.parametrize("corrupted", [True, False])
@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_patching_is_what_a_pass_by_hand_with_the_part_replaced_loses(
    architecture: str, corrupted: bool, tmp_path: Path
) -> None:
    engine = tiny_engine(architecture, tmp_path)
    asked = asked_of(engine, corrupted=corrupted, against=corrupted)
    other = values_of(engine, asked.corrupted) if asked.corrupted else {}
    clean = margin(engine, asked, Reference(engine.model, engine.sites), asked.tokens)
    for kind in KINDS:
        chosen = places(engine, asked, kind)
        whole = patched_pushes(engine, asked, kind, [reports.Part(*place) for place in chosen])
        for place in chosen:
            reference = Reference(engine.model, engine.sites, replacing(engine, kind, place, other))
            lost = clean - margin(engine, asked, reference, asked.tokens)
            assert float(whole[place]) == pytest.approx(lost, abs=2e-3, rel=2e-3), (kind, place)


@pytest.mark.parametrize("corrupted", [True, False])
@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_relevance_is_what_a_frozen_pass_by_hand_loses(architecture: str, corrupted: bool, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    asked = asked_of(engine, corrupted=corrupted, against=corrupted)
    other = values_of(engine, asked.corrupted) if asked.corrupted else {}
    found = part_pushes(engine, asked, KINDS, "relp")
    frozen = Frozen(engine)
    clean = margin(engine, asked, frozen, asked.tokens)
    for kind in KINDS:
        for place in places(engine, asked, kind):
            frozen.at = replacing(engine, kind, place, other)
            lost = clean - margin(engine, asked, frozen, asked.tokens)
            assert float(found[kind][place]) == pytest.approx(lost, abs=2e-3, rel=2e-3), (kind, place)


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_the_gradient_is_how_fast_the_margin_moves_toward_the_other_value(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path, torch.float64)
    asked = asked_of(engine, corrupted=True)
    assert asked.corrupted is not None
    mine, other = values_of(engine, asked.tokens), values_of(engine, asked.corrupted)
    found = part_pushes(engine, asked, KINDS, "gradient")
    step = 0.01
    for kind in KINDS:
        for place in places(engine, asked, kind):
            moved = []
            for way in (step, -step):
                beside = {site: value + way * (other[site] - value) for site, value in mine.items()}
                reference = Reference(engine.model, engine.sites, replacing(engine, kind, place, beside))
                moved.append(margin(engine, asked, reference, asked.tokens))
            slope = (moved[1] - moved[0]) / (2 * step)
            assert float(found[kind][place]) == pytest.approx(slope, rel=0.02, abs=2e-3), (kind, place)


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_direct_is_what_a_part_adds_to_the_logits_through_the_frozen_norms_alone(
    architecture: str, tmp_path: Path
) -> None:
    engine = tiny_engine(architecture, tmp_path)
    asked = asked_of(engine, corrupted=False)
    found = part_pushes(engine, asked, KINDS, "direct")
    frozen = Frozen(engine)
    margin(engine, asked, frozen, asked.tokens)
    (row,), (token,), (rival,) = asked.margin.rows, asked.margin.tokens, asked.margin.rivals
    unembed, ratio = engine.sites.weight("lm_head.weight").read(), frozen.kept["logits"][row]
    reader = unembed[token] * ratio[token] - unembed[rival] * ratio[rival]
    centre = torch.eye(WIDTH) - (1.0 / WIDTH if engine.sites.map.norm_kind == "layer" else 0.0)

    def through(norm: str, vector: Tensor) -> Tensor:
        return (vector @ centre) * frozen.kept[norm][0, row] if norm in frozen.kept else vector

    values = values_of(engine, asked.tokens)
    for layer in range(LAYERS):
        prefix = f"layers.{layer}"
        for kind in KINDS:
            number = {"neurons": 17, "heads": 2}.get(kind, 0)
            size = size_of(engine, kind)
            columns = slice(number * size, (number + 1) * size)
            written = values[site_of(kind, layer)][row, columns]
            if kind == "neurons":
                written = engine.sites.weight(f"{prefix}.mlp.down.weight").read()[:, columns] @ written
                written = through(f"{prefix}.mlp_post_norm", written)
            if kind == "heads":
                written = engine.sites.weight(f"{prefix}.attn.o.weight").read()[:, columns] @ written
                written = through(f"{prefix}.attn_post_norm", written)
            wanted = float(through("final_norm", written) @ reader)
            assert float(found[kind][layer, row, number]) == pytest.approx(wanted, abs=1e-3, rel=1e-3), (kind, layer)
            assert float(found[kind][layer, :row].abs().sum()) == 0.0


@pytest.mark.parametrize("architecture", BIAS_FREE)
def test_nothing_is_lost_on_the_way_where_there_are_no_biases(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    asked = asked_of(engine, corrupted=False, against=False)
    with torch.no_grad():
        total = float(asked.margin.of(engine, read(engine, asked.tokens, [], prompt=len(PROMPT)).final))
    relevance = part_pushes(engine, asked, ("resid",), "relp")["resid"]
    torch.testing.assert_close(relevance.sum((1, 2)), torch.full((LAYERS,), total), atol=1e-3, rtol=1e-3)
    direct = part_pushes(engine, asked, ("resid", "mlp", "heads"), "direct")
    added = direct["resid"][0].sum() + direct["mlp"][1:].sum() + direct["heads"][1:].sum()
    assert float(added) == pytest.approx(total, abs=1e-3, rel=1e-3)
    assert float(direct["resid"][-1].sum()) == pytest.approx(total, abs=1e-3, rel=1e-3)


def test_nothing_is_lost_in_new_neurons_either(tmp_path: Path) -> None:
    engine = tiny_engine("mistral", tmp_path)
    layer = next(layer for layer in range(LAYERS) if engine.sites.spare_of(layer))
    generator = torch.Generator().manual_seed(5)
    sites = [f"layers.{layer}.mlp.spare.{part}.weight" for part in ("gate", "up", "down")]
    deltas = [torch.randn(engine.sites.weight(site).shape, generator=generator) / 8 for site in sites]
    before = part_pushes(engine, asked_of(engine, corrupted=False), ("resid",), "relp")["resid"]
    ops = tuple(Dense(site=site, delta=delta) for site, delta in zip(sites, deltas, strict=True))
    engine.become((Active(Adjustment(name="new", method="test", ops=ops)),))
    asked = asked_of(engine, corrupted=False)
    with torch.no_grad():
        total = float(asked.margin.of(engine, read(engine, asked.tokens, [], prompt=len(PROMPT)).final))
    relevance = part_pushes(engine, asked, ("resid",), "relp")["resid"]
    torch.testing.assert_close(relevance.sum((1, 2)), torch.full((LAYERS,), total), atol=1e-3, rtol=1e-3)
    assert float((relevance - before).abs().max()) > 0.1


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_the_rules_change_no_value_by_a_bit(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    plain = read(engine, PROMPT, [], prompt=len(PROMPT), gradients=True)
    ruled = read(engine, PROMPT, [], prompt=len(PROMPT), gradients=True, rules=rules(engine.sites))
    assert torch.equal(plain.final, ruled.final)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_under_a_steering_the_last_stream_carries_the_whole_difference(architecture: str, tmp_path: Path) -> None:
    engine = tiny_engine(architecture, tmp_path)
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    ops = tuple(
        Steer(site=site, vector=vector, when=when)
        for site, when in (("embed", "always"), ("layers.1.resid", "prompt"), ("final.resid", "always"))
    )
    engine.become((Active(Adjustment(name="s", method="test", ops=ops)),))
    asked = asked_of(engine, corrupted=True)
    assert asked.corrupted is not None
    with torch.no_grad():
        both = [
            float(asked.margin.of(engine, read(engine, tokens, [], prompt=len(PROMPT)).final))
            for tokens in (asked.tokens, asked.corrupted)
        ]
    lost = patched_pushes(engine, asked, "resid")
    assert float(lost[-1, -1, 0]) == pytest.approx(both[0] - both[1], abs=1e-3, rel=1e-3)
    assert float(lost[0].abs().sum()) > 0


def test_positions_before_the_first_difference_are_nobody_s_doing(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    asked = asked_of(engine, corrupted=True)
    assert asked.start == 2
    every = part_pushes(engine, asked, KINDS, "gradient")
    for kind in KINDS:
        assert float(every[kind][:, :2].abs().max()) < 1e-5
    assert {part.position for part in parts_of(engine, asked, "heads")} == set(range(2, len(asked.tokens)))
    assert len(parts_of(engine, asked, "heads")) == LAYERS * HEADS * (len(asked.tokens) - 2)


def test_many_parts_in_batches_are_each_as_if_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine("qwen3", tmp_path)
    asked = asked_of(engine, corrupted=False)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr("liveweight.tracing.patching._TOKENS", 11)
    found = patched_pushes(engine, asked, "heads", progress=lambda done, of: told.append((done, of)))
    for place in ((0, 0, 3), (1, 4, 0), (2, 6, 1)):
        alone = patched_pushes(engine, asked, "heads", [reports.Part(*place)])
        assert float(found[place]) == pytest.approx(float(alone[place]), abs=1e-4)
        assert int((alone != 0).sum()) == 1
    assert told[-1] == (found.numel(), found.numel()) and len(told) > 10


# ---------------------------------------------------------------------------------------------- the margin and errors


def test_a_margin_is_fixed_before_anything_is_replaced(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    found = margin_of(engine, PROMPT, ANSWER)
    logits = Reference(engine.model, engine.sites).logits(torch.tensor([[*PROMPT, *ANSWER]]))[0]
    first = len(PROMPT) - 1
    assert found.rows == (first, first + 1, first + 2) and found.tokens == ANSWER
    for row, token, rival in zip(found.rows, found.tokens, found.rivals, strict=True):
        assert rival == int(logits[row].index_fill(0, torch.tensor(token), float("-inf")).argmax())
    assert margin_of(engine, PROMPT, ANSWER, AGAINST).rows == (first + 1,)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"corrupted": [Message("user", "what is?")]}, "tokens"),
        ({"corrupted": QUESTION}, "prompt itself"),
        ({"by": "magic"}, "'magic'"),
        ({"sites": "layers"}, "'layers'"),
        ({"top": 0}, "0 parts"),
        ({"against": ""}, "empty"),
        ({"against": ANSWER}, "begin alike"),
        ({"answer": ()}, "no answer"),
        ({"answer": (VOCABULARY,)}, "no token"),
    ],
)
def test_what_cannot_be_attributed_is_said(words: dict[str, Any], said: str, tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    with pytest.raises(InvalidInput, match=said):
        attribute(engine, QUESTION, **({"answer": ANSWER} | words))


def test_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="experts"):
        attribute(tiny_engine("mixtral", tmp_path), QUESTION, ANSWER)


# ------------------------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize("by", ["gradient", "direct", "relp", "patching"])
@pytest.mark.parametrize("sites", KINDS)
def test_a_report_holds_every_value_its_strongest_parts_and_a_picture(sites: PartKind, by: Any, tmp_path: Path) -> None:
    engine = tiny_engine("gemma2", tmp_path)
    report = attribute(
        engine, QUESTION, "cat", by=by, sites=sites, against="cow", corrupted=OTHER, top=4, cache_dir=tmp_path
    )
    prompt, other = engine.encode(QUESTION), engine.encode(OTHER)
    answers = [engine.format.encode_continuation(prompt, text) for text in ("cat", "cow")]
    asked = comparison(engine, prompt, *answers, other)
    found = (
        patched_pushes(engine, asked, sites) if by == "patching" else part_pushes(engine, asked, (sites,), by)[sites]
    )
    if sites == "neurons" and by == "patching":
        assert report.tried == min(reports.CANDIDATES, LAYERS * NEURONS * (len(asked.tokens) - asked.start))
    else:
        summed = torch.tensor(report.grid)
        torch.testing.assert_close(summed, found.sum(-1), atol=1e-4, rtol=1e-4)
        assert report.total == pytest.approx(float(found.abs().sum()), rel=1e-3)
    assert report.tokens == tuple(engine.format.tokenizer.decode([token]) for token in asked.tokens)
    assert report.compared == (("a", "o"),)
    assert len(report.values) == (HEADS if sites == "heads" else 1)
    for side, sign in ((report.pushed, 1), (report.opposed, -1)):
        pushes = [sign * each.push for each in side]
        assert pushes == sorted(pushes, reverse=True) and all(push > 0 for push in pushes) and len(side) <= 4
        for each in side:
            assert each.push == pytest.approx(float(found[each.layer, each.position, each.index or 0]), abs=1e-4)
            assert each.token == report.tokens[each.position]
            assert (each.index is None) == (sites in ("mlp", "resid"))
            assert (each.label is None) == (each.activation is None) == (sites != "neurons")
            if sites == "neurons":
                mine = values_of(engine, asked.tokens)[f"layers.{each.layer}.mlp.neurons"]
                assert each.activation == pytest.approx(float(mine[each.position, each.index or 0]), abs=1e-3)
    assert report.pushed
    assert Attribution.model_validate_json(report.model_dump_json()) == report
    picture = report.picture()
    assert picture.layout.xaxis.range[0] >= asked.start - 0.5
    (drawn,) = picture.data
    assert torch.tensor(drawn.z).shape == (LAYERS, len(report.tokens))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report)
    shown = console.export_text()
    assert report.pushed[0].name in shown and "a rather than o" in shown
    assert "pushed it" in report._repr_html_()


def test_the_last_stream_s_part_is_the_margin_that_the_corrupted_prompt_costs(tmp_path: Path) -> None:
    engine = tiny_engine("phi3", tmp_path)
    report = attribute(engine, QUESTION, "cat", by="patching", sites="resid", against="bow", corrupted=OTHER)
    assert report.corrupted == "what is at?" and report.corrupted_margin is not None
    assert report.values[0][-1][-1] == pytest.approx(report.margin - report.corrupted_margin, abs=1e-3)


def test_excluded_neurons_are_in_no_list_and_in_no_sum(tmp_path: Path) -> None:
    engine = tiny_engine("llama", tmp_path)
    whole = attribute(engine, QUESTION, ANSWER, sites="neurons", exclude=(), top=3)
    assert whole.by == "gradient"
    first = whole.pushed[0]
    assert first.index is not None
    report = attribute(engine, QUESTION, ANSWER, sites="neurons", exclude={(first.layer, first.index)}, top=3)
    assert report.left_out == ((first.layer, first.index),)
    assert (first.layer, first.index) not in {(each.layer, each.index) for each in report.pushed}
    assert report.total < whole.total
