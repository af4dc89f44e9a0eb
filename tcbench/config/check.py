"""What a suite's schema cannot say of its rows: names, options and references that must fit one another."""

from pathlib import Path

from pydantic import ValidationError

from tcbench.config.suite import Suite, expand
from tcbench.data.source import PromptSet
from tcbench.errors import UserError
from tcbench.method import Method
from tcbench.metrics.catalogue import EXTRACTORS, METRICS
from tcbench.registry import method_names


def check_ablations(path: Path, suite: Suite) -> None:
    """Names, bases and changes of the ablations; raises UserError."""
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
            expanded = expand(suite, name, ablation)
        except ValidationError as error:
            problem = error.errors()[0]
            raise UserError(f"{field}.rows: {'.'.join(map(str, problem['loc']))}: {problem['msg'].lower()}") from error
        if clash := set(expanded.own) & set(suite.rows):
            raise UserError(f"{field}: variant {sorted(clash)[0]!r} has the name of a row; rename one of them")
        check_rows(path, expanded)


def check_rows(path: Path, suite: Suite) -> None:
    """Methods, options and references of the rows, and what their metrics need; raises UserError."""
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
        if row.training_seed is not None and not suite[name].trains:
            raise UserError(f"{field}.training_seed: nothing is trained for this row; remove it")
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
