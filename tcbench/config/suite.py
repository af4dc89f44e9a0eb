"""A suite, everything that a run depends on besides the code, and its rows. Imports no torch."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt

from tcbench.config.fields import (
    Ablation,
    Clip,
    DataName,
    ExtractorName,
    Figure,
    File,
    Guidance,
    ImageRewardFiles,
    Images,
    Latency,
    Latents,
    MetricName,
    ModelName,
    PaperModel,
    PaperTable,
    Prompts,
    Row,
    Strict,
    VBench,
)
from tcbench.data.source import DataSource, PromptSet
from tcbench.method import Method
from tcbench.metrics.catalogue import usual_metrics
from tcbench.record.files import digest
from tcbench.registry import data_source, make_method

TABLE_2 = PaperTable(title="Table II", metrics=("fid", "sfid", "is", "precision", "recall"))


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
    def row(self) -> Row:
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


class Suite(Strict):
    """Everything that a run depends on besides the code.

    Attributes:
        suite: its name, and that of its folder in results/.
        differs: how it differs from the paper's setting, for titles; empty if it does not.
        model, weights: a known model, and its checkpoint if not the shipped one; "random" draws weights from `seed`.
        data: what samples show: a data set of the package, which scores compare with and training uses, too; prompts
            of a published set; or ImageNet's classes in turn.
        data_folder: where the files of `data` are, if not where they usually are.
        real: what scores compare with where `data` brings no images: a folder of them, or ADM's reference batch (.npz).
        training: what methods are trained on where `data` brings no images, through the autoencoder of `latents`.
        extractor: features behind FID and friends; none where no metric needs any.
        extractor_weights: their file, if it does not ship.
        device, tf32: where everything runs, and whether a GPU rounds the factors of matrix products to TF32.
        clip, image_reward, vbench: where the metrics of those names find their weights.
        seed: keys all noise of evaluated samples; training_seed all of training.
        samples, batch_size: per row; samples of a batch are consecutive.
        shard_batches: batches per file on disk, a shard, which is a jackknife group.
        traced: samples per row whose trajectory is kept.
        tables: the paper's tables that the rows stand beside, by file name.
        jobs: workflow jobs that sample: `two` (rows with and without something trained), `nfe` (the same two for every
            NFE), one per method or one per row.
        defaults: options by method, under the rows' own.
        ablations: questions asked beside the tables (target `ablations`).
        prompts, text_encoder, latents: what stands before and behind the paper's denoisers, where `data` is a set of
            prompts: how they are used, the folder of the T5 or mT5 that reads them, the autoencoder.
        files: what does not ship with the project (`tcbench validate --files`).
    """

    suite: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    description: str
    differs: str
    stands_for: PaperModel | None = None
    model: ModelName
    weights: str | None = None
    data: DataName
    data_folder: Path | None = None
    real: Path | None = None
    training: Images | None = None
    extractor: ExtractorName | None = None
    extractor_weights: Path | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    tf32: bool = False
    guidance: Guidance
    spacing: Literal["linspace", "leading"] = "linspace"
    solver: Literal["ddim", "dpm", "euler_ancestral"] = "ddim"
    seed: int = 0
    training_seed: int = 0
    samples: PositiveInt
    batch_size: PositiveInt
    shard_batches: PositiveInt = 1
    traced: int = Field(0, ge=0)
    floor_draws: PositiveInt = 20
    metrics: tuple[MetricName, ...] = Field(default_factory=usual_metrics)
    clip: Clip = Field(default_factory=Clip)
    image_reward: ImageRewardFiles = Field(default_factory=ImageRewardFiles)
    vbench: VBench = Field(default_factory=VBench)
    latency: Latency = Field(default_factory=lambda: Latency(warmup=1))
    figure: Figure
    tables: dict[str, PaperTable] = Field(default={"table2": TABLE_2})
    jobs: Literal["two", "nfe", "method", "row"] = "method"
    diagnostics_pairs: PositiveInt = 64
    defaults: dict[str, dict[str, Any]] = Field(default={})
    rows: dict[str, Row]
    ablations: dict[str, Ablation] = Field(default={})
    prompts: Prompts = Field(default_factory=Prompts)
    text_encoder: Path | None = None
    latents: Latents | None = None
    files: dict[str, File] = Field(default={})

    @property
    def source(self) -> DataSource:
        """The data set."""
        return data_source(self.data, self.data_folder)

    @property
    def data_settings(self) -> dict[str, Any]:
        """Everything in the config that the data set's images depend on, and what identifies files of yours."""
        if self.data_folder is None:
            return {"data": self.data}
        return {"data": self.data, "data_folder": str(self.data_folder), "data_files": self.source.fingerprint()}

    @property
    def captions_of_real(self) -> Path | None:
        """The file that says what the images of `real` show, where the prompts' file does."""
        return self.prompts.file if isinstance(self.source, PromptSet) and self.source.describes_images else None

    def __getitem__(self, name: str) -> Entry:
        """A row, bound to this suite.

        Raises:
            KeyError: there is none of that name.
        """
        if name not in self.rows:
            raise KeyError(name)
        return Entry(self, name)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The rows that are sampled and scored, in order."""
        return tuple(self[name] for name in self.rows)

    @cached_property
    def added_rows(self) -> tuple[str, ...]:
        """Rows that none of its tables lists, if all list theirs, and no listed row is compared with.

        Listed rows are tested together; somebody added these, and nothing of the others depends on them.
        """
        if not all(table.rows for table in self.tables.values()):
            return ()
        listed = {name for table in self.tables.values() for name in table.rows}
        own = listed | {self[name].reference.name for name in listed}
        return tuple(name for name in self.rows if name not in own)

    @cached_property
    def shown_tables(self) -> dict[str, PaperTable]:
        """Its tables as they are rendered: added rows are in the first one."""
        tables = dict(self.tables)
        if self.added_rows:
            first = next(iter(tables))
            tables[first] = tables[first].model_copy(update={"rows": (*tables[first].rows, *self.added_rows)})
        return tables

    @cached_property
    def trained_rows(self) -> tuple[str, ...]:
        """Rows that are trained, in order."""
        return tuple(name for name in self.rows if self[name].trains)

    @cached_property
    def predictor_rows(self) -> tuple[str, ...]:
        """Rows that train a scorer of tokens, in order."""
        return tuple(name for name in self.trained_rows if self[name].method.predicts)

    @cached_property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Rows by workflow job that samples."""
        groups: dict[str, tuple[str, ...]] = {}
        for row, settings in self.rows.items():
            need = "trained" if self[row].trained_as else "untrained"
            names = {"two": need, "nfe": f"nfe{settings.nfe}-{need}", "method": settings.method, "row": row}
            groups[names[self.jobs]] = (*groups.get(names[self.jobs], ()), row)
        return groups

    @cached_property
    def scored_together(self) -> dict[str, tuple[str, ...]]:
        """Rows by workflow job that scores: small suites have one, for importing torch takes longer than scoring."""
        return self.groups if self.jobs == "row" else {"all": tuple(self.rows)}

    @property
    def root(self) -> Path:
        """Where this suite's results go, and what ablations share, relative to the working directory."""
        return Path("results") / self.suite

    @property
    def folder(self) -> Path:
        """Where samples and scores go: `root`, or below it for an ablation."""
        return self.root

    @property
    def group_size(self) -> int:
        """Samples of a shard, the group that the jackknife leaves out: whole batches, whose samples may depend on each
        other."""
        return self.batch_size * self.shard_batches

    @property
    def latents_index(self) -> Path:
        """What `tcbench encode` says of the training images' latents; ablations share it."""
        return self.root / "latents.json"

    @cached_property
    def ablation_suites(self) -> dict[str, "AblationSuite"]:
        """The ablations as suites of their own, by name."""
        return {name: expand(self, name, ablation) for name, ablation in self.ablations.items()}

    @cached_property
    def twins(self) -> dict[str, str]:
        """Rows of another suite with samples to copy, by the digest of their settings."""
        return {}

    def find(self, name: str) -> Entry:
        """A row of this suite, or of an ablation of it.

        Raises:
            KeyError: neither has it.
        """
        holding = (ablation for ablation in self.ablation_suites.values() if name in ablation.own)
        return self[name] if name in self.rows else next(holding, self)[name]

    def digest(self) -> str:
        """Identifies the whole config."""
        return digest(self.model_dump(mode="json"))


