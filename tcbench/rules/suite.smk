# One suite, from its config to its tables: this file reads and checks the config and names targets; the rules are beside
# it, by stage. workflow.smk makes a module of it for every suite.
import glob
import os
import shlex

from snakemake.exceptions import WorkflowError

from tcbench.config.load import load_suite
from tcbench.config.suite import TRAININGS
from tcbench.errors import UserError
from tcbench.report.names import PICTURES, figure_names
from tcbench.outside.devices import jobs_per_gpu, uses_gpus, visible_gpus
from tcbench.outside.places import PACKAGE, suite_file, suite_word, vbench_environment
from tcbench.record.sources import source_digest
from tcbench.workflow import ALL_CORES, asked_of, cluster_resources, sampling_parts

# An explicit file wins over a suite's name, so that tests and users can run a config of their own.
GIVEN = config.get("suite_file") or config["suite"]
try:
    ASKED = asked_of(config)
    SUITE = load_suite(suite_file(GIVEN), ASKED)
    ON_GPUS = uses_gpus(SUITE.model.device)
    HERE = len(visible_gpus()) if ON_GPUS else 0
except UserError as error:
    raise WorkflowError(str(error)) from None

# What is trained and searched is the suite's; of a preview, the rest has folders of its own (tcbench/config/preview.py).
ROOT, RESULTS, SHOWN = SUITE.root, SUITE.folder, SUITE.shown_in
# Commands are f-strings, because Snakemake fills in no globals of a module; it then fills in what is in single braces.
CONFIG = shlex.quote(suite_word(GIVEN)).replace("{", "{{").replace("}", "}}")
OF_SAMPLES = f"{CONFIG} --samples {ASKED.samples}" if ASKED.samples else CONFIG
OF_ROWS = f"{OF_SAMPLES} --rows {' '.join(map(shlex.quote, ASKED.rows))}" if ASKED.rows else OF_SAMPLES

# Jobs lease their GPUs themselves (tcbench/outside/devices.py); the count keeps more from being started than will get one.
GPUS = config.get("gpus", HERE)
if HERE and workflow.resource_settings.nodes is None and "gpu" not in workflow.global_resources:
    workflow.register_resource("gpu", HERE * jobs_per_gpu())


wildcard_constraints:
    row="[A-Za-z0-9._-]+",
    group="[A-Za-z0-9._-]+",


include: "prepare.smk"
include: "train.smk"
include: "sample.smk"
include: "score.smk"
include: "ablations.smk"
include: "report.smk"
include: "rivals.smk"


rule tables:
    default_target: True
    input:
        rules.render_tables.output,


rule figures:
    input:
        rules.render_figures.output,


rule ablations:
    input:
        rules.render_ablations.output if SUITE.ablations else [],


rule rivals:
    input:
        rules.render_rivals.output if SUITE.rivals else [],


rule verdicts:
    input:
        rules.render_verdicts.output,


rule report:
    input:
        rules.render_report.output,


rule all:
    input:
        rules.tables.input,
        rules.figures.input,
        rules.ablations.input,
        rules.diagnostics.output if SUITE.predictor_rows else [],
        rules.verdicts.input,
        rules.report.input,


if not SUITE.preview:

    rule publish:
        input:
            rules.all.input,
        shell:
            f"tcbench publish {CONFIG}"
