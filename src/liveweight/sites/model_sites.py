"""The sites of one live model.

Owns the answer to "where in this model is `layers.11.mlp.down.weight`?": it reads the table of architectures against
the model's modules, names every weight and activation, and refuses what is not there with the nearest thing that is.
Reads weights; what is written to them is decided elsewhere.

Weights, always (out, in):

    embed.weight  positions.weight  lm_head.weight  final_norm.weight
    layers.{l}.attn.q|k|v|o.weight  layers.{l}.attn.q_norm|k_norm.weight
    layers.{l}.mlp.gate|up|down.weight            an ungated MLP has up and down only
    layers.{l}.mlp.spare.gate|up|down.weight      the neurons that a layer was grown by, see spare_neurons.py
    layers.{l}.mlp.router.weight  layers.{l}.mlp.experts.{e}.gate|up|down.weight
    layers.{l}.attn_norm|mlp_norm|attn_post_norm|mlp_post_norm.weight
    and .bias beside any of them, where there is one

Activations, always (…, size):

    embed                  the residual stream as it enters the first block
    layers.{l}.resid       the residual stream as it leaves a block
    layers.{l}.attn.heads  the heads' outputs, before o
    layers.{l}.mlp.neurons the neurons' activations, before down
    layers.{l}.mlp.router  the router's logits
    final.resid            the residual stream after the final norm, as the unembedding reads it
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from liveweight.errors import InvalidInput, UnknownSite, Unsupported, UnsupportedArchitecture
from liveweight.sites.architectures import ARCHITECTURES, Architecture, Piece
from liveweight.sites.points import ActivationPoint
from liveweight.sites.runtimes import require_writable
from liveweight.sites.views import WeightView

if TYPE_CHECKING:  # importing transformers takes seconds, and whoever has a model has done it
    from transformers import PreTrainedModel

ADDED = "liveweight_spare_neurons"  # the attribute of a grown model: layer -> how many neurons were added
_NUMBERED = re.compile(r"^layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^mlp\.experts\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Norm:
    """A norm as a linear reader sees it: multiply by `scale` of the weight at `site`, after centring if `centred`."""

    site: str
    plus_one: bool
    centred: bool

    def scale(self, weight: Tensor) -> Tensor:
        """The factor of each dimension, from the norm's weight (width,)."""
        return weight + 1 if self.plus_one else weight

    def direction(self, vector: Tensor, weight: Tensor) -> Tensor:
        """`vector` (…, width) after the norm, up to the norm's own positive denominator."""
        if self.centred:
            vector = vector - vector.mean(dim=-1, keepdim=True)
        return vector * self.scale(weight)


