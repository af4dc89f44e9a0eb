"""Which transformers a method can be put on: those that compute what diffusers' class computes, and nothing beside."""

from typing import Any

from torch import nn

from tcbench.engine.fused import can_fuse
from tcbench.errors import UserError
from tcbench.models.adapter import Adapter
from tcbench.models.inferred import spec_of
from tcbench.models.networks import make_adapter

PROCESSORS = {
    *("AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0", "XFormersAttnProcessor"),
    *("FluxAttnProcessor", "WanAttnProcessor"),
}
"""diffusers' ways to compute the attention that the families' adapters compute."""

_LINEAR = (".to_q", ".to_k", ".to_v", ".to_out.0", ".net.0.proj", ".net.2")
"""How the names of the layers end whose weights the fused kernels read."""


def adapter_of(transformer: Any) -> Adapter:
    """The engine's view of a pipeline's transformer.

    Raises:
        UserError: it is of an unknown class or shape, compiled, moved by hooks, in training, attends in a way of its
            own, or has weights that the adapter does not read.
    """
    if hasattr(transformer, "_orig_mod") or any(_is_compiled(module) for module in _modules(transformer)):
        raise UserError(
            "the pipeline's transformer is compiled (torch.compile), and a method runs its parts one by one; "
            "enable the cache on the network as it was before"
        )
    spec = spec_of(transformer)
    if transformer.training:
        raise UserError("the pipeline's transformer is in training mode; call pipe.transformer.eval()")
    for name, module in transformer.named_modules():
        if _is_hooked(module, itself=name == ""):
            where = f"transformer.{name}".rstrip(".")
            raise UserError(
                f"{where}: hooks change or move it (offloading, layerwise casting, a hook of yours), and a method runs "
                "its parts without them; use pipe.to(device) instead, or enable the cache without the hooks"
            )
        processor = type(getattr(module, "processor", None)).__name__
        if processor not in {"NoneType", *PROCESSORS}:
            raise UserError(f"transformer.{name}: attends by {processor}, which tcbench does not run; remove it")
    adapter = make_adapter(transformer, spec)
    if unread := adapter.unread():
        raise UserError(f"transformer.{unread}")
    return adapter


def fuses(adapter: Adapter) -> bool:
    """Whether the fused kernels serve it: where it is, and with its layers, which LoRA or quantisation may replace."""
    layers = (layer for block in adapter.blocks for layer in block.named_modules())
    return can_fuse(adapter) and all(type(layer) is nn.Linear for name, layer in layers if name.endswith(_LINEAR))


def _modules(transformer: Any) -> list[nn.Module]:
    return list(transformer.modules()) if isinstance(transformer, nn.Module) else []


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None


def _is_hooked(module: nn.Module, itself: bool) -> bool:
    """Whether somebody's hooks run in a module; torch's own on the transformer `itself` run whatever it computes."""
    registry = getattr(module, "_diffusers_hook", None)
    of_torch = not itself and bool(module._forward_hooks or module._forward_pre_hooks)
    return hasattr(module, "_hf_hook") or bool(registry and registry.hooks) or of_torch
