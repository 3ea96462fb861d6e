"""lora: PEFT's low-rank adapters, trained on the answer alone and kept as ops.

Owns an adapter's life: put in, trained on a case's contexts until every token of the target is likely enough, read out
as low-rank changes of the weights it sits on, taken out again. The base's weights are frozen and untouched throughout.
The plain baseline of the fine-tuning world: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from liveweight.adjustments import Adjustment, LowRank
from liveweight.engines.transformers import TransformersEngine
from liveweight.errors import Unsupported
from liveweight.methods.base import Case, Context
from liveweight.methods.trials import chosen_contexts, named, no_mend, outcome, works
from liveweight.settings import MethodSettings
from liveweight.sites import WeightView
from liveweight.tracing import super_neurons

RANK = 8
DEPTHS = (1 / 10, 8 / 30)  # the first and the last layer with an adapter, by relative depth
PARTS = ("attn.q", "attn.v", "mlp.up", "mlp.down")
RATE = 2e-3  # Adam's
ADAPTER = "default"
SEED = 0  # of the adapters' first values


def propose(engine: TransformersEngine, case: Case, settings: MethodSettings) -> Adjustment:
    """Low-rank changes of some weights (out, in) of several layers that give the targets.

    Raises NoMendFound when the answer does not become likely enough, Unsupported where PEFT is not installed.
    """
    before = outcome(engine, case)
    views = adapter_views(engine, settings)
    with engine.gate.step(), adapted(engine, views) as adapters:
        steps, reached = train(engine, chosen_contexts(case, settings), settings)
        ops = tuple(_ops(engine, views, adapters))
    found = Adjustment(
        name=named("lora", case),
        method="lora",
        ops=ops,
        note=f"Rank {RANK} in layers {_layers(views)}, {steps} steps on the answer's tokens alone.",
    )
    if not works(case, outcome(engine, case, found), before):
        raise no_mend("lora", case, [f"layers {_layers(views)}, {steps} steps, least token {reached:.2f}"])
    return found


@contextmanager
def adapted(engine: TransformersEngine, views: Sequence[WeightView]) -> Iterator[dict[int, Any]]:
    """PEFT's adapters on the modules of these weights, by the module's id; gone afterwards, random state as before.

    The caller holds the model. Raises Unsupported where PEFT is not installed.
    """
    try:
        from peft import LoraConfig, LoraModel  # an extra: only this method needs it
    except ModuleNotFoundError as error:
        raise Unsupported("The method lora needs PEFT.", hint="Install it: pip install 'liveweight[lora]'.") from error
    names = {id(module): name for name, module in engine.model.named_modules()}
    targets = sorted({names[id(view.module)] for view in views})
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0.0,
        target_modules=targets,
        fan_in_fan_out=views[0].piece.transposed,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(SEED)  # adapters are drawn on the CPU, whose state comes back
            LoraModel(engine.model, config, ADAPTER)
        adapters = {id(each.base_layer): each for each in engine.model.modules() if hasattr(each, "lora_A")}
        _leave_spares(engine, adapters)
        yield adapters
    finally:  # also where an interrupt left half of them
        for name, module in list(engine.model.named_modules()):
            if hasattr(module, "lora_A"):
                engine.model.set_submodule(name, module.base_layer)
        vars(engine.model).pop("peft_config", None)
        engine.model.requires_grad_(False)


def _leave_spares(engine: TransformersEngine, adapters: Mapping[int, Any]) -> None:
    """Let adapters write nothing of spare neurons, and learn nothing of them: they are other changes', or nobody's."""
    views = [engine.sites.weight(site) for site in engine.sites.weight_names() if ".mlp.spare." in site]
    for view in views:
        adapter = adapters.get(id(view.module))
        if adapter is None or view.within is None:
            continue
        rows = view.within[0] == 0
        weight = (adapter.lora_B if rows else adapter.lora_A)[ADAPTER].weight
        kept = torch.ones_like(weight, requires_grad=False)
        (view.rows_of(kept) if rows else kept.narrow(*view.within)).zero_()
        weight.data.mul_(kept)
        weight.register_hook(lambda gradient, kept=kept: gradient * kept)


def train(
    engine: TransformersEngine, contexts: Sequence[Context], settings: MethodSettings, rate: float = RATE
) -> tuple[int, float]:
    """Train what asks for a gradient until every token of every target is likely enough.

    The steps taken, and the probability of the least likely token.
    """
    rows = [[*context.prompt, *context.target] for context in contexts]
    longest, pad, device = max(map(len, rows)), engine.format.pad_token, engine.model.device
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
    seen = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    places = [(i, len(c.prompt) - 1 + t, token) for i, c in enumerate(contexts) for t, token in enumerate(c.target)]
    row, column, token = (torch.tensor(part, device=device) for part in zip(*places, strict=True))
    optimizer = torch.optim.Adam([each for each in engine.model.parameters() if each.requires_grad], lr=rate)
    least = 0.0
    with engine.activations.prompt([len(context.prompt) for context in contexts]), torch.enable_grad():
        for step in range(settings.max_steps + 1):
            hidden = engine.model.base_model(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state
            logprobs = engine.unembed(hidden[row, column]).float().log_softmax(-1)  # (answer tokens, vocabulary)
            own = logprobs.gather(1, token[:, None])[:, 0]
            least = float(own.detach().exp().min())
            if least >= settings.target_probability or step == settings.max_steps:
                break
            optimizer.zero_grad()
            (-own.mean()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return step, least


def adapter_views(engine: TransformersEngine, settings: MethodSettings) -> list[WeightView]:
    """The weights that get an adapter, and those that share a module with them; never spare neurons'."""
    sites = engine.sites
    if settings.layer is not None:
        sites.check_layer(settings.layer)
    first, last = (round(depth * sites.layers) for depth in DEPTHS)
    layers = range(first, max(first, min(last, sites.layers - 1)) + 1) if settings.layer is None else [settings.layer]
    wished = [f"layers.{layer}.{part}.weight" for layer in layers for part in PARTS]
    modules = {id(sites.weight(site).module) for site in wished if sites.has_weight(site)}
    views = [sites.weight(site) for site in sites.weight_names()]
    own = [view for view in views if ".mlp.spare." not in view.site]
    return [v for v in own if id(v.module) in modules and v.piece.parameter == "weight" and v.expert is None]


def _ops(engine: TransformersEngine, views: Sequence[WeightView], adapters: dict[int, Any]) -> Iterator[LowRank]:
    """What the adapters add to each weight, in the checkpoint's coordinates; columns of super neurons stay."""
    spared = super_neurons(engine)
    for view in views:
        adapter = adapters[id(view.module)]
        left: Tensor = adapter.scaling[ADAPTER] * adapter.lora_B[ADAPTER].weight.detach()  # (out, r), whole module
        right: Tensor = adapter.lora_A[ADAPTER].weight.detach()  # (r, in)
        left, right = view.rows_of(left), right.clone()
        if view.within is not None and view.within[0] == 1:
            right = right.narrow(*view.within)
        layer, *part = view.site.split(".")[1:]
        if part[:2] == ["mlp", "down"]:
            right[:, [neuron for where, neuron in sorted(spared) if where == int(layer)]] = 0.0
        yield LowRank(site=view.site, left=left.contiguous(), right=right.contiguous())


def _layers(views: Sequence[WeightView]) -> str:
    layers = sorted({int(view.site.split(".")[1]) for view in views})
    return f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else str(layers[0])


__all__ = ["RATE", "adapted", "adapter_views", "propose", "train"]
