"""`tcbench init`: a method and a suite to start from, which run as they are written."""

import re
from pathlib import Path

import yaml

from tcbench.data.images import list_images, read_rgb
from tcbench.errors import UserError
from tcbench.outside.places import ASSETS, SHIPPED, method_files, suite_files

TEMPLATES = ASSETS / "starter"
"""method.py: a method that holds branches between full steps. images.yaml: a suite of images in class folders."""


def write_starter(name: str, images: Path | None) -> list[str]:
    """Write methods/NAME.py and config/NAME.yaml, and say what to do with them.

    Suites have no `_` in their names: that of method `my_method` is called `my-method`.

    Args:
        images: a folder of images in class folders that the suite is of; None for a suite of digits, as `demo`.

    Returns:
        lines to print.

    Raises:
        UserError: the name is taken, or cannot be both a file's and a module's, or the folder is none of class folders.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise UserError(f"{name}: use lower-case letters, digits and '_', a letter first, e.g. my_method")
    called = name.replace("_", "-")
    method, suite = Path("methods") / f"{name}.py", Path("config") / f"{called}.yaml"
    for file, known in ((method, method_files()), (suite, suite_files())):
        if file.exists() or file.stem in known:
            raise UserError(f"{file}: {file.stem!r} is there already; give another name, nothing was written")
    config = _of_images(called, name, images) if images else _of_digits(called, name)
    cls = "".join(map(str.capitalize, name.split("_")))
    text = (TEMPLATES / "method.py").read_text(encoding="utf-8").replace("class Starter", f"class {cls}")
    for path, content in ((method, text.replace("starter", name)), (suite, config)):
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return [
        f"{method}: the method; edit `plan`",
        f"{suite}: a suite with it in a row",
        f"next: tcbench demo {called}    (table and picture, about a minute)",
        f"then: tcbench macs --model dit-xl-2-256 --method {name} --nfe 50    (its cost at full size)",
    ]


def _of_digits(name: str, method: str) -> str:
    """The suite `demo` under another name, with the method in a row more."""
    text = (SHIPPED / "config" / "demo.yaml").read_text(encoding="utf-8")
    body = text[text.index("suite: demo") :].replace("suite: demo", f"suite: {name}", 1)
    head = (
        f"# {method}.py among methods that need no training (TeaCache is calibrated, not trained): "
        f"`tcbench demo {name}`.\n# docs/config.md has every key.\n"
    )
    return f"{head}{body.rstrip()}\n  {method}: {{method: {method}, nfe: 20}}\n"


def _of_images(name: str, method: str, folder: Path) -> str:
    """A suite of images in class folders, with a small random network of their size."""
    listing = list_images(folder)
    if not listing.classes:
        raise UserError(f"{folder}: holds no folders; give a folder per class with images of one size inside")
    width, height = read_rgb(listing.paths[0]).size
    if width != height or width % 4:
        raise UserError(f"{listing.paths[0]}: is {width}x{height}; a model is square, its side a multiple of 4")
    text = (TEMPLATES / "images.yaml").read_text(encoding="utf-8")
    quoted = yaml.safe_dump(str(folder), default_style='"').strip()
    values = {"NAME": name, "METHOD": method, "FOLDER": quoted, "SIDE": width, "CLASSES": max(listing.classes) + 1}
    for word, value in values.items():
        text = text.replace(f"<{word}>", str(value))
    return text
