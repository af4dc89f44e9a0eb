"""VBench: its pinned environment, a row's videos on disk, and its sixteen dimensions computed by the package itself."""

import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tcbench.config.suite import Entry, Suite
from tcbench.errors import NotRun, UserError
from tcbench.metrics.vbench import DIMENSIONS, MEGABYTES, Dimension
from tcbench.models.specs import MODELS
from tcbench.outside.devices import lease, uses_gpus
from tcbench.outside.places import ASSETS, vbench_environment
from tcbench.record.files import atomic, read_json, write_bytes, write_text
from tcbench.record.provenance import collect
from tcbench.record.records import VBENCH
from tcbench.record.shards import read_manifest, read_shards
from tcbench.record.videos import CODEC, CRF, unpacked

REQUIREMENTS = ASSETS / "vbench" / "requirements.txt"
DOWNLOADS = "about 110 packages with a torch of their own, 6 GB on disk, 3 minutes on a fast line"
CHECKPOINTS = "VBench's checkpoints are not among them: it fetches each on first use, or put them in its cache folder"


def build_environment() -> None:
    """Make VBench's virtual environment, from scratch, with Python 3.11: its pinned tokenizers have no later wheels.

    Raises:
        UserError: there is no Python 3.11, or an installation fails.
    """
    folder = vbench_environment()
    python = sys.executable if sys.version_info[:2] == (3, 11) else shutil.which("python3.11")
    if python is None:
        raise UserError("vbench: its environment needs Python 3.11; install python3.11 and try again")
    print(f"{folder}: installing VBench; {DOWNLOADS}. {CHECKPOINTS}", file=sys.stderr)
    for command in (
        [python, "-m", "venv", "--clear", folder],
        [folder / "bin" / "pip", "install", "--requirement", REQUIREMENTS],
    ):
        if status := subprocess.run([str(word) for word in command]).returncode:
            raise UserError(f"vbench: `{' '.join(map(str, command))}` failed with status {status}; see its output")
    write_text(folder / "requirements.txt", REQUIREMENTS.read_text(encoding="utf-8"))  # marks it whole


def score_videos(entry: Entry) -> None:
    """Write results/<suite>/videos/<row>/, and vbench/<row>.json: every dimension's score and that of each sample, or
    why it was not run.

    Samples of one prompt are its videos 0, 1, ... in the protocol's naming, `{prompt}-{i}.mp4`.

    Raises:
        UserError: the model makes images, the row has no prompts, a shard is damaged, or the process breaks down.
    """
    suite, started = entry.suite, time.time()
    if len(MODELS[suite.model.name].latent_shape) < 4:
        raise UserError(f"suite {suite.suite}: {suite.model.name} makes images; VBench looks at videos")
    manifest = read_manifest(entry.samples, entry.sample_settings)
    names = video_names(manifest.get("captions") or [], f"{entry.manifest}")
    write_videos(entry, names)
    reasons = {dimension.name: why_not(suite, dimension) for dimension in DIMENSIONS}
    dimensions: dict[str, Any] = {name: {"not_run": reason} for name, reason in reasons.items() if reason}
    if runnable := [name for name, reason in reasons.items() if not reason]:
        if uses_gpus(suite.model.device):
            lease()
        with tempfile.TemporaryDirectory() as scratch:
            task = {
                "videos": str(entry.videos),
                "dimensions": runnable,
                "device": suite.model.device,
                "scratch": scratch,
                "answer": f"{scratch}/answer.json",
            }
            dimensions |= _by_sample(_process(suite, task), names)
    VBENCH.write(
        entry.vbench,
        {
            "row": entry.name,
            "suite": suite.suite,
            "dimensions": {dimension.name: dimensions[dimension.name] for dimension in DIMENSIONS},
            "video": {"fps": suite.vbench.fps, "codec": f"{CODEC}, crf {CRF}"},
            "shards": manifest["shards"],
            "provenance": collect(suite.model_dump(mode="json"), [suite.samples.seed], started),
        },
    )


def video_names(captions: list[str], where: str) -> list[str]:
    """File names of the samples' videos by the protocol; raises UserError if a caption cannot be one."""
    if not captions:
        raise UserError(
            f"{where}: has no captions, and VBench's videos are named by them; sample a text-to-video suite"
        )
    seen: Counter[str] = Counter()
    names = []
    for caption in captions:
        name = f"{caption}-{seen[caption]}.mp4"
        if "/" in name or len(name.encode()) > 250:
            raise UserError(f"{where}: caption {caption[:40]!r}... cannot be a file name; use VBench's own prompts")
        seen[caption] += 1
        names.append(name)
    return names


