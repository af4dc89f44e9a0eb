"""The groups of a suite's config and their fields. A stage depends on whole groups (`tcbench.config.depends`).

The text below a field is its description; docs/config.md is made of them.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from tcbench.errors import did_you_mean
from tcbench.metrics.catalogue import EXTRACTORS, METRICS, usual_metrics
from tcbench.models.specs import MODELS, LatentsKind, ModelSpec
from tcbench.precision import Dtype
from tcbench.registry import data_names


def _one_of(known: Callable[[], Iterable[str]]) -> AfterValidator:
    """A check that a name is known when a config is read, so that what was added since the import counts."""

    def check(name: str) -> str:
        if name not in known():
            values = {"name": repr(name[:60]), "hint": did_you_mean(name[:60], known())}
            raise PydanticCustomError("unknown", "{name} is unknown; {hint}", values)
        return name

    return AfterValidator(check)


def _plain(pattern: str, words: str, *reserved: str) -> AfterValidator:
    """A check of names that become files, rules of the workflow or modules: nothing but plain words may.

    Args:
        words: what may stand in it.
        reserved: patterns of names that mean something else.
    """

    def check(name: str) -> str:
        if len(name) > LONGEST_NAME or not re.fullmatch(pattern, name):
            values = {"words": words, "most": LONGEST_NAME}
            raise PydanticCustomError("name", "use {words}; it becomes the name of files, at most {most} long", values)
        if any(re.fullmatch(taken, name.lower()) for taken in reserved):
            raise PydanticCustomError("name", "the name {name} is taken by the project; give another", {"name": name})
        return name

    return AfterValidator(check)


def _path(value: object) -> object:
    if value == "":
        raise PydanticCustomError("name", "an empty path; name a file or folder, or leave the field out")
    return value


def _template(text: str) -> str:
    if "{}" not in text or set(text.replace("{}", "", 1)) & {"{", "}"}:
        raise PydanticCustomError("name", "write {} once, where the prompt goes, and no other braces")
    return text


LONGEST_NAME = 64
MOST = 10**7
"""More samples, rounds, draws or pairs than this are a slip."""

MetricName = Annotated[str, _one_of(lambda: METRICS)]
ModelName = Annotated[str, _one_of(lambda: MODELS)]
DataName = Annotated[str, _one_of(data_names)]
ExtractorName = Annotated[str, _one_of(lambda: EXTRACTORS)]
SuiteName = Annotated[
    str,
    _plain(
        "[a-z][a-z0-9-]*", "lower-case letters, digits and '-' only, a letter first", "reference", "latents", "digests"
    ),
]
RowName = Annotated[str, _plain("[A-Za-z0-9][A-Za-z0-9._-]*", "letters, digits, '-', '_' and '.' only", "floor", "row")]
TableName = Annotated[
    str,
    _plain(
        "[A-Za-z][A-Za-z0-9_-]*", "letters, digits, '-' and '_' only, a letter first",
        "verdicts", "table1", "local_error", "speed", "ablation-.*",
    ),
]  # fmt: skip
AblationName = Annotated[str, _plain("[A-Za-z][A-Za-z0-9_]*", "letters, digits and '_' only, a letter first")]
MethodName = Annotated[str, _plain("[A-Za-z_][A-Za-z0-9_]*", "letters, digits and '_' only")]

Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1, le=MOST)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
Nfe = Annotated[int, Field(strict=True, ge=2, le=1000)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Scale = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1000)]
Folder = Annotated[Path, BeforeValidator(_path)]
"""Of a file or a folder, relative to the working directory; `~` is your home."""


class Strict(BaseModel):
    """Part of a config: unknown fields are refused, nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class PaperModel(Strict):
    """The paper's model and resolution that this suite's rows stand beside."""

    name: str
    """As the paper calls it."""
    resolution: Count
    """Pixels along a side."""


class About(Strict):
    """What titles and captions say of the suite; no number depends on it."""

    description: str
    """Data, resolution, kind of model, in a line."""
    differs: str
    """How it differs from the paper's setting, for titles; empty if it does not."""
    guidance_rule: str
    """By what rule `sampler.guidance_scale` was chosen."""
    stands_for: PaperModel | None = None
    """The paper's model and resolution that the rows stand beside."""


