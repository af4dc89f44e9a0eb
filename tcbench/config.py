"""Suite configs: one YAML file each, validated as a whole before any job starts. Imports no torch."""

from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError
from pydantic_core import PydanticCustomError

from tcbench.data.source import DataSource, PromptSet
from tcbench.entry import Entry
from tcbench.errors import UserError, did_you_mean
from tcbench.files import digest
from tcbench.method import Method
from tcbench.metrics.catalogue import EXTRACTORS, METRICS, usual_metrics
from tcbench.models.specs import MODELS
from tcbench.places import suite_files
from tcbench.registry import data_names, data_source, method_names

Config = TypeVar("Config", bound=BaseModel)


def _one_of(known: Callable[[], Iterable[str]]) -> AfterValidator:
    """A check that a name is known when a config is read, so that what was added since the import counts."""

    def check(name: str) -> str:
        if name not in known():
            values = {"name": repr(name), "hint": did_you_mean(name, known())}
            raise PydanticCustomError("unknown", "{name} is unknown; {hint}", values)
        return name

    return AfterValidator(check)


MetricName = Annotated[str, _one_of(lambda: METRICS)]
ModelName = Annotated[str, _one_of(lambda: MODELS)]
DataName = Annotated[str, _one_of(data_names)]
ExtractorName = Annotated[str, _one_of(lambda: EXTRACTORS)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PaperCell(_Strict):
    """The paper's numbers for a row, as printed; its "TFLOPs" are TMACs."""

    fid: float | None = None
    sfid: float | None = None
    inception_score: float | None = Field(None, alias="is")
    precision: float | None = None
    recall: float | None = None
    coco_clip: float | None = None
    parti_clip: float | None = None
    image_reward: float | None = None
    vbench: float | None = None
    latency_s: float | None = None
    tmacs: float | None = None
    speedup: float | None = None


class Row(_Strict):
    """One line of a table.

    Attributes:
        method: a file of methods/.
        nfe: steps of the uncached sampler; rows with the same nfe are compared.
        options: the method's own, over the suite's `defaults` for it.
        label: what tables call it, if not the method's label.
        control: not in the paper's table; shown as a control.
        artefacts_from: sample with what was trained for that row (predictor, alpha-bar, refiners).
        target: the row whose MACs this one's knob was solved for (`tcbench match`, `tcbench validate --macs`).
        paper: the paper's numbers.
        guidance_scale: the CFG scale, if not the suite's (guidance sweeps).
        refiners: whether LoRA refiners among the artefacts are merged into the model: at every step, at no step, or
            for P-steps alone (`p-steps`).
    """

    method: str
    nfe: int = Field(ge=2, le=1000)
    options: dict[str, Any] = {}
    label: str | None = None
    control: bool = False
    artefacts_from: str | None = None
    target: str | None = None
    paper: PaperCell | None = None
    guidance_scale: float | None = Field(None, ge=0)
    refiners: bool | Literal["p-steps"] = True

    def is_reference_for(self, row: "Row") -> bool:
        """Whether it is the uncached row at another's NFE and CFG scale, without anybody's refiners."""
        plain = self.method == "uncached" and self.artefacts_from is None
        return plain and (self.nfe, self.guidance_scale) == (row.nfe, row.guidance_scale)


class Ablation(_Strict):
    """One question asked of one row: variants of it, sampled and scored side by side.

    Attributes:
        title: names the table.
        question: what the variants decide, one sentence for the caption.
        base: the row that variants change; every difference is to the variant that changes nothing.
        samples: per variant, if not the suite's.
        guidance_scales: repeats every variant at each of these CFG scales.
        rows: variants by name; each maps fields of `Row` to other values, `options` one by one. `base` takes another
            row. A variant shares the artefacts of the row it changes; `artefacts_from: null` trains its own. One that
            names another `method` inherits neither options nor artefacts.
    """

    title: str
    question: str
    base: str
    samples: PositiveInt | None = None
    guidance_scales: tuple[float, ...] = ()
    rows: dict[str, dict[str, Any]]


class Guidance(_Strict):
    """Classifier-free guidance: one scale for every row, and the rule it was chosen by."""

    scale: float = Field(ge=0)
    rule: str


class Latency(_Strict):
    """Latency protocol: whole runs of one batch, rows interleaved, the first `warmup` rounds dropped."""

    batch_size: PositiveInt = 8
    warmup: int = Field(1, ge=0)
    repeats: PositiveInt = 3


class Clip(_Strict):
    """The model of `clip_score`, by open_clip's names; `weights` is a tag or a file (`tcbench.metrics.clip`)."""

    model: str = "ViT-L-14-quickgelu"
    weights: str | None = "openai"


class ImageRewardFiles(_Strict):
    """The official checkpoint, and the vocabulary of bert-base-uncased as a folder or a Hugging Face name."""

    weights: Path = Path("~/.cache/ImageReward/ImageReward.pt")
    tokenizer: str = "bert-base-uncased"


class VBench(_Strict):
    """VBench's own environment and checkpoints, and the frame rate that videos are written with."""

    environment: Path = Path(".vbench")
    weights: Path = Path("~/.cache/vbench")
    fps: PositiveInt = 18


class Figure(_Strict):
    """Which NFE the per-step figures show, and how many samples a grid does."""

    nfe: int
    columns: PositiveInt = 10


class PaperTable(_Strict):
    """A table of the paper, or part of one, that rows stand beside.

    Attributes:
        title: what it is called.
        metrics: columns of quality; the paper's numbers for others get columns of their own.
        rows: by name; all of the suite's if none is given.
        paper: whether the paper's numbers of the rows stand beside them; not if it asks the question of another model.
    """

    title: str
    metrics: tuple[MetricName, ...]
    rows: tuple[str, ...] = ()
    paper: bool = True


TABLE_2 = PaperTable(title="Table II", metrics=("fid", "sfid", "is", "precision", "recall"))


class Prompts(_Strict):
    """How a set of prompts is used.

    Attributes:
        file: the set's own file, if it does not ship with the package (`tcbench.data.prompts`).
        per_prompt: samples of every prompt.
        lowercase: whether the text encoder reads it in lower case.
        clean: whether it reads it as PixArt-alpha's code cleans captions, lower case included; or only captions of
            training, as Open-Sora-Plan's.
        template: what the text encoder reads when samples are evaluated, `{}` being the prompt.
        negative: what guidance steers away from, for models without a learned null caption.
    """

    file: Path | None = None
    per_prompt: PositiveInt = 1
    lowercase: bool = False
    clean: bool | Literal["training"] = False
    template: str = "{}"
    negative: str | None = None


class Latents(_Strict):
    """Which autoencoder's latents the model denoises: Stable Diffusion's, or Open-Sora-Plan's WF-VAE.

    Attributes:
        scale: what latents are multiplied by for the denoiser; WF-VAE's own config.json says it.
    """

    kind: Literal["sd", "wf"]
    folder: Path
    scale: float = 0.18215


class Images(_Strict):
    """Images or videos in files (`tcbench.data.images`, `tcbench.data.videos`), and what they show.

    Attributes:
        folder: the images; ImageNet's has a folder per class.
        captions: COCO's captions_*.json of that folder, or Open-Sora-Plan's annotations of videos; without it, the
            folders inside are the classes.
        frames_per_second: of videos, as the model is trained with.
    """

    folder: Path
    captions: Path | None = None
    frames_per_second: PositiveFloat | None = None


class File(_Strict):
    """Something that a suite needs and that does not ship with the project.

    Attributes:
        path: where it is looked for.
        holds: what it must hold, if it is a folder.
        used: what for.
        get: where it comes from.
    """

    path: Path
    holds: tuple[str, ...] = ()
    used: str
    get: str


class PaperModel(_Strict):
    """The paper's model and resolution that this suite's rows stand beside."""

    name: str
    resolution: int


class Suite(_Strict):
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
    tables: dict[str, PaperTable] = {"table2": TABLE_2}
    jobs: Literal["two", "nfe", "method", "row"] = "method"
    diagnostics_pairs: PositiveInt = 64
    defaults: dict[str, dict[str, Any]] = {}
    rows: dict[str, Row]
    ablations: dict[str, Ablation] = {}
    prompts: Prompts = Field(default_factory=Prompts)
    text_encoder: Path | None = None
    latents: Latents | None = None
    files: dict[str, File] = {}

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
        return {name: _expand(self, name, ablation) for name, ablation in self.ablations.items()}

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


def _expand(suite: Suite, name: str, ablation: Ablation) -> AblationSuite:
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


def load_suite(path: Path | str) -> Suite:
    """Read and check a suite config.

    Raises:
        UserError: one line that names the file, the field and the fix.
    """
    path = Path(path)
    suite = validated(path, read_mapping(path), Suite)
    _check_rows(path, suite)
    _check_ablations(path, suite)
    return suite


def read_mapping(path: Path) -> dict[str, Any]:
    """The fields of a YAML config, unchecked.

    Raises:
        UserError: the file is missing, unreadable, not YAML, or not a mapping.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = sorted({*(file.name for file in path.parent.glob("*.yaml")), *suite_files()})
        raise UserError(f"{path}: no such config; {did_you_mean(path.name, known)}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must be a mapping of fields; see config/digits.yaml")
    return raw


def validated(path: Path, raw: dict[str, Any], schema: type[Config]) -> Config:
    """A config checked against its schema.

    Raises:
        UserError: one line that names the file, the field and the fix.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        # an unknown key first: it is often the misspelling of one reported missing
        problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        raise UserError(_explain(path, problems[0], schema)) from error


def _check_ablations(path: Path, suite: Suite) -> None:
    for name, ablation in suite.ablations.items():
        field = f"{path}: ablations.{name}"
        if not name.replace("_", "").isalnum():
            raise UserError(
                f"{field}: use letters, digits and '_' only; it becomes a folder and a rule of the workflow"
            )
        for base in [ablation.base, *(row["base"] for row in ablation.rows.values() if "base" in row)]:
            if base not in suite.rows:
                raise UserError(f"{field}: base {base!r} is not a row; rows: {', '.join(suite.rows)}")
        try:
            expanded = _expand(suite, name, ablation)
        except ValidationError as error:
            problem = error.errors()[0]
            raise UserError(f"{field}.rows: {'.'.join(map(str, problem['loc']))}: {problem['msg'].lower()}") from error
        if clash := set(expanded.own) & set(suite.rows):
            raise UserError(f"{field}: variant {sorted(clash)[0]!r} has the name of a row; rename one of them")
        _check_rows(path, expanded)


def _explain(path: Path, problem: Any, schema: type[BaseModel]) -> str:
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        given = f", not {problem['input']!r}" if problem["type"] not in ("missing", "unknown") else ""
        return f"{path}: {field}: {problem['msg'][0].lower() + problem['msg'][1:]}{given}"
    for part in problem["loc"][:-1]:
        if part in schema.model_fields:  # other parts are keys of a mapping or places in a list
            schema = _model_in(schema.model_fields[str(part)].annotation) or schema
    known = [info.alias or name for name, info in schema.model_fields.items()]
    return f"{path}: {field}: unknown key; {did_you_mean(str(problem['loc'][-1]), known)}"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The config model that a field's type is or holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for inner in get_args(annotation) if (model := _model_in(inner))), None)


def _check_rows(path: Path, suite: Suite) -> None:
    for known in suite.defaults:
        if known not in method_names():
            raise UserError(f"{path}: defaults.{known}: no such method; known: {', '.join(method_names())}")
    methods: dict[str, Method] = {}
    for name in suite.rows:  # first of all, because a row may refer to a later one
        try:
            methods[name] = suite[name].method
        except UserError as error:
            raise UserError(f"{path}: rows.{name}: {error}") from error
    for name, row in suite.rows.items():
        field, method = f"{path}: rows.{name}", methods[name]
        if not name.replace("-", "").replace(".", "").replace("_", "").isalnum():
            raise UserError(f"{field}: use letters, digits, '-', '_' and '.' only; it becomes a file name")
        if not any(other.method == "uncached" and other.nfe == row.nfe for other in suite.rows.values()):
            raise UserError(f"{field}: nothing to compare with; add a row with method: uncached and nfe: {row.nfe}")
        steps = method.sampled_steps(row.nfe)
        if not 2 <= steps <= 1000:
            raise UserError(f"{field}: samples {steps} steps; give 2 to 1000")
        full = getattr(method, "num_full_steps", None)
        if full and full > steps:
            raise UserError(f"{field}.options.num_full_steps: {full} full steps of {steps}; give {steps} or fewer")
        source = row.artefacts_from
        if source and (source not in suite.rows or not suite[source].trains):
            raise UserError(f"{field}.artefacts_from: {source!r} is not a row that is trained")
        if source and suite.rows[source].nfe != row.nfe:
            raise UserError(f"{field}.artefacts_from: {source!r} was trained for another nfe")
        schedule = getattr(method, "schedule", None)
        if schedule in ("adaptive", "reversed") and not suite[name].trained_as:  # method.Schedule, from alpha-bar
            raise UserError(f"{field}.options.schedule: {schedule!r} needs artefacts_from; or set 'even'")
        if row.target is not None:
            _check_target(field, suite, name, method)
    for name, table in suite.tables.items() if "tables" in suite.model_fields_set else ():
        if unknown := [row for row in table.rows if row not in suite.rows]:
            raise UserError(f"{path}: tables.{name}.rows: {unknown[0]!r} is not a row; rows: {', '.join(suite.rows)}")
        if unread := [metric for metric in table.metrics if metric not in suite.metrics]:
            raise UserError(f"{path}: tables.{name}.metrics: {unread[0]!r} is not among `metrics`; add it there")
    data = suite.source
    if isinstance(data, PromptSet) and data.shipped is None and suite.prompts.file is None:
        raise UserError(
            f"{path}: prompts.file: the prompts of {suite.data!r} do not ship with the project; name the file"
        )
    _check_images(path, suite)
    if suite.traced == 1:
        raise UserError(f"{path}: traced: the spread of deviations needs two samples; give 2 or more, or 0")
    if suite.figure.nfe not in {row.nfe for row in suite.rows.values()}:
        raise UserError(f"{path}: figure.nfe: no row has nfe {suite.figure.nfe}")
    if suite.samples < 2 * suite.group_size:
        most = suite.samples // 2 // suite.shard_batches
        raise UserError(f"{path}: batch_size: an interval needs two shards or more; give {most} or less")


def _check_images(path: Path, suite: Suite) -> None:
    """Where FID's features and the images of both sides come from."""
    compared = [metric for metric in suite.metrics if "features" in METRICS[metric].needs]
    if compared and suite.extractor is None:
        raise UserError(f"{path}: extractor: {compared[0]} compares features; name an extractor or remove the metric")
    if suite.extractor and not EXTRACTORS[suite.extractor].ships and suite.extractor_weights is None:
        raise UserError(f"{path}: extractor_weights: those of {suite.extractor} do not ship; name their file")
    if compared and suite.real is None and not suite.source.brings_images:
        raise UserError(f"{path}: real: {compared[0]} compares with real images; name a folder or ADM's .npz")
    if suite.latents and suite.latents.kind == "wf" and "scale" in suite.latents.model_fields_set:
        raise UserError(f"{path}: latents.scale: WF-VAE's own config.json says it; remove it here")
    if suite.source.takes_folder and suite.source.folder is None:
        raise UserError(f"{path}: data_folder: data {suite.data!r} are files of yours; name their folder")
    if suite.data_folder and not suite.source.takes_folder:
        raise UserError(f"{path}: data_folder: data {suite.data!r} are not read from a folder; remove it")
    if suite.training and suite.latents is None:
        raise UserError(f"{path}: latents: `training` is seen through an autoencoder; name it")
    if suite.training and suite.latents:
        videos, rate = suite.latents.kind == "wf", suite.training.frames_per_second
        if videos != (rate is not None):
            fix = "give the rate of its training" if videos else "remove it"
            raise UserError(f"{path}: training.frames_per_second: latents of kind {suite.latents.kind!r}; {fix}")
        if videos and suite.training.captions is None:
            raise UserError(f"{path}: training.captions: videos are listed there; name the file")


def _check_target(field: str, suite: Suite, name: str, method: Method) -> None:
    row, target = suite.rows[name], suite.rows.get(str(suite.rows[name].target))
    if target is None or target.nfe != row.nfe or target is row:
        others = [other for other, settings in suite.rows.items() if settings.nfe == row.nfe and other != name]
        raise UserError(f"{field}.target: {row.target!r} is not another row with nfe {row.nfe}; give one of {others}")
    if target.target is not None:
        raise UserError(f"{field}.target: {row.target!r} is matched to {target.target!r} itself; name that row")
    if method.knob is None or getattr(method, method.knob) is None:
        fix = f"set {method.knob} in its options" if method.knob else "it has no knob, so remove target"
        raise UserError(f"{field}.target: nothing to match {row.method!r} with; {fix}")
