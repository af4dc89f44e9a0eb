import getpass
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tcbench import __version__
from tcbench.outside.places import PACKAGE
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
    monkeypatch.setattr(provenance, "PACKAGE", package)
    (package / "__init__.py").write_text("")
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
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "published").write_text("by the run before")
    assert provenance.collect({}, [], 0)["git"] == {"commit": commit, "dirty": False}
    (tmp_path / "new.py").write_text("")
    assert provenance.collect({}, [], 0)["git"] == {"commit": commit, "dirty": True}


def test_what_changed_between_two_commits(checkout, tmp_path):
    checkout("init", "-q")
    commits = []
    for name in ("first.py", "second.py"):
        (tmp_path / "tcbench" / name).write_text("")
        checkout("add", ".")
        checkout("commit", "-qm", name)
        commits.append(checkout("rev-parse", "HEAD"))
    first, second = commits
    assert provenance.is_ancestor(first, second) and provenance.is_ancestor(first, first)
    assert not provenance.is_ancestor(second, first) and not provenance.is_ancestor("a" * 40, first)
    assert provenance.changed_between(first, second) == {tmp_path / "tcbench" / "second.py"}
    assert provenance.changed_between(first, first) == set()


@pytest.mark.parametrize("above", ["", "below/"])
def test_the_package_s_own_folder_is_asked(tmp_path, above):
    """A copy of the package, in a checkout of its own or below a foreign one; its process has no other tcbench."""
    root = tmp_path / above
    shutil.copytree(PACKAGE, root / "tcbench", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True)
    ask = "from tcbench.record import provenance; print(provenance.collect({}, [], 0)['git']['commit'])"
    environment = os.environ | {"PYTHONPATH": str(root)}
    said = subprocess.run([sys.executable, "-c", ask], cwd=root, env=environment, capture_output=True, text=True)
    assert said.stdout.strip() == ("unknown" if above else commit.stdout.strip()), said.stderr


def test_a_foreign_checkout_around_the_package_is_not_ours(checkout, tmp_path, monkeypatch):
    checkout("init", "-q")
    checkout("add", ".")
    checkout("commit", "-qm", "first")
    installed = tmp_path / "site-packages" / "tcbench"
    installed.mkdir(parents=True)
    monkeypatch.setattr(provenance, "PACKAGE", installed)
    assert provenance.collect({}, [], 0)["git"]["commit"] == "unknown"


def test_no_git_and_no_package_are_recorded_not_raised(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package",))
    record = provenance.collect({}, [], 0)
    assert record["git"] == {"commit": "unknown", "dirty": "unknown"}
    assert record["packages"] == {"no-such-package": "not installed"}
