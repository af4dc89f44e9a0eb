"""The fastest `Blocks` for a model where it is."""

from tcbench.engine.compiled import CompiledBlocks, can_compile
from tcbench.engine.fused import FusedBlocks, can_fuse
from tcbench.engine.plain import PlainBlocks
from tcbench.models.adapter import Adapter


def fastest(adapter: Adapter) -> type[FusedBlocks | CompiledBlocks | PlainBlocks]:
    """Fused kernels, compiled parts or, where neither serves it, the model's own layers."""
    if can_fuse(adapter):
        return FusedBlocks
    return CompiledBlocks if can_compile(adapter) else PlainBlocks
