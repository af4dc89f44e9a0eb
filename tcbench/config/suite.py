"""A suite, everything that a run depends on besides the code, and its rows. Imports no torch."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, PrivateAttr

from tcbench.config.depends import STAGES
from tcbench.config.fields import (
    Ablation,
    AblationName,
    About,
    Data,
    Diagnostics,
    File,
    Latency,
    MethodName,
    Model,
    PaperTable,
    Rivals,
    Row,
    RowName,
    Sampler,
    Samples,
    Scoring,
    Search,
    Show,
    Strict,
    SuiteName,
    Training,
    VBench,
)
from tcbench.data.source import DataSource, PromptSet
from tcbench.method import Method
from tcbench.models.specs import MODELS
from tcbench.precision import Dtype
from tcbench.record.files import digest
from tcbench.registry import data_source, make_method


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
        return self.suite.sampler.guidance_scale if scale is None else scale

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
    def steps_of(self) -> "Entry | None":
        """The row whose full steps this one has, if they are another's."""
        return self.suite[source] if (source := self.row.full_steps_of) else None

    @property
    def training_source(self) -> "Entry | None":
        """The row whose training its samples depend on, be it by what is trained or by the full steps it led to."""
        return self.trained_as or (self.steps_of.trained_as if self.steps_of else None)

    @property
    def training_seed(self) -> int:
        """Seed of what is trained for it."""
        return self.suite.training.seed if self.row.training_seed is None else self.row.training_seed

    @property
    def target(self) -> "Entry | None":
        """The row whose MACs it is to have, if any."""
        return self.suite[target] if (target := self.row.target) else None

    @property
    def shows_steps(self) -> bool:
        """Whether Fig. 11 shows what its sample looks like on the way: as many steps as the uncached run's."""
        shown = self.nfe == self.suite.show.figure.nfe and not self.row.control and self.row.refiners is True
        return shown and self.method.sampled_steps(self.nfe) == self.nfe

    # --- what its numbers depend on

    def row_settings(self, stage: str) -> dict[str, Any]:
        """The part of the row that a stage's result for it depends on, with what its fields stand for."""
        part = STAGES[stage].row
        if part is None:
            return {}
        settings = self.row.model_dump(include=set(part.model_fields), mode="json", by_alias=True)
        settings["options"] = self.method.model_dump(mode="json")
        if "guidance_scale" in settings:
            settings["guidance_scale"] = self.guidance_scale
        if "artefacts_from" in settings:
            source = self.trained_as
            settings["artefacts_from"] = source.training_settings if source else None
        if "full_steps_of" in settings:
            settings["full_steps_of"] = self.steps_of.row_settings("sample") if self.steps_of else None
        if settings.get("searched"):
            settings["searched"] = {"over": settings["searched"], **self.suite.search.model_dump()}
            if self.target and settings["searched"]["over"] is not True:  # options at its MACs, of calibration batches
                calibration = self.suite.samples.model_dump(include={"seed", "batch_size"})
                settings["searched"]["target"] = self.target.row_settings("sample") | calibration
        return settings

    def settings(self, stage: str) -> dict[str, Any]:
        """Everything in the config that a stage's result for this row depends on."""
        return self.suite.settings(stage) | self.row_settings(stage)

    @property
    def sample_settings(self) -> dict[str, Any]:
        """Everything in the config that its samples depend on."""
        return self.settings("sample")

    @property
    def training_settings(self) -> dict[str, Any]:
        """Everything in the config that what is trained for it depends on."""
        return self.settings("train")

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
    def searched(self) -> Path:
        """What was searched for it; ablations share it."""
        return self.suite.root / "searched" / f"{self.name}.json"

    @property
    def before_search(self) -> tuple[Path, ...]:
        """Files of other stages that a search for it reads: of what is trained for it, and for its target."""
        target = self.target if isinstance(self.row.searched, dict) else None
        folders = [entry.artefacts for entry in (self, target) if entry and entry.artefacts]
        return tuple(dict.fromkeys(folder / "artefacts.json" for folder in folders))

    @property
    def before_sampling(self) -> tuple[Path, ...]:
        """Files of other stages that its samples depend on: what was trained, and what was searched."""
        entries = [entry for entry in (self, self.steps_of) if entry]
        trained = [entry.artefacts / "artefacts.json" for entry in entries if entry.artefacts]
        return tuple(dict.fromkeys([*trained, *(entry.searched for entry in entries if entry.row.searched)]))

    @property
    def samples(self) -> Path:
        """The folder of what is said of its samples, in which they are too unless the suite is a preview."""
        return self.suite.folder / "samples" / self.name

    @property
    def manifest(self) -> Path:
        """What is said of its samples, and which shards they are in."""
        return self.samples / "row.json"

    def shard(self, number: int) -> Path:
        """A file of its samples."""
        return self.suite.store / "samples" / self.name / f"shard-{number:05d}.safetensors"

    @property
    def twin(self) -> str | None:
        """The row of the suite whose samples begin with this ablation's row's, because their settings are the same."""
        return self.suite.twins.get(digest(self.sample_settings)) if self.suite.twins else None

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


