"""What a data set is: a file of `tcbench/data/sets/`, or of `./data_sets`, with one `DataSource`. Imports no torch.

Configs are checked against the class, so whatever reads images or needs torch is imported inside functions.
"""

import csv
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from tcbench.data import Dataset
from tcbench.errors import UserError
from tcbench.outside.places import locate


class DataSource(ABC):
    """A data set: what samples show and are compared with, and what networks learn from.

    Attributes:
        name: the file's, and what a suite's `data.name` calls it.
        conditioning: on what samples are generated: classes in turn, or captions.
        brings_images: whether `images` reads any; else a suite names them in `scoring.real` and `training.images`.
        recipes: what `tcbench pretrain` makes of it, "denoiser", "classifier", "reader" or "clip": the fields in which
            the recipe differs from its class's defaults.
        takes_folder: whether its files may lie in a folder that the suite names, `data.folder`.
        usual_folders: where they are looked for otherwise; with none, the suite must name it.
        holds: what the folder must hold.
        get: where the files come from.
        folder: that folder, or the first of the usual ones that is there, or the first; None without files.
    """

    name: ClassVar[str]
    conditioning: ClassVar[Literal["class", "text"]]
    brings_images: ClassVar[bool] = True
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    takes_folder: ClassVar[bool] = False
    usual_folders: ClassVar[tuple[Path, ...]] = ()
    holds: ClassVar[tuple[str, ...]] = ()
    get: ClassVar[str] = ""

    def __init__(self, folder: Path | None = None) -> None:
        there = (path for path in self.usual_folders if path.is_dir())
        self.folder = folder or next(there, self.usual_folders[0] if self.usual_folders else None)

    @abstractmethod
    def images(self, held_out: bool = False) -> Dataset:
        """Images with what conditions them; if `held_out`, such as no model is trained on, where there are any.

        Raises:
            UserError: a file is missing or is not the data set's.
        """

    def parts(self, examples: int) -> tuple[Dataset, Dataset]:
        """(what a denoiser trains on, what is held out of it, for its log); `examples`: how many to make up."""
        return self.images(), self.images(held_out=True)[:512]

    def fingerprint(self) -> str | None:
        """Identifies files whose content no digest in the code does; None where there are none."""
        return None


class NamedImages(DataSource):
    """A data set whose images are the files that a suite names."""

    brings_images = False

    def images(self, held_out: bool = False) -> Dataset:
        """None are read here."""
        raise UserError(f"data {self.name!r}: no images of it are read here; a suite names them")


class PromptSet(NamedImages):
    """A published set of prompts.

    Attributes:
        shipped: its file among the package's assets; None if a suite must name it, `data.prompts.file`.
        describes_images: whether that file also says what the images of `scoring.real` show.
    """

    conditioning = "text"
    shipped: ClassVar[str | None] = None
    describes_images: ClassVar[bool] = False

    @abstractmethod
    def read(self, path: Path) -> list[str]:
        """The prompts in a file; KeyError, TypeError or ValueError if it is not the set's."""

    def prompts(self, path: Path | None = None) -> tuple[str, ...]:
        """The prompts of the set, in a fixed order; `path`: its own file.

        Raises:
            UserError: the file is missing or is not the set's.
        """
        if path is None and self.shipped is None:
            raise UserError(
                f"data.prompts.file: the prompts of {self.name!r} do not ship with the package; give their file"
            )
        file = locate(path or str(self.shipped))
        if not file.exists():
            raise UserError(f"{file}: not found; `tcbench validate CONFIG --files` says how to get it")
        try:
            prompts = self.read(file)
        except (KeyError, TypeError, ValueError, csv.Error) as error:  # of text and JSON, too
            raise UserError(
                f"{file}: not the prompts of {self.name} ({type(error).__name__}: {error}); get it again"
            ) from error
        if not prompts:
            raise UserError(f"{file}: holds no prompts of {self.name}; get it again")
        if empty := [number for number, prompt in enumerate(prompts, 1) if not (prompt or "").strip()]:
            raise UserError(f"{file}: prompt {empty[0]} is empty; write or remove it")
        return tuple(prompts)