class ModelSites:
    """Every named place of one model. Build it with `model_sites`."""

    def __init__(self, model: PreTrainedModel, name: str, architecture: Architecture) -> None:
        """Read `architecture` against `model`. Raises UnsupportedArchitecture naming the modules that are missing."""
        self.model = model
        self.architecture = name
        self.map = architecture
        self._missing: list[str] = []
        self.blocks: list[nn.Module] = self._block_list()
        self.embed = self._module(model, architecture.embed)
        self.final_norm = self._module(model, architecture.final_norm)
        self.lm_head = self._module(model, architecture.lm_head)
        self._refuse_if_missing()
        config = model.config
        self.layers = len(self.blocks)
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or self.heads)
        self.head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // self.heads)
        self.gated = "gate" in (architecture.experts or architecture.mlp)
        self._parameter_names = {id(value): key for key, value in model.named_parameters(remove_duplicate=False)}
        self._weights: dict[str, WeightView] = {view.site: view for view in self._find_weights()}
        self._refuse_if_missing()
        self.width = self.weight("embed.weight").shape[1]
        self.vocabulary = self.weight("embed.weight").shape[0]
        self.experts = max(self.experts_of(layer) for layer in range(self.layers))
        expert = next((layer for layer in range(self.layers) if self.experts_of(layer)), None)
        self.neurons = self.neurons_of(0 if expert is None else expert)
        self.tied = self.weight("embed.weight").key == self.weight("lm_head.weight").key
        spare = sum(view.native().numel() for view in self._weights.values() if ".mlp.spare." in view.site)
        self.parameters = sum(each.numel() for each in model.parameters()) - spare  # the checkpoint's
        self._activations = frozenset(self._activation_names())
        self.notes: tuple[str, ...] = self._notes()

    # ------------------------------------------------------------------------------------------------- weights

    def names(self) -> list[str]:
        """Every site of this model, weights first."""
        return [*self._weights, *self._activation_names()]

    def weight_names(self) -> list[str]:
        """Every weight site of this model."""
        return list(self._weights)

    def resolve(self, site: str) -> str:
        """`site` itself where this model has it. Raises UnknownSite naming it and the nearest that exist."""
        if site in self._weights or site in self._activations:
            return site
        raise UnknownSite(f"There is no site {site!r} in this {self.architecture} model.", hint=self._nearest(site))

    def canonical(self, site: str) -> str:
        """The name under which shared memory is kept: `embed.weight` for a tied `lm_head.weight`."""
        self.resolve(site)
        return "embed.weight" if self.tied and site == "lm_head.weight" else site

    def has_weight(self, site: str) -> bool:
        """Whether this model has that weight (a bias, say)."""
        return site in self._weights

    def weight(self, site: str) -> WeightView:
        """The weight at a site. Raises UnknownSite, also when the site is an activation."""
        if site not in self._weights:
            if site in self._activations:
                raise UnknownSite(
                    f"{site!r} is an activation of this {self.architecture} model, not a weight.",
                    hint=f"Weights end in .weight or .bias; {self._nearest(site + '.weight')}",
                )
            self.resolve(site)
        return self._weights[site]

    def mlp_part(self, layer: int, part: str, expert: int | None = None) -> str:
        """The site of an MLP's (or an expert's) gate, up or down weight. Raises UnknownSite."""
        self.check_layer(layer)
        count = self.experts_of(layer)
        if count and expert is None:
            raise UnknownSite(
                f"Layer {layer} has {count} experts, and none was named.", hint=f"Name an expert from 0 to {count - 1}."
            )
        if expert is None:
            return f"layers.{layer}.mlp.{part}.weight"
        if not count:
            raise UnknownSite(f"Layer {layer} has no experts, so no expert {expert}.", hint="Leave the expert out.")
        self._check_range("expert", expert, count, f"in layer {layer}")
        return f"layers.{layer}.mlp.experts.{expert}.{part}.weight"

    def neuron_write(self, layer: int, neuron: int, expert: int | None = None) -> Tensor:
        """What a neuron adds to the residual stream per unit of activation: its column of down, (width,)."""
        self.check_neurons(layer, (neuron,), expert)
        return self.weight(self.mlp_part(layer, "down", expert)).read()[:, neuron].clone()

    def neuron_read(self, layer: int, neuron: int, expert: int | None = None) -> dict[str, Tensor]:
        """The rows by which a neuron reads its input: `gate` and `up`, or `up` alone; each (width,)."""
        self.check_neurons(layer, (neuron,), expert)
        parts = ("gate", "up") if self.gated else ("up",)
        return {part: self.weight(self.mlp_part(layer, part, expert)).read()[neuron].clone() for part in parts}

    def read_norm(self, layer: int) -> Norm | None:
        """The norm between the residual stream and the neurons of a layer; None where they read it directly."""
        self.check_layer(layer)
        return self._norm(layer, self.map.read_norm)

    def write_norm(self, layer: int) -> Norm | None:
        """The norm between what the neurons of a layer write and the residual stream; None where there is none."""
        self.check_layer(layer)
        return self._norm(layer, self.map.write_norm)

    # --------------------------------------------------------------------------------------------- activations

    def activation(self, site: str) -> ActivationPoint:
        """The activation at a site. Raises UnknownSite, and Unsupported for neurons that are spread over experts."""
        found = _NUMBERED.match(site)
        if found and found[2] == "mlp.neurons" and int(found[1]) < self.layers and self.experts_of(int(found[1])):
            raise Unsupported(
                f"{site} is not one tensor: layer {found[1]} has {self.experts_of(int(found[1]))} experts, and each "
                "token runs through a few of them.",
                hint="Name an expert in the op (Clamp, Gain, ScaleNeurons), or use the layer's resid.",
            )
        if site not in self._activations:
            if site in self._weights:
                raise UnknownSite(
                    f"{site!r} is a weight of this {self.architecture} model, not an activation.",
                    hint="Activations are embed, final.resid and layers.*.resid, .attn.heads, .mlp.neurons.",
                )
            self.resolve(site)
        if site == "embed":
            return ActivationPoint(site, self.blocks[0], "input", self.width)
        if site == "final.resid":
            return ActivationPoint(site, self.final_norm, "output", self.width)
        assert found is not None
        layer, part = int(found[1]), found[2]
        block = self.blocks[layer]
        match part:
            case "resid":
                return ActivationPoint(site, block, "output", self.width)
            case "attn.heads":
                output = block.get_submodule(self.map.attention["o"].module)
                return ActivationPoint(site, output, "input", self.heads * self.head_dim)
            case "mlp.neurons":
                down = block.get_submodule(self.map.mlp["down"].module)
                return ActivationPoint(site, down, "input", self.neurons_of(layer))
            case _:
                router = block.get_submodule(self.map.router)
                declared = self.map.router_renormalises
                sums_to_one = bool(getattr(router, "norm_topk_prob", False)) if declared is None else declared
                return ActivationPoint(site, router, "output", self.experts_of(layer), True, sums_to_one)

    def stream_writes(self) -> list[ActivationPoint]:
        """Everything that is added into the residual stream: embeddings, then each layer's attention and MLP."""
        points = [self.activation("embed")]
        for layer, block in enumerate(self.blocks):
            attention = self.map.norms.get("attn_post_norm", self.map.attention["o"].module)
            mlp = self.map.norms.get("mlp_post_norm", "")
            if not mlp:
                mlp = self.map.experts_module if self.experts_of(layer) else self.map.mlp["down"].module
            for part, path in (("attn", attention), ("mlp", mlp)):
                points.append(
                    ActivationPoint(f"layers.{layer}.{part}.write", block.get_submodule(path), "output", self.width)
                )
        return points

    def activation_function(self, layer: int) -> nn.Module | None:
        """The module that applies the MLP's (or the experts') activation function in a layer."""
        self.check_layer(layer)
        path = self.map.experts_activation if self.experts_of(layer) else self.map.activation
        found = _descend(self.blocks[layer], path)
        return found if isinstance(found, nn.Module) else None

    def experts_module(self, layer: int) -> nn.Module:
        """The module that runs a layer's experts: (tokens (N, width), chosen (N, k), shares (N, k)) -> (N, width)."""
        self.check_layer(layer)
        if not self.experts_of(layer):
            raise UnknownSite(f"Layer {layer} has no experts.", hint="Leave the expert out.")
        return self.blocks[layer].get_submodule(self.map.experts_module)

    # -------------------------------------------------------------------------------------------------- checks

    def experts_of(self, layer: int) -> int:
        """How many experts a layer has; 0 where its MLP is dense."""
        view = self._weights.get(f"layers.{layer}.mlp.experts.0.down.weight")
        return int(view.parameter.shape[0]) if view is not None else 0

    def neurons_of(self, layer: int) -> int:
        """How many neurons a layer's MLP (or each of its experts) has."""
        kind = "experts.0." if self.experts_of(layer) else ""
        return self.weight(f"layers.{layer}.mlp.{kind}down.weight").shape[1]

    def spare_of(self, layer: int) -> int:
        """How many spare neurons a layer's MLP has, numbered from `neurons_of(layer)` on."""
        added: dict[int, int] = getattr(self.model, ADDED, {})
        return added.get(layer, 0)

    def check_layer(self, layer: int) -> None:
        """Raises UnknownSite for a layer that this model does not have."""
        self._check_range("layer", layer, self.layers, f"in this {self.architecture} model")

    def check_neurons(
        self, layer: int, neurons: tuple[int, ...], expert: int | None = None, spare: int | None = None
    ) -> None:
        """Raises UnknownSite for a layer, an expert or a neuron that this model does not have.

        Where `spare` is given, so many neurons count beyond the layer's own.
        """
        self.mlp_part(layer, "down", expert)
        more = "" if not spare else f" The last {spare} are spare ones; the setting spare_neurons says how many."
        for neuron in (min(neurons), max(neurons)):
            self._check_range("neuron", neuron, self.neurons_of(layer) + (spare or 0), f"in layer {layer}", more)

    def check_heads(self, layer: int, heads: tuple[int, ...]) -> None:
        """Raises UnknownSite for a layer or a head that this model does not have."""
        self.check_layer(layer)
        for head in (min(heads), max(heads)):
            self._check_range("head", head, self.heads, f"in layer {layer}")

    # ------------------------------------------------------------------------------------------------- internal

    def _find_weights(self) -> Iterator[WeightView]:
        whole = {"embed": self.map.embed, "lm_head": self.map.lm_head, "final_norm": self.map.final_norm}
        if self.map.positions:
            whole["positions"] = self.map.positions
        for part, path in whole.items():
            yield from self._views(part, self.model, Piece(path))
        for layer, block in enumerate(self.blocks):
            prefix = f"layers.{layer}"
            for part, path in self.map.norms.items():
                yield from self._views(f"{prefix}.{part}", block, Piece(path))
            for part, piece in self.map.attention.items():
                yield from self._views(f"{prefix}.attn.{part}", block, piece)
            if self.map.experts_module and _descend(block, self.map.experts_module) is not None:
                yield from self._views(f"{prefix}.mlp.router", block, Piece(self.map.router))
                for part, piece in self.map.experts.items():
                    yield from self._expert_views(f"{prefix}.mlp.experts", part, block, piece)
            else:
                for part, piece in self.map.mlp.items():
                    views = list(self._views(f"{prefix}.mlp.{part}", block, piece))
                    spare = self.spare_of(layer)
                    yield from _cut(views, part, spare) if spare else views

    def _views(self, site: str, root: nn.Module, piece: Piece) -> Iterator[WeightView]:
        """The weight of a piece and, where there is one, its bias."""
        module = self._module(root, piece.module)
        for name in (piece.parameter, "bias") if module is not None else ():
            parameter = getattr(module, name, None)
            if isinstance(parameter, nn.Parameter):
                part = Piece(piece.module, name, piece.split, piece.part, piece.transposed)
                suffix = "bias" if name == "bias" else "weight"
                yield self._view(f"{site}.{suffix}", module, part, parameter)
            elif name != "bias":
                self._missing.append(f"{piece.module}.{name}")

    def _expert_views(self, prefix: str, part: str, root: nn.Module, piece: Piece) -> Iterator[WeightView]:
        module = self._module(root, piece.module)
        parameter = getattr(module, piece.parameter, None)
        if not isinstance(parameter, nn.Parameter) or parameter.dim() != 3:
            self._missing.append(f"{piece.module}.{piece.parameter} as one (experts, out, in) parameter")
            return
        for expert in range(parameter.shape[0]):
            yield self._view(f"{prefix}.{expert}.{part}.weight", module, piece, parameter, expert)

    def _view(
        self, site: str, module: nn.Module, piece: Piece, parameter: nn.Parameter, expert: int | None = None
    ) -> WeightView:
        name = self._parameter_names.get(id(parameter), f"{piece.module}.{piece.parameter}")
        return WeightView(site, module, name, piece, (self.heads, self.kv_heads, self.head_dim), expert)

    def _block_list(self) -> list[nn.Module]:
        found = _descend(self.model, self.map.blocks)
        if not isinstance(found, nn.ModuleList) or not len(found):
            self._missing.append(self.map.blocks)
            return []
        return list(found)

    def _module(self, root: nn.Module, path: str) -> nn.Module:
        found = _descend(root, path)
        if found is None:
            self._missing.append(path)
            return nn.Module()
        return found

    def _refuse_if_missing(self) -> None:
        if self._missing:
            missing = ", ".join(dict.fromkeys(self._missing))
            raise UnsupportedArchitecture(
                f"This {self.architecture} model ({type(self.model).__name__}) has no {missing}.",
                hint="Load it as a causal language model with the pinned transformers.",
                missing=list(dict.fromkeys(self._missing)),
            )

    def _norm(self, layer: int, part: str) -> Norm | None:
        if not part:
            return None
        kind = self.map.norm_kind
        return Norm(f"layers.{layer}.{part}.weight", kind == "rms_plus_one", kind == "layer")

    def activation_names(self) -> list[str]:
        """Every activation site of this model, in the order in which a forward pass comes by."""
        return list(self._activation_names())

    def _activation_names(self) -> Iterator[str]:
        yield "embed"
        for layer in range(self.layers):
            yield f"layers.{layer}.attn.heads"
            yield f"layers.{layer}.mlp.router" if self.experts_of(layer) else f"layers.{layer}.mlp.neurons"
            yield f"layers.{layer}.resid"
        yield "final.resid"

    def _nearest(self, site: str) -> str:
        numbered = _NUMBERED.match(site)
        if numbered and int(numbered[1]) >= self.layers:
            return f"Its layers are 0 to {self.layers - 1}."
        layer = int(numbered[1]) if numbered else 0
        expert = _EXPERT.match(numbered[2]) if numbered else None
        if expert and 0 < self.experts_of(layer) <= int(expert[1]):
            return f"The experts of layer {layer} are 0 to {self.experts_of(layer) - 1}."
        here = [name for name in self.names() if not name.startswith("layers.") or name.startswith(f"layers.{layer}.")]
        near = difflib.get_close_matches(site, here, n=3, cutoff=0.3)
        return f"The nearest are {', '.join(near)}." if near else f"Some are {', '.join(here[:3])}."

    def _check_range(self, what: str, value: int, count: int, where: str, more: str = "") -> None:
        if not 0 <= value < count:
            raise UnknownSite(f"There is no {what} {value} {where}.", hint=f"They are 0 to {count - 1}.{more}")

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self.tied:
            notes.append("lm_head.weight and embed.weight are one tensor: a change to one is a change to both.")
        if self.experts:
            notes.append(f"Each token runs through a few of {self.experts} experts; neurons belong to an expert.")
        return tuple(notes)


