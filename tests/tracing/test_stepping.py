"""A stepped run: a function of prompt and edits, that leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from liveweight.adjustments import Active, Adjustment, Clamp, Steer
from liveweight.engines.base import Message
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import InvalidInput, StateConflict, UnknownSite, Unsupported
from liveweight.tracing import Run
from tests.tracing.test_reads_do_not_write import everything, some_state
from tests.tracing.tiny_engines import tiny_engine
from tiny_models import ARCHITECTURES, EXPERT_ARCHITECTURES, WIDTH

QUESTION = [Message("user", "what is it?")]


def run_of(engine: TransformersEngine) -> Run:
    return Run(engine, engine.encode(QUESTION), question="what is it?")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    return tiny_engine("llama", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_run_stops_at_every_site_in_order_and_sees_what_a_trace_sees(name: str, tmp_path: Path) -> None:
    engine = tiny_engine(name, tmp_path)
    with run_of(engine) as run:
        before = everything(engine)
        sites = list(run.sites)
        traced = engine.trace(run.tokens, sites).values
        for site in sites:
            seen = run.until(site).value
            assert torch.equal(seen, traced[site]), site
            assert everything(engine) == before
        assert run.finish().kl == 0.0


def test_next_goes_from_layer_to_layer_and_ends_at_the_final_norm(engine: TransformersEngine) -> None:
    with run_of(engine) as run:
        stops = [run.next().site for _ in range(4)]
        assert stops == ["layers.0.resid", "layers.1.resid", "layers.2.resid", "final.resid"]
        with pytest.raises(StateConflict, match="the last site"):
            run.next()
        run.restart().until("layers.1.attn.heads")
        assert run.next().site == "layers.1.resid"


def test_a_set_entry_holds_its_value_exactly_and_is_seen_by_what_comes_behind(engine: TransformersEngine) -> None:
    with run_of(engine) as run:
        plain = run.until("layers.1.resid").value
        run.set(0.1, positions=3, indices=17).scale(-2.0, positions=-1, indices=[2, 5]).add(0.5, positions=1, indices=0)
        seen = run.value
        wished = plain.clone()
        wished[3, 17] = 0.1
        wished[-1, [2, 5]] *= -2.0
        wished[1, 0] += 0.5
        assert torch.equal(seen, wished)
        later = run.until("layers.2.resid").value
        assert not torch.equal(later[-1], engine.trace(run.tokens, ["layers.2.resid"]).values["layers.2.resid"][-1])
        ending = run.finish()
        assert ending.kl > 0 and ending.before != ending.after
        assert [run.undo().said.split()[0] for _ in range(3)] == ["added", "scaled", "set"]
        assert run.finish().kl == 0.0


def test_a_vector_is_added_a_direction_projected_out_and_neurons_are_held(engine: TransformersEngine) -> None:
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    with run_of(engine) as run:
        held = run.until("layers.0.mlp.neurons").clamp({4: 2.0, 7: 0.0}).value
        assert held[:, 4].tolist() == [2.0] * len(run.tokens) and not held[:, 7].any()
        plain = run.until("layers.0.resid").value
        added = run.add(vector, positions=[0, -1]).value
        assert torch.equal(added[[0, -1]], plain[[0, -1]] + vector) and torch.equal(added[1:-1], plain[1:-1])
        assert (run.ablate(vector).value @ vector).abs().max() < 1e-4
        assert [type(edit.op) for edit in run.edits[:2]] == [Clamp, Steer]


def test_a_look_tells_norms_the_largest_entries_the_logit_lens_and_neurons_labels(engine: TransformersEngine) -> None:
    with run_of(engine) as run:
        value = run.until("layers.2.resid").value
        view = run.look(top=3)
        assert view.shape == tuple(value.shape) and len(view.tokens) == len(view.norms) == len(view.lens)
        assert view.norms == pytest.approx(value.norm(dim=1).tolist())
        first = view.largest[0]
        assert abs(first.value) == float(value.abs().max()) == abs(float(value[first.position, first.index]))
        assert [abs(entry.value) for entry in view.largest] == sorted(
            (abs(e.value) for e in view.largest), reverse=True
        )
        # Behind the last layer the lens is the model's own answer.
        top = view.lens[-1].top
        assert [(g.id, g.probability) for g in top] == [
            (g.id, pytest.approx(g.probability)) for g in run.finish(top=len(top)).after
        ]
        assert {entry.position for entry in run.look(position=-2).largest} == {len(run.tokens) - 2}
        neurons = run.restart().until("layers.1.mlp.neurons").look(top=2)
        assert not neurons.lens and all(entry.label for entry in neurons.largest)


def test_what_cannot_be_done_is_an_error_with_a_way_out(engine: TransformersEngine, tmp_path: Path) -> None:
    with run_of(engine) as run:
        with pytest.raises(StateConflict, match="until"):
            _ = run.value
        with pytest.raises(StateConflict, match="nothing to keep"):
            run.adjustment("x")
        with pytest.raises(UnknownSite, match=r"layers\.9"):
            run.until("layers.9.resid")
        with pytest.raises(UnknownSite, match="is a weight"):
            run.until("layers.0.mlp.down.weight")
        run.until("layers.1.resid")
        with pytest.raises(StateConflict, match="restart"):
            run.until("layers.0.resid")
        with pytest.raises(InvalidInput, match="token of the prompt 99"):
            run.set(1.0, positions=99)
        with pytest.raises(InvalidInput, match=r"entry of layers\.1\.resid 24"):
            run.set(1.0, indices=24)
        with pytest.raises(InvalidInput, match="as many values"):
            run.set(torch.ones(3), indices=[1, 2])
        with pytest.raises(InvalidInput, match="no neurons"):
            run.clamp({1: 0.0})
        with pytest.raises(InvalidInput, match="3 entries"):
            run.add(torch.ones(3))
        with pytest.raises(StateConflict, match="no edit"):
            run.undo()
        assert not run.edits
    with pytest.raises(StateConflict, match="over"):
        run.next()
    experts = run_of(tiny_engine(EXPERT_ARCHITECTURES[0], tmp_path))
    with pytest.raises(Unsupported, match="experts"):
        experts.until("layers.0.mlp.neurons")
    assert experts.until("layers.0.mlp.router").look(top=1).shape == (len(experts.tokens), 5)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 15),
    edits=st.lists(
        st.tuples(
            st.sampled_from(["embed", "layers.0.attn.heads", "layers.1.mlp.neurons", "layers.2.resid", "final.resid"]),
            st.sampled_from(["set", "scale", "add"]),
            st.sampled_from([None, 0, -1, 4]),
            st.integers(0, WIDTH - 1),
            st.floats(-3, 3, width=32),
        ),
        max_size=4,
    ),
    raised=st.booleans(),
)
def test_whatever_is_done_and_raised_the_model_is_as_before_and_the_adjustment_is_what_was_done(
    engine: TransformersEngine, seed: int, edits: list[tuple[str, str, int | None, int, float]], raised: bool
) -> None:
    engine.become(some_state(seed))
    before = everything(engine)
    run = run_of(engine)
    try:
        with run:
            for site, verb, position, index, value in sorted(edits, key=lambda each: run.sites.index(each[0])):
                getattr(run.until(site), verb)(value, position, index)
                run.look(top=1)
            seen = run.finish()
            run.generate(2)
            if raised:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert raised
    assert everything(engine) == before
    if edits:  # what was kept is the same function as what was seen
        kept = Active(run.adjustment("kept"))
        with engine.preview((*engine.state, kept)):
            final = engine.trace(run.tokens, ["final.resid"]).values["final.resid"][-1]
            probabilities = engine.unembed(final).softmax(-1)
        assert [g.probability for g in seen.after] == pytest.approx(
            [float(probabilities[g.id]) for g in seen.after], abs=1e-6
        )
    engine.become(())


def test_an_edit_of_all_positions_holds_in_what_is_generated_too(engine: TransformersEngine) -> None:
    with run_of(engine) as run:
        run.until("final.resid").set(0.0)  # every logit is then the same
        assert len({guess.probability for guess in run.finish().after}) == 1
        edited, plain = run.generate(4), run.generate(4, edited=False)
        assert edited != plain
        state = (Active(Adjustment(name="k", method="t", ops=run.adjustment().ops)),)
    with engine.preview(state):
        assert "".join(t.text for t in engine.continue_from(run.tokens)).startswith(edited)
