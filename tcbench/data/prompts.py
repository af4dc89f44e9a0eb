"""MSCOCO's captions, which are prompts and say what its images show."""

from pathlib import Path
from typing import Any

from tcbench.record.files import read_json


def coco_captions(path: Path) -> list[tuple[int, str]]:
    """(number, first caption) of every image that a captions_*.json of MSCOCO describes, by number."""
    first: dict[int, Any] = {}
    for annotation in sorted(read_json(path)["annotations"], key=lambda annotation: -annotation["id"]):
        first[annotation["image_id"]] = annotation
    return [(image, " ".join(first[image]["caption"].split())) for image in sorted(first)]
