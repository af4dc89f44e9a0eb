"""What a suite's schema cannot say: names, options and references that must fit one another, and what a model can have.

Every check yields all that it finds. It looks at whole groups alone, so that a mistake elsewhere neither hides it nor
is reported twice.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pydantic import ValidationError

from tcbench.config.document import Field, Problem
from tcbench.config.fields import Ablation, Rivals
from tcbench.config.suite import (
    BASELINE,
    RIVALS,
    TRAININGS,
    Entry,
    Suite,
    ablation_rows,
    rival_rows,
    trains_refiners,
)
from tcbench.data.source import PromptSet
from tcbench.errors import UserError
from tcbench.method import Method
from tcbench.metrics.catalogue import EXTRACTORS, METRICS
from tcbench.models.specs import MODELS, TextSpec
from tcbench.precision import Dtype
from tcbench.registry import make_method, method_names

Problems = Iterator[Problem]
_CHECKS: list[tuple[frozenset[str], Callable[["_Suite"], Problems]]] = []


@dataclass
class _Suite:
    """A suite as far as it is valid.

    Attributes:
        suite: broken groups are no attributes of it, broken rows and ablations lack.
        broken: those.
        methods: of the rows that are whole and whose options are.
    """

    suite: Suite
    broken: set[Field]
    methods: dict[str, Method] = field(default_factory=dict)

    def is_whole(self, group: str) -> bool:
        """Whether a group is there and nothing is wrong with it."""
        return hasattr(self.suite, group) and (group,) not in self.broken

    @property
    def has_all_rows(self) -> bool:
        """Whether no row is broken, its method and options included, so that none is missing for that."""
        return not any(place[0] == "rows" for place in self.broken) and self.methods.keys() == self.suite.rows.keys()

    def lacks(self, row: str) -> bool:
        """Whether the suite has no such row, not even a broken one."""
        return row not in self.suite.rows and ("rows", row) not in self.broken

    @property
    def rows(self) -> list[tuple[Field, Entry, Method]]:
        """(field, row, method) of the rows that are whole."""
        return [(("rows", name), self.suite[name], method) for name, method in self.methods.items()]


def _looks_at(*groups: str) -> Callable[[Callable[[_Suite], Problems]], Callable[[_Suite], Problems]]:
    """Register a check that looks at these groups."""

    def register(check: Callable[[_Suite], Problems]) -> Callable[[_Suite], Problems]:
        _CHECKS.append((frozenset(groups), check))
        return check

    return register


def problems_of(suite: Suite, broken: set[Field]) -> list[Problem]:
    """Everything that is wrong with a suite besides its schema.

    Args:
        suite: as far as its parts are valid.
        broken: groups, rows and ablations that are not.
    """
    partial = _Suite(suite, broken)
    return [problem for groups, check in _CHECKS if all(map(partial.is_whole, groups)) for problem in check(partial)]


# --- rows


@_looks_at("rows", "defaults")
def _methods(it: _Suite) -> Problems:
    for name in it.suite.defaults:
        if name not in method_names():
            yield Problem(("defaults", name), f"no such method; known: {', '.join(method_names())}")
    for name in it.suite.rows:
        try:
            it.methods[name] = it.suite[name].method
        except UserError as error:
            yield Problem(("rows", name), str(error))


@_looks_at("rows", "defaults", "sampler")
def _rows(it: _Suite) -> Problems:
    rows = it.suite.rows
    for place, entry, method in it.rows:
        row = entry.row
        if it.has_all_rows and not any(other.is_reference_for(row) for other in rows.values()):
            at = "" if row.guidance_scale is None else f" and guidance_scale: {row.guidance_scale:g}"
            yield Problem(place, f"nothing to compare with; add a row with method: uncached and nfe: {row.nfe}{at}")
        try:
            steps = method.sampled_steps(row.nfe)
        except UserError as error:
            yield Problem(place, str(error))
            continue
        if not 2 <= steps <= 1000:
            yield Problem(place, f"samples {steps} steps; give 2 to 1000")
        full = getattr(method, "num_full_steps", None)
        if full and full > steps:
            says = f"{full} full steps of {steps}; give {steps} or fewer"
            yield Problem((*place, "options", "num_full_steps"), says)
        if (listed := getattr(method, "full_steps", None)) and listed[-1] >= steps:
            yield Problem((*place, "options", "full_steps"), f"{listed[-1]} is no step of {steps}; remove it")
        yield from _borrowed(it, place, entry, method)
        yield from _found(it, place, entry, method)
        if row.target is not None and it.has_all_rows:
            yield from _target(it, (*place, "target"), entry, method)


def _borrowed(it: _Suite, place: Field, entry: Entry, method: Method) -> Problems:
    """Whether what a row samples with is trained, and for it."""
    source, rows = entry.row.artefacts_from, it.suite.rows
    if source and it.lacks(source):
        yield Problem((*place, "artefacts_from"), f"{source!r} is not a row that is trained")
    if source and source in it.methods:
        if not it.suite[source].trains:
            yield Problem((*place, "artefacts_from"), f"{source!r} is not a row that is trained")
        if rows[source].nfe != entry.nfe:
            yield Problem((*place, "artefacts_from"), f"{source!r} was trained for another nfe")
    schedule = getattr(method, "schedule", None)
    listed = getattr(method, "full_steps", None) or entry.row.full_steps_of
    if schedule in ("adaptive", "reversed") and not (
        source or method.trains or listed
    ):  # method.Schedule, from alpha-bar
        yield Problem((*place, "options", "schedule"), f"{schedule!r} needs artefacts_from; or set 'even'")
    if entry.row.training_seed is not None and not entry.trains:
        yield Problem((*place, "training_seed"), "nothing is trained for this row; remove it")
    if entry.row.refiners is not True and not (source or method.trains):
        yield Problem((*place, "refiners"), "the row samples with nothing trained, so it has none; remove the field")


def _found(it: _Suite, place: Field, entry: Entry, method: Method) -> Problems:
    """Whether full steps can be another row's, and what is searched can be."""
    row, source = entry.row, entry.row.full_steps_of
    options = type(method).model_fields
    if (source or row.searched is True) and "full_steps" not in options:
        at = (*place, "full_steps_of" if source else "searched")
        yield Problem(at, f"{row.method} takes no list of full steps; remove it")
    if source and it.lacks(source):
        yield Problem((*place, "full_steps_of"), f"{source!r} is not a row")
    elif source and source in it.methods:
        if it.suite.rows[source].nfe != entry.nfe:
            yield Problem((*place, "full_steps_of"), f"{source!r} has another nfe")
        if it.suite.rows[source].full_steps_of or "full_steps" not in type(it.methods[source]).model_fields:
            yield Problem((*place, "full_steps_of"), f"{source!r} has no full steps of its own; name one that has")
    if source and (row.searched or row.target):
        yield Problem((*place, "full_steps_of"), "another row's full steps leave nothing to search or to match")
    if isinstance(row.searched, dict):
        if row.target is None:
            yield Problem((*place, "searched"), "options are searched at the MACs of a row; set target")
        for name, values in row.searched.items():
            if name not in options or name == method.knob:
                says = f"{name!r} is no option of {row.method} besides its knob; name others"
                yield Problem((*place, "searched"), says)
            elif not values:
                yield Problem((*place, "searched", name), "give values to try")


