# The workflow: a module of rules for each suite, and targets over all of them. The Snakefile includes this file, and
# `tcbench run` starts it from any folder.
# Targets: tables (default), figures, ablations, rivals, diagnostics, verdicts, report, all; of one suite also pretrain and
# publish; speed. With several suites, what one of them has is also a target of its own, e.g. scenes_tables.
import os
import shlex
import sys

from snakemake.exceptions import WorkflowError

from tcbench.errors import UserError
from tcbench.outside.places import suite_file, suite_word
from tcbench.outside.warm import PROGRAMS
from tcbench.record.sources import source_digest
from tcbench.config.speed import load_speed_suite
from tcbench.workflow import ALL_CORES, SUITES, TARGETS, asked_of

# The `tcbench` of the Python that runs snakemake, also when its virtual environment is not activated, unless `tcbench run
# --warm` has one that starts sooner.
found_in = [*filter(None, [os.environ.get(PROGRAMS)]), os.path.dirname(sys.executable)]
shell.prefix(f"set -euo pipefail; export PATH={shlex.quote(':'.join(found_in))}:\"$PATH\"; ")

try:
    asked_of(config)
except UserError as error:
    raise WorkflowError(str(error)) from None


include: "speed.smk"


# A module for each suite; of several, the rules' names begin with the suite's. (`from suite` looks for a module that is
# called so before it looks into the variable.)
SEVERAL = "suite" not in config and "suite_file" not in config

for suite in SUITES if SEVERAL else [config.get("suite", "one")]:
    prefix = f"{suite}_" if SEVERAL else ""

    module:
        name:
            suite
        snakefile:
            "suite.smk"
        config:
            config | {"suite": suite}

    use rule * from suite as prefix*


for target in TARGETS if SEVERAL else ():

    rule:
        name:
            target
        default_target:
            target == TARGETS[0]
        input:
            [getattr(rules, f"{suite}_{target}").input for suite in SUITES],


# Before the first job, what all of it takes, and while it runs, how much is left.
onstart:
    from snakemake.logging import logger

    from tcbench.config.load import load_suite
    from tcbench.forecast.progress import Listener, announce

    named = SUITES if SEVERAL else [config.get("suite_file") or config["suite"]]
    gpus = workflow.global_resources.get("gpu")
    left = announce(
        [load_suite(suite_file(name)) for name in named],
        {job.jobid: job.output for job in workflow.dag.needrun_jobs()},
        cores=workflow.resource_settings.cores or workflow.resource_settings.nodes or 1,
        gpus=int(gpus.value) if gpus and gpus.value else 1,
        say=logger.info,
    )
    if left:
        logger.addHandler(Listener(left))