class AblationSuite(Suite):
    """The variants of one ablation and the uncached rows they are compared with; its parent's rows can be referred to.

    Attributes:
        ablation: its name in the config.
        own: the rows that are sampled and scored here, in order; the first ones are references.
    """

    ablation: str
    own: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Below the suite's folder."""
        return self.root / "ablations" / self.ablation

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Those of `own`."""
        return tuple(self[name] for name in self.own)

    @cached_property
    def twins(self) -> dict[str, str]:
        """The rows of the suite itself: a variant that changes nothing, or a reference, is one with fewer samples."""
        return {digest(self[name].sample_settings): name for name in self.rows if name not in self.own}

    @property
    def variants(self) -> tuple[str, ...]:
        """The rows of the ablation's table: all but the references that no variant is."""
        return tuple(row for row in self.own if not row.startswith(f"{self.ablation}-reference"))


def expand(suite: Suite, name: str, ablation: Ablation) -> AblationSuite:
    """Variants and references of an ablation as rows, in front of the suite's own."""
    variants: dict[str, Row] = {}
    for key, change in ablation.rows.items():
        change = dict(change)
        base = change.pop("base", ablation.base)
        row = suite.rows[base].model_dump(by_alias=True, exclude={"label", "control", "target", "paper"})
        if "method" in change:
            row |= {"options": {}, "artefacts_from": None}
        else:
            row["artefacts_from"] = source.name if (source := suite[base].trained_as) else None
        change["options"] = row["options"] | change.get("options", {})
        for scale in ablation.guidance_scales or (None,):
            settings = row | {"label": key} | change | ({} if scale is None else {"guidance_scale": scale})
            at = "" if scale is None else f"-cfg{scale:g}"
            variants[f"{name}-{key}{at}"] = Row.model_validate(settings)
    references: dict[str, Row] = {}
    for variant in variants.values():
        if not any(other.is_reference_for(variant) for other in [*variants.values(), *references.values()]):
            at = "" if variant.guidance_scale is None else f"-cfg{variant.guidance_scale:g}"
            references[f"{name}-reference{variant.nfe}{at}"] = Row(
                method="uncached", nfe=variant.nfe, guidance_scale=variant.guidance_scale
            )
    own = references | variants
    shared = {field: getattr(suite, field) for field in Suite.model_fields}
    changed = {"rows": own | suite.rows, "samples": ablation.samples or suite.samples, "traced": 0, "ablations": {}}
    return AblationSuite(**shared | changed, ablation=name, own=tuple(own))
