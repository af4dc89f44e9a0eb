"""Where methods, suites' configs and the workflow are: in a checkout, an editable install, a wheel. Imports no torch.

What ships lies in one folder, `methods/`, `config/` and `profiles/`: the checkout's, or `tcbench/shipped/` of a wheel
(pyproject.toml). A user's methods are found beside it in the folders of $TCBENCH_METHODS and in `./methods`, a user's
suites in `./config`, a user's data sets in `./data_sets`.

A user's file adds, it does not replace: a name stands for one content, wherever it is found. Files of one name in two
places may only be copies of each other, so that the row "fora" is FORA in everybody's tables.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from tcbench.errors import UserError, did_you_mean

PACKAGE = Path(__file__).resolve().parent.parent
_IN_A_WHEEL = PACKAGE / "shipped"
SHIPPED = _IN_A_WHEEL if _IN_A_WHEEL.exists() else PACKAGE.parent
WORKFLOW = PACKAGE / "rules" / "workflow.smk"
PROFILES = SHIPPED / "profiles"
ADDED_METHODS = "TCBENCH_METHODS"
"""The environment variable of added folders of methods, separated as in $PATH. The workflow's jobs inherit it."""

VBENCH = "TCBENCH_VBENCH"
"""The environment variable of the folder of VBench's own environment. Its python is run, so no config names it."""


def vbench_environment() -> Path:
    """The folder of VBench's own environment: $TCBENCH_VBENCH, else `.vbench` below the working directory."""
    return Path(os.environ.get(VBENCH) or ".vbench")


def add_methods(folders: Iterable[str]) -> None:
    """Search these folders for methods too, here and in the processes that are started from here."""
    before = os.environ.get(ADDED_METHODS, "")
    os.environ[ADDED_METHODS] = os.pathsep.join([*folders, *filter(None, [before])])


def method_files() -> dict[str, list[Path]]:
    """The files of every method, by name; those that ship first.

    Raises:
        UserError: an added folder is not there.
    """
    added = [Path(folder) for folder in os.environ.get(ADDED_METHODS, "").split(os.pathsep) if folder]
    for folder in added:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder of methods; correct --methods or ${ADDED_METHODS}")
    return _by_name([SHIPPED / "methods", *added, Path("methods")], ".py")


def method_file(name: str) -> Path:
    """The file that defines a method.

    Raises:
        UserError: there is none (suggests near misses), or several that differ.
    """
    files = method_files()
    if name not in files:
        raise UserError(f"method {name!r}: no file {name}.py in methods/; {did_you_mean(name, files)}")
    return _the_one("method", name, files[name])


def data_files() -> dict[str, list[Path]]:
    """The files of every data set, by name; those of the package first, then those of `./data_sets`."""
    return _by_name([PACKAGE / "data" / "sets", Path("data_sets")], ".py")


def data_file(name: str) -> Path:
    """The file that defines a data set.

    Raises:
        UserError: there is none (suggests near misses), or several that differ.
    """
    files = data_files()
    if name not in files:
        raise UserError(f"data {name!r}: no file {name}.py of a data set; {did_you_mean(name, files)}")
    return _the_one("data", name, files[name])


def suite_files() -> dict[str, list[Path]]:
    """The configs of every suite, by name; those that ship first."""
    return _by_name([SHIPPED / "config", Path("config")], ".yaml")


def suite_file(suite: str) -> Path:
    """The config of a suite that is given by name (`digits`) or by path, which is not looked at.

    Letters, digits, `_` and `-` are a name; anything else is a path.

    Raises:
        UserError: there is no suite of that name (suggests near misses), or several that differ.
    """
    if not re.fullmatch(r"[\w-]+", suite):
        return Path(suite)
    files = suite_files()
    if suite not in files:
        known = [*files, *(path.name for path in sorted(Path().glob("*.yaml")))]  # a config here needs its ending
        raise UserError(f"suite {suite!r}: no file {suite}.yaml in config/; {did_you_mean(suite, known)}")
    return _the_one("suite", suite, files[suite])


def profile_folder(profile: str) -> Path:
    """A profile of Snakemake's, that ships or is given by its path.

    Raises:
        UserError: it is neither.
    """
    for folder in (PROFILES / profile, Path(profile)):
        if (folder / "config.yaml").exists():
            return folder
    known = sorted(folder.name for folder in PROFILES.iterdir())
    raise UserError(f"profile {profile!r}: no config.yaml in such a folder; those that ship: {', '.join(known)}")


def suite_word(suite: str) -> str:
    """How the workflow's commands call a suite, so that they stay the same where the package or the work is moved to.

    It is the name if that means this content, else the path, relative if it is below the working directory.
    """
    path = suite_file(suite)
    namesakes = suite_files().get(path.stem, [])
    if namesakes and all(other.read_bytes() == path.read_bytes() for other in namesakes):
        return path.stem
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _by_name(folders: Iterable[Path], suffix: str) -> dict[str, list[Path]]:
    """Files by stem; a folder that is named twice counts once, files that begin with `_` are not meant."""
    distinct: dict[Path, Path] = {}
    for folder in folders:
        distinct.setdefault(folder.resolve(), folder)
    found: dict[str, list[Path]] = {}
    for folder in filter(Path.is_dir, distinct.values()):
        for file in sorted(os.listdir(folder)):  # not `glob`, which takes ten times as long and is asked for often
            stem, ending = os.path.splitext(file)
            if ending == suffix and not stem.startswith("_"):
                found.setdefault(stem, []).append(folder / file)
    return found


def _the_one(what: str, name: str, files: list[Path]) -> Path:
    first, *others = files
    for other in others:
        if other.read_bytes() != first.read_bytes():
            raise UserError(f"{what} {name!r}: {other} and {first} differ; rename yours, for a name has one meaning")
    return first


ASSETS = PACKAGE / "assets"


def locate(file: Path | str) -> Path:
    """The package's own file of that name under its assets if there is one, else the user's path."""
    packaged = ASSETS / file
    return packaged if packaged.exists() else Path(file)
