# One suite, from its config to its tables: this file reads and checks the config and names targets; the rules are beside
# it, by stage. workflow.smk makes a module of it for every suite.
import os
import shlex

from snakemake.exceptions import WorkflowError

from tcbench.config.load import load_suite
from tcbench.config.suite import TRAININGS
from tcbench.errors import UserError
from tcbench.report.names import PICTURES, figure_names
from tcbench.outside.places import PACKAGE, suite_file, suite_word, vbench_environment
from tcbench.record.sources import source_digest
from tcbench.workflow import ALL_CORES

# An explicit file wins over a suite's name, so that tests and users can run a config of their own.
GIVEN = config.get("suite_file") or config["suite"]
try:
    SUITE = load_suite(suite_file(GIVEN))
except UserError as error:
    raise WorkflowError(str(error)) from None

RESULTS = f"results/{SUITE.suite}"
# Commands are f-strings, because Snakemake fills in no globals of a module; it then fills in what is in single braces.
CONFIG = shlex.quote(suite_word(GIVEN)).replace("{", "{{").replace("}", "}}")


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


rule publish:
    input:
        rules.all.input,
    shell:
        f"tcbench publish {CONFIG}"
