"""`tcbench`: one thin sub-command per workflow rule, so that any rule can be run and debugged by hand.

torch is imported by the sub-commands that need it, not by `--help`.
"""

import argparse
import errno
import io
import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args

from tcbench import __version__
from tcbench.budget.borrowing import check_borrowing
from tcbench.config.document import Document, parse
from tcbench.config.load import load_suite, validated
from tcbench.config.preview import WHOLE, Asked
from tcbench.config.speed import SpeedSuite, is_speed_config, load_speed_suite, parts
from tcbench.config.suite import Entry, Suite
from tcbench.errors import UserError, did_you_mean, is_full
from tcbench.listing import LISTS, listed, methods_listed
from tcbench.models.specs import MODELS
from tcbench.outside.devices import NVML_CHECK, release, start_again_alone
from tcbench.outside.places import ADDED_METHODS, VBENCH, add_methods, suite_file
from tcbench.precision import Dtype
from tcbench.record.files import PROVENANCE, vouch, write_text
from tcbench.record.records import PUBLISHED
from tcbench.registry import make_method, method_names
from tcbench.timesteps import TRAIN_TIMESTEPS
from tcbench.workflow import TARGETS, run_workflow

if TYPE_CHECKING:
    from tcbench.budget.matching import Basis, Match
    from tcbench.method import Method
    from tcbench.report.table import Table

    ToMatch = tuple[str, int, tuple[Method, Basis], tuple[Method, Basis] | None]