@dataclass(frozen=True)
class Preview:
    """What of a suite is looked at before the rest is there (`tcbench.config.preview`).

    Attributes:
        says: which part, for titles.
        folder: where everything but samples and what is trained goes.
        group_size: samples of a group that the jackknife leaves out, whole batches.
        partial: whether rows lack, and what is rendered therefore has a folder of its own.
    """

    says: str
    folder: Path
    group_size: int
    partial: bool


class Suite(Strict):
    """Everything that a run depends on besides the code, by groups; a stage depends on whole ones."""

    suite: SuiteName
    """Its name, and that of its folder in results/."""
    about: About
    """What titles and captions say of it."""
    model: Model
    """The denoiser, what stands before and behind it, and where it runs."""
    data: Data
    """What samples show."""
    sampler: Sampler
    """How every row is sampled and every method trained."""
    samples: Samples
    """The samples of every row."""
    training: Training = Field(default_factory=Training)
    """What methods are trained with, besides their options."""
    search: Search = Field(default_factory=Search)
    """What rows that are `searched` may spend."""
    scoring: Scoring = Field(default_factory=Scoring)
    """What samples are scored by, and what they are compared with."""
    vbench: VBench = Field(default_factory=VBench)
    """How VBench sees the videos."""
    latency: Latency = Field(default_factory=lambda: Latency(warmup=1))
    """How latency is measured."""
    diagnostics: Diagnostics = Field(default_factory=Diagnostics)
    """How the local errors of predictors are measured."""
    show: Show
    """What is rendered of the scores."""
    trainings: PositiveInt = 1
    """How often everything that is trained is trained, with seeds from `training.seed` on. Rows that sample with it are
    sampled as often, in the ablation `trainings`; tables give their means, and intervals that cover other trainings."""
    trainings_of: tuple[RowName, ...] = ()
    """The rows that are trained as often, with them the rows that share what they train; all that train if empty."""
    training_gpus: PositiveInt = 1
    """GPUs that train a row together, each with its share of every batch; the result is that of one to rounding. The
    batch must be a multiple of it."""
    jobs: Literal["two", "nfe", "method", "row"] = "method"
    """Workflow jobs that sample: `two` (rows with and without something trained), `nfe` (the same two for every NFE),
    one per `method` or one per `row`."""
    defaults: dict[MethodName, dict[str, Any]] = Field(default={})
    """Options by method, under the rows' own."""
    rows: dict[RowName, Row] = Field(min_length=1)
    """The lines of the tables, by name; every nfe needs one whose method is `uncached`."""
    ablations: dict[AblationName, Ablation] = Field(default={})
    """Questions asked beside the tables (target `ablations`), by name."""
    rivals: Rivals | None = None
    """Methods side by side at a few MAC budgets (target `rivals`)."""
    files: dict[str, File] = Field(default={})
    """What does not ship with the project (`tcbench validate --files`), by a name that you choose."""
    _preview: "Preview | None" = PrivateAttr(None)

    @property
    def sampling_dtypes(self) -> dict[str, Dtype]:
        """What the `denoiser` and the `autoencoder`, if there is one, compute in; `training` is not looked at."""
        model, on_gpu = self.model, self.model.device == "cuda"
        dtypes: dict[str, Dtype] = {
            "denoiser": model.dtype or (MODELS[model.name].reference_dtype if on_gpu else "fp32")
        }
        if model.latents:
            reference: Dtype = "fp16" if model.latents.kind == "wf" else "tf32"
            dtypes["autoencoder"] = model.latents.dtype or (reference if on_gpu else "fp32")
        return dtypes

    @property
    def dtypes(self) -> dict[str, Dtype]:
        """The same, and what `training` computes in."""
        dtypes = self.sampling_dtypes
        learnt: Dtype = "bf16" if dtypes["denoiser"] == "fp16" else dtypes["denoiser"]  # gradients would underflow
        return dtypes | {"training": self.training.dtype or learnt}

    @property
    def computes_halves(self) -> bool:
        """Whether guidance takes an unconditional half beside every sample, and the model does not read the scale."""
        return MODELS[self.model.name].guidance(self.sampler.guidance_scale).rows > 1

    @property
    def source(self) -> DataSource:
        """The data set."""
        return data_source(self.data.name, self.data.folder)

    def settings(self, stage: str) -> dict[str, Any]:
        """Everything in the config besides rows that a stage's results depend on: whole groups, what identifies files
        of yours among the data, and the rate of videos that are kept as mp4."""
        groups = STAGES[stage].groups
        settings = self.model_dump(include=set(groups), mode="json")
        if "samples" in groups and self.decodes_videos:
            settings["frames_per_second"] = self.vbench.fps
        return settings | ({"files_of_data": self._files_of_data} if "data" in groups else {})

    @property
    def decodes_videos(self) -> bool:
        """Whether samples are videos of bytes; shards keep some frames and an mp4 of each (`tcbench.record.videos`)."""
        return self.model.latents is not None and self.model.latents.kind == "wf"

    @property
    def proportions(self) -> float:
        """Width of an image, or of a video's frame, by its height."""
        *_, height, width = MODELS[self.model.name].latent_shape
        return width / height

    @cached_property
    def _files_of_data(self) -> str | None:
        return self.source.fingerprint() if self.data.folder else None

    @property
    def captions_of_real(self) -> Path | None:
        """The file that says what the images of `scoring.real` show, where the prompts' file does."""
        return self.data.prompts.file if isinstance(self.source, PromptSet) and self.source.describes_images else None

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

    @property
    def references(self) -> tuple[Entry, ...]:
        """The uncached rows that others are compared with, in order."""
        return tuple(self[name] for name in dict.fromkeys(entry.reference.name for entry in self.entries))

    @cached_property
    def added_rows(self) -> tuple[str, ...]:
        """Rows that no table of `show` lists, if it has tables and all list theirs, and no listed row is compared with.

        Listed rows are tested together; somebody added these, and nothing of the others depends on them.
        """
        tables = self.show.tables.values()
        if not tables or not all(table.rows for table in tables):
            return ()
        listed = {name for table in tables for name in table.rows}
        own = listed | {self[name].reference.name for name in listed}
        return tuple(name for name in self.rows if name not in own)

    @cached_property
    def tables(self) -> dict[str, PaperTable]:
        """The tables of `show` as they are rendered: added rows are at the end of the first."""
        tables = dict(self.show.tables)
        if self.added_rows:
            first = next(iter(tables))
            tables[first] = tables[first].model_copy(update={"rows": (*tables[first].rows, *self.added_rows)})
        return tables

    @cached_property
    def trained_rows(self) -> tuple[str, ...]:
        """Rows that are trained, in order."""
        return tuple(name for name in self.rows if self[name].trains)

    @cached_property
    def searched_rows(self) -> tuple[str, ...]:
        """Rows that something is searched for, in order."""
        return tuple(name for name in self.rows if self[name].row.searched)

    @cached_property
    def predictor_rows(self) -> tuple[str, ...]:
        """Rows that train a scorer of tokens, in order."""
        return tuple(name for name in self.trained_rows if self[name].method.predicts)

    @cached_property
    def adaptive_rows(self) -> tuple[str, ...]:
        """Rows whose full steps beta chooses (Eq. 13), in order."""
        methods = {name: self[name].method for name in self.rows}
        return tuple(
            name
            for name, method in methods.items()
            if getattr(method, "schedule", None) == "adaptive" and not getattr(method, "full_steps", None)
        )

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
        """Where this suite's results go, and what ablations and previews share, relative to the working directory."""
        return Path("results") / self.suite

    @property
    def store(self) -> Path:
        """Where samples go, those of previews too: `root`, or below it for an ablation."""
        return self.root

    @property
    def folder(self) -> Path:
        """Where all goes that is said of samples, scores and tables: `root`, or below it for a preview."""
        return self.preview.folder if self.preview else self.root

    @property
    def shown_in(self) -> Path:
        """Where all goes that is rendered of scores: `folder`, or below it if rows lack."""
        return self.folder / "partial" if self.preview and self.preview.partial else self.folder

    @property
    def preview(self) -> "Preview | None":
        """What of a suite this is, if it is not the whole one."""
        return self._preview

    @property
    def jackknife_size(self) -> int:
        """Samples of a group that the jackknife leaves out: a shard; of a preview of few shards, fewer batches."""
        return self.preview.group_size if self.preview else self.samples.group_size

    @property
    def latents_index(self) -> Path:
        """What `tcbench encode` says of the training images' latents; ablations share it."""
        return self.root / "latents.json"

    @cached_property
    def ablation_suites(self) -> dict[str, "AblationSuite"]:
        """The ablations as suites of their own, by name."""
        return {name: expand(self, name, ablation) for name, ablation in self.ablations.items()}

    @cached_property
    def rival_suite(self) -> "AblationSuite | None":
        """The rivals as a suite of their own, before their knobs are solved: a row for each contender."""
        return expand(self, RIVALS, rival_rows(self, self.rivals)) if self.rivals else None

    def rival_record(self, contender: str) -> Path:
        """Which settings of a rival meet the budgets."""
        return self.root / RIVALS / f"{contender}.json"

    @cached_property
    def twins(self) -> dict[str, str]:
        """Rows of the suite with samples to copy for an ablation, by the digest of their settings."""
        return {}

    def find(self, name: str) -> Entry:
        """A row of this suite, of an ablation of it, or of its rivals.

        Raises:
            KeyError: neither has it.
        """
        if name in self.rows:
            return self[name]
        parts = (*self.ablation_suites.values(), *filter(None, [self.rival_suite]))
        holding = (part for part in parts if name in part.own)
        return next(holding, self)[name]

    @property
    def repeats(self) -> dict[str, tuple[str, ...]]:
        """The rows of the ablation `trainings` that repeat a row with another training seed, by that row."""
        numbers = range(1, self.trainings)
        return {
            name: tuple(f"{TRAININGS}-{name}-{number}" for number in numbers)
            for name in self.rows
            if self.repeated(name)
        }

    def repeated(self, name: str) -> bool:
        """Whether a row rests on something that is trained `trainings` times."""
        source = self[name].training_source
        return self.trainings > 1 and source is not None and (not self.trainings_of or source.name in self.trainings_of)

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
    def store(self) -> Path:
        """Below the suite's."""
        return super().store / "ablations" / self.ablation

    @property
    def folder(self) -> Path:
        """Below the suite's."""
        return super().folder / "ablations" / self.ablation

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


