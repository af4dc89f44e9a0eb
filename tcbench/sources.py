"""Which source files a stage's results depend on: one list for the workflow's rules and for the samples' fingerprints.

A stage does not list what cannot change its numbers, so that editing a table does not retrain anything.
"""

from functools import lru_cache
from pathlib import Path

from tcbench.files import digest, sha256
from tcbench.places import PACKAGE, data_file, method_file

_MODEL = [
    *("assets.py", "groups.py"),
    *(f"models/{name}.py" for name in ("adapter", "dit", "pixart", "open_sora_plan", "specs", "networks", "weights")),
    "models/predictor.py",
]
_ENGINE = [
    *("plan.py", "shapes.py", "guidance.py", "method.py", "ledger.py", "cache.py", "engine.py", "fused.py"),
    *("noise.py", "sampling.py", "timesteps.py", "unseen.py", "observations.py"),
    *(f"kernels/{path.name}" for path in sorted((PACKAGE / "kernels").glob("*.py"))),
    *_MODEL,
]
_DATA = [f"data/{name}.py" for name in ("__init__", "source", "captions", "captioned", "prompts", "images", "videos")]
_STAGE = [  # artefacts are loaded there
    *_ENGINE,
    *(f"training/{name}.py" for name in ("caching", "routers", "common")),
    "stages/common.py",
    "models/text.py",
    "models/pretrained.py",
    "models/wf_vae.py",
    *_DATA,
]
_METRICS = [f"metrics/{path.name}" for path in sorted((PACKAGE / "metrics").glob("*.py"))]

_SCORE = [
    *_METRICS,
    "stats.py",
    *(f"models/{name}.py" for name in ("classifier", "reader", "digits_clip")),
    *_DATA,
    *(f"data/sets/{name}.py" for name in ("scenes", "moving")),  # whose captions the digit reader checks
    *(f"stages/{name}.py" for name in ("score", "readings", "vbench")),
]

STAGES: dict[str, list[str]] = {
    "encode": [
        "data/images.py",
        "data/videos.py",
        "models/pretrained.py",
        "models/wf_vae.py",
        "noise.py",
        "stages/encode.py",
    ],
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


def source_files(stage: str, *methods: str, data: str | None = None) -> list[Path]:
    """A stage's sources, and the files of the methods and of the data set involved."""
    return [
        *(PACKAGE / name for name in STAGES[stage]),
        *(method_file(name) for name in methods),
        *([data_file(data)] if data else []),
    ]


@lru_cache
def source_digest(stage: str, *methods: str, data: str | None = None) -> str:
    """Identifies the code of a stage, of the methods and of the data set involved by content alone, wherever it lies.

    Rules have this as a parameter, not the files as inputs, so that a moved checkout runs nothing again.
    """
    return digest([sha256(path) for path in source_files(stage, *methods, data=data)])