Handler = Callable[[argparse.Namespace], int | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. A `UserError` is one line on stderr and status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show "≈" shows "\u2248"
        sys.stdout.reconfigure(errors="backslashreplace")
    os.environ.setdefault(NVML_CHECK, "1")
    try:
        parsed = _parser().parse_args(arguments)
        if parsed.methods:
            add_methods(parsed.methods)
        try:
            status = parsed.handler(parsed) or 0
        except Exception as error:
            if is_full(error):
                start_again_alone(sys.argv[1:] if arguments is None else arguments)
            raise
        finally:
            release()
        sys.stdout.flush()
        return status
    except UserError as error:
        for line in str(error).splitlines():
            print(f"tcbench: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        where = "".join(f" in {note}" for note in getattr(error, "__notes__", ()))
        print(f"tcbench: interrupted{where}; finished files are kept, run the same command to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise  # the system refused something else than a file
        if error.filename is None:  # every file is written under its name, standard output has none
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        where = error.filename or "standard output"
        print(f"tcbench: {where}: {error.strerror}; free space or fix permissions", file=sys.stderr)
        return 2
    return 0


SYNONYMS = {word: "--samples" for word in ("--limit", "--count", "--num-samples", "--n-samples", "--num-images")} | {
    **{word: "--nfe" for word in ("--steps", "--num-steps", "--num-inference-steps")},
    **{"--option": "--set", "--options": "--set", "--output": "--out", "--dir": "--results"},
}
"""What other tools call our options."""


class _Parser(argparse.ArgumentParser):
    """A parser, of all commands or of one, that suggests what may be meant by what it does not know.

    A command's names may stand before, between and behind its options.
    """

    _intermixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Also a command refuses what it does not know: it is the command whose options are near, not all of them."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if self._intermixing:
            return parsed, unknown
        if unknown and not any(word.startswith("-") for word in unknown) and not self._subparsers:
            self._intermixing = True  # it calls this for options alone, then for names alone
            try:
                parsed, unknown = self.parse_known_intermixed_args(args, namespace)
            finally:
                self._intermixing = False
        if unknown:
            option = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
            known = [word for word in self._option_string_actions if word.startswith("--")]
            meant = SYNONYMS.get(option or "")
            hint = f"; {did_you_mean(meant if meant in known else option, known)}" if option else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Of a choice, the nearest is named instead of all."""
        if choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)$", message):
            known = [word.strip("'") for word in choice[2].split(", ")]
            message = f"{message[: choice.start()]}unknown {choice[1]!r}; {did_you_mean(choice[1], known)}"
        super().error(message)


def _parser() -> argparse.ArgumentParser:
    return _parser_naming(", ".join(method_names()))


@cache  # a process may call `main` many times
def _parser_naming(methods: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tcbench",
        usage="tcbench [-h] [--version] COMMAND ...",
        description=__doc__.splitlines()[0].replace("`", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tcbench {__version__}")
    commands = parser.add_subparsers(required=True, prog="tcbench", metavar="COMMAND", help=argparse.SUPPRESS)
    groups: list[str] = []

    def group(title: str) -> None:
        groups.append(f"\n{title}:")

    def command(name: str, handler: Handler, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, description=help)
        groups.append(textwrap.fill(f"  {name:<13}{help}", 100, subsequent_indent=" " * 15))
        sub.set_defaults(handler=handler)
        sub.add_argument(
            "--methods",
            action="append",
            default=[],
            metavar="DIR",
            help=f"look for methods here too, as in ./methods and ${ADDED_METHODS}; may be given again",
        )
        return sub

    def stage(name: str, handler: Handler, help: str) -> argparse.ArgumentParser:
        sub = command(name, handler, help)
        sub.add_argument("config", metavar="SUITE", type=suite_file, help="a suite's name, e.g. digits, or its config")
        return sub

    def samples(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--samples",
            type=int,
            metavar="N",
            help="look early at a row's first N samples; more later repeat none",
        )

    def of_rows(sub: argparse.ArgumentParser) -> None:
        samples(sub)
        sub.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="look early at these rows alone")

    def as_json(sub: argparse.ArgumentParser, what: str = "print JSON instead of text") -> None:
        sub.add_argument("--json", action="store_true", help=what)

    group("start here")
    sub = command("run", _run, "run the workflow from any folder, with results below it; what is finished is kept")
    sub.add_argument(
        "suite", nargs="?", metavar="SUITE", help="a name, e.g. digits, or a config (default: the embedded ones)"
    )
    sub.add_argument(
        "targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)}, or a file (default: {TARGETS[0]})"
    )
    of_rows(sub)
    sub.add_argument("--cores", default="all", help="a number (default: all)")
    sub.add_argument("--gpus", type=int, metavar="N", help="GPUs that rows are sampled on at once (default: all here)")
    sub.add_argument(
        "--warm", action="store_true", help="start jobs as forks of one process that has imported torch and the like"
    )
    sub.add_argument("--profile", default="default", help="slurm, or a folder with a profile of yours (%(default)s)")
    sub.add_argument("--dry-run", "-n", action="store_true", help="print what would be done")
    sub.add_argument(
        "--snakemake", action="append", default=[], metavar="OPTION", help="hand on, e.g. --snakemake=--keep-going"
    )
    sub = command("demo", _demo, "a small suite from start to table and picture, in this one process: about a minute")
    sub.add_argument(
        *("config",), nargs="?", metavar="SUITE", type=suite_file, default="demo", help="another suite than %(default)s"
    )
    sub = command("init", _init, "write a method and a suite with it in a row, to start from: methods/ and config/")
    sub.add_argument("name", metavar="NAME", help="what both are called, e.g. mine")
    sub.add_argument("--images", type=Path, metavar="DIR", help="a suite of images of yours, in a folder per class")
    sub = command("list", _list, "what there is: suites, models, methods, metrics, or the tables of suites")
    sub.add_argument("what", choices=LISTS)
    as_json(sub)
    sub = command("methods", _methods, "list the methods and their options")
    sub.add_argument("name", nargs="?", help="one method, with what its options mean")
    as_json(sub)

    group("look at results (seconds, no torch)")
    for name, handler, help in (
        ("tables", _tables, "render the tables and sample grids, of a speed suite tables and figure"),
        ("figures", _figures, "render the figures; status 1 if one that is named cannot be drawn"),
        ("diagnostics", _diagnostics, "render the table of one-step local errors"),
        ("ablations", _ablations, "render the tables of the ablations"),
        ("rivals", _rivals, "render the table of rivals, and what papers print of them"),
        ("verdicts", _verdicts, "test the paper's claims on the results and print what came out"),
        ("report", _report, "write the report: one HTML page with everything"),
    ):
        sub = stage(name, handler, help)
        sub.add_argument(
            "--results",
            type=Path,
            help="folder to read and write (default: results/<suite>); published results bring their own config",
        )
        sub.add_argument(
            "--overwrite", action="store_true", help="in published results, replace what is rendered differently now"
        )
        samples(sub)
        sub.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="of these rows alone, and say so")
        sub.add_argument("--partial", action="store_true", help="of the rows that are scored so far, and say so")
        if name == "figures":
            sub.add_argument(
                "names", nargs="*", metavar="NAME", help="figures to draw, e.g. fig10_deviation (default: all)"
            )
        elif name != "report":
            as_json(sub)
    sub = command("claims", _claims, "the verdicts of all suites side by side, a column per suite")
    sub.add_argument("results", type=Path, nargs="?", default=Path("results"), help="folder of suites (%(default)s)")
    sub.add_argument("--overwrite", action="store_true", help="replace published verdicts that differ")
    as_json(sub)
    sub = command("index", _index, "write index.html over the reports of all suites below a folder")
    sub.add_argument("results", type=Path, nargs="?", default=Path("results"), help="folder of suites (%(default)s)")
    sub = command("summary", _summary, "what was found, in a few lines, from published results")
    sub.add_argument("results", type=Path, help="e.g. results/reference")
    sub.add_argument("--write", type=Path, metavar="PAGE", help="put them, with their picture, into README.md's place")
    sub = command("export", _export, "every number of some suites in one tidy file, a line each")
    sub.add_argument("results", type=Path, nargs="+", help="folders of suites, e.g. results or results/reference")
    sub.add_argument("--out", type=Path, help="a .csv, .json or .parquet (default: CSV on standard output)")

    group("what things cost (seconds, no torch)")
    sub = command("macs", _macs, "MACs of any model, method and NFE, from shapes alone")
    sub.add_argument("--model", required=True, type=_model, metavar="MODEL", help=", ".join(MODELS))
    sub.add_argument("--method", required=True, metavar="METHOD", help=methods)
    sub.add_argument("--nfe", type=_nfe, required=True, help="steps of the uncached sampler")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the method")
    as_json(sub, "print JSON, in MACs, instead of text")
    sub.add_argument(
        "--memory",
        nargs="?",
        const="fp32",
        choices=get_args(Dtype),
        help="also what is held between steps for one sample, where the model computes in this (default: fp32)",
    )
    sub = command(
        "match",
        _match,
        "the setting of a method's knob at which its MACs meet a budget: from shapes alone (--model, --method, --nfe), "
        "or of a suite's row with what was trained for it (--suite, --row); status 1 if there is none",
    )
    sub.add_argument("--model", type=_model, metavar="MODEL", help=", ".join(MODELS))
    sub.add_argument("--method", metavar="METHOD", help=methods)
    sub.add_argument("--nfe", type=_nfe, help="steps of the uncached sampler")
    sub.add_argument("--suite", type=suite_file, help="a suite's name or config, in place of --model and --nfe")
    sub.add_argument("--row", help="one of its rows, in place of --method")
    sub.add_argument("--batches", type=int, default=2, help="calibration batches, where MACs depend on the sample")
    budget = sub.add_mutually_exclusive_group()
    budget.add_argument("--macs", type=float, metavar="MACS", help="the budget for one sample, e.g. 4.94e12")
    budget.add_argument("--like", help="the MACs of this method are the budget; of this row, with --suite")
    sub.add_argument("--like-set", action="append", default=[], metavar="KEY=VALUE", help="an option of --like")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the method or row")
    sub.add_argument("--tolerance", type=float, default=0.01, help="share of the budget it may miss (default 0.01)")
    as_json(sub, "print JSON, in MACs, instead of text")
    sub = command("audit", _audit, "check every number of the paper that needs no weights")
    sub.add_argument("--out", type=Path, help="write the page (default: print its counts)")
    as_json(sub)
    sub = command("bench", _bench, "time every method on full-size models with random weights and print the table")
    sub.add_argument("--config", metavar="SUITE", type=suite_file, default="speed", help="a speed suite (%(default)s)")
    sub.add_argument("--model", action="append", default=[], help="only this model; may be given again, as may others")
    sub.add_argument("--dtype", action="append", default=[], choices=get_args(Dtype))
    sub.add_argument("--batch-size", action="append", default=[], type=int)
    sub.add_argument("--nfe", action="append", default=[], type=_nfe)
    sub.add_argument("--path", default="fused", choices=("fused", "plain"), help="how plans are executed (%(default)s)")
    sub.add_argument("--no-peers", action="store_true", help="time no other implementations")
    sub.add_argument(
        "--profile", nargs="*", metavar="ROW", help="instead, profile a step of each kind of these rows (TokenCache's)"
    )
    sub.add_argument("--results", type=Path, help="folder to write and read (default: results/<suite>)")

    sub = stage("forecast", _forecast, "how long all of it takes on some cards: hours by stage, disk, memory, and why")
    sub.add_argument(
        "--gpu",
        metavar="CARD",
        help="as tcbench/assets/forecast/rates.yaml calls it (default: h100, of CPU suites cpu)",
    )
    sub.add_argument("--gpus", "--cores", type=int, metavar="N", help="how many (default: 1, of CPU suites 2)")
    sub.add_argument("--calibrate", action="store_true", help="measure rates on this machine first, for a minute")
    as_json(sub, "print JSON, in seconds and bytes, instead of text")

    group("check")
    sub = stage("validate", _validate, "check a suite config and list its rows")
    sub.add_argument("--macs", action="store_true", help="also check that a row with a target is as near as it can be")
    sub.add_argument(
        *("--files", "--dry-run"),
        action="store_true",
        help="also look for every file that a run would need and that does not ship; 1 if any lacks",
    )
    as_json(sub)
    sub = stage(
        "rehearse", _rehearse, "run every stage on stand-ins for the suite's files and compare with the forecast"
    )
    sub.add_argument("--into", type=Path, required=True, metavar="DIR", help="where stand-ins and results go")
    sub.add_argument(
        "--size", choices=("full", "tiny"), default="full", help="of networks; tiny ones run on a CPU (default: full)"
    )
    sub.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="these stages, and `files`, again")
    sub.add_argument("--minutes", type=float, metavar="N", help="begin no other stage after so many")
    sub.add_argument("--batches", type=int, default=4, metavar="N", help="of samples of a row (default: %(default)s)")
    sub.add_argument(
        "--rows", nargs="+", default=[], metavar="ROW", help="these, with what they need (default: one of every method)"
    )
    sub.add_argument("--nfe", type=_nfe, metavar="N", help="of a row at most (default: its own)")
    sub.add_argument("--card-memory", type=float, metavar="GB", help="take no more of the card, as if it had no more")
    sub = command("golden", _golden, "compare with reference outputs in a directory; status 1 if one is missed")
    sub.add_argument("directory", type=Path, help="weights, inputs and cases, as docs/goldens.md describes")
    sub.add_argument("cases", nargs="*", metavar="CASE", help="names of cases (default: all)")
    sub = command("vouch", _vouch, "let a record of results that was edited on purpose count again")
    sub.add_argument("files", nargs="+", type=Path, metavar="FILE", help="e.g. results/digits/latency.json")

    group("one part of a run, by hand")
    sub = stage("pretrain", _pretrain, "train an embedded suite's base model or a network of its metrics from scratch")
    sub.add_argument("what", choices=("denoiser", "classifier", "reader", "clip"))
    sub.add_argument("--out", type=Path, required=True, help="folder for the weights and the training log")
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe, e.g. iterations=100"
    )
    sub.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="GPUs that share a denoiser's batches (default: 1)"
    )
    in_parts: dict[str, Any] = {
        **{"type": _part, "default": (1, 1), "metavar": "I/N"},
        "help": "of N jobs that do this at once, on as many GPUs or machines, this is the I-th",
    }
    sub = stage(
        "encode", _encode, "put the images of `training.images` through the autoencoder; finished shards are kept"
    )
    sub.add_argument("--part", "-p", **in_parts)
    sub = stage("train", _train, "train what a row's method declares (predictor, refiners)")
    sub.add_argument("--row", required=True)
    sub = stage("search", _search, "search what a row says is `searched`: its full steps, or options")
    sub.add_argument("--row", required=True)
    for name, handler, help in (
        ("sample", _sample, "generate the samples of some rows; finished shards are kept"),
        ("score", _score, "score the samples of some rows"),
    ):
        sub = stage(name, handler, help)
        sub.add_argument("--rows", nargs="+", required=True, metavar="ROW")
        samples(sub)
        if name == "sample":
            sub.add_argument("--part", "-p", **in_parts)
    missing: dict[str, Any] = {
        "action": "store_true",
        "help": "keep what is there of the same samples, settings and code",
    }
    sub.add_argument("--missing", **missing)
    sub = stage("vbench", _vbench, "score the videos of some rows with VBench, in its own environment")
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--build-env", action="store_true", help="install that environment (6 GB); nothing else does")
    what.add_argument("--rows", nargs="+", metavar="ROW")
    sub.add_argument("--environment", metavar="DIR", help=f"where that is (default: ${VBENCH}, else .vbench here)")
    samples(sub)
    samples(stage("floor", _floor, "measure the metrics of real subsets, the floor under every FID"))
    of_rows(stage("seed-noise", _seed_noise, "measure how far two uncached runs of different noise are apart"))
    sub = stage("latency", _latency, "measure the latency of every row")
    samples(sub)
    sub.add_argument("--missing", **missing)
    sub = stage("diagnose", _diagnose, "one-step local error of predictor, random and oracle token selection")
    sub.add_argument("--row", required=True)
    samples(sub)
    sub = stage("ablate", _ablate, "sample and score the variants of one ablation")
    sub.add_argument("--name", required=True, metavar="ABLATION")
    samples(sub)
    sub = stage("rival", _rival, "solve, sample and score one method of the table of rivals at its budgets")
    sub.add_argument("--method", required=True)
    sub = stage("publish", _publish, "promote a clean run's small artefacts to results/reference/")
    sub.add_argument(
        "--allow-dirty", action="store_true", help="publish results of uncommitted code (never commit those)"
    )
    sub.add_argument(
        "--part",
        action="store_true",
        help="of a run that was cut short, or not timed, what was run; titles say what lacks",
    )
    sub = command("completion", _completion, 'completion for a shell: eval "$(tcbench completion bash)"')
    sub.add_argument("shell", choices=("bash", "zsh"))
    parser.epilog = "\n".join(groups).lstrip() + "\n\ntcbench COMMAND --help says more."
    parser.set_defaults(commands=commands.choices)
    return parser


def _model(name: str) -> str:
    """The name of a known model."""
    if name not in MODELS:
        raise UserError(f"--model: {name!r} is unknown; {did_you_mean(name, MODELS)}")
    return name


def _nfe(text: str) -> int:
    """A number of steps that there are timesteps for."""
    if not (text.isdecimal() and 2 <= int(text) <= TRAIN_TIMESTEPS):
        raise UserError(f"--nfe {text}: give 2 to {TRAIN_TIMESTEPS}")
    return int(text)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


def _print_tables(parsed: argparse.Namespace, tables: Mapping[str, "Table"]) -> None:
    """Tables by name, as Markdown or as their records."""
    if parsed.json:
        _print_json({name: table.records for name, table in tables.items()})
    else:
        for table in tables.values():
            print(table.lead_text() if sys.stdout.isatty() else table.markdown())


def _entries(parsed: argparse.Namespace, names: Sequence[str]) -> list[Entry]:
    """Rows of the config, or of its ablations."""
    suite = load_suite(parsed.config, Asked(parsed.samples if "samples" in parsed else None))
    try:
        entries = [suite.find(name) for name in names]
    except KeyError as error:
        known = [*suite.rows, *(row for ablation in suite.ablation_suites.values() for row in ablation.own)]
        raise UserError(f"{parsed.config}: no row {error}; {did_you_mean(error.args[0], known)}") from None
    if len({entry.suite.folder for entry in entries}) > 1:
        raise UserError(f"--rows {' '.join(names)}: not all of the suite or all of one ablation; name these apart")
    return entries


def _results(parsed: argparse.Namespace) -> tuple[Suite, Path]:
    """The suite and the folder of its results; or the part of it that is asked for, and where that is shown."""
    asked = Asked(parsed.samples, tuple(parsed.rows), parsed.partial)
    if parsed.results is None:
        from tcbench.stages.render import gathered

        suite = load_suite(parsed.config, asked)
        return suite, gathered(suite)
    if asked != WHOLE:
        raise UserError("--results: a folder is shown as it is; leave out --samples, --rows and --partial")
    return _published(parsed, load_suite(parsed.config)), parsed.results


_AnySuite = TypeVar("_AnySuite", Suite, SpeedSuite)


def _published(parsed: argparse.Namespace, suite: _AnySuite) -> _AnySuite:
    """The suite, or where published results are read the one that they were made with."""
    if parsed.results and (published := parsed.results / PROVENANCE).exists():
        return validated(Document(published, PUBLISHED.read(published)["suite"]), type(suite))
    return suite


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE pairs, values read as in a config."""
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair}: give KEY=VALUE")
        document = parse(value, Path(f"--set {key}"))
        for problem in document.problems:
            raise UserError(f"--set {key}: {problem.says}")
        options[key] = document.value
    return options


def _validate(parsed: argparse.Namespace) -> int:
    if is_speed_config(parsed.config):
        return _validate_speed(parsed)
    suite = load_suite(parsed.config)
    try:
        check_borrowing(suite)
    except UserError as error:
        raise UserError("\n".join(f"{parsed.config}: {line}" for line in str(error).splitlines())) from error
    matches = _matches(suite) if parsed.macs else {}
    found = _needs(suite) if parsed.files else []
    missing = sum(need["problem"] is not None for need in found)
    if parsed.json:
        rows = {
            entry.name: {"method": entry.row.method, "nfe": entry.nfe, "label": entry.label}
            | {"trained_as": entry.trained_as and entry.trained_as.name, "target": entry.row.target}
            | ({"match": matches[entry.name]} if entry.name in matches else {})
            for entry in suite.entries
        }
        _print_json({"suite": suite.suite, "rows": rows, "in_no_table": [*suite.added_rows], "files": found})
        return int(missing > 0)
    print(f"{parsed.config}: valid; suite {suite.suite}, {len(suite.rows)} rows, {len(suite.groups)} sampling jobs")
    for entry in suite.entries:
        trained = f", trained as {source.name}" if (source := entry.trained_as) else ""
        print(f"  {entry.name}: {entry.row.method}, NFE {entry.nfe}{trained}")
    _say_added(suite)
    for row, says in matches.items():
        print(f"  {row}: {says}")
    if not parsed.files:
        return 0
    for need in found:
        print(f"  {'missing' if need['problem'] else 'here':8}{need['name']}: {need['path']}, {need['used']}")
        if need["problem"]:
            print(f"          {need['problem']}; {need['get']}")
    print(f"{parsed.config}: {missing} of {len(found)} missing")
    if not missing:
        print(f"  run it: tcbench run {parsed.config}")
    return int(missing > 0)


def _validate_speed(parsed: argparse.Namespace) -> int:
    if parsed.macs or parsed.files:
        raise UserError(f"{parsed.config}: a speed suite has random weights: no row has a target, and no file is read")
    suite = load_speed_suite(parsed.config)
    every = parts(suite)
    rows = {name: {row: timed.method for row, timed in model.rows.items()} for name, model in suite.models.items()}
    if parsed.json:
        _print_json({"suite": suite.suite, "parts": [part.name for part in every], "rows": rows})
        return 0
    count = sum(map(len, rows.values()))
    print(f"{parsed.config}: valid; speed suite {suite.suite}, {len(rows)} models, {count} rows, {len(every)} parts")
    for part in every:
        timed = [name for name, row in suite.models[part.model].rows.items() if row.nfe == part.nfe]
        print(f"  {part.name}: {', '.join(timed)}")
    return 0


def _matches(suite: Suite) -> dict[str, str]:
    """How near to its target each row with one is, in words."""
    from tcbench.budget.matching import TOLERANCE, targeted_rows
    from tcbench.stages.match import Calibration

    found = {}
    for targeted in targeted_rows(suite, Calibration(suite, prepare=_set_threads).basis):
        match = targeted.match
        near = "" if match.reachable else f"; nothing is within {TOLERANCE:.0%}: {_nearest(match)}"
        if targeted.estimates:
            near += f"; an estimate, not trained yet: {'; '.join(targeted.estimates)}"
        if len(targeted.target_batches) > 1:
            near += f"; {targeted.target}: {_spread(targeted.target_batches)}"
        found[targeted.row] = f"{targeted.off_target:+.2%} off {targeted.target}{near}"
    return found


def _needs(suite: Suite) -> list[dict[str, Any]]:
    """The files that a run would need and that do not ship."""
    from tcbench.config.needs import needs

    return [
        {"name": need.name, "path": str(need.path), "used": need.used, "problem": need.problem, "get": need.get}
        for need in needs(suite)
    ]


def _say_added(suite: Suite) -> None:
    """Where rows are shown that the config's tables do not list."""
    if suite.added_rows:
        print(f"  listed in no table, so at the end of {next(iter(suite.tables))}: {', '.join(suite.added_rows)}")


def _run(parsed: argparse.Namespace) -> int:
    asked = Asked(parsed.samples, tuple(parsed.rows))
    options = parsed.cores, parsed.dry_run, parsed.snakemake, asked, parsed.profile, parsed.gpus, parsed.warm
    return run_workflow(parsed.suite, parsed.targets, *options)


def _forecast(parsed: argparse.Namespace) -> None:
    suite = load_suite(parsed.config)
    on_cpu = suite.model.device == "cpu"
    count = parsed.gpus if parsed.gpus is not None else 2 if on_cpu else 1
    if count < 1:
        raise UserError(f"--gpus {count}: give 1 or more")
    card, calibrated = parsed.gpu or ("cpu" if on_cpu else "h100"), list[Any]()
    if parsed.calibrate:
        from tcbench.forecast.calibrate import calibrate

        _set_threads()
        card, calibrated = calibrate(suite)
    from tcbench.forecast.estimate import forecast
    from tcbench.forecast.text import as_json, whole

    told = forecast(suite, card, count, calibrated)
    print(json.dumps(as_json(told), indent=1) if parsed.json else whole(told))


def _rehearse(parsed: argparse.Namespace) -> None:
    from tcbench.rehearse.run import rehearse

    path = rehearse(
        *(parsed.config, parsed.into, parsed.size, parsed.only, parsed.minutes),
        batches=parsed.batches,
        rows=parsed.rows,
        most_steps=parsed.nfe,
        card_memory=parsed.card_memory,
    )
    print(path)


def _demo(parsed: argparse.Namespace) -> None:
    started = time.time()  # before torch is imported, which may take as long as the suite
    suite = load_suite(parsed.config)
    from tcbench.stages.demo import run_here

    _set_threads()
    run_here(suite, started)


def _init(parsed: argparse.Namespace) -> None:
    from tcbench.starter import write_starter

    for line in write_starter(parsed.name, parsed.images):
        print(line)


def _list(parsed: argparse.Namespace) -> None:
    entries = listed(parsed.what)
    if parsed.json:
        _print_json(entries)
        return
    width = max(map(len, entries), default=0)
    for name, entry in entries.items():
        print(f"{name:<{width}}  {entry['says']}")


def _completion(parsed: argparse.Namespace) -> None:
    from tcbench.completion import script

    print(script(parsed.shell, parsed.commands))


def _pretrain(parsed: argparse.Namespace) -> None:
    from tcbench.stages.pretrain import pretrain

    pretrain(load_suite(parsed.config), parsed.what, parsed.out, _options(parsed.set), parsed.gpus)


def _set_threads() -> None:
    """One thread unless TCBENCH_THREADS asks for more: with another number torch gives other bits, and a row's numbers
    must not depend on the machine or on who started the job."""
    import torch

    threads = os.environ.get("TCBENCH_THREADS", "1")
    if not threads.isdecimal() or threads == "0":
        raise UserError(f"TCBENCH_THREADS={threads}: give a number of threads, 1 or more")
    torch.set_num_threads(int(threads))


def _train(parsed: argparse.Namespace) -> None:
    (entry,) = _entries(parsed, [parsed.row])
    if not entry.trains:
        raise UserError(f"row {entry.name}: trains nothing; rows that do: {', '.join(entry.suite.trained_rows)}")
    from tcbench.stages.train import train_row

    _set_threads()
    train_row(entry)


def _search(parsed: argparse.Namespace) -> None:
    (entry,) = _entries(parsed, [parsed.row])
    if not entry.row.searched:
        rows = ", ".join(entry.suite.searched_rows) or "none"
        raise UserError(f"row {entry.name}: nothing is `searched` for it; rows with: {rows}")
    from tcbench.stages.search import search_row

    _set_threads()
    search_row(entry)


def _encode(parsed: argparse.Namespace) -> None:
    suite = load_suite(parsed.config)
    from tcbench.stages.encode import encode_images
    from tcbench.stages.part import Part

    _set_threads()
    encode_images(suite, Part(*parsed.part))


def _sample(parsed: argparse.Namespace) -> None:
    entries = _entries(parsed, parsed.rows)
    from tcbench.stages.part import Part
    from tcbench.stages.sample import sample_rows

    _set_threads()
    sample_rows(entries, Part(*parsed.part))


def _part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r}: write I/N, e.g. 2/8, the second of eight")
    return int(number), int(of)


def _score(parsed: argparse.Namespace) -> None:
    entries = _entries(parsed, parsed.rows)
    from tcbench.stages.score import score_rows

    _set_threads()
    score_rows(entries, parsed.missing)


def _vbench(parsed: argparse.Namespace) -> None:
    if parsed.environment:
        os.environ[VBENCH] = parsed.environment
    entries = _entries(parsed, parsed.rows or ())
    from tcbench.stages.vbench import build_environment, score_videos

    if parsed.build_env:
        build_environment()
    for entry in entries:
        score_videos(entry)


def _floor(parsed: argparse.Namespace) -> None:
    suite = load_suite(parsed.config, Asked(parsed.samples))
    from tcbench.stages.score import measure_floor

    _set_threads()
    measure_floor(suite)


def _seed_noise(parsed: argparse.Namespace) -> None:
    suite = load_suite(parsed.config, Asked(parsed.samples, tuple(parsed.rows)))
    from tcbench.stages.score import measure_seed_noise

    _set_threads()
    measure_seed_noise(suite)


def _latency(parsed: argparse.Namespace) -> None:
    suite = load_suite(parsed.config, Asked(parsed.samples))
    from tcbench.stages.latency import measure_latency

    _set_threads()
    measure_latency(suite, parsed.missing)


def _diagnose(parsed: argparse.Namespace) -> None:
    (entry,) = _entries(parsed, [parsed.row])
    predictor_rows = entry.suite.predictor_rows
    if entry.name not in predictor_rows:
        raise UserError(f"row {entry.name}: has no predictor; rows that do: {', '.join(predictor_rows)}")
    from tcbench.stages.diagnose import diagnose_row

    _set_threads()
    diagnose_row(entry)


def _tables(parsed: argparse.Namespace) -> None:
    from tcbench.stages.render import render_grids, render_strips, render_tables

    if is_speed_config(parsed.config):
        from tcbench.report.speed import render_speed

        timed = load_speed_suite(parsed.config)
        folder = parsed.results or timed.folder
        if Asked(parsed.samples, tuple(parsed.rows), parsed.partial) != WHOLE:
            raise UserError(f"{parsed.config}: a speed suite has no samples or rows to look at early")
        _print_tables(parsed, render_speed(_published(parsed, timed), folder, parsed.overwrite))
        return
    suite, folder = _results(parsed)
    tables = render_tables(suite, folder, parsed.overwrite)
    results = parsed.results or suite.folder
    if (results / "samples").exists():  # published results carry the strips themselves
        render_strips(suite, folder, results)
    render_grids(suite, folder, parsed.overwrite)
    _print_tables(parsed, {name: tables[name] for name in suite.tables})
    if not parsed.json:
        _say_added(suite)


def _figures(parsed: argparse.Namespace) -> int:
    from tcbench.report.names import figure_names
    from tcbench.stages.render import render_figures

    suite, folder = _results(parsed)
    for name in parsed.names:
        if name not in figure_names(suite):
            raise UserError(f"figure {name!r}: {parsed.config} has none; {did_you_mean(name, figure_names(suite))}")
    drawn = render_figures(suite, folder, parsed.names)
    for path in drawn:
        print(path)
    return int(len(drawn) < len(parsed.names))


def _ablate(parsed: argparse.Namespace) -> None:
    suite = load_suite(parsed.config, Asked(parsed.samples))
    if parsed.name not in suite.ablation_suites:
        raise UserError(f"{parsed.config}: no ablation {parsed.name!r}; {did_you_mean(parsed.name, suite.ablations)}")
    from tcbench.stages.sample import sample_rows
    from tcbench.stages.score import score_rows

    _set_threads()
    ablation = suite.ablation_suites[parsed.name]
    sample_rows(ablation.entries)
    score_rows(ablation.entries)


def _rival(parsed: argparse.Namespace) -> None:
    suite = load_suite(parsed.config)
    from tcbench.stages.rivals import run_rival

    _set_threads()
    run_rival(suite, parsed.method)


def _rivals(parsed: argparse.Namespace) -> None:
    from tcbench.stages.render import render_rivals

    _print_tables(parsed, render_rivals(*_results(parsed), parsed.overwrite))


def _ablations(parsed: argparse.Namespace) -> None:
    from tcbench.stages.render import render_ablations

    suite, folder = _results(parsed)
    tables = render_ablations(suite, folder, parsed.overwrite)
    if parsed.json:
        _print_tables(parsed, tables)
        return
    for name in tables:
        print(folder / "tables" / f"{name}.md")


def _verdicts(parsed: argparse.Namespace) -> None:
    from tcbench.stages.render import render_verdicts

    _print_tables(parsed, render_verdicts(*_results(parsed), parsed.overwrite))


def _claims(parsed: argparse.Namespace) -> None:
    from tcbench.report.verdicts import across_suites

    table = across_suites(parsed.results)
    table.write(parsed.results, "verdicts", overwrite=parsed.overwrite)
    _print_tables(parsed, {"verdicts": table})


def _index(parsed: argparse.Namespace) -> None:
    from tcbench.report.index import index_page

    path = parsed.results / "index.html"
    write_text(path, index_page(parsed.results))
    print(path)


def _summary(parsed: argparse.Namespace) -> None:
    from tcbench.report.summary import summary, write_summary

    if parsed.write:
        print(write_summary(parsed.results, parsed.write))
    for line in summary(parsed.results):
        print(f"- {line}")


def _export(parsed: argparse.Namespace) -> None:
    from tcbench.report.export import export, write_tidy

    table = export(parsed.results)
    if parsed.out:
        write_tidy(table, parsed.out)
        print(f"{parsed.out}: {len(table)} lines")
    else:
        print(table.to_csv(index=False, lineterminator="\n"), end="")


def _report(parsed: argparse.Namespace) -> None:
    from tcbench.stages.render import render_report

    suite, folder = _results(parsed)
    render_report(suite, folder)
    print(folder / "report.html")


def _diagnostics(parsed: argparse.Namespace) -> None:
    from tcbench.stages.render import render_diagnostics

    suite, folder = _results(parsed)
    if not suite.predictor_rows:
        raise UserError(f"{parsed.config}: no row trains a predictor, so there is nothing to diagnose")
    _print_tables(parsed, render_diagnostics(suite, folder, parsed.overwrite))


def _publish(parsed: argparse.Namespace) -> None:
    from tcbench.stages.publish import publish

    suite = load_speed_suite(parsed.config) if is_speed_config(parsed.config) else load_suite(parsed.config)
    files, lacks = publish(suite, parsed.allow_dirty, parsed.part)
    target = f"results/reference/{suite.suite}"
    print(f"published {len(files)} files to {target}/")
    if lacks:
        print(f"{len(lacks)} rows were not run: {', '.join(lacks)}")
    if isinstance(suite, Suite) and parsed.part:
        pages = ["tables", "ablations", *(["rivals"] if suite.rivals else []), "diagnostics", "verdicts"]
        print(f"next: tcbench {', '.join(pages)} and report, each with {suite.suite} --results {target}")


def _vouch(parsed: argparse.Namespace) -> None:
    for path in parsed.files:
        vouch(path)
        print(f"{path}: carries the digest of what it holds now")


def _bench(parsed: argparse.Namespace) -> None:
    suite = load_speed_suite(parsed.config)
    folder = parsed.results or suite.folder
    chosen = parts(suite, parsed.model, parsed.dtype, parsed.batch_size, parsed.nfe)
    _set_threads()
    if parsed.profile is None:
        from tcbench.stages.bench import bench

        bench(suite, chosen, folder, parsed.path, not parsed.no_peers)
    else:
        from tcbench.stages.profile import profile_parts

        profile_parts(suite, chosen, parsed.profile, folder, parsed.path)
    from tcbench.report.speed import render_speed

    for table in render_speed(suite, folder).values():
        print(table.markdown())


def _macs(parsed: argparse.Namespace) -> None:
    method = make_method(parsed.method, _options(parsed.set))
    from tcbench.budget.costing import macs_of
    from tcbench.method import Artefacts

    totals = macs_of(parsed.model, method, parsed.nfe)
    uncached = macs_of(parsed.model, make_method("uncached", {}), parsed.nfe)
    totals["of_uncached"] = totals["per_sample"] / uncached["per_sample"]
    if parsed.memory:
        from tcbench.stages.memory import cache_bytes

        totals["cache_bytes"] = cache_bytes(parsed.model, method, parsed.nfe, parsed.memory)
    estimate = method.macs_depend_on(Artefacts())
    if parsed.json:
        _print_json({**totals, "estimate": estimate})
        return
    print(f"{method.name} on {parsed.model}, NFE {parsed.nfe}: MACs of one sample, both halves of the guided pair")
    if estimate:
        print(f"  an estimate: {estimate}")
    bounds = {"at least": totals["least_per_sample"]} if "least_per_sample" in totals else {}
    lines = {
        **bounds,
        "at most" if bounds else "everything charged": totals["per_sample"],
        "without overheads": totals["per_sample_without_overheads"],
        "by the paper's rule": totals["paper_rule"],
        **{f"  {tag}": macs for tag, macs in totals["by_tag"].items()},
    }
    letter, unit = ("T", 1e12) if totals["per_sample"] >= 1e11 else ("G", 1e9)
    for what, macs in lines.items():
        print(f"  {what:<22}{macs / unit:12.4f} {letter}")
    share = "of uncached" + (", at most" if bounds else "")
    print(f"  {share:<22}{totals['of_uncached']:12.2%}")
    if parsed.memory:
        print(f"  {'cache':<22}{totals['cache_bytes'] / 2**20:12.4f} MiB in {parsed.memory}")


def _golden(parsed: argparse.Namespace) -> int:
    from tcbench.golden.check import check

    _set_threads()
    report = check(parsed.directory, parsed.cases)
    print(json.dumps(report, indent=1, allow_nan=False))
    return int(not report["passed"])


def _match(parsed: argparse.Namespace) -> int:
    if parsed.like_set and not parsed.like:
        raise UserError("--like-set: these are options of --like; give it too")
    model, nfe, (method, basis), like = _row_to_match(parsed) if parsed.suite else _shapes_to_match(parsed)
    from tcbench.budget.matching import mean, solve

    target = like[1].macs(model, like[0], nfe) if like else (parsed.macs,)
    target_estimate = like[1].estimate(like[0]) if like else None
    match = solve(model, method, nfe, mean(target) if like else parsed.macs, parsed.tolerance, basis)
    if parsed.json:
        record = {
            "model": model,
            "method": method.name,
            "nfe": nfe,
            "knob": method.knob,
            "setting": match.setting,
            "macs": match.macs,
            "macs_per_batch": list(match.batches),
            "target_macs": match.target_macs,
            "target_macs_per_batch": list(target),
            "target_estimate": target_estimate,
            "off_target": match.off_target,
            "reachable": match.reachable,
            "nearest": [list(pair) for pair in match.nearest],
            "estimate": match.estimate,
            "options": match.method.model_dump(mode="json"),
        }
        _print_json(record)
        return int(not match.reachable)
    print(f"{parsed.row or method.name} on {model}, NFE {nfe}: target {match.target_macs:.4e} MACs of one sample")
    if len(target) > 1:
        print(f"  target: {_spread(target)}")
    if target_estimate:
        print(f"  target: an estimate: {target_estimate}")
    if match.reachable:
        print(f"  {method.knob}: {match.setting}  ({match.macs:.4e} MACs, {match.off_target:+.2%})")
    else:
        print(f"  no setting within {parsed.tolerance:.2%}; nearest: {_nearest(match)}")
    if len(match.batches) > 1:
        print(f"  {_spread(match.batches)}")
    if match.estimate:
        print(f"  an estimate: {match.estimate}; `tcbench sample` records the MACs of every batch")
    return int(not match.reachable)


def _shapes_to_match(parsed: argparse.Namespace) -> "ToMatch":
    """(model, NFE, what to match, what to match it to unless that is --macs), from shapes."""
    from tcbench.budget.matching import SHAPES

    for option in ("model", "method", "nfe"):
        if getattr(parsed, option) is None:
            raise UserError(f"--{option} is missing; give --model, --method and --nfe, or --suite and --row")
    if parsed.like is None and parsed.macs is None:
        raise UserError("no budget; give --macs or --like")
    method = make_method(parsed.method, _options(parsed.set))
    like = (make_method(parsed.like, _options(parsed.like_set)), SHAPES) if parsed.like else None
    return parsed.model, parsed.nfe, (method, SHAPES), like


def _row_to_match(parsed: argparse.Namespace) -> "ToMatch":
    """The same of a suite's rows, with what was trained for them; a row's `target` needs no --like."""
    if parsed.model or parsed.method or parsed.nfe:
        raise UserError("--suite: a row has its own model, method and NFE; give --row alone")
    suite = load_suite(parsed.suite)
    entry = _entry(suite, "--row", parsed.row)
    from tcbench.stages.match import Calibration

    basis_of = Calibration(suite, parsed.batches, _set_threads).basis

    def costed(entry: Entry, changes: Sequence[str]) -> "tuple[Method, Basis]":
        method = entry.method
        return make_method(method.name, method.model_dump() | _options(changes)), basis_of(entry)

    if parsed.macs is not None:
        return suite.model.name, entry.nfe, costed(entry, parsed.set), None
    target = _entry(suite, "--like", parsed.like or entry.row.target)
    if target.nfe != entry.nfe:
        raise UserError(
            f"--like: {target.name} has NFE {target.nfe}, {entry.name} has {entry.nfe}; give a row with the same"
        )
    return suite.model.name, entry.nfe, costed(entry, parsed.set), costed(target, parsed.like_set)


def _entry(suite: Suite, option: str, row: str | None) -> Entry:
    if row not in suite.rows:
        near = did_you_mean(row, suite.rows) if row else f"known: {', '.join(suite.rows)}"
        raise UserError(f"{option}: suite {suite.suite} has no row {row!r}; {near}")
    return suite[str(row)]


def _spread(batches: Sequence[int]) -> str:
    """Mean and range over calibration batches."""
    average = sum(batches) / len(batches)
    low, high = (extreme(batches) / average - 1 for extreme in (min, max))
    return f"mean of {len(batches)} calibration batches {average:.4e} MACs, spread {low:+.4%} to {high:+.4%}"


def _nearest(match: "Match") -> str:
    """The settings around a target."""
    return ", ".join(
        f"{match.method.knob} {setting} ({macs / match.target_macs - 1:+.2%})" for setting, macs in match.nearest
    )


def _audit(parsed: argparse.Namespace) -> None:
    from tcbench.audit.checks import VERDICTS
    from tcbench.audit.sections import audit
    from tcbench.report.audit import audit_page

    sections = audit()
    if parsed.out:
        write_text(parsed.out, audit_page(sections))
    if parsed.json:
        _print_json([asdict(section) for section in sections])
        return
    counts = (f"{sum(section.count(verdict) for section in sections)} {verdict}" for verdict in VERDICTS)
    print(f"{parsed.out or 'the paper'}: {', '.join(counts)}")


def _methods(parsed: argparse.Namespace) -> None:
    found = methods_listed([parsed.name] if parsed.name else None)
    if parsed.json:
        _print_json(found)
        return
    for name, method in found.items():
        if "broken" in method:
            print(f"{name}: broken: {method['broken']}")
            continue
        print(f"{name} (knob: {method['knob'] or 'none'})" + ("" if method["ships"] else f" {method['file']}"))
        if parsed.name:
            print(f"\n    {method['about']}\n")
        for option, default in method["options"].items():
            print(f"    {option}" + ("" if default is None and option in method["required"] else f" = {default!r}"))


if __name__ == "__main__":
    sys.exit(main())
