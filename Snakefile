# tcbench: from a suite's config to its tables. Targets: tables (default), figures, ablations, diagnostics, verdicts, report,
# all, pretrain, publish, speed.
#   snakemake --cores all tables
#   snakemake --cores all tables --config suite=digits
# This file only reads and checks the config and names targets; the rules are in tcbench/rules, by stage.
import os
import sys

from snakemake.exceptions import WorkflowError

from tcbench.config import load_suite
from tcbench.errors import UserError
from tcbench.report.names import PICTURES, figure_names
from tcbench.sources import source_files
from tcbench.speed_config import load_speed_suite

# An explicit file wins over a suite's name, so that tests and users can run a config of their own.
SUITE_FILE = config.get("suite_file") or os.path.join(workflow.basedir, "config", config.get("suite", "digits") + ".yaml")
try:
    SUITE = load_suite(SUITE_FILE)
except UserError as error:
    raise WorkflowError(str(error)) from None

RESULTS = f"results/{SUITE.suite}"

# The `tcbench` of the Python that runs snakemake, also when its virtual environment is not activated.
shell.prefix(f"set -euo pipefail; export PATH=\"{os.path.dirname(sys.executable)}:$PATH\"; ")


wildcard_constraints:
    row="[A-Za-z0-9._-]+",
    group="[A-Za-z0-9._-]+",


include: "tcbench/rules/prepare.smk"
include: "tcbench/rules/train.smk"
include: "tcbench/rules/sample.smk"
include: "tcbench/rules/score.smk"
include: "tcbench/rules/ablations.smk"
include: "tcbench/rules/report.smk"
include: "tcbench/rules/speed.smk"


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


rule publish:
    input:
        rules.all.input,
    shell:
        "tcbench publish {SUITE_FILE:q}"