TRAININGS = "trainings"
"""The ablation that holds the rows of further training seeds."""


def with_trainings(suite: Suite) -> Suite:
    """A suite of several trainings with the ablation that trains and samples again what is trained."""
    rows: dict[str, dict[str, Any]] = {}
    for name in filter(suite.repeated, suite.rows):
        entry = suite[name]
        source, steps = entry.trained_as, entry.steps_of
        for number in range(1, suite.trainings):
            seed = suite.training.seed + number
            change: dict[str, Any] = {"base": name, "label": f"{entry.label}, training seed {seed}"}
            if entry.trains:
                change |= {"artefacts_from": None, "training_seed": seed}
            elif source:
                change["artefacts_from"] = f"{TRAININGS}-{source.name}-{number}"
            if steps and suite.repeated(steps.name):
                change["full_steps_of"] = f"{TRAININGS}-{steps.name}-{number}"
            rows[f"{name}-{number}"] = change
    if not rows:
        return suite
    trainings = Ablation.model_validate(
        {
            "title": "Further training seeds",
            "question": "How much does a row depend on the seed of its training?",
            "base": next(iter(rows.values()))["base"],
            "rows": rows,
        }
    )
    return suite.model_copy(update={"ablations": {**suite.ablations, TRAININGS: trainings}})