def _target(it: _Suite, place: Field, entry: Entry, method: Method) -> Problems:
    row, rows = entry.row, it.suite.rows
    target = rows.get(str(row.target))
    if target is None or target.nfe != row.nfe or target is row:
        others = [other for other, settings in rows.items() if settings.nfe == row.nfe and other != entry.name]
        yield Problem(place, f"{row.target!r} is not another row with nfe {row.nfe}; give one of {others}")
    elif target.target is not None:
        yield Problem(place, f"{row.target!r} is matched to {target.target!r} itself; name that row")
    elif method.knob is None or (getattr(method, method.knob) is None and not row.searched):
        fix = f"set {method.knob} in its options" if method.knob else "it has no knob, so remove target"
        yield Problem(place, f"nothing to match {row.method!r} with; {fix}")


@_looks_at("model", "training")
def _dtypes(it: _Suite) -> Problems:
    model, latents = it.suite.model, it.suite.model.latents
    asked: dict[Field, Dtype | None] = {
        ("model", "dtype"): model.dtype,
        ("training", "dtype"): it.suite.training.dtype,
    }
    asked |= {("model", "latents", "dtype"): latents.dtype} if latents else {}
    for place, dtype in asked.items():
        if dtype == "tf32" and model.device == "cpu":
            yield Problem(place, "a CPU knows no TF32; write fp32, or leave it out")
        if dtype == "fp16" and place[0] == "training":
            yield Problem(place, "gradients underflow in fp16 and are not scaled; write bf16, tf32 or fp32")


