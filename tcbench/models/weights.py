"""Reading and checking files of weights, the same for every network of the package.

What others publish or train comes in many wrappings; docs/user-files.md says which are taken off. Nothing in a file is
ever executed.
"""

import re
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from tqdm import tqdm

from tcbench.errors import UserError
from tcbench.models.torchscript import is_torchscript, read_torchscript
from tcbench.outside.foreign import head_of, read_json_as, refuse_stand_in

FOLDER_FILES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
"""What diffusers and transformers call a folder's weights; the first that is there, whole or in shards, is read."""

AVERAGED = ("ema", "state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "params_ema")
PLAIN = ("state_dict", "model_state_dict", "model", "module", "net", "params")
"""Under what names training scripts save weights beside other things; averaged ones are preferred."""

_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of names that torch.compile and wrappers of parallel training put in."""

_PREFIXES = ("module.", "model.")
"""What DistributedDataParallel and Lightning put before every name."""

_COUNTERS = {"n_averaged", "num_updates", "decay", "initted", "step"}
"""What classes that average weights count beside them."""

_HARMLESS = {"argparse.Namespace", "types.SimpleNamespace", "datetime.datetime"}


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names in the network, without executing anything in it.

    A file's content says what it is: safetensors, what torch.save writes, or a TorchScript archive. Of a folder as
    diffusers and transformers save one: its weights, whole or in shards; so too for the index of shards. Of a training
    script's checkpoint: the averaged weights if there are such, said in a line on stderr, else the plain ones, whether
    they stand in mappings of their own or under names of their own (`ema_model.x` beside `model.x`, as Lightning saves
    a module that holds both). Names lose what wrappers put before them.

    Raises:
        UserError: a file is missing, truncated, of another kind, quantised, or holds no tensors by name.
    """
    state = _read_folder(path) if path.is_dir() else _read_index(path) if path.suffix == ".json" else _read_file(path)
    for key, tensor in state.items():
        if tensor.is_quantized or tensor.dtype in (torch.int8, torch.uint8):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{path}: {key} holds {kind}: quantised weights; give the checkpoint in 16 or 32 bit")
    return _bare(state, path)


def _read_file(path: Path) -> dict[str, Tensor]:
    head = head_of(path)
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length < 100_000_000:  # what safetensors allows for its header
        try:
            return load_file(path)
        except Exception as error:  # its own exceptions, and what torch makes of impossible shapes
            reason = str(error).partition("\n")[0]
            raise UserError(f"{path}: truncated or not a safetensors file ({reason}); download it again") from error
    if is_torchscript(path):
        return read_torchscript(path)
    return _weights_in(read_pickle(path), path)


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote, without executing anything in it.

    Objects of other classes than tensors and plain values, such as a training script's settings, are read as `Unread`.
    A name of Python's standard library is refused instead, because there it can only be code to run.

    Raises:
        UserError: the file is missing, truncated, another thing, or holds code.
    """
    refuse_stand_in(path, "a checkpoint")
    try:
        # a file of before torch 1.6 cannot be asked what it names
        named = get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else sorted(_HARMLESS)
        if code := [name for name in named if _is_code(name)]:
            raise _holds_code(path, code[0])
        with safe_globals([(Unread, name) for name in named]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # what damaged bytes make of the unpickler's few building blocks has no bounds
        if blocked := re.search(r"GLOBAL (\S+)", str(error)):
            raise _holds_code(path, blocked[1]) from error
        reason = str(error).partition("\n")[0].partition(". ")[0]  # further sentences advise to load without safeguards
        raise UserError(f"{path}: truncated or not a plain checkpoint ({reason}); download it again") from error


def _is_code(name: str) -> bool:
    """Whether what a pickle names is of the standard library, of Python 2's names too, and no plain data."""
    module = name.rpartition(".")[0]
    root = IMPORT_MAPPING.get(module, module).partition(".")[0]
    return root in sys.stdlib_module_names and name not in _HARMLESS and not name.startswith("pathlib.")


def _holds_code(path: Path, name: str) -> UserError:
    return UserError(
        f"{path}: not a plain checkpoint: to read it is to run {name}; get it as safetensors, or save its weights "
        "alone where they were trained, with safetensors.torch.save_file(model.state_dict(), FILE)"
    )


class Unread:
    """Stands for an object of a checkpoint that is neither a tensor nor a plain value; knows nothing of it."""

    def __init__(self, *args: object) -> None:  # called where the pickle would have called the class
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _weights_in(content: Any, path: Path, within: str = "") -> dict[str, Tensor]:
    """The tensors by name, out of what a training script saved along."""
    if not isinstance(content, Mapping):
        what = "objects of classes" if isinstance(content, Unread) else f"a {type(content).__name__}"
        raise UserError(
            f"{path}: {within}not a state dict of tensors but {what}; save model.state_dict() where it was trained"
        )
    there = [key for key in (*AVERAGED, *PLAIN) if isinstance(content.get(key), Mapping | list | Unread)]
    there = [key for key in there if content[key] != {} and content[key] != []]
    if there:
        if there[0] in AVERAGED and (plain := [key for key in there if key in PLAIN]):
            tqdm.write(f"{path}: reads the averaged weights, {there[0]!r}, not {plain[0]!r}", file=sys.stderr)
        return _weights_in(content[there[0]], path, f"{there[0]!r}: ")
    state = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not state:
        names = ", ".join(map(repr, list(content)[:3])) or "nothing"
        raise UserError(f"{path}: {within}not a state dict of tensors (holds {names}); give a checkpoint of weights")
    return state


def _bare(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same without what wrappers put into the names; 8-bit floating point in float32, the rest as it is."""
    bare = _without_prefix({_WRAPPERS.sub("", key): tensor for key, tensor in state.items()})
    if len(bare) < len(state):
        raise UserError(f"{path}: holds weights twice, with and without a wrapper's prefix; save them once")
    return {
        key: tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
        for key, tensor in _without_prefix(_averaged_among(bare, path)).items()
    }


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same without the prefixes that all names have."""
    while state and (prefix := next((text for text in _PREFIXES if all(key.startswith(text) for key in state)), None)):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _averaged_among(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The averaged weights, if they stand among others under a name of `AVERAGED`; no counters of averaging."""
    state = {key: tensor for key, tensor in state.items() if key not in _COUNTERS or tensor.numel() > 1}
    under = next((name for name in AVERAGED if any(key.startswith(f"{name}.") for key in state)), None)
    if under is None:
        return state
    averaged = {key.removeprefix(f"{under}."): tensor for key, tensor in state.items() if key.startswith(f"{under}.")}
    averaged = {key: tensor for key, tensor in averaged.items() if key not in _COUNTERS}
    others = [key for key in state if not key.startswith(f"{under}.")]
    if others:
        tqdm.write(f"{path}: reads the averaged weights, '{under}.*', not {others[0]!r} and others", file=sys.stderr)
    # latent diffusion's LitEma leaves the dots out of the names that it averages
    dotted = {(name := key.partition(".")[2]).replace(".", ""): name for key in others}
    return {dotted.get(key, key) if "." not in key else key: tensor for key, tensor in averaged.items()}


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for name in FOLDER_FILES:
        if (index := folder / f"{name}.index.json").exists():
            return _read_index(index)
        if (folder / name).exists():
            return _read_file(folder / name)
    if (folder / "transformer").is_dir():
        raise UserError(f"{folder}: the folder of a whole pipeline; give its denoiser, {folder / 'transformer'}")
    raise UserError(f"{folder}: a folder without {FOLDER_FILES[0]}; give the checkpoint's own file or folder")


class _Index(BaseModel):
    weight_map: dict[str, str]


def _read_index(index: Path) -> dict[str, Tensor]:
    shards = read_json_as(index, _Index, "an index of shards").weight_map
    state: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        if PurePath(name).name != name:
            raise UserError(f"{index}: shard {name!r} is no file beside it; download the folder again")
        if not (index.parent / name).exists():
            raise UserError(f"{index.parent / name}: not found, and the index lists it; download all shards")
        state |= _read_file(index.parent / name)
    if lacking := sorted(shards.keys() - state.keys()):
        raise UserError(
            f"{index.parent / shards[lacking[0]]}: lacks {lacking[0]}, which the index lists; download it again"
        )
    return state


def divides(tensor: Tensor, parts: int) -> bool:
    """Whether a tensor has so many equal parts along its first dimension, as stacked weights do."""
    return tensor.ndim > 0 and len(tensor) % parts == 0


def check_state(state: dict[str, Tensor], model: nn.Module, name: str, path: Path) -> None:
    """Check that `state` has exactly the parameters of `model`, called `name`, in shape and finite.

    Raises:
        UserError: as `check_shapes` and `check_finite`.
    """
    check_shapes(state, model, name, path)
    for key, tensor in state.items():
        check_finite(key, tensor, path)


def check_shapes(state: dict[str, Tensor], model: nn.Module, name: str, path: Path) -> None:
    """Check that `state` has exactly the parameters of `model`, called `name`, in shape, and of floating point.

    Raises:
        UserError: names `path` and the first tensor that is missing, misshapen, of another kind or unknown.
    """
    fix = f"give a checkpoint of {name} or correct the model's shape"
    # named_parameters lists a shared parameter once, under its first name; state_dict would list every alias
    wanted = {key: parameter.shape for key, parameter in model.named_parameters()}
    for key, shape in wanted.items():
        if key not in state:
            raise UserError(f"{path}: {key} is missing; {fix}")
        if state[key].shape != shape:
            raise UserError(f"{path}: {key} has shape {list(state[key].shape)}, not {list(shape)}; {fix}")
        if not state[key].is_floating_point():
            kind = str(state[key].dtype).removeprefix("torch.")
            raise UserError(f"{path}: {key} holds {kind}, not floating-point numbers; {fix}")
    for key in state:
        if key not in wanted:
            raise UserError(f"{path}: {key} is not part of {name}; {fix}")


def check_finite(key: str, tensor: Tensor, path: Path) -> None:
    """Check the values of one tensor of a checkpoint, on its device; raises UserError."""
    if not tensor.isfinite().all():
        raise UserError(f"{path}: {key} holds NaN or infinity; train or download it again")