RIVALS = "rivals"
"""What the suite of rivals is called; no ablation may be."""

BASELINE = "fewer_steps"
"""The rival that all others are compared with at every budget."""


def trains_refiners(method: Method) -> bool:
    """Whether it has LoRA trained, of which the rank is its option `refiner_rank`."""
    return bool(getattr(method, "refiner_rank", None))


def rival_rows(suite: Suite, rivals: Rivals) -> Ablation:
    """The rivals as variants of the suite's rows, one for each contender, in the config's order.

    What borrows another method's alpha-bar for its schedule samples without the LoRA beside it, trained on the
    other method's tokens and steps.
    """
    at_nfe = [name for name, row in suite.rows.items() if row.nfe == rivals.nfe and not row.control]
    uncached = next(name for name in at_nfe if suite.rows[name].method == "uncached")
    predictor = next((name for name in at_nfe if suite[name].trains and suite[name].method.predicts), None)
    rows: dict[str, dict[str, Any]] = {}
    for contender, method in rivals.contenders.items():
        if contender != method:  # which comes after its method
            plain = {"refiners": False, "label": f"{rows[method]['label']}, no LoRA"}
            trained = {} if "base" in rows[method] else {"artefacts_from": f"{RIVALS}-{method}"}
            rows[contender] = rows[method] | trained | plain
            continue
        fits = (
            name
            for name, row in suite.rows.items()
            if (row.method, row.nfe) == (method, rivals.nfe) and not (row.searched or row.full_steps_of)
        )
        anew = rivals.anew.get(method)
        if anew is None and (name := next(fits, None)):
            rows[method] = {"base": name, "label": suite[name].method.label}
            lender = suite[name].trained_as
        else:
            made = make_method(method, suite.defaults.get(method, {}) | (anew or {}))
            borrows = getattr(made, "schedule", None) in ("adaptive", "reversed") and not made.trains
            borrowed = {"artefacts_from": predictor} if borrows else {}
            rows[method] = {"method": method, "label": made.label, "options": anew or {}} | borrowed
            lender = suite[predictor] if borrows and predictor else None
        if lender and lender.row.method != method and trains_refiners(lender.method):
            rows[method]["refiners"] = False
    described = {"title": "Rivals", "question": "Which method is best at equal MACs?", "base": uncached, "rows": rows}
    return Ablation.model_validate(described | {"samples": rivals.samples})


