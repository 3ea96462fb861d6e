"""Runtimes that would not see a write, or would not stand one.

Owns recognising them: weights that were repacked, quantised, computed from others, moved away between steps, or taken
for constants. A change of such a model could be ignored without a word, so it is refused by name. Imports none of the
libraries that it recognises.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from liveweight.errors import Unsupported

_QUANTISED = {  # package of a module's class -> what people call it
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "auto_gptq": "GPTQ",
    "gptqmodel": "GPTQ",
    "awq": "AWQ",
    "hqq": "HQQ",
    "optimum": "quanto",
    "compressed_tensors": "compressed-tensors",
    "transformer_engine": "Transformer Engine",
}
_TORCH_QUANTISED = ("torch.ao.nn.", "torch.nn.quantized.")
_WRITABLE = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def obstacles(model: nn.Module) -> Iterator[tuple[str, str]]:
    """What stands between a write and this model's tokens, each with the way out; nothing for a plain torch model."""
    # Looked through before every change, so nothing here asks a module for what it may lack: that is slow.
    for name, module in model.named_modules():
        for what, way_out in _of_module(module):
            yield f"The module {name or type(module).__name__} {what}", way_out
        for own, parameter in module._parameters.items():
            for what, way_out in _of_parameter(parameter) if parameter is not None else ():
                yield f"The weight {name}.{own} {what}", way_out


def require_writable(model: nn.Module) -> None:
    """Raises Unsupported naming the first obstacle."""
    for what, way_out in obstacles(model):
        raise Unsupported(f"{what} A change would be lost or could not be made.", hint=way_out)


def _of_module(module: nn.Module) -> Iterator[tuple[str, str]]:
    kind = type(module)
    if kind.__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
        yield (
            "was compiled by torch.compile, which may take weights for constants and passes hooks by.",
            "Load the model without compiling it.",
        )
    if isinstance(module, torch.jit.ScriptModule):
        yield "is TorchScript, which may hold its weights as constants.", "Load the model itself."
    quantised = _QUANTISED.get(kind.__module__.partition(".")[0])
    if quantised is not None or kind.__module__.startswith(_TORCH_QUANTISED):
        yield f"is quantised or repacked by {quantised or 'torch.ao'}.", "Load the unquantised checkpoint."
    if "parametrizations" in module._modules:
        yield "computes its weights from others (a parametrization).", "Remove the parametrization."
    hook = vars(module).get("_hf_hook")
    if hook is not None and any(getattr(each, "offload", False) for each in (hook, *getattr(hook, "hooks", ()))):
        yield "is offloaded by accelerate: its weights are elsewhere between steps.", "Load it onto one device."


def _of_parameter(parameter: Tensor) -> Iterator[tuple[str, str]]:
    if type(parameter) is not nn.Parameter:
        yield f"is a {type(parameter).__name__}, not a plain tensor.", "Load the unquantised checkpoint."
    elif parameter.is_inference():
        yield "was made in inference mode and cannot be written to.", "Load it outside inference_mode."
    elif parameter.dtype not in _WRITABLE:
        yield f"is stored as {parameter.dtype}.", "Load it in float32, bfloat16 or float16."
