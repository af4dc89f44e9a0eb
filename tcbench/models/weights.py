"""Reading and checking files of weights, the same for every network of the package."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcbench.errors import UserError
from tcbench.record.files import read_json, read_tensors

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from .safetensors, or from .pt / .pth / .bin without executing anything in it.

    Of a folder as diffusers saves it: from its safetensors file or shards. Of a training script's checkpoint: the
    averaged weights if there are such.

    Raises:
        UserError: a file is missing, truncated, of another kind, or holds something else.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    if path.suffix not in {".pt", ".pth", ".bin"}:
        raise UserError(f"{path}: unknown kind of checkpoint; give a .safetensors, .pt, .pth or .bin file")
    state = read_pickle(path)
    if isinstance(state, dict):  # as the training scripts of DiT and PixArt-alpha save
        state = state.get("ema", state.get("state_dict", state))
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: not a state dict of tensors; give a checkpoint of weights only")
    return state


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote, without executing anything in it.

    Raises:
        UserError: the file is missing, truncated, or holds more than plain values and tensors.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DiT's training script saves its flags along
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; download the checkpoint or correct the path") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: truncated or not a plain checkpoint ({reason}); download it again") from error


def _read_folder(folder: Path) -> dict[str, Tensor]:
    index = folder / f"{DIFFUSERS_FILE}.index.json"
    if index.exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
    elif (folder / DIFFUSERS_FILE).exists():
        names = [DIFFUSERS_FILE]
    else:
        raise UserError(f"{folder}: a folder without {DIFFUSERS_FILE}; give the checkpoint's own file or folder")
    return {key: tensor for name in names for key, tensor in read_tensors(folder / name)[0].items()}


def check_state(state: dict[str, Tensor], model: nn.Module, name: str, path: Path) -> None:
    """Check that `state` has exactly the parameters of `model`, called `name`, in shape and finite.

    Raises:
        UserError: names `path` and the first tensor that is missing, misshapen, not finite or unknown.
    """
    fix = f"give a checkpoint of {name} or correct the model's shape"
    # named_parameters lists a shared parameter once, under its first name; state_dict would list every alias
    wanted = {key: parameter.shape for key, parameter in model.named_parameters()}
    for key, shape in wanted.items():
        if key not in state:
            raise UserError(f"{path}: {key} is missing; {fix}")
        if state[key].shape != shape:
            raise UserError(f"{path}: {key} has shape {list(state[key].shape)}, not {list(shape)}; {fix}")
        if not torch.isfinite(state[key]).all():
            raise UserError(f"{path}: {key} holds NaN or infinity; train or download it again")
    for key in state:
        if key not in wanted:
            raise UserError(f"{path}: {key} is not part of {name}; {fix}")
