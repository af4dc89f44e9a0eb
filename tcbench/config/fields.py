"""The parts of a suite's config: what may stand below its top level."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from pydantic_core import PydanticCustomError

from tcbench.errors import did_you_mean
from tcbench.metrics.catalogue import EXTRACTORS, METRICS
from tcbench.models.specs import MODELS
from tcbench.registry import data_names


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


class Strict(BaseModel):
    """Part of a config: unknown fields are refused, nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PaperCell(Strict):
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


class Row(Strict):
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


class Ablation(Strict):
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


class Guidance(Strict):
    """Classifier-free guidance: one scale for every row, and the rule it was chosen by."""

    scale: float = Field(ge=0)
    rule: str


class Latency(Strict):
    """Latency protocol: whole runs of one batch, rows interleaved, the first `warmup` rounds dropped."""

    batch_size: PositiveInt = 8
    warmup: int = Field(1, ge=0)
    repeats: PositiveInt = 3


class Clip(Strict):
    """The model of `clip_score`, by open_clip's names; `weights` is a tag or a file (`tcbench.metrics.clip`)."""

    model: str = "ViT-L-14-quickgelu"
    weights: str | None = "openai"


class ImageRewardFiles(Strict):
    """The official checkpoint, and the vocabulary of bert-base-uncased as a folder or a Hugging Face name."""

    weights: Path = Path("~/.cache/ImageReward/ImageReward.pt")
    tokenizer: str = "bert-base-uncased"


class VBench(Strict):
    """VBench's own environment and checkpoints, and the frame rate that videos are written with."""

    environment: Path = Path(".vbench")
    weights: Path = Path("~/.cache/vbench")
    fps: PositiveInt = 18


class Figure(Strict):
    """Which NFE the per-step figures show, and how many samples a grid does."""

    nfe: int
    columns: PositiveInt = 10


class PaperTable(Strict):
    """A table of the paper, or part of one, that rows stand beside.

    Attributes:
        title: what it is called.
        metrics: columns of quality; the paper's numbers for others get columns of their own.
        rows: by name; all of the suite's if none is given. They are what the marks are corrected over
            (`Suite.added_rows`): a row that is added to the suite and listed nowhere is shown in the first table, and
            changes no other row's mark.
        paper: whether the paper's numbers of the rows stand beside them; not if it asks the question of another model.
    """

    title: str
    metrics: tuple[MetricName, ...]
    rows: tuple[str, ...] = ()
    paper: bool = True


class Prompts(Strict):
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


class Latents(Strict):
    """Which autoencoder's latents the model denoises: Stable Diffusion's, or Open-Sora-Plan's WF-VAE.

    Attributes:
        scale: what latents are multiplied by for the denoiser; WF-VAE's own config.json says it.
    """

    kind: Literal["sd", "wf"]
    folder: Path
    scale: float = 0.18215


class Images(Strict):
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


class File(Strict):
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


class PaperModel(Strict):
    """The paper's model and resolution that this suite's rows stand beside."""

    name: str
    resolution: int
