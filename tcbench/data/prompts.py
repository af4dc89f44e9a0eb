"""MSCOCO's captions, which are prompts and say what its images show."""

from pathlib import Path

from pydantic import BaseModel

from tcbench.errors import UserError
from tcbench.outside.foreign import read_json_as


class _Image(BaseModel):
    id: int
    file_name: str


class _Annotation(BaseModel):
    id: int
    image_id: int
    caption: str


class _Captions(BaseModel):
    images: list[_Image] = []
    annotations: list[_Annotation]


def coco_captions(path: Path) -> list[tuple[int, str]]:
    """(number, first caption) of every image that a captions_*.json of MSCOCO describes, by number.

    Raises:
        UserError: the file is missing or something else, or an image's first caption is empty.
    """
    return _first(_read(path), path)


def coco_files(path: Path) -> list[tuple[str, str]]:
    """(name of its file, first caption) of every image that is described, by the images' numbers.

    Raises:
        UserError: as `coco_captions`, or an image has no file or two.
    """
    captions = _read(path)
    names = {image.id: image.file_name for image in captions.images}
    if len(names) < len(captions.images):
        raise UserError(f"{path}: `images` lists a number twice; number its images, or get it again")
    described = _first(captions, path)
    if lost := [image for image, _ in described if image not in names]:
        raise UserError(f"{path}: captions image {lost[0]}, which `images` does not list; get it again or add it")
    return [(names[image], caption) for image, caption in described]


def _read(path: Path) -> _Captions:
    return read_json_as(path, _Captions, "captions of MSCOCO")


def _first(captions: _Captions, path: Path) -> list[tuple[int, str]]:
    first = {
        annotation.image_id: " ".join(annotation.caption.split())
        for annotation in sorted(captions.annotations, key=lambda annotation: -annotation.id)
    }
    if empty := [image for image, caption in first.items() if not caption]:
        raise UserError(f"{path}: the first caption of image {min(empty)} is empty; write one or remove it")
    return sorted(first.items())
