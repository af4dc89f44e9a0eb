import getpass
import json
import os
import re
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tcbench import __version__
from tcbench.record import provenance
from tcbench.record.files import digest


def test_record_is_complete_json_without_machine_names():
    started = time.time() - 90
    record = provenance.collect({"out": "/private/place", "nfe": 50}, range(3), started)
    text = json.dumps(record)
    assert record["config_digest"] == digest({"nfe": 50, "out": "/private/place"})
    assert record["seeds"] == [0, 1, 2] and record["tcbench"] == __version__
    assert 90 <= record["wall_s"] < 120
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["started_utc"])
    assert record["started_utc"] < record["finished_utc"]
    assert re.match(r"\d+\.\d+", record["packages"]["numpy"]) and record["cpu"]["cores"] >= 1
    for secret in ("/private", str(Path.home()) + "/", socket.gethostname(), str(Path(__file__).parent)):
        assert secret not in text
    assert getpass.getuser() not in re.findall(r"\w+", text)


def test_threads_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert provenance.collect({}, [], time.time())["cpu"]["OMP_NUM_THREADS"] == "3"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout with the package at its root; returns a function that runs git in it."""
    package = tmp_path / "tcbench"
    package.mkdir()
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    (package / "provenance.py").write_text("")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    return git


def test_commit_and_dirty_flag(checkout, tmp_path):
    unknown = {"commit": "unknown", "dirty": "unknown"}
    assert provenance.collect({}, [], 0)["git"] == unknown  # not a checkout
    checkout("init", "-q")
    assert provenance.collect({}, [], 0)["git"] == unknown  # no commit yet
    checkout("add", ".")
    checkout("commit", "-qm", "first")
    commit = checkout("rev-parse", "HEAD")
    assert provenance.collect({}, [], 0)["git"] == {"commit": commit, "dirty": False}
    (tmp_path / "new.py").write_text("")
    assert provenance.collect({}, [], 0)["git"] == {"commit": commit, "dirty": True}


def test_a_foreign_checkout_around_the_package_is_not_ours(checkout, tmp_path, monkeypatch):
    checkout("init", "-q")
    checkout("add", ".")
    checkout("commit", "-qm", "first")
    installed = tmp_path / "site-packages" / "tcbench"
    installed.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(installed / "provenance.py"))
    assert provenance.collect({}, [], 0)["git"]["commit"] == "unknown"


def test_no_git_and_no_package_are_recorded_not_raised(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package",))
    record = provenance.collect({}, [], 0)
    assert record["git"] == {"commit": "unknown", "dirty": "unknown"}
    assert record["packages"] == {"no-such-package": "not installed"}
