"""What training made for a row, on disk: one file a scorer or table, LoRA refiners, and an index of digests."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tcbench.errors import UserError
from tcbench.method import Artefacts, ModelShape, Table
from tcbench.models.adapter import Adapter
from tcbench.models.networks import make_adapter
from tcbench.models.predictor import CachePredictor
from tcbench.models.weights import read_pickle
from tcbench.plan import Site
from tcbench.record.files import digest, read_json, read_tensors, seal, write_tensors
from tcbench.record.records import TRAINED, Trained
from tcbench.trainable import Imported, ImportRouter

if TYPE_CHECKING:
    from peft.tuners.lora import LoraModel


def add_refiners(adapter: Adapter, blocks: int, rank: int, generator: torch.Generator | None = None) -> "LoraModel":
    """Put LoRA (Hu et al. 2021) on attention and MLP of the last `blocks` blocks, in place; it starts as no change.

    Args:
        generator: of what is to learn, which is float32 whatever the model is.
    """
    from peft import LoraConfig  # takes five seconds, which what trains and merges no refiners does without
    from peft.tuners.lora import LoraModel

    names = {module: name for name, module in adapter.model.named_modules()}
    last = "|".join(re.escape(names[block]) for block in adapter.blocks[adapter.shape.num_blocks - blocks :])
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=rf"({last})\.({adapter.refiner_layers})")
    lora = LoraModel(adapter.model, {"default": config}, "default")
    if generator is not None:
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()  # peft takes the dtype of the layer
            if "lora_A" in name:  # peft draws it from the global generator
                bound = parameter.shape[1] ** -0.5
                with torch.no_grad():
                    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
    return lora


def save_artefacts(folder: Path, artefacts: Artefacts, refiners: dict[str, Tensor], log: dict) -> None:
    """Write what `train` made: one safetensors file a scorer or table, the refiners, and last `artefacts.json`, which
    vouches for them with their digests, so that an interrupted save is never taken for a finished one."""
    names = []
    for name, scorer in artefacts.scorers.items():
        write_tensors(folder / f"{name}.safetensors", {key: value.cpu() for key, value in scorer.state_dict().items()})
        names.append(name)
    for name, table in artefacts.tables.items():
        write_tensors(folder / f"{name}.safetensors", {"table": torch.tensor(table)})
        names.append(name)
    log["tables"] = list(artefacts.tables)
    if refiners:
        write_tensors(folder / "refiners.safetensors", refiners)
    files = [*names, "refiners"] if refiners else names
    log["files"] = {name: seal(folder / f"{name}.safetensors") for name in files}
    TRAINED.write(folder / "artefacts.json", log)


def artefacts_digest(folder: Path) -> str:
    """Identifies what `save_artefacts` wrote by what samples depend on: training again gives the same, although it
    takes another time.

    Raises:
        UserError: artefacts.json is missing or damaged.
    """
    log = TRAINED.read(folder / "artefacts.json")
    return digest([log["files"], log["tables"], log.get("scores"), log.get("settings")])


def load_artefacts(folder: Path, adapter: Adapter, *, refined: bool = True) -> tuple[Artefacts, Adapter]:
    """Read what `save_artefacts` wrote: the artefacts, and the adapter to sample with.

    That adapter is a copy with the refiners merged into its weights (they cost no MACs), or `adapter` itself.

    Args:
        refined: else `adapter` is what to sample with in any case, and a large model is not copied for nothing.

    Raises:
        UserError: a file is missing, damaged, or not the one that `artefacts.json` vouches for.
    """
    log, numbers = TRAINED.read(folder / "artefacts.json"), load_numbers(folder)
    scorers: dict[str, nn.Module] = {}
    for name in log["files"].keys() - numbers.tables:
        tensors, path = _vouched(folder, name, log), folder / f"{name}.safetensors"
        if name != "refiners":
            scorers[name] = CachePredictor(adapter)
            _load_exactly(scorers[name], tensors, path)
            scorers[name].eval().requires_grad_(False)
        elif refined:
            trained = [stage for stage in log["stages"] if {"blocks", "rank"} <= stage.keys()]
            if not trained:
                raise UserError(f"{folder / 'artefacts.json'}: no stage trained the refiners; train the row again")
            adapter = _merged(adapter, trained[0]["blocks"], trained[0]["rank"], tensors, path)
    return replace(numbers, scorers=scorers), adapter


def load_numbers(folder: Path) -> Artefacts:
    """The part of what `save_artefacts` wrote that needs no model: tables and alpha-bar.

    Raises:
        UserError: as `load_artefacts`.
    """
    log = TRAINED.read(folder / "artefacts.json")
    tables = {}
    for name in log["tables"]:
        if (table := _vouched(folder, name, log).get("table")) is None or table.ndim != 2:
            raise UserError(f"{folder / name}.safetensors: holds no table; train the row again")
        tables[name] = as_table(table)
    return Artefacts(alpha_bar=tuple(log["scores"]["alpha_bar"]) if "scores" in log else None, tables=tables)


def _vouched(folder: Path, name: str, log: Trained) -> dict[str, Tensor]:
    path = folder / f"{name}.safetensors"
    tensors, _ = read_tensors(path, fix="train the row again")
    if seal(path) != log["files"].get(name):
        raise UserError(f"{path}: is not the file that artefacts.json vouches for; train the row again")
    return tensors


def _merged(adapter: Adapter, blocks: int, rank: int, tensors: dict[str, Tensor], path: Path) -> Adapter:
    merged = make_adapter(copy.deepcopy(adapter.model), adapter.spec)
    lora = add_refiners(merged, blocks, rank)
    _load_exactly(lora, tensors, path, only="lora_")
    lora.merge_and_unload()
    return make_adapter(merged.model, merged.spec)  # the merged layers are new modules


def _load_exactly(module: nn.Module, tensors: dict[str, Tensor], path: Path, only: str = "") -> None:
    expected = {key for key in module.state_dict() if only in key}
    if expected != set(tensors):
        odd = sorted(expected ^ set(tensors))[0]
        raise UserError(
            f"{path}: {odd} is missing or unknown; the file belongs to another model or version: train again"
        )
    try:
        module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise UserError(f"{path}: {str(error).splitlines()[-1].strip()}; train the row again") from error


def as_table(logits_SG: Tensor) -> Table:
    """A tensor of two dimensions as host data; float32 numbers survive the way there and back unchanged."""
    return tuple(tuple(row) for row in logits_SG.tolist())


def read_imported(stage: Imported, shape: ModelShape, steps: int) -> Table:
    """The table that a method declares to be read from a file.

    Raises:
        UserError: the file is missing, damaged, of another form, or made for another model or number of steps.
    """
    if isinstance(stage, ImportRouter):
        return read_router(stage.path)
    return read_schedule(Path(stage.path), shape, steps)


def read_router(path: Path | str) -> Table:
    """Read a router that the reference's training script saved: {"routers": {"i.prob": [G] logits, i = 0..S-1}, ...}.

    Nothing in the file is executed.

    Raises:
        UserError: the file is missing, damaged, or of another form.
    """
    content = read_pickle(Path(path))
    wanted = '{"routers": {"0.prob": logits, "1.prob": logits, ...}}'
    routers = content.get("routers") if isinstance(content, Mapping) else None
    if not isinstance(routers, Mapping) or not routers:
        raise UserError(f"{path}: holds no routers; a checkpoint of the form {wanted} is needed")
    rows: list[Tensor] = []
    for index in range(len(routers)):
        row = routers.get(f"{index}.prob")
        if not isinstance(row, Tensor) or row.ndim != 1 or not row.isfinite().all():
            raise UserError(f"{path}: {index}.prob is missing, not a vector or not finite; {wanted} is needed")
        rows.append(row)
    if len({len(row) for row in rows}) > 1:
        raise UserError(f"{path}: its routers have different lengths; a checkpoint of one model is needed")
    return as_table(torch.stack(rows).float())


def read_schedule(path: Path, shape: ModelShape, steps: int) -> Table:
    """Read SmoothCache's lists: JSON of ones (compute) and zeros in sampling order by component, {"attn": [1, 0, ...]}.

    Raises:
        UserError: the file is missing, damaged, of another form, or made for another number of steps.
    """
    lists = read_json(path, fix="give a list of ones and zeros for each part of a block")
    if not isinstance(lists, Mapping) or not lists:
        raise UserError(f'{path}: holds no lists; JSON of the form {{"attn": [1, 0, ...], ...}} is needed')
    known = {name for site in shape.sites for name in _components(site)}
    for name, values in lists.items():
        if name not in known:
            parts = ", ".join(shape.kinds)
            raise UserError(
                f"{path}: {name!r} is no part of this model ({parts}); name a part, or a block's own as in 'attn-7'"
            )
        if not isinstance(values, list) or not all(value in (0, 1) for value in values):
            raise UserError(f"{path}: {name}: holds something else than ones and zeros; correct it")
        if len(values) != steps:
            raise UserError(f"{path}: {name}: a list of {len(values)} steps, the run has {steps}; use one made for it")
    return schedule_table(lists, shape, steps)


def schedule_table(lists: Mapping[str, Sequence[int]], shape: ModelShape, steps: int) -> Table:
    """Lists by component as a row for each step and a column for each branch.

    A block's own list goes before that of its component. What has none, and what lies past a list's end, is computed.
    """

    def entry(site: Site, step: int) -> float:
        own = next((lists[name] for name in _components(site) if name in lists), ())
        return float(own[step]) if step < len(own) else 1.0

    return tuple(tuple(entry(site, step) for site in shape.sites) for step in range(steps))


def _components(site: Site) -> tuple[str, str]:
    """What a list may be called that a branch follows, its own name first."""
    return f"{site.part}-{site.block}", site.part