@_looks_at("rows", "defaults", "jobs")
def _jobs(it: _Suite) -> Problems:
    """Jobs become rules of the workflow, whose names have no '-' and no '.'."""
    if it.suite.jobs != "row":
        return
    rules: dict[str, str] = {}
    for name in it.suite.rows:
        other = rules.setdefault(name.replace("-", "_").replace(".", "_"), name)
        if other != name:
            yield Problem(("rows", name), f"differs from row {other!r} in punctuation alone; rename one of them")


@_looks_at("rows", "defaults", "trainings_of")
def _trainings(it: _Suite) -> Problems:
    for number, name in enumerate(it.suite.trainings_of):
        if it.lacks(name) or (name in it.methods and not it.suite[name].trains):
            training = [row for row in it.methods if it.suite[row].trains]
            yield Problem(
                ("trainings_of", str(number)), f"{name!r} is no row that trains something; give some of {training}"
            )


@_looks_at("rows", "defaults", "ablations", "samples", "sampler", "trainings", "trainings_of")
def _ablations(it: _Suite) -> Problems:
    suite = it.suite
    for name, ablation in suite.ablations.items():
        place = ("ablations", name)
        if name == TRAININGS and suite.trainings > 1:
            yield Problem(place, "is made for `trainings`; give yours another name")
        unknown = [
            Problem((*where, "base"), f"base {base!r} is not a row; rows: {', '.join(suite.rows)}")
            for where, base in _bases(place, ablation)
            if it.lacks(base)
        ]
        yield from unknown
        yield from _variants(it, place, ablation)
        if unknown or any(base not in it.methods for _, base in _bases(place, ablation)):
            continue  # what they are variants of is broken
        try:
            own = ablation_rows(suite, name, ablation)
        except ValidationError as error:
            first = error.errors()[0]
            yield Problem((*place, "rows", *map(str, first["loc"])), first["msg"].lower())
            continue
        except UserError as error:
            yield Problem((*place, "rows"), str(error))
            continue
        for clash in sorted(set(own) & set(suite.rows)):
            yield Problem(place, f"variant {clash!r} has the name of a row; rename one of them")
        inner = _Suite(suite.model_copy(update={"rows": own | suite.rows}), it.broken)
        for problem in (*_methods(inner), *_rows(inner)):
            if problem.field[1] in own:
                yield Problem(_in_ablation(place, ablation, problem.field), problem.says)


