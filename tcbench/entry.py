"""One row of one suite, bound: what it runs, what it is compared with, where its files are. Imports no torch."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcbench.files import digest
from tcbench.method import Method
from tcbench.registry import make_method

if TYPE_CHECKING:
    from tcbench.config import Row, Suite


@dataclass(frozen=True, eq=False)
class Entry:
    """A row of a suite: `suite["nfe20-fora"]`.

    Attributes:
        suite: the suite, or the ablation, that the row is sampled and scored in.
        name: what the suite calls the row.
    """

    suite: "Suite"
    name: str

    @property
    def row(self) -> "Row":
        """What the config says of it."""
        return self.suite.rows[self.name]

    @cached_property
    def method(self) -> Method:
        """Its method, with the suite's defaults and its own options."""
        return make_method(self.row.method, self.suite.defaults.get(self.row.method, {}) | self.row.options)

    @property
    def nfe(self) -> int:
        """Steps of the uncached sampler."""
        return self.row.nfe

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.row.label or type(self.method).label

    @property
    def guidance_scale(self) -> float:
        """Its CFG scale."""
        scale = self.row.guidance_scale
        return self.suite.guidance.scale if scale is None else scale

    @property
    def reference(self) -> "Entry":
        """The uncached row at the same NFE and CFG scale, without anybody's refiners."""
        return next(self.suite[name] for name, other in self.suite.rows.items() if other.is_reference_for(self.row))

    @property
    def trained_as(self) -> "Entry | None":
        """The row whose artefacts this one samples with, if it needs any."""
        if source := self.row.artefacts_from:
            return self.suite[source]
        return self if self.method.trains else None

    @property
    def trains(self) -> bool:
        """Whether artefacts are trained for this very row."""
        source = self.row.artefacts_from
        return self.method.trains if source is None else source == self.name

    @property
    def shows_steps(self) -> bool:
        """Whether Fig. 11 shows what its sample looks like on the way: as many steps as the uncached run's."""
        shown = self.nfe == self.suite.figure.nfe and not self.row.control and self.row.refiners is True
        return shown and self.method.sampled_steps(self.nfe) == self.nfe

    # --- what its numbers depend on

    @property
    def sample_settings(self) -> dict[str, Any]:
        """Everything in the config that its samples depend on."""
        shared = self.suite.model_dump(
            include={
                "model",
                "weights",
                "data",
                "guidance",
                "spacing",
                "solver",
                "tf32",
                "prompts",
                "text_encoder",
                "latents",
                "seed",
                "batch_size",
                "samples",
                "traced",
            },
            mode="json",
        )
        return shared | {
            "method": self.row.method,
            "version": self.method.version,
            "nfe": self.nfe,
            "guidance_scale": self.guidance_scale,
            "refiners": self.row.refiners,
            "options": self.method.model_dump(mode="json"),
            "training": source.training_settings if (source := self.trained_as) else None,
        }

    @property
    def training_settings(self) -> dict[str, Any]:
        """Everything in the config that what is trained for it depends on."""
        shared = self.suite.model_dump(
            include={"model", "weights", "guidance", "spacing", "solver", "training_seed", "tf32"},
            mode="json",
        )
        shared |= self.suite.data_settings
        if self.suite.training:  # read by a text encoder, seen through an autoencoder
            shared |= self.suite.model_dump(include={"training", "prompts", "text_encoder", "latents"}, mode="json")
        return shared | {"method": self.method.name, "version": self.method.version, "nfe": self.nfe,
                         "options": self.method.model_dump(mode="json")}  # fmt: skip

    # --- where its files are

    @property
    def trained(self) -> Path:
        """The folder of what is trained for it; ablations share it."""
        return self.suite.root / "trained" / self.name

    @property
    def artefacts(self) -> Path | None:
        """The folder of what it samples with, if it needs anything."""
        return source.trained if (source := self.trained_as) else None

    @property
    def samples(self) -> Path:
        """The folder of its samples."""
        return self.suite.folder / "samples" / self.name

    @property
    def manifest(self) -> Path:
        """What is said of its samples, and which shards they are in."""
        return self.samples / "row.json"

    def shard(self, number: int) -> Path:
        """A file of its samples."""
        return self.samples / f"shard-{number:05d}.safetensors"

    @property
    def twin(self) -> Path | None:
        """The folder of another row's samples that begin with this row's, because their settings are the same."""
        name = self.suite.twins.get(digest(self.sample_settings)) if self.suite.twins else None
        return self.suite.root / "samples" / name if name else None

    @property
    def features(self) -> Path:
        """The features of its samples."""
        return self.suite.folder / "features" / f"{self.name}.safetensors"

    @property
    def readings(self) -> Path:
        """What scorers read from its samples."""
        return self.suite.folder / "readings" / f"{self.name}.safetensors"

    @property
    def videos(self) -> Path:
        """The folder of its videos, as VBench reads them."""
        return self.suite.folder / "videos" / self.name

    @property
    def vbench(self) -> Path:
        """VBench's scores of its videos."""
        return self.suite.folder / "vbench" / f"{self.name}.json"

    @property
    def scores(self) -> Path:
        """Its scores."""
        return self.suite.folder / "scores" / f"{self.name}.json"

    @property
    def diagnostics(self) -> Path:
        """The local errors of its predictor."""
        return self.suite.folder / "diagnostics" / f"{self.name}.json"