def model_sites(model: PreTrainedModel) -> ModelSites:
    """The sites of a loaded model.

    Raises UnsupportedArchitecture when no entry of the table fits, naming what is missing, Unsupported where a runtime
    would not see or stand a write (see `runtimes.py`), and InvalidInput when its weights have not been loaded.
    """
    require_writable(model)
    name = str(model.config.model_type)
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedArchitecture(
            f"The architecture {name!r} ({type(model).__name__}) has no entry in the table of sites.",
            hint=f"Known are {known}. Adding one is one entry in sites/architectures.py.",
        )
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise InvalidInput("The model's weights have not been loaded.", hint="Load it without a meta device.")
    with torch.no_grad():
        return ModelSites(model, name, ARCHITECTURES[name])


def _cut(views: list[WeightView], part: str, spare: int) -> Iterator[WeightView]:
    """The checkpoint's own neurons of part of a grown MLP, then the spare ones."""
    for view in views:
        if part == "down" and view.site.endswith(".bias"):
            yield view
            continue
        dim = 1 if part == "down" else 0
        own = view.shape[dim] - spare
        yield replace(view, within=(dim, 0, own))
        yield replace(view, site=view.site.replace(".mlp.", ".mlp.spare."), within=(dim, own, spare))


def _descend(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, or None."""
    found: object = root
    for step in path.split("."):
        found = getattr(found, step, None)
    return found if isinstance(found, nn.Module) else None