def write_videos(entry: Entry, names: Sequence[str]) -> None:
    """A row's videos under these names, those of its decoded samples as they are in its shards, and no others.

    Raises:
        UserError: as `read_shards`.
    """
    for stale in {path.name for path in entry.videos.glob("*.mp4")} - set(names):
        (entry.videos / stale).unlink()
    shards = read_shards(entry.samples, "np")
    files = (file for tensors in shards for file in unpacked(tensors, entry.suite.vbench.fps))
    for name, content in zip(names, tqdm(files, desc=f"videos {entry.name}", total=len(names), delay=2), strict=True):
        write_bytes(entry.videos / name, content)


def why_not(suite: Suite, dimension: Dimension) -> str | None:
    """What a dimension needs that is not here, or None: nothing is downloaded without being asked for."""
    environment = vbench_environment()
    if not (environment / "requirements.txt").exists():
        return f"needs VBench's environment: tcbench vbench CONFIG --build-env ({DOWNLOADS})"
    cache = suite.vbench.weights
    if absent := [name for name in dimension.needs if not (cache.expanduser() / name).exists()]:
        return "needs " + " and ".join(f"{cache / name} ({MEGABYTES[name]} MB)" for name in absent)
    if dimension.detectron2 and not any(environment.glob("lib/python*/site-packages/detectron2")):
        return f"needs detectron2 in {environment}, which has to be built for its torch"
    return None


def readings(entry: Entry, shards: dict[str, str]) -> dict[str, dict[str, float]]:
    """Dimension -> sample number -> score, of a row whose sixteen dimensions were all run on these shards.

    Raises:
        NotRun: a dimension was not run.
        UserError: the results are of other samples.
    """
    path = entry.vbench
    if not path.exists():
        raise NotRun(f"needs `tcbench vbench CONFIG --rows {entry.name}`")
    record = VBENCH.read(path)
    if record["shards"] != shards:
        raise UserError(f"{path}: is of other samples; delete it and run `tcbench vbench` for {entry.name} again")
    absent = {name: result["not_run"] for name, result in record["dimensions"].items() if "not_run" in result}
    if absent:
        name, reason = next(iter(absent.items()))
        more = f"; {len(absent) - 1} more dimensions were not run either" if len(absent) > 1 else ""
        raise NotRun(f"{reason} (for {name}{more})")
    return {name: result["samples"] for name, result in record["dimensions"].items()}


def _process(suite: Suite, task: dict[str, Any]) -> dict[str, Any]:
    path = Path(task["scratch"]) / "task.json"
    path.write_text(json.dumps(task), encoding="utf-8")
    script = Path(__file__).with_name("vbench_process.py")
    python = (vbench_environment() / "bin" / "python").absolute()
    cache = {"VBENCH_CACHE_DIR": str(suite.vbench.weights.expanduser()), "HF_HUB_OFFLINE": "1"}
    environment = {"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(Path.home()), **cache}
    log = suite.folder / "logs" / f"vbench-{Path(task['videos']).name}.txt"
    with atomic(log) as partial, open(partial, "w", encoding="utf-8") as output:
        status = subprocess.run([python, "-P", script, path], env=environment, stdout=output, stderr=output).returncode
    if status:
        raise UserError(f"vbench: its process ended with status {status}; see {log}")
    return read_json(Path(task["answer"]))


def _by_sample(answer: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Scores by sample number in the place of file names, checked to give the package's own score."""
    number = {name: index for index, name in enumerate(names)}
    units = {dimension.name: dimension.unit for dimension in DIMENSIONS}
    results: dict[str, Any] = {}
    for name, result in answer.items():
        if result.get("videos") == {}:
            result = {"not_run": "needs samples of this dimension's prompts"}
        if "not_run" not in result:
            samples = {str(number[video]): value for video, value in result["videos"].items()}
            mean = sum(samples.values()) / len(samples) / units[name]
            if not math.isclose(mean, result["score"], rel_tol=1e-4, abs_tol=1e-6):
                raise UserError(f"vbench: {name} is {result['score']}, but its videos' mean is {mean}; report this")
            result = {"score": result["score"], "samples": samples}
        results[name] = result
    return results