class Latents(Strict):
    """Which autoencoder's latents the model denoises."""

    kind: LatentsKind
    """Stable Diffusion's or one of its kind (FLUX.1's), Open-Sora-Plan's WF-VAE, or Wan 2.1's."""
    folder: Folder
    """The autoencoder's files."""
    scale: Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=1000)] = 0.18215
    """What latents are multiplied by for the denoiser, of `sd`; the others' own config.json says it."""
    dtype: Dtype | None = None
    """What the autoencoder computes in; if not given, on a GPU `tf32` of `sd` and `wan` and `fp16` of `wf`, on a CPU
    `fp32`."""


def _families() -> dict[str, type[ModelSpec]]:
    """The specs of all families, by the family's name."""

    def below(spec: type[ModelSpec]) -> Iterator[type[ModelSpec]]:
        for each in spec.__subclasses__():
            yield each
            yield from below(each)

    found = ((spec, spec.model_fields["family"].default) for spec in below(ModelSpec))  # type: ignore[type-abstract]
    return {family: spec for spec, family in found if isinstance(family, str)}


def _described(name: str, shape: dict[str, Any]) -> ModelSpec:
    """The spec of an inline shape, with every field that is wrong with it in one line."""
    families = _families()
    if (family := shape.get("family")) not in families:
        values = {"family": repr(family)[:60], "hint": did_you_mean(str(family)[:60], families)}
        raise PydanticCustomError("unknown", "shape.family: {family} is unknown; {hint}", values)
    try:
        return families[family].model_validate({**shape, "name": name})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise PydanticCustomError("name", "shape: {wrong}", {"wrong": wrong[:300]}) from error


class Model(Strict):
    """The denoiser, what stands before and behind it, and where it runs."""

    name: ModelName
    """An entry of `MODELS` (`tcbench/models/specs.py`), or the name of the one that `shape` describes."""
    shape: dict[str, Any] | None = None
    """Of a model that is none of them: its `family` (`dit`, `pixart`, `open_sora_plan`) and the fields of that
    family's spec, e.g. `num_blocks`, `num_heads`, `head_dim`, `sample_size`, `in_channels` (docs/add-a-model.md)."""
    weights: str | None = None
    """Its checkpoint, if not the one that ships; "random" draws weights from `seed`."""
    seed: Seed = 0
    """Of random weights."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where everything runs."""
    dtype: Dtype | None = None
    """What it computes in: 16-bit weights and activations (`bf16`, `fp16`), or float32 with the factors of products
    rounded to TF32 by a GPU or not (`tf32`, `fp32`). If not given, on a GPU what the model's reference code takes
    (`tf32` of DiT, `fp16` of PixArt-alpha and Open-Sora-Plan, `bf16` of FLUX.1 and Wan), on a CPU `fp32`. Latents,
    guidance and the sampler are float32."""
    text_encoder: Folder | None = None
    """The folder of the T5 or mT5 that reads the prompts of a published set; of FLUX.1 and Wan, that of the whole
    pipeline, with encoders and tokenizers in folders of their own."""
    latents: Latents | None = None
    """The autoencoder, of a model that denoises latents."""

    @model_validator(mode="before")
    @classmethod
    def _without_tf32(cls, model: Any) -> Any:
        """Published suites of before there was `dtype` said `tf32: true` or `false`."""
        if not isinstance(model, dict) or not isinstance(model.get("tf32"), bool):
            return model
        newer = {key: value for key, value in model.items() if key != "tf32"}
        return {"dtype": "tf32", **newer} if model["tf32"] else newer

    @model_validator(mode="before")
    @classmethod
    def _known_by_its_shape(cls, model: Any) -> Any:
        """A model that the config describes is one of `MODELS` from here on, in this process."""
        if isinstance(model, dict) and isinstance(model.get("shape"), dict) and isinstance(model.get("name"), str):
            spec = _described(model["name"], model["shape"])
            if MODELS.setdefault(spec.name, spec) != spec:
                raise PydanticCustomError(
                    "name", "shape: another model is called {name}; rename yours", {"name": spec.name}
                )
        return model

    @model_serializer(mode="wrap")
    def _without_no_shape(self, plain: Callable[["Model"], dict[str, Any]]) -> dict[str, Any]:
        """So that what was made of a known model is still what a config without the field would make."""
        return {key: value for key, value in plain(self).items() if key != "shape" or value is not None}


class Prompts(Strict):
    """How a set of prompts is used."""

    file: Folder | None = None
    """The set's own file, if it does not ship with the package."""
    per_prompt: Count = 1
    """Samples of every prompt."""
    lowercase: Flag = False
    """Whether the text encoder reads it in lower case."""
    clean: Flag | Literal["training"] = False
    """Whether it reads it as PixArt-alpha's code cleans captions, lower case included; or only captions of training, as
    Open-Sora-Plan's."""
    template: Annotated[str, AfterValidator(_template)] = "{}"
    """What the text encoder reads when samples are evaluated, `{}` being the prompt."""
    negative: str | None = None
    """What guidance steers away from, for models without a learned null caption."""


