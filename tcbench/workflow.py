"""`tcbench run`: the workflow from any folder, as `snakemake` runs it in a checkout."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from tcbench.config.load import load_suite
from tcbench.config.preview import WHOLE, Asked
from tcbench.config.speed import is_speed_config, load_speed_suite
from tcbench.errors import UserError, did_you_mean
from tcbench.outside.places import WORKFLOW, profile_folder, suite_file
from tcbench.outside.warm import warm_jobs

SUITES = ("digits", "scenes", "moving")
"""The embedded suites, which run when none is named."""

TARGETS = ("tables", "figures", "ablations", "rivals", "diagnostics", "verdicts", "report", "all")
"""What a suite can be asked for, and all of `SUITES` together; the first is the default."""

ALL_CORES = 4096
"""Threads of a rule that nothing else shall run beside: Snakemake lowers them to --cores. Its own word for that number,
`workflow.cores`, breaks commands that do without it, such as `snakemake --unlock`."""


CONFIG_KEYS = {
    "suite": "a suite by name",
    "suite_file": "a suite's config",
    "speed_file": "a speed suite by name, or its config",
    "samples": "look early at so many samples of a row",
    "rows": "look early at these rows, with commas between them",
    "gpus": "GPUs that rows are sampled on at once, if they are not this machine's",
}
"""What `snakemake --config` may say."""


def asked_of(config: Mapping[str, Any]) -> Asked:
    """What part of the suites Snakemake's config asks for.

    Raises:
        UserError: it has a key that means nothing here, or a value that cannot be meant.
    """
    for key, value in config.items():
        if key not in CONFIG_KEYS:
            raise UserError(f"--config {key}={value}: unknown; {did_you_mean(key, CONFIG_KEYS)}")
        if key in ("samples", "gpus") and (type(value) is not int or value < 1):
            raise UserError(f"--config {key}={value}: give a number, 1 or more")
    return Asked(config.get("samples"), tuple(filter(None, str(config.get("rows", "")).split(","))))


def sampling_parts(work: int, longest: int, shards: int, gpus: int) -> int:
    """In how many parts, each a job on a GPU, something is sampled: the longest in as many as there are GPUs, what is
    shorter in as many fewer, because every job has to load the model first.

    Args:
        work, longest: sampled steps times samples.
    """
    return max(1, min(math.ceil(gpus * work / longest), shards))


MEMORY_GB = {
    "encode": 32,
    "train": 64,
    "search": 32,
    "sample": 32,
    "latency": 32,
    "score": 64,
    "floor": 64,
    "vbench": 32,
}
"""Of the host, by stage, that a cluster is asked for on behalf of suites that run on GPUs."""
LIGHT_GB = 4
"""The same of everything else."""

LIMIT_MINUTES = 24 * 60
"""What a cluster is asked for where nothing better is known. A job that needs more is ended there, and goes on where it
was when it is started again."""


def cluster_resources(stage: str, on_gpus: bool, minutes: int = LIMIT_MINUTES) -> dict[str, int]:
    """What a rule asks a cluster for besides GPUs, by Snakemake's names; without a cluster nothing comes of it.

    Args:
        minutes: how long the job may take.
    """
    memory = MEMORY_GB.get(stage, LIGHT_GB) if on_gpus else LIGHT_GB
    return {"mem_mb": 1000 * memory, "runtime": minutes}


def run_workflow(
    suite: str | None,
    targets: Sequence[str],
    cores: str,
    dry_run: bool,
    options: Sequence[str],
    asked: Asked = WHOLE,
    profile: str = "default",
    gpus: int | None = None,
    warm: bool = False,
) -> int:
    """Run Snakemake on a suite, with results below the working directory.

    Args:
        suite: name or path of its config; None or a target for the embedded suites.
        targets: what is asked for, rules or files; none for the default.
        cores: a number, or "all".
        dry_run: whether to print what would be done and do nothing.
        options: options of Snakemake's own; with any, it prints in its own words, else as `tcbench.console` does.
        asked: the part of the suite that is wanted.
        profile: name of a profile that ships, or the path of one.
        gpus: how many a row is sampled on at once, if not as many as this machine has.
        warm: whether jobs are forks of one process that has imported what they need.

    Returns:
        Snakemake's exit status.

    Raises:
        UserError: the suite's config is missing or wrong, has no such part, or a speed suite is asked for tables; or
            there is no such profile.
    """
    targets = [*([suite] if suite in TARGETS else []), *targets]
    config: dict[str, Any] = {}
    if suite and suite not in TARGETS:
        path = suite_file(suite)
        if is_speed_config(path):
            load_speed_suite(path)
            targets = targets or ["speed"]
            if targets != ["speed"] or asked != WHOLE:
                raise UserError(f"{path}: a speed suite has one target, `speed`, and no part to look at early")
            config["speed_file"] = suite
        else:
            load_suite(path, asked)
            config["suite_file"] = suite
    config |= {"samples": asked.samples, "rows": ",".join(asked.rows), "gpus": gpus}
    said = [f"{key}={value}" for key, value in config.items() if value]
    from snakemake.cli import main
    from snakemake_interface_logger_plugins.registry import LoggerPluginRegistry

    from tcbench import console

    LoggerPluginRegistry().register_plugin("tcbench", console)
    arguments = [*targets, "--snakefile", str(WORKFLOW), "--workflow-profile", str(profile_folder(profile))]
    arguments += ["--cores", cores]
    printed = ["--dry-run"] if dry_run else [] if options else ["--logger", "tcbench"]
    try:
        with warm_jobs() if warm and not dry_run else nullcontext():
            main([*arguments, *options, *printed, *(["--config", *said] if said else [])])
    except SystemExit as end:
        return int(end.code or 0)
    return 0
