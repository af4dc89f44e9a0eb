"""Weights of the reference models of goldens: what was drawn uniformly is drawn again, the rest is stored.

The models are initialised at random, most of their values by `xavier_uniform_`. Such a matrix is fixed by its shape, a
seed and its place in the stream of the Mersenne twister, which NumPy promises never to change; PyTorch's generator on
the CPU is the same one. The draws are exact on every machine, and a digest says so.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tcbench.errors import UserError
from tcbench.record.files import read_tensors, write_tensors

Recipe = dict[str, dict[str, list[int]]]
"""By tensor: `shape`, `start` [place in the stream], and `scaled` [rows, factor], the first rows times a factor."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, those of its recipe drawn.

    Raises:
        UserError: the file is missing or damaged, or what was drawn is not what the digest is of.
    """
    tensors, metadata = read_tensors(path)
    if "drawn" not in metadata:
        return tensors
    tensors |= draw(int(metadata["seed"]), json.loads(metadata["drawn"]))
    if fingerprint(tensors) != metadata["sha256"]:
        raise UserError(f"{path}: drawn from seed {metadata['seed']}, the weights miss their digest; restore the file")
    return tensors


def write_weights(path: Path, tensors: Mapping[str, Tensor], seed: int, drawn: Recipe) -> None:
    """Write weights without the tensors that a recipe draws from `seed`."""
    kept = {name: tensor for name, tensor in tensors.items() if name not in drawn}
    metadata = {"seed": str(seed), "drawn": json.dumps(drawn), "sha256": fingerprint(tensors)}
    write_tensors(path, kept, metadata)


def draw(seed: int, recipe: Recipe) -> dict[str, Tensor]:
    """The tensors of a recipe as torch.nn.init.xavier_uniform_ draws [rows, everything else] matrices, float32."""
    end = max(how["start"][0] + math.prod(how["shape"]) for how in recipe.values())
    # 24 of every 32 bits, as a fraction
    unit = (np.random.RandomState(seed).randint(2**32, size=end, dtype=np.uint32) & 0xFFFFFF) / 2**24
    tensors = {}
    for name, how in recipe.items():
        (start,), shape = how["start"], how["shape"]
        size = math.prod(shape)
        bound = np.float32(math.sqrt(6 / (shape[0] + size // shape[0])))
        # one rounding, as a fused multiply-add has
        values = (unit[start : start + size] * np.float64(bound + bound) - np.float64(bound)).astype(np.float32)
        values = values.reshape(shape)
        rows, factor = how.get("scaled", (0, 1))
        values[:rows] *= factor
        tensors[name] = torch.from_numpy(values)
    return tensors


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all values, by name."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(name.encode() + tensors[name].numpy().tobytes())
    return content.hexdigest()
