"""Which pairs of a method and a model are tried without `--every-combination`.

A method shows itself on one model; the engine and a model see of it what is decided. So the first model has every
method, and each further one those that between them decide all that any decides, and a share of the others.
"""

from collections.abc import Iterable
from typing import Any

import pytest

from tcbench.registry import method_names

COVERING = {
    *("clusca", "dbcache", "delta_dit", "duca", "first_block", "goc", "lazydit", "no_tokens", "procache", "speca"),
    *("toca", "toca_tokens", "tokencache", "tome", "tome_merge"),
}
"""Those methods; tests/test_contract.py checks that no other decides anything else."""


def marks_of(models: Iterable[str], model: str, name: str) -> tuple[Any, ...]:
    """The mark of a pair that is left out."""
    _, *further = models
    others = [other for other in method_names() if other not in COVERING]
    tried = model not in further or name in COVERING or further[others.index(name) % len(further)] == model
    return () if tried else (pytest.mark.combination,)