@_looks_at("rows", "defaults", "ablations", "samples", "sampler", "scoring", "rivals")
def _rivals(it: _Suite) -> Problems:
    suite, rivals, place = it.suite, it.suite.rivals, ("rivals",)
    if rivals is None:
        return
    if RIVALS in suite.ablations:
        yield Problem(("ablations", RIVALS), "is what the suite of `rivals` is called; give yours another name")
    if BASELINE not in rivals.methods:
        yield Problem((*place, "methods"), f"lacks {BASELINE}, which all others are compared with; add it")
    for metric in [name for name in rivals.metrics if name not in suite.scoring.metrics]:
        yield Problem((*place, "metrics"), f"{metric!r} is not among `scoring.metrics`; add it there")
    if rivals.samples and rivals.samples < 2 * suite.samples.group_size:
        yield Problem((*place, "samples"), f"an interval needs two shards of {suite.samples.group_size}; give more")
    for name, tried in rivals.methods.items():
        anew = rivals.anew.get(name, {})
        try:
            method = make_method(name, suite.defaults.get(name, {}) | anew)
        except UserError as error:
            yield Problem((*place, "anew" if anew else "methods", name), str(error))
            continue
        if method.knob is None:
            yield Problem((*place, "methods", name), "has no knob, so it meets no budget; remove it")
        for option, values in tried.items():
            if option not in type(method).model_fields or option == method.knob:
                says = f"{option!r} is no option of {name} besides its knob; name others"
                yield Problem((*place, "methods", name), says)
            elif not values:
                yield Problem((*place, "methods", name, option), "give values to try")
        if name in rivals.without_refiners and not trains_refiners(method):
            yield Problem((*place, "without_refiners"), f"{name} trains no LoRA here; remove it")
    for name in rivals.anew.keys() - rivals.methods.keys():
        yield Problem((*place, "anew", name), "is not among `rivals.methods`; add it there")
    for name in {*rivals.without_refiners} - rivals.methods.keys():
        yield Problem((*place, "without_refiners"), f"{name} is not among `rivals.methods`; add it there")
    if it.has_all_rows:
        if not any(row.method == "uncached" and row.nfe == rivals.nfe for row in suite.rows.values()):
            yield Problem(
                (*place, "nfe"), f"nothing to compare with; add a row with method: uncached, nfe: {rivals.nfe}"
            )
        elif not any(field[0] == "rivals" for field in it.broken):
            yield from _rival_rows(it, rivals)


def _rival_rows(it: _Suite, rivals: Rivals) -> Problems:
    """What is wrong with the rows that rivals start from."""
    try:
        own = ablation_rows(it.suite, RIVALS, rival_rows(it.suite, rivals))
    except UserError:
        return  # said of the method
    inner = _Suite(it.suite.model_copy(update={"rows": own | it.suite.rows}), it.broken)
    for problem in (*_methods(inner), *_rows(inner)):
        if problem.field[1] in own:
            method = str(problem.field[1]).removeprefix(f"{RIVALS}-")
            field = ("anew", method) if method in rivals.anew else ("methods", method)
            yield Problem(("rivals", *field, *problem.field[2:]), problem.says)


def _bases(place: Field, ablation: Ablation) -> Iterator[tuple[Field, str]]:
    """(field, row) of everything that an ablation changes."""
    yield place, ablation.base
    for key, variant in ablation.rows.items():
        if "base" in variant.model_fields_set:
            yield (*place, "rows", key), variant.base


def _variants(it: _Suite, place: Field, ablation: Ablation) -> Problems:
    """Names and numbers of an ablation that its variants share."""
    if not ablation.rows:
        yield Problem((*place, "rows"), "names no variant; add one")
    for key in ablation.rows:
        if key.startswith("reference"):
            yield Problem((*place, "rows", key), "names that begin with 'reference' are taken; give another")
    shown = [f"{scale:g}" for scale in ablation.guidance_scales]
    if len(set(shown)) < len(shown):
        yield Problem((*place, "guidance_scales"), f"{', '.join(shown)}: a scale comes twice; remove it")
    if ablation.samples and ablation.samples < 2 * it.suite.samples.group_size:
        yield Problem((*place, "samples"), f"an interval needs two shards of {it.suite.samples.group_size}; give more")


def _in_ablation(place: Field, ablation: Ablation, field: Field) -> Field:
    """Where a config says what a row of an ablation is."""
    name = field[1].removeprefix(f"{place[1]}-")
    key = next((key for key in ablation.rows if name == key or name.startswith(f"{key}-cfg")), None)
    return (*place, "rows", key, *field[2:]) if key else place


# --- tables and figures


@_looks_at("rows", "show", "scoring")
def _tables(it: _Suite) -> Problems:
    show, rows = it.suite.show, it.suite.rows
    for name, table in show.tables.items() if "tables" in show.model_fields_set else ():
        for row in filter(it.lacks, table.rows):
            says = f"{row!r} is not a row; rows: {', '.join(rows)}"
            yield Problem(("show", "tables", name, "rows", str(table.rows.index(row))), says)
        for metric in table.metrics:
            if metric not in it.suite.scoring.metrics:
                says = f"{metric!r} is not among `scoring.metrics`; add it there"
                yield Problem(("show", "tables", name, "metrics", str(table.metrics.index(metric))), says)


