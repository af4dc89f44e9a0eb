"""Which source files a stage's results depend on: one list for the workflow's inputs and for the samples' fingerprints.

A stage does not list what cannot change its numbers, so that editing a table does not retrain anything.
"""

from functools import lru_cache
from pathlib import Path

from tcbench.files import digest, sha256
from tcbench.registry import method_file

PACKAGE = Path(__file__).resolve().parent

_MODEL = [
    "groups.py",
    *(f"models/{name}.py" for name in ("adapter", "dit", "pixart", "open_sora_plan", "specs", "weights", "predictor")),
]
_ENGINE = [
    *("plan.py", "method.py", "ledger.py", "cache.py", "engine.py", "fused.py", "noise.py", "sampling.py"),
    *(f"kernels/{path.name}" for path in sorted((PACKAGE / "kernels").glob("*.py"))),
    *_MODEL,
]
_DATA = [
    f"data/{name}.py"
    for name in ("__init__", "captions", "captioned", "scenes", "moving", "prompts", "images", "fashion", "cifar")
]
_STAGE = [  # artefacts are loaded there
    *_ENGINE,
    *(f"training/{name}.py" for name in ("caching", "routers", "common")),
    "stages/common.py",
    "models/text.py",
    "models/pretrained.py",
    *_DATA,
]
_METRICS = [f"metrics/{path.name}" for path in sorted((PACKAGE / "metrics").glob("*.py"))]

_SCORE = [
    *_METRICS,
    "stats.py",
    *(f"models/{name}.py" for name in ("classifier", "reader", "digits_clip")),
    *_DATA,
    *(f"stages/{name}.py" for name in ("score", "readings", "vbench")),
]

STAGES: dict[str, list[str]] = {
    "encode": ["data/images.py", "models/pretrained.py", "noise.py", "stages/encode.py"],
    "train": [*_STAGE, "stages/train.py"],
    "sample": [*_STAGE, "stages/sample.py"],
    "score": _SCORE,
    "ablate": [*_STAGE, "stages/sample.py", *_SCORE],
    "vbench": [*(f"stages/{name}.py" for name in ("vbench", "vbench_process")), "metrics/vbench.py"],
    "bench": [*_STAGE, *("replay.py", "untrained.py", "stages/bench.py", "stages/peers.py", "stages/timing.py")],
    "latency": [*_STAGE, "stages/latency.py"],
    "diagnose": [*_STAGE, "stages/diagnose.py"],
    "report": [*(f"report/{path.name}" for path in sorted((PACKAGE / "report").glob("*.py"))), "stages/render.py"],
}


def source_files(stage: str, *methods: str) -> list[str]:
    """Absolute paths of a stage's sources and of the files of the methods involved."""
    return [str(PACKAGE / name) for name in STAGES[stage]] + [str(method_file(name)) for name in methods]


@lru_cache
def source_digest(stage: str, *methods: str) -> str:
    """Identifies the code of a stage and of the methods involved, by content."""
    return digest([sha256(Path(path)) for path in source_files(stage, *methods)])
