"""`tcbench run`: the workflow from any folder, as `snakemake` runs it in a checkout."""

from collections.abc import Sequence

from tcbench.config.load import load_suite
from tcbench.config.speed import is_speed_config, load_speed_suite
from tcbench.errors import UserError
from tcbench.outside.places import PROFILE, WORKFLOW, suite_file

SUITES = ("digits", "scenes", "moving")
"""The embedded suites, which run when none is named."""

TARGETS = ("tables", "figures", "ablations", "diagnostics", "verdicts", "report", "all")
"""What a suite can be asked for, and all of `SUITES` together; the first is the default."""

ALL_CORES = 4096
"""Threads of a rule that nothing else shall run beside: Snakemake lowers them to --cores. Its own word for that number,
`workflow.cores`, breaks commands that do without it, such as `snakemake --unlock`."""


def run_workflow(suite: str | None, targets: Sequence[str], cores: str, dry_run: bool, options: Sequence[str]) -> int:
    """Run Snakemake on a suite, with results below the working directory.

    Args:
        suite: name or path of its config; None or a target for the embedded suites.
        targets: what is asked for, rules or files; none for the default.
        cores: a number, or "all".
        dry_run: whether to print what would be done and do nothing.
        options: options of Snakemake's own; with any, it prints in its own words, else as `tcbench.console` does.

    Returns:
        Snakemake's exit status.

    Raises:
        UserError: the suite's config is missing or wrong, or a speed suite is asked for tables.
    """
    targets = [*([suite] if suite in TARGETS else []), *targets]
    config = []
    if suite and suite not in TARGETS:
        path = suite_file(suite)
        if is_speed_config(path):
            load_speed_suite(path)
            targets = targets or ["speed"]
            if targets != ["speed"]:
                raise UserError(f"{path}: a speed suite has one target, `speed`")
            config = ["--config", f"speed_file={suite}"]
        else:
            load_suite(path)
            config = ["--config", f"suite_file={suite}"]
    from snakemake.cli import main
    from snakemake_interface_logger_plugins.registry import LoggerPluginRegistry

    from tcbench import console

    LoggerPluginRegistry().register_plugin("tcbench", console)
    arguments = [*targets, "--snakefile", str(WORKFLOW), "--workflow-profile", str(PROFILE), "--cores", cores]
    printed = ["--dry-run"] if dry_run else [] if options else ["--logger", "tcbench"]
    try:
        main([*arguments, *options, *config, *printed])
    except SystemExit as end:
        return int(end.code or 0)
    return 0