@_looks_at("rows", "defaults", "show")
def _figure(it: _Suite) -> Problems:
    nfe = it.suite.show.figure.nfe
    if it.has_all_rows and nfe not in {row.nfe for row in it.suite.rows.values()}:
        yield Problem(("show", "figure", "nfe"), f"no row has nfe {nfe}")


# --- samples and scores


@_looks_at("samples", "scoring")
def _samples(it: _Suite) -> Problems:
    samples = it.suite.samples
    if samples.traced == 1:
        says = "the spread of deviations needs two samples; give 2 or more, or 0"
        yield Problem(("samples", "traced"), says)
    if samples.count < 2 * samples.group_size:
        most = samples.count // 2 // samples.shard_batches
        fix = f"give {most} or less" if most else "give more samples, or fewer in shard_batches"
        yield Problem(("samples", "batch_size"), f"an interval needs two shards or more; {fix}")
        return
    left = samples.count - samples.group_size
    for metric in it.suite.scoring.metrics:
        if left < METRICS[metric].least:
            least = METRICS[metric].least
            says = f"{metric} needs {least} samples when a shard is left out, and {left} are left; give more"
            yield Problem(("samples", "count"), says)


@_looks_at("scoring", "model")
def _neighbours(it: _Suite) -> Problems:
    """Of decoded videos shards keep a few frames to the bit, and an mp4, which VBench reads."""
    for number, metric in enumerate(it.suite.scoring.metrics if it.suite.decodes_videos else ()):
        if METRICS[metric].neighbours:
            says = f"{metric} looks at all frames, and few are kept of decoded videos; take vbench"
            yield Problem(("scoring", "metrics", str(number)), says)


@_looks_at("scoring", "data")
def _compared(it: _Suite) -> Problems:
    """Where features and the images of both sides come from."""
    scoring, data = it.suite.scoring, it.suite.data
    compared = [metric for metric in scoring.metrics if "features" in METRICS[metric].needs]
    if compared and scoring.extractor is None:
        says = f"{compared[0]} compares features; name an extractor or remove the metric"
        yield Problem(("scoring", "extractor"), says)
    if scoring.extractor:
        extractor = EXTRACTORS[scoring.extractor]
        if not extractor.ships and scoring.extractor_weights is None:
            says = f"those of {scoring.extractor} do not ship; name their file"
            yield Problem(("scoring", "extractor_weights"), says)
        if extractor.knows and data.name not in extractor.knows:
            says = f"{scoring.extractor} knows {' and '.join(extractor.knows)}, not {data.name}; name another"
            yield Problem(("scoring", "extractor"), says)
    source = _source(it)
    if source is None:
        return
    second = [metric for metric in scoring.metrics if "imagenet" in METRICS[metric].needs]
    if (compared or second) and scoring.real is None and not source.brings_images:
        says = f"{(compared or second)[0]} compares with real images; name a folder or ADM's .npz"
        yield Problem(("scoring", "real"), says)
    if source.conditioning != "text":
        for metric in scoring.metrics:
            if METRICS[metric].reads_captions:
                says = f"{metric} reads captions, and data {data.name!r} have none; remove the metric"
                yield Problem(("scoring", "metrics", str(scoring.metrics.index(metric))), says)


# --- data and model


def _source(it: _Suite):  # type: ignore[no-untyped-def]  # DataSource | None
    """The data set, if its file is whole."""
    try:
        return it.suite.source
    except UserError:
        return None


@_looks_at("data")
def _data(it: _Suite) -> Problems:
    data = it.suite.data
    try:
        source = it.suite.source
    except UserError as error:
        yield Problem(("data", "name"), str(error))
        return
    if source.takes_folder and source.folder is None:
        yield Problem(("data", "folder"), f"data {data.name!r} are files of yours; name their folder")
    if data.folder and not source.takes_folder:
        yield Problem(("data", "folder"), f"data {data.name!r} are not read from a folder; remove it")
    if not isinstance(source, PromptSet):
        if "prompts" in data.model_fields_set and data.prompts != type(data.prompts)():
            yield Problem(("data", "prompts"), f"data {data.name!r} are no published set of prompts; remove it")
    elif source.shipped is None and data.prompts.file is None:
        says = f"the prompts of {data.name!r} do not ship with the project; name the file"
        yield Problem(("data", "prompts", "file"), says)


