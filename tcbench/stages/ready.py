"""What several stages need: the suite's model, and a row ready to sample."""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tcbench.artefacts import artefacts_digest, load_artefacts, load_numbers
from tcbench.budget.borrowing import check_training, training_record
from tcbench.budget.costing import run_of_shapes
from tcbench.config.suite import Entry, Suite
from tcbench.errors import UserError
from tcbench.method import Artefacts, Method, refuse_lacking
from tcbench.models.adapter import Adapter
from tcbench.models.networks import build_transformer, load_transformer, make_adapter
from tcbench.models.specs import MODELS
from tcbench.models.text import text_encoder_beside
from tcbench.outside.places import locate
from tcbench.precision import set_products, weights_dtype
from tcbench.record.files import digest
from tcbench.record.identity import content_digest, content_digests
from tcbench.record.records import SEARCHED
from tcbench.registry import make_method
from tcbench.samplers import SamplerSettings
from tcbench.schedule import as_options
from tcbench.stages.images import device_of


@dataclass(frozen=True)
class ReadyRow:
    """A row with everything loaded."""

    method: Method
    nfe: int
    adapter: Adapter
    artefacts: Artefacts


def sampler_settings(entry: Entry, *, training: bool = False) -> SamplerSettings:
    """What all rows share, and the row's CFG scale; with the seed of its samples, or of what is trained for it."""
    suite = entry.suite
    seed = (suite.training if training else suite.samples).seed
    return SamplerSettings(entry.guidance_scale, seed, suite.sampler.spacing, suite.sampler.solver)


def load_adapter(suite: Suite, *, training: bool = False, learns: bool = True) -> Adapter:
    """The suite's model with its weights, on its device, in the denoiser's dtype; for training in that of training,
    where passes run under `precision.mixed`. From here on float32 products are of the precision that is asked for.

    Args:
        learns: in training, whether anything learns that begins as weights of the model, which are float32 therefore.
    """
    spec, device = MODELS[suite.model.name], device_of(suite)
    dtype = suite.dtypes["training"] if training else suite.sampling_dtypes["denoiser"]
    set_products(dtype)
    weights = weights_dtype("fp32" if training and learns else dtype)
    if suite.model.weights == "random":
        network = build_transformer(spec, device=device, dtype=weights, seed=suite.model.seed, zero_init=False)
    else:
        network = load_transformer(spec, suite.model.weights, device, weights)
    adapter = make_adapter(network, spec)
    if training:
        adapter.hold_matrices(weights_dtype(dtype))
    return adapter


@lru_cache
def weights_digest(model: str, weights: str | None) -> str:
    """Identifies the model's weights, and those of the text encoder beside them, by content."""
    path = weights or MODELS[model].weights
    if weights == "random" or path is None:
        return "random"
    file = locate(path)
    files = sorted(file.glob("*.safetensors")) if file.is_dir() else [file, text_encoder_beside(file)]
    return "+".join(content_digest(file) for file in files if file.exists())


def weights_read(suite: Suite) -> dict[str, str]:
    """The same of a suite's model, as provenance keeps it."""
    return {"denoiser": weights_digest(suite.model.name, suite.model.weights)}


def text_encoder_digests(suite: Suite) -> dict[str, str]:
    """Identifies what is read of the folder of `model.text_encoder`, by content; empty where none is named."""
    if (folder := suite.model.text_encoder) is None:
        return {}
    from tcbench.models.pretrained import weights_files

    return content_digests([folder / "config.json", folder / "spiece.model", *weights_files(folder)])


def files_digests(entry: Entry) -> dict[str, str]:
    """Digests of the files that training read for a row (an imported router), as far as they are still there."""
    source = entry.trained_as
    files = source.method.files() if source else ()
    return {name: content_digest(Path(name)) for name in files if Path(name).exists()}


def sampled_method(entry: Entry) -> Method:
    """The row's method, with what other stages find out: another row's full steps, what was searched.

    Raises:
        UserError: their files are missing, damaged or of other settings.
    """
    method, source = entry.method, entry.steps_of
    if source is None:
        return _with_found(entry) if entry.row.searched else method
    of_source = sampled_method(source)
    run = run_of_shapes(source.suite.model.name, of_source.sampled_steps(source.nfe))
    if source.artefacts:
        training_record(source)
        run = replace(run, artefacts=load_numbers(source.artefacts))
    return make_method(method.name, method.model_dump() | as_options(of_source.i_steps(run), method))


def recorded_options(entry: Entry) -> dict[str, Any]:
    """The options of the row's method, and in the place of those that were left open what they are in its runs.

    Raises:
        UserError: as `sampled_method`, or the method cannot say.
    """
    method = sampled_method(entry)
    run = run_of_shapes(entry.suite.model.name, method.sampled_steps(entry.nfe))
    return method.model_dump(mode="json") | method.implied(run)


def _with_found(entry: Entry) -> Method:
    """The row's method with what was searched for it."""
    found, folder = SEARCHED.read(entry.searched, entry.name, entry.suite.suite), entry.artefacts
    trained = artefacts_digest(folder) if folder else None
    if (digest(found["settings"]), found["artefacts"]) != (digest(entry.settings("search")), trained):
        raise UserError(
            f"{entry.searched}: was searched with other settings or trained parts than row {entry.name} has; "
            f"run `tcbench search` for it again"
        )
    return make_method(entry.method.name, entry.method.model_dump() | found["options"])


def ready_row(entry: Entry, adapter: Adapter) -> ReadyRow:
    """A row as it is sampled: what it needs, and the method as other stages' results make it.

    Raises:
        UserError: as `prepared_row` and `sampled_method`.
    """
    return replace(prepared_row(entry, adapter), method=sampled_method(entry))


def prepared_row(entry: Entry, adapter: Adapter) -> ReadyRow:
    """Load what a row needs; `adapter` is the plain model and stays untouched.

    Raises:
        UserError: an artefact is missing or damaged, a file that it was made from has changed since, or the artefacts
            come from a row of the same method that was trained with other options.
    """
    folder = entry.artefacts
    check_training(entry)
    if folder is None:
        return ReadyRow(entry.method, entry.nfe, adapter, Artefacts())
    log = training_record(entry)
    read = log.get("read", {}) if log else {}
    for name, found in files_digests(entry).items():
        if read.get(name) != found:
            raise UserError(f"{name}: is not the file that {folder.name} was trained from; train that row again")
    refiners = entry.row.refiners
    artefacts, sampled = load_artefacts(folder, adapter, refined=bool(refiners))
    refuse_lacking(entry.method, artefacts, f"row {entry.name}")
    if refiners == "p-steps" and sampled is not adapter:
        sampled.on_full_steps(adapter)
    return ReadyRow(entry.method, entry.nfe, sampled, artefacts)