def with_own(part: AblationSuite, own: dict[str, Row]) -> AblationSuite:
    """The same with other rows of its own; what it had can still be referred to."""
    fields = {field: getattr(part, field) for field in AblationSuite.model_fields}
    return AblationSuite(**fields | {"rows": own | part.rows, "own": tuple(own)})


def ablation_rows(suite: Suite, name: str, ablation: Ablation) -> dict[str, Row]:
    """References and variants of an ablation as rows."""
    variants: dict[str, Row] = {}
    for key, variant in ablation.rows.items():
        change = variant.model_dump(by_alias=True)
        base = change.pop("base", ablation.base)
        row = suite.rows[base].model_dump(
            by_alias=True, exclude={"label", "control", "target", "paper", "training_seed"}
        )
        if "method" in change:
            row |= {"options": {}, "artefacts_from": None, "full_steps_of": None, "searched": False}
        else:
            row["artefacts_from"] = source.name if (source := suite[base].trained_as) else None
        change["options"] = row["options"] | change.get("options", {})
        for scale in ablation.guidance_scales or (None,):
            settings = row | {"label": key} | change | ({} if scale is None else {"guidance_scale": scale})
            at = "" if scale is None else f"-cfg{scale:g}"
            variants[f"{name}-{key}{at}"] = Row.model_validate(settings)
    references: dict[str, Row] = {}
    for sampled in variants.values():
        if not any(other.is_reference_for(sampled) for other in [*variants.values(), *references.values()]):
            at = "" if sampled.guidance_scale is None else f"-cfg{sampled.guidance_scale:g}"
            references[f"{name}-reference{sampled.nfe}{at}"] = Row(
                method="uncached", nfe=sampled.nfe, guidance_scale=sampled.guidance_scale
            )
    return references | variants


def expand(suite: Suite, name: str, ablation: Ablation) -> AblationSuite:
    """An ablation as a suite, with its rows in front of the suite's own."""
    own = ablation_rows(suite, name, ablation)
    shared = {field: getattr(suite, field) for field in Suite.model_fields}
    samples = suite.samples.model_copy(update={"count": ablation.samples or suite.samples.count, "traced": 0})
    changed = {"rows": own | suite.rows, "samples": samples, "ablations": {}}
    expanded = AblationSuite(**shared | changed, ablation=name, own=tuple(own))
    expanded._preview = suite.preview
    return expanded
