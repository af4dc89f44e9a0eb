"""tcbench: one referee for caching methods on diffusion transformers, at matched compute.

`import tcbench` imports nothing else: the names below are found when they are asked for (docs/api.md).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tcbench.attach.cached import disable_cache, enable_cache
    from tcbench.errors import UserError
    from tcbench.models.inferred import spec_of
    from tcbench.models.networks import make_adapter
    from tcbench.registry import make_method
    from tcbench.samplers import SamplerSettings
    from tcbench.sampling import sample_batch

__version__ = "0.1.0"
__all__ = [
    "SamplerSettings",
    "UserError",
    "disable_cache",
    "enable_cache",
    "make_adapter",
    "make_method",
    "sample_batch",
    "spec_of",
]

_MODULES = {
    "SamplerSettings": "samplers",
    "UserError": "errors",
    "disable_cache": "attach.cached",
    "enable_cache": "attach.cached",
    "make_adapter": "models.networks",
    "make_method": "registry",
    "sample_batch": "sampling",
    "spec_of": "models.inferred",
}
"""Where each public name is defined."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
