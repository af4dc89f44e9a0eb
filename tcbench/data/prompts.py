"""The prompt sets of text-to-image and text-to-video evaluation, in a fixed order."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tcbench.assets import locate
from tcbench.errors import UserError
from tcbench.files import read_json

SHIPPED = {"partiprompts": "prompts/PartiPrompts.tsv"}


def read_prompts(name: str, path: Path | None = None) -> tuple[str, ...]:
    """The prompts of a set.

    Args:
        name: "coco": the first caption of every image of MSCOCO, by image number (Lin et al. 2014); "partiprompts": the
            1632 of Yu et al. 2022, which ship; "vbench": every distinct prompt of VBench's suite (Huang et al. 2024).
        path: the set's own file: captions_val2017.json, PartiPrompts.tsv or VBench_full_info.json.

    Raises:
        UserError: the file is missing or is not the set's.
    """
    if path is None and name not in SHIPPED:
        raise UserError(f"prompts.file: the prompts of {name!r} do not ship with the package; give their file")
    file = locate(path or SHIPPED[name])
    if not file.exists():
        raise UserError(f"{file}: not found; `tcbench validate CONFIG --files` says how to get it")
    try:
        prompts = _READERS[name](file)
    except (KeyError, TypeError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise UserError(f"{file}: not the prompts of {name} ({type(error).__name__}: {error}); get it again") from error
    if not prompts:
        raise UserError(f"{file}: holds no prompts of {name}; get it again")
    return tuple(prompts)


def _coco(path: Path) -> list[str]:
    return [caption for _, caption in coco_captions(path)]


def coco_captions(path: Path) -> list[tuple[int, str]]:
    """(number, first caption) of every image that a captions_*.json of MSCOCO describes, by number."""
    first: dict[int, Any] = {}
    for annotation in sorted(read_json(path)["annotations"], key=lambda annotation: -annotation["id"]):
        first[annotation["image_id"]] = annotation
    return [(image, " ".join(first[image]["caption"].split())) for image in sorted(first)]


def _partiprompts(path: Path) -> list[str]:
    with open(path, encoding="utf-8", newline="") as lines:
        return [row["Prompt"].strip() for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)]


def _vbench(path: Path) -> list[str]:
    return list(dict.fromkeys(entry["prompt_en"] for entry in read_json(path)))


_READERS: dict[str, Callable[[Path], list[str]]] = {"coco": _coco, "partiprompts": _partiprompts, "vbench": _vbench}
