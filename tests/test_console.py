"""What `tcbench run` prints: short lines that say which job, how far, where its log is; failures in full."""

import logging
import re
from pathlib import Path

import pytest
from snakemake_interface_logger_plugins.common import LogEvent

from tcbench import console
from tcbench.console import LogHandler, expected, last_line, name_of
from tcbench.outside.places import PACKAGE
from tcbench.workflow import TARGETS


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(console, "EVERY_S", 0.05)
    handler = LogHandler(None, None)
    yield handler
    handler.close()


def event(kind: LogEvent | None, message: str = "", level: int = logging.INFO, **fields: object) -> logging.LogRecord:
    record = logging.makeLogRecord({"msg": message, "levelno": level, "levelname": logging.getLevelName(level)})
    record.__dict__.update(event=kind, **fields)
    return record


def job(rule: str, number: int, log: Path, outputs: list[str]) -> logging.LogRecord:
    files = {"output": outputs, "input": ["a/very/long/path"] * 200, "log": [str(log)]}
    return event(LogEvent.JOB_INFO, rule_name=rule, jobid=number, **files)


def test_a_run_in_short_lines(handler, capsys, tmp_path):
    log = tmp_path / "train.log"
    log.write_bytes(b"loading\n train: 10%|1   |\r train: 60%|6   | 6/10 [00:06<00:04]")
    handler.emit(
        event(LogEvent.RUN_INFO, stats={"digits_train": 1, "digits_score_all": 1, "digits_tables": 1, "total": 3})
    )
    handler.emit(event(None, "Building DAG of jobs..."))
    handler.emit(job("digits_train", 1, log, ["results/digits/trained/nfe20-tokencache/artefacts.json"]))
    handler.ended.wait(0.2)
    handler.emit(event(LogEvent.JOB_FINISHED, job_id=1))
    scores = [f"results/digits/scores/row{number}.json" for number in range(9)]
    handler.emit(job("digits_score_all", 2, tmp_path / "none.log", scores))
    handler.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("2 jobs;")
    assert lines[1] == f"[  0%] digits_train: nfe20-tokencache; log: {log}"
    assert "digits_train: train: 60%|6   | 6/10 [00:06<00:04]" in lines[2]
    share = expected("digits_train") / (expected("digits_train") + expected("digits_score_all"))
    assert lines[-1].startswith(f"[{share:4.0%}, 1 min left] digits_score_all: row0, row1, row2 and 6 more rows; log: ")
    assert max(map(len, lines)) <= console.WIDTH


def test_the_forecast_is_passed_on_and_other_notes_are_not(handler, capsys):
    for message in ("forecast of digits: 14 min on 2 cores\n  train 5 min", "Building DAG of jobs..."):
        handler.emit(event(None, message))
    assert capsys.readouterr().err == "forecast of digits: 14 min on 2 cores\n  train 5 min\n"


def test_a_failure_is_told_in_full(handler, capsys, tmp_path):
    log = tmp_path / "train.log"
    log.write_text("tcbench: methods/x.py: step 3: no\n", encoding="utf-8")
    fields = {"rule_name": "train", "msg": "", "rule_msg": None, "jobid": 1, "input": [], "output": ["o"], "aux": {}}
    fields |= {"log": [str(log)], "conda_env": None, "shellcmd": "tcbench train", "indent": False}
    handler.emit(event(LogEvent.JOB_ERROR, level=logging.ERROR, **fields))
    handler.emit(event(None, "Exiting because a job execution failed.", logging.ERROR))
    handler.close()
    said = capsys.readouterr().err
    assert "Error in rule train" in said and "methods/x.py: step 3: no" in said and "tcbench train" in said
    assert "Exiting because a job execution failed." in said


def test_every_rule_that_computes_is_told_of():
    """But for those that copy, or show what there is so far."""
    rules = "\n".join(path.read_text(encoding="utf-8") for path in sorted((PACKAGE / "rules").glob("*.smk")))
    names = re.findall(r"^ *rule (\w+):|^ +name:\n +f\"(\w+)_\{", rules, re.MULTILINE)
    silent = {name for named in names if not expected(name := "".join(named))}
    assert silent - {*TARGETS, "pretrain"} == {"publish", "partial"}


def test_what_is_known_of_a_job(tmp_path):
    assert name_of({"rule_name": "render_tables", "output": ["results/d/tables/table2.md"]}) == "render_tables"
    assert expected("digits_sample_nfe20_untrained") == console.EXPECTED["sample"] and expected("digits_tables") == 0
    assert last_line(str(tmp_path / "none")) == ""