class Data(Strict):
    """What samples show."""

    name: DataName
    """A data set, which scores compare with and training uses, too; prompts of a published set; or ImageNet's classes
    in turn."""
    folder: Folder | None = None
    """Where its files are, if not where they usually are."""
    prompts: Prompts = Field(default_factory=Prompts)
    """How a published set of prompts is used."""


class Sampler(Strict):
    """How every row is sampled and every method trained."""

    guidance_scale: Scale
    """The CFG scale of rows that name no other."""
    spacing: Literal["linspace", "leading"] = "linspace"
    """How the steps are spread over the model's timesteps."""
    solver: Literal["ddim", "dpm", "euler_ancestral", "flow", "flow_unipc"] = "ddim"
    """DDIM, DPM-Solver++ or Euler-ancestral; along a flow Euler's method or UniPC."""


class Samples(Strict):
    """The samples of every row."""

    count: Count
    """Samples of a row."""
    batch_size: Count
    """Samples of a batch, which are consecutive."""
    shard_batches: Count = 1
    """Batches per file on disk, a shard, which is a jackknife group."""
    traced: Annotated[int, Field(strict=True, ge=0, le=MOST)] = 0
    """Samples whose trajectory is kept."""
    seed: Seed = 0
    """Keys all of their noise."""
    labels: Literal["balanced", "drawn"] = "balanced"
    """Of classes: in turn, so that every one comes as often, or drawn at random, each sample's by its own key, as DiT's
    script does. Balanced classes raise IS, by 4 to 9 % where there are 1000 (docs/reproduction-notes.md)."""

    @property
    def group_size(self) -> int:
        """Samples of a shard, the group that the jackknife leaves out: whole batches, whose samples may depend on each
        other."""
        return self.batch_size * self.shard_batches

    @property
    def shards(self) -> int:
        """How many shards there are, the last one perhaps short."""
        return -(-self.count // self.group_size)


class Images(Strict):
    """Images or videos in files (`tcbench.data.images`, `tcbench.data.videos`), and what they show."""

    folder: Folder
    """The images; ImageNet's has a folder per class."""
    captions: Folder | None = None
    """COCO's captions_*.json of that folder, or Open-Sora-Plan's annotations of videos; without it, the folders inside
    are the classes."""
    frames_per_second: Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=1000)] | None = None
    """Of videos, as the model is trained with."""
    resize: Literal["once", "halving"] = "once"
    """How images become squares: at once, or halved first, as ADM and DiT do (`tcbench.data.images.to_square`)."""


class Training(Strict):
    """What methods are trained with, besides their options."""

    seed: Seed = 0
    """Keys all randomness of training."""
    images: Images | None = None
    """What they are trained on where `data` brings no images, through the autoencoder of `model.latents`."""
    dtype: Dtype | None = None
    """What training computes in; if not given, what the denoiser does, `bf16` in the place of `fp16`. In 16 bits
    products are of 16-bit copies (autocast), and matrices of the model, in which nothing learns, are held as such; what
    learns, the optimiser and losses are float32."""
    checkpointed: Flag = False
    """Whether predictors and routers learn with every block computed again for its gradient: the same result in less
    memory, at a third more work."""


class Search(Strict):
    """What a row that is `searched` may spend, the same for all, on noise that no evaluated sample has."""

    samples: Count = 16
    """Calibration samples, one batch, on which a setting's deviation from the uncached run is measured."""
    trials: Count = 32
    """Settings that are tried."""


class Clip(Strict):
    """The model of `clip_score` (`tcbench.metrics.clip`)."""

    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = "ViT-L-14-quickgelu"
    """By open_clip's name."""
    weights: str | None = "openai"
    """A tag that open_clip may download, or a file."""


class ImageRewardFiles(Strict):
    """The files of `image_reward`."""

    weights: Folder = Path("~/.cache/ImageReward/ImageReward.pt")
    """The official checkpoint."""
    tokenizer: str = "bert-base-uncased"
    """The vocabulary of bert-base-uncased, as a folder or a Hugging Face name."""


class LpipsFiles(Strict):
    """The file of `lpips`."""

    weights: Folder = Path("~/.cache/torch/hub/checkpoints/alexnet-owt-7be5be79.pth")
    """AlexNet's weights as torchvision has them; the linear layers ship with the package `lpips`."""


