"""What a suite needs that does not ship with the project: is it there, and if not, where does it come from?"""

from dataclasses import dataclass
from pathlib import Path

from tcbench.config import PROMPT_SETS, Suite
from tcbench.data.prompts import SHIPPED, read_prompts
from tcbench.errors import UserError


@dataclass(frozen=True)
class Need:
    """A file or folder.

    Attributes:
        name: what the config calls it.
        path, used, get: where it should be, what for, where it comes from.
        problem: why it cannot be used, None if nothing is known against it.
    """

    name: str
    path: Path
    used: str
    get: str
    problem: str | None


def needs(suite: Suite) -> list[Need]:
    """Every file of `suite.files`, and the prompts, which are read to be counted. Weights are not opened."""
    found = [
        Need(name, file.path, file.used, file.get, _problem(file.path.expanduser(), file.holds))
        for name, file in suite.files.items()
        if file.path != suite.prompts.file
    ]
    if suite.data in PROMPT_SETS:
        source = next((file for file in suite.files.values() if file.path == suite.prompts.file), None)
        path, used, problem = suite.prompts.file or Path(SHIPPED[suite.data]), f"prompts of {suite.data}", None
        if suite.prompts.file and not path.exists():
            problem = "not there"
        else:
            try:
                used = f"{len(read_prompts(suite.data, suite.prompts.file))} {used}"
            except UserError as error:
                problem = str(error).removeprefix(f"{path}: ")
        found.append(Need("prompts", path, used, source.get if source else "it ships with the package", problem))
    return found


def _problem(path: Path, holds: tuple[str, ...]) -> str | None:
    if not path.exists():
        return "not there"
    lacking = [name for name in holds if not (path / name).exists()]
    return f"lacks {', '.join(lacking)}" if lacking else None