@_looks_at("data", "model")
def _conditioned(it: _Suite) -> Problems:
    """Whether the model is conditioned on what the data bring, and by whom captions are read."""
    spec, source, model = MODELS[it.suite.model.name], _source(it), it.suite.model
    if source is None:
        return
    reads = isinstance(spec, TextSpec)
    if reads != (source.conditioning == "text"):
        what, instead = ("captions", "classes") if reads else ("classes", "captions")
        says = f"{spec.name} is conditioned on {what}, and data {it.suite.data.name!r} bring {instead}; name others"
        yield Problem(("data", "name"), says)
    elif isinstance(source, PromptSet) and model.text_encoder is None:
        yield Problem(("model", "text_encoder"), f"reads the prompts of {it.suite.data.name!r}; name its folder")
    if model.text_encoder is not None and not isinstance(source, PromptSet):
        says = f"data {it.suite.data.name!r} are no prompts for it to read; remove it"
        yield Problem(("model", "text_encoder"), says)


@_looks_at("data", "samples")
def _labels(it: _Suite) -> Problems:
    source = _source(it)
    if source is not None and source.conditioning == "text" and it.suite.samples.labels == "drawn":
        says = f"data {it.suite.data.name!r} bring captions, not classes to draw; remove it"
        yield Problem(("samples", "labels"), says)


@_looks_at("model")
def _model(it: _Suite) -> Problems:
    model = it.suite.model
    spec = MODELS[model.name]
    if model.weights is None and spec.weights is None:
        yield Problem(("model", "weights"), f"those of {spec.name} do not ship; name their file, or write random")
    channels, latents = spec.latent_shape[0], model.latents
    if latents is None and channels not in (1, 3):
        says = f"{spec.name} denoises latents of {channels} channels; name their autoencoder"
        yield Problem(("model", "latents"), says)
    if latents is not None:
        if latents.kind != spec.latents_kind:
            says = f"{spec.name} was trained with kind {spec.latents_kind!r}; write that"
            yield Problem(("model", "latents", "kind"), says)
        if latents.kind != "sd" and "scale" in latents.model_fields_set:
            yield Problem(("model", "latents", "scale"), "its own config.json says it; remove it here")


@_looks_at("model", "sampler")
def _sampled(it: _Suite) -> Problems:
    spec, solver = MODELS[it.suite.model.name], it.suite.sampler.solver
    if solver not in spec.solvers:
        says = f"{solver!r} takes another prediction than {spec.name} makes; give one of {', '.join(spec.solvers)}"
        yield Problem(("sampler", "solver"), says)


@_looks_at("training", "model", "data")
def _training(it: _Suite) -> Problems:
    images, latents, source = it.suite.training.images, it.suite.model.latents, _source(it)
    if images is None:
        return
    if source is not None and source.brings_images:
        says = f"data {it.suite.data.name!r} bring the images that methods are trained on; remove it"
        yield Problem(("training", "images"), says)
    elif latents is None:
        yield Problem(("model", "latents"), "`training.images` are seen through an autoencoder; name it")
    else:
        videos, rate = latents.kind != "sd", images.frames_per_second
        if videos != (rate is not None):
            fix = "give the rate of its training" if videos else "remove it"
            says = f"latents of kind {latents.kind!r}; {fix}"
            yield Problem(("training", "images", "frames_per_second"), says)
        if videos and images.captions is None:
            yield Problem(("training", "images", "captions"), "videos are listed there; name the file")


@_looks_at("training", "data", "rows", "defaults")
def _trained(it: _Suite) -> Problems:
    """A row that trains needs something to train on."""
    source = _source(it)
    if source is None or source.brings_images or it.suite.training.images:
        return
    for place, entry, method in it.rows:
        if method.trains and entry.row.artefacts_from is None:
            says = f"data {it.suite.data.name!r} bring no images, and row {place[1]} trains on some; name them"
            yield Problem(("training", "images"), says)
            return