class Scoring(Strict):
    """What samples are scored by, and what they are compared with."""

    metrics: tuple[MetricName, ...] = Field(default_factory=usual_metrics)
    """Entries of the catalogue (`tcbench/metrics/catalogue.py`)."""
    extractor: ExtractorName | None = None
    """The features behind FID and friends; none where no metric needs any."""
    extractor_weights: Folder | None = None
    """Their file, if it does not ship."""
    real: Folder | None = None
    """What scores compare with where `data` brings no images: a folder of them, or ADM's reference batch (.npz)."""
    floor_draws: Count = 20
    """How often real images are drawn for the floor under every FID."""
    clip: Clip = Field(default_factory=Clip)
    """Where `clip_score` finds its weights."""
    image_reward: ImageRewardFiles = Field(default_factory=ImageRewardFiles)
    """Where `image_reward` finds its weights."""
    lpips: LpipsFiles = Field(default_factory=LpipsFiles)
    """Where `lpips` finds its weights."""


class VBench(Strict):
    """How VBench sees the videos; its environment is named outside of configs (`tcbench vbench --help`)."""

    weights: Folder = Path("~/.cache/vbench")
    """Its checkpoints."""
    fps: Count = 18
    """The frame rate that videos are written with."""


class Latency(Strict):
    """Latency protocol: whole runs of one batch, rows interleaved, the first `warmup` rounds dropped."""

    batch_size: Count = 8
    """Samples of the batch."""
    warmup: Annotated[int, Field(strict=True, ge=0, le=MOST)] = 1
    """Rounds that are dropped."""
    repeats: Count = 3
    """Rounds that count."""


class Diagnostics(Strict):
    """What is measured of trained predictors: one-step local errors, and what they say along whole runs."""

    pairs: Count = 64
    """Pairs of neighbouring steps that they are measured on."""
    trajectories: Annotated[int, Field(ge=2, multiple_of=2)] = 16
    """Uncached runs of which Figs. 3 and 8 are, in two batches."""


class Figure(Strict):
    """What figures and grids show."""

    nfe: Nfe
    """Whose rows the per-step figures show."""
    columns: Count = 10
    """Samples in a grid."""


class PaperTable(Strict):
    """A table of the paper, or part of one, that rows stand beside."""

    title: str
    """What it is called."""
    metrics: tuple[MetricName, ...]
    """Columns of quality; the paper's numbers for others get columns of their own."""
    rows: tuple[RowName, ...] = ()
    """By name; all of the suite's if none is given. Marks are corrected over them: a row that is added to the suite and
    listed nowhere is shown at the end of the first table, and changes no other row's mark."""
    paper: Flag = True
    """Whether the paper's numbers of the rows stand beside them; not if it asks the question of another model."""


TABLE_2 = PaperTable(title="Table II", metrics=("fid", "sfid", "is", "precision", "recall"))


class Show(Strict):
    """What is rendered of the scores."""

    figure: Figure
    """What figures and grids show."""
    tables: dict[TableName, PaperTable] = Field(default={"table2": TABLE_2})
    """The paper's tables that the rows stand beside, by file name."""


class PaperCell(Strict):
    """The paper's numbers for a row, as printed."""

    fid: Number | None = None
    """FID."""
    sfid: Number | None = None
    """sFID."""
    inception_score: Number | None = Field(None, alias="is")
    """Inception score."""
    precision: Number | None = None
    """Precision."""
    recall: Number | None = None
    """Recall."""
    coco_clip: Number | None = None
    """CLIP score on MSCOCO."""
    parti_clip: Number | None = None
    """CLIP score on PartiPrompts."""
    image_reward: Number | None = None
    """ImageReward."""
    vbench: Number | None = None
    """VBench's total, in %."""
    latency_s: Number | None = None
    """Seconds of a batch of 8 on the paper's GPU."""
    tmacs: Number | None = None
    """The column that the paper calls TFLOPs."""
    speedup: Number | None = None
    """The ratio of those."""


class TrainedRow(Strict):
    """The part of a row that what is trained for it depends on."""

    method: MethodName
    """A file of methods/."""
    nfe: Nfe
    """Steps of the uncached sampler; rows with the same nfe are compared."""
    options: dict[str, Any] = Field(default={})
    """The method's own, over the suite's `defaults` for it (`tcbench methods NAME`)."""
    training_seed: Seed | None = None
    """Of what is trained for it, if not the suite's."""


class SampledRow(TrainedRow):
    """The part of a row that its samples depend on."""

    artefacts_from: RowName | None = None
    """Sample with what was trained for that row (predictor, alpha-bar, refiners)."""
    guidance_scale: Scale | None = None
    """The CFG scale, if not the suite's (guidance sweeps)."""
    refiners: Flag | Literal["p-steps"] = True
    """Whether LoRA refiners among the artefacts are merged into the model: at every step, at no step, or for P-steps
    alone (`p-steps`)."""
    full_steps_of: RowName | None = None
    """Compute everything at the steps at which that row does, where its own schedule, training or search puts them."""
    searched: Flag | dict[str, list[Any]] = False
    """Search what samples deviate least with (`search`): with `true` the list of full steps, as many as the options
    say; or these values of options, every combination of them at the MACs of `target`."""

    def is_reference_for(self, row: "SampledRow") -> bool:
        """Whether it is the uncached row at another's NFE and CFG scale, without anybody's refiners."""
        plain = self.method == "uncached" and self.artefacts_from is None
        return plain and (self.nfe, self.guidance_scale) == (row.nfe, row.guidance_scale)


class Row(SampledRow):
    """One line of a table."""

    label: str | None = None
    """What tables call it, if not the method's label."""
    control: Flag = False
    """Not in the paper's table; shown as a control."""
    target: RowName | None = None
    """The row whose MACs this one's knob was solved for (`tcbench match`, `tcbench validate --macs`)."""
    paper: PaperCell | None = None
    """The paper's numbers."""


class Variant(Row):
    """Other values of a row's fields, `options` one by one; what is not named is as in the row that it changes."""

    method: MethodName = ""
    """Another method, which inherits neither options nor artefacts."""
    nfe: Nfe = 0
    """Another number of steps."""
    base: RowName = ""
    """Another row to change than the ablation's."""

    @model_serializer(mode="wrap")
    def _what_is_named(self, plain: Callable[["Variant"], dict[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in plain(self).items() if name in self.model_fields_set}


class Ablation(Strict):
    """One question asked of one row: variants of it, sampled and scored side by side."""

    title: str
    """Of the table."""
    question: str
    """What the variants decide, one sentence for the caption."""
    base: RowName
    """The row that variants change; every difference is to the variant that changes nothing."""
    samples: Count | None = None
    """Samples of a variant, if not the suite's `samples.count`."""
    guidance_scales: tuple[Scale, ...] = ()
    """Repeats every variant at each of these CFG scales."""
    rows: dict[RowName, Variant]
    """Variants by name. A variant shares the artefacts of the row it changes; `artefacts_from: null` trains its own."""


Ratio = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=1, le=1000)]


class Rivals(Strict):
    """Methods side by side at a few MAC budgets, their knobs solved by the workflow (target `rivals`)."""

    nfe: Nfe
    """Steps of the uncached run; a row with `method: uncached` must have as many."""
    ratios: Annotated[tuple[Ratio, ...], Field(min_length=1)]
    """The budgets: how many times fewer MACs than it, what a method computes for itself included."""
    near: Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, lt=1)] = 0.05
    """How far from a budget a row's MACs may be, as a share of it; what comes no nearer has no row."""
    samples: Count | None = None
    """Samples of a row, if not the suite's `samples.count`."""
    metrics: tuple[MetricName, ...]
    """Columns of quality."""
    methods: dict[MethodName, dict[str, list[Any]]] = Field(min_length=1)
    """What is compared. A method has the options and the training of the first row with it at this nfe, otherwise the
    suite's defaults; its knob is solved. Values of further options are tried in their order, all combinations, where
    those before do not reach a budget; none may change what is trained."""
    anew: dict[MethodName, dict[str, Any]] = {}
    """Methods that are trained for this table alone, with these options beside the suite's defaults: a router that
    closes fewer gates than the one of the suite's row, say."""
    without_refiners: tuple[MethodName, ...] = ()
    """Methods that are compared without the LoRA that was trained for them, too."""

    @property
    def contenders(self) -> dict[str, str]:
        """The method of each name in the table; `x-plain` is x without its LoRA."""
        return {
            name: method
            for method in self.methods
            for name in (method, *([f"{method}-plain"] if method in self.without_refiners else []))
        }


class File(Strict):
    """Something that a suite needs and that does not ship with the project."""

    path: Folder
    """Where it is looked for."""
    holds: tuple[str, ...] = ()
    """What it must hold, if it is a folder."""
    used: str
    """What for."""
    get: str
    """Where it comes from."""
