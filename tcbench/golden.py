"""`tcbench golden`: the harness against outputs of the original public code, case by case.

A case is `NAME.json` (the settings it was made with) beside `NAME.safetensors` (what came out); all cases of a
directory share `weights.safetensors` and `inputs.safetensors`, cases of PixArt-alpha `pixart_weights.safetensors` and
`pixart_inputs.safetensors`; those of Open-Sora-Plan have a folder like its checkpoint's. docs/goldens.md describes the
format. What the settings call for is run with this package's methods, engine and samplers, and the largest error of
every quantity is reported.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tcbench import golden_l2c, golden_video
from tcbench.errors import UserError
from tcbench.executed import ALL, PlanRecord
from tcbench.files import read_json, read_tensors
from tcbench.golden_weights import read_weights
from tcbench.method import Artefacts, Look, Method, Policy, Run
from tcbench.models.adapter import Adapter, Prompt, Text
from tcbench.models.networks import fill_transformer, make_adapter
from tcbench.models.specs import MODELS, DiTSpec, PixArtSpec
from tcbench.plan import Plan, Site
from tcbench.registry import make_method
from tcbench.sampling import (
    AncestralDDPM,
    Passes,
    ReferenceDDIM,
    ReferenceDPMSolver,
    Sampler,
    denoise,
)
from tcbench.training.routers import as_table

Settings = Mapping[str, Any]

PIXART_NAMES = {"eps_guided": "eps", "timesteps_continuous_model_input": "timesteps"}

MARGIN = 10
"""Tolerances are this many times the rounding that was seen on the cases of tests/golden, whatever instructions torch
and its libraries were limited to. Most of it comes from the sines of float32 timesteps."""

_SCORE_ROUNDING = 1.7e-6
DECIDING_GAP = 2 * MARGIN * _SCORE_ROUNDING  # where the last chosen token scores less above the next, rounding decides


class Unsupported(Exception):
    """A case that this package has nothing to compare with; says why."""


@dataclass(frozen=True)
class Case:
    """One case on disk.

    Raises:
        UserError: from its properties, if a file is missing or damaged, or lacks a field.
    """

    directory: Path
    name: str

    @cached_property
    def settings(self) -> Settings:
        """The JSON sidecar."""
        settings = read_json(self.directory / f"{self.name}.json")
        if not isinstance(settings, dict):
            raise UserError(f"{self.directory / self.name}.json: not an object of settings; see docs/goldens.md")
        return settings

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        """The reference's tensors; PixArt-alpha's under the names of DiT's, conditional rows first as here."""
        tensors = read_tensors(self.directory / f"{self.name}.safetensors")[0]
        if not self.pixart:
            return tensors
        tensors = {PIXART_NAMES.get(name, name): tensor for name, tensor in tensors.items()}
        return {
            name: torch.cat(tensor.chunk(2, dim=3)[::-1], dim=3) if name in ("fresh_idx", "score") else tensor
            for name, tensor in tensors.items()
        }

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """The directory's shared inputs."""
        return read_tensors(self.shared("inputs.safetensors"))[0]

    @cached_property
    def pixart(self) -> bool:
        """Whether the case is one of PixArt-alpha."""
        return "pixart" in str(self.settings.get("source", "")).lower()

    def shared(self, name: str) -> Path:
        """A file that the cases of a model share."""
        return self.directory / (f"pixart_{name}" if self.pixart else name)

    @property
    def repository(self) -> str:
        """Name of the repository that made the case, in lower case, from `source`: "owner/name@commit ..."."""
        found = re.match(r"[\w.-]+/([\w.-]+)", str(self.settings.get("source", "")))
        return found[1].lower() if found else ""

    def setting(self, name: str) -> Any:
        """A required setting, at the top level or among `hyperparameters`; a note in brackets may follow its name."""
        for settings in (self.settings, self.settings.get("hyperparameters", {})):
            for key, value in settings.items():
                if key.partition(" (")[0] == name:
                    return value
        raise UserError(f"{self.directory / self.name}.json: no {name!r}; add the setting that the case was made with")

    def input(self, name: str) -> Tensor:
        """One of the shared inputs."""
        if name not in self.inputs:
            raise UserError(f"{self.shared('inputs.safetensors')}: no tensor {name!r}; see docs/goldens.md")
        return self.inputs[name]

    def number(self, name: str) -> float:
        """A required setting that is a number."""
        try:
            return float(self.setting(name))
        except (TypeError, ValueError) as error:
            message = f"{self.directory / self.name}.json: {name}: {self.setting(name)!r} is not a number"
            raise UserError(f"{message}; correct it") from error

    def prompt(self) -> Prompt:
        """What the samples show: labels, or captions with their masks."""
        if self.pixart:
            return Text(self.input("caption")[:, 0], self.input("caption_mask").bool())
        return self.input("labels")

    def adapter(self) -> Adapter:
        """The case's model: PixArt-alpha's shape is in the settings, DiT's in `weights.json` (without it: tiny-dit)."""
        path, key = self.directory / "weights.json", "model_config"
        if self.pixart:
            path, key = self.directory / f"{self.name}.json", "model"
        spec = MODELS["tiny-dit"]
        if path.exists():
            try:
                spec = (_pixart_spec if self.pixart else _spec)(read_json(path)[key])
            except (KeyError, TypeError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"{path}: {key}: {reason} missing or wrong; see docs/goldens.md") from error
        weights = self.shared("weights.safetensors")
        return make_adapter(fill_transformer(spec, read_weights(weights), weights), spec)


def _spec(config: Settings) -> DiTSpec:
    """The shape of a DiT from the arguments of the reference's class."""
    return DiTSpec(
        name="golden",
        num_blocks=config["depth"],
        num_heads=config["num_heads"],
        head_dim=config["hidden_size"] // config["num_heads"],
        sample_size=config["input_size"],
        patch_size=config["patch_size"],
        in_channels=config["in_channels"],
        out_channels=config["in_channels"] * (2 if config["learn_sigma"] else 1),
        num_classes=config["num_classes"],
        guided_channels=3,  # fixed in the reference's forward_with_cfg
    )


def _pixart_spec(config: Settings) -> PixArtSpec:
    """The shape of a PixArt-alpha from the arguments of the reference's class."""
    return PixArtSpec(
        name="golden",
        num_blocks=config["depth"],
        num_heads=config["num_heads"],
        head_dim=config["hidden_size"] // config["num_heads"],
        sample_size=config["input_size"],
        patch_size=config["patch_size"],
        in_channels=config["in_channels"],
        out_channels=2 * config["in_channels"],
        guided_channels=config["in_channels"],
        caption_channels=config["caption_channels"],
        caption_tokens=config["model_max_length"],
    )


@dataclass(frozen=True)
class Kind:
    """A kind of case.

    Attributes:
        matches: whether a case is of this kind, by its settings.
        run: (directory, name) -> the largest error by quantity; raises `Unsupported` for settings it cannot run.
        tolerances: the largest error allowed, by quantity, or what reads it from the case; 0 for one that is not named,
            which is then exact.
    """

    matches: Callable[[Case], bool]
    run: Callable[[Path, str], dict[str, float]]
    tolerances: Mapping[str, float] | Callable[[Case], Mapping[str, float]]


# --- running a sampling case


@dataclass
class _Recorder:
    """A policy that remembers what another one chose."""

    policy: Policy
    scores: list[dict[Site, Tensor]] = field(default_factory=list)
    chosen: list[dict[Site, Tensor]] = field(default_factory=list)

    def plan(self, look: Look) -> Plan:
        plan = self.policy.plan(look)
        # not copies: what a policy defers is there when the step is over
        self.scores.append(getattr(self.policy, "scores", {}))
        self.chosen.append(getattr(self.policy, "chosen", {}))
        return plan


@dataclass(frozen=True)
class Outcome:
    """What this package computed for a case.

    Attributes:
        method, run: what was run.
        executed: what was computed.
        scores, chosen: by step and branch, the scores [R, N] by which tokens were chosen, and their places [R, K].
        tensors: timesteps [S], eps [S, n, C, H, W], final [n, C, H, W] and, if the case stores the latents that its
            network saw, eps_from_x_in like eps.
    """

    method: Method
    run: Run
    executed: PlanRecord
    scores: list[dict[Site, Tensor]]
    chosen: list[dict[Site, Tensor]]
    tensors: dict[str, Tensor]


@torch.inference_mode()
def sample_case(case: Case, method: Method, artefacts: Artefacts | None = None) -> Outcome:
    """Sample with the case's noise, labels, guidance and sampler; again from its stored latents, if it has them."""
    adapter, x, prompt = case.adapter(), case.input("z"), case.prompt()
    sampler = sampler_of(case, len(x))
    guidance = adapter.spec.guidance(case.number("cfg_scale"))
    run = Run(adapter.shape, sampler.timesteps, guidance, torch.arange(len(x)), artefacts=artefacts or Artefacts())
    recorder = _Recorder(method.start(run))
    passes = Passes(adapter, run, lambda _: recorder)
    steps = list(_progress(denoise(passes, sampler, x, prompt), case, run.nfe))
    tensors = {
        "timesteps": torch.tensor(sampler.timesteps),
        "eps": torch.stack([eps for eps, _, _ in steps]),
        "final": steps[-1][2],
    }
    if "x_in" in case.expected:
        again = Passes(adapter, run, method.start)
        again.prepare(prompt)
        eps = [again(step, seen)[0] for step, seen in enumerate(case.expected["x_in"][: run.nfe])]
        tensors["eps_from_x_in"] = torch.stack(eps)
    return Outcome(method, run, passes.plans, recorder.scores, recorder.chosen, tensors)


def _progress(steps: Any, case: Case, total: int) -> Any:
    return tqdm(steps, total=total, desc=case.name, mininterval=1, leave=False)


def sampler_of(case: Case, samples: int) -> Sampler:
    """DDIM or, where `sampler` says so first, ancestral sampling with the case's noise; on the grid of its respacing.

    Cases of PixArt-alpha: DPM-Solver++.

    Raises:
        Unsupported: another sampler or grid, or ancestral sampling without the noise that was used.
    """
    if case.pixart:
        steps = re.fullmatch(r"DPM-Solver\+\+.*order 2 multistep, time_uniform, (\d+) steps.*", case.setting("sampler"))
        if not steps:
            raise Unsupported(f"sampler {case.setting('sampler')!r} is not second-order DPM-Solver++, uniform in time")
        return ReferenceDPMSolver(int(steps[1]))
    respacing = re.fullmatch(r"(ddim)?(\d+)", str(case.setting("timestep_respacing")))
    if not respacing:
        raise Unsupported(f"timestep_respacing {case.setting('timestep_respacing')!r} is not 'N' or 'ddimN'")
    nfe, spacing = int(respacing[2]), "leading" if respacing[1] else "linspace"
    named = re.search(r"ddim|p_sample|ddpm|ancestral", str(case.setting("sampler")).lower())
    if not named:
        raise Unsupported(f"sampler {case.setting('sampler')!r} is neither DDIM nor ancestral DDPM")
    if named[0] == "ddim":
        return ReferenceDDIM(nfe, spacing)
    return AncestralDDPM(nfe, given_noise(case, nfe, samples), spacing)


def given_noise(case: Case, nfe: int, samples: int) -> Tensor:
    """The noise of every ancestral step, [S or S - 1, n, C, H, W], from the case or else the shared inputs.

    The tensor called `noise`, or the only one with "noise" in its name. Of rows for both halves of the guided pairs the
    first half counts, because the network sees the first half of the latents twice.
    """
    for tensors in (case.expected, case.inputs):
        names = ["noise"] if "noise" in tensors else [name for name in tensors if "noise" in name]
        if len(names) > 1:
            raise UserError(f"{case.name}: which of {', '.join(names)} is the sampler's noise? call it 'noise'")
        if names:
            noise = tensors[names[0]]
            if noise.ndim != 5 or noise.shape[0] < nfe - 1 or noise.shape[1] not in (samples, 2 * samples):
                raise UserError(
                    f"{case.name}: {names[0]} has shape {list(noise.shape)}; "
                    f"give [{nfe}, {samples}, C, H, W], in sampling order"
                )
            return noise[:, :samples]
    raise Unsupported("ancestral sampling needs a tensor 'noise', in the case or in inputs.safetensors")


# --- comparing


def largest_errors(case: Case, ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """By name, for tensors on both sides: the largest absolute difference of numbers, how many decisions differ.

    Raises:
        UserError: shapes differ.
    """
    errors = {}
    for name in (name for name in ours if name in expected):
        one, other = ours[name], expected[name]
        if one.shape != other.shape:
            shapes = f"{name}: shape {list(other.shape)}, computed {list(one.shape)}"
            raise UserError(f"{case.directory / case.name}.safetensors: {shapes}; check the case's settings")
        difference = (one.double() - other.double()).abs()
        errors[name] = (difference.max() if one.is_floating_point() else difference.count_nonzero()).item()
    return errors


def compare(case: Case, outcome: Outcome) -> dict[str, float]:
    """The quantities of every sampling case."""
    expected = dict(case.expected)
    if "eps" not in expected and "final" not in expected:
        raise UserError(f"{case.directory / case.name}.safetensors: neither eps nor final; nothing to compare with")
    ours = dict(outcome.tensors)
    if "eps" in expected:
        expected["eps_from_x_in"] = expected["eps"]
        ours["eps"] = ours["eps"][-len(expected["eps"]) :]  # of all steps, or of the last ones
    full = [
        [
            [outcome.executed.at(step, Site(block, part)) == ALL for part in ("attn", "mlp")]
            for block in _blocks(outcome)
        ]
        for step in range(outcome.run.nfe)
    ]
    return largest_errors(case, {**ours, "recomputed": torch.tensor(full)}, expected)


def compare_tokens(case: Case, outcome: Outcome) -> dict[str, float]:
    """ToCa's decisions: which blocks are partial, under which interval; which tokens they recompute, by which score."""
    expected, run, blocks = case.expected, outcome.run, _blocks(outcome)
    method: Any = outcome.method
    branches = [part for part, kind in run.shape.kinds.items() if kind != "mix"]
    done = [
        [[outcome.executed.at(step, Site(block, branch)) for branch in ("attn", *branches)] for block in blocks]
        for step in range(run.nfe)
    ]
    partial = [[attn != ALL for attn, *_ in of] for of in done]
    counters = [method.counter(step, run.nfe) for step in range(run.nfe)]
    ratios = [[method.ratio(counter, run.nfe, block, len(blocks)) for block in blocks] for counter in counters]
    fresh = torch.tensor([[[each.count for each in row] for _, *row in of] for of in done])
    ours = {
        "type": torch.tensor(partial),
        "fresh_count": fresh if case.pixart else fresh[:, :, 0],
        "threshold_in_force": torch.tensor([row.intervals for row in method.timetable(run)]),
        "fresh_ratio": torch.tensor(ratios) * torch.tensor(partial),
    }
    errors = largest_errors(case, ours, expected)
    # [S, block, branch, ...]; DiT's cases have one branch and no axis for it
    of_branches = {
        name: tensor if case.pixart else tensor[:, :, None] for name, tensor in expected.items() if tensor.ndim > 1
    }
    sites = [(step, Site(block, branch)) for step in range(run.nfe) for block in blocks for branch in branches]
    if "fresh_idx" in expected:
        wrong = [_other_tokens(of_branches, outcome, step, site, branches.index(site.part)) for step, site in sites]
        errors["fresh_idx"] = float(sum(wrong))
    if "score" in expected:
        by_site = [
            largest_errors(
                case,
                {"score": outcome.scores[step][site]},
                {"score": of_branches["score"][step, site.block, branches.index(site.part)]},
            )["score"]
            for step, site in sites
            if site in outcome.scores[step]
        ]
        errors["score"] = torch.tensor([0.0, *by_site]).max().item()  # NaN, if there is one
    return errors


def _other_tokens(expected: Mapping[str, Tensor], outcome: Outcome, step: int, site: Site, branch: int) -> int:
    """How many rows choose another set of tokens, where the scores leave no doubt."""
    place = (step, site.block, branch)
    if "kth_gap" in expected and expected["kth_gap"][place] <= DECIDING_GAP:
        return 0
    theirs = [set(row) - {-1} for row in expected["fresh_idx"][place].tolist()]
    tokens = outcome.chosen[step].get(site)
    ours = [set(row) for row in ([[]] * len(theirs) if tokens is None else tokens.tolist())]
    return sum(map(operator.ne, ours, theirs))


def _blocks(outcome: Outcome) -> range:
    return range(outcome.run.shape.num_blocks)


# --- the kinds


def _run_uncached(directory: Path, name: str) -> dict[str, float]:
    case = Case(directory, name)
    return compare(case, sample_case(case, make_method("uncached", {})))


def _run_fora(directory: Path, name: str) -> dict[str, float]:
    case = Case(directory, name)
    mode = case.setting("save_cache")
    if mode not in ("boost_infer_static", "boost_infer"):
        raise Unsupported(f"save_cache {mode!r} is not 'boost_infer_static' or 'boost_infer'")
    interval = int(case.number("cache_threshold")) if mode == "boost_infer_static" else 1  # boost_infer reuses nothing
    return compare(case, sample_case(case, make_method("fora", {"interval": interval})))


def _run_toca(directory: Path, name: str) -> dict[str, float]:
    case = Case(directory, name)
    for setting, known in (("cache_type", "attention"), ("force_fresh", "global")):
        if case.setting(setting) != known:
            raise Unsupported(f"{setting} {case.setting(setting)!r} is not {known!r}")
    schedule = str(case.setting("ratio_scheduler"))
    if case.pixart and schedule != "ToCa":
        raise Unsupported(f"ratio_scheduler {schedule!r} is not 'ToCa'")
    if case.settings.get("scaled_to_depth") is False:
        raise Unsupported("the layer divisor of its schedule was not scaled to the model's depth")
    options = {
        "fresh_ratio": case.number("fresh_ratio"),
        "interval": int(case.number("fresh_threshold")),
        "schedule": schedule.removeprefix("ToCa-"),
        "soft_fresh_weight": case.number("soft_fresh_weight"),
    }
    if case.pixart:
        options |= {"schedule": "pixart", "bonus": 0.4, "cell": 4}  # fixed in the released code
    try:
        method = make_method("toca", options)
    except UserError as error:
        raise Unsupported(str(error)) from error
    outcome = sample_case(case, method)
    return compare(case, outcome) | compare_tokens(case, outcome)


def _run_learning_to_cache(directory: Path, name: str) -> dict[str, float]:
    case = Case(directory, name)
    method = make_method("learning_to_cache", {"threshold": case.number("thres")})
    router = Artefacts(tables={"router": as_table(case.expected["router_prob"])})
    return compare(case, sample_case(case, method, router))


def _train_learning_to_cache(directory: Path, name: str) -> dict[str, float]:
    return golden_l2c.run_training(Case(directory, name))


def _run_video(run: Callable[[Case], dict[str, float]]) -> Callable[[Path, str], dict[str, float]]:
    return lambda directory, name: run(Case(directory, name))


def _allowed(**rounding: float) -> dict[str, float]:
    return {quantity: MARGIN * seen for quantity, seen in rounding.items()}


_TRAJECTORY = _allowed(eps=1.1e-5, eps_from_x_in=7.3e-6, final=1.7e-4)

KINDS: dict[str, Kind] = {
    "uncached": Kind(lambda case: case.repository == "dit", _run_uncached, _TRAJECTORY),
    "fora": Kind(lambda case: case.repository == "fora", _run_fora, _TRAJECTORY),
    "toca": Kind(
        lambda case: case.repository == "toca" and not case.pixart,
        _run_toca,
        _TRAJECTORY | _allowed(fresh_ratio=1e-7, score=_SCORE_ROUNDING),
    ),
    "toca_pixart": Kind(
        lambda case: case.repository == "toca" and case.pixart,
        _run_toca,
        _allowed(timesteps=6.2e-5, eps=5.1e-5, eps_from_x_in=3.4e-5, final=1.2e-3, score=_SCORE_ROUNDING),
    ),
    "l2c": Kind(
        lambda case: case.repository == "learning-to-cache" and "router_prob" in case.expected,
        _run_learning_to_cache,
        _TRAJECTORY,
    ),
    "l2c_training": Kind(
        lambda case: case.repository == "learning-to-cache" and "router_prob" not in case.expected,
        _train_learning_to_cache,
        _allowed(loss=2.3e-6, data_loss=2.3e-6, gates=1e-7, mse_per_sample=4.1e-6, gradients=4.1e-10, logits=3e-8),
    ),
    "osp": Kind(
        lambda case: case.repository == "open-sora-plan" and "sampler" in case.settings,
        _run_video(golden_video.run_sampling),
        golden_video.stated_tolerances,
    ),
    "osp_forward": Kind(
        lambda case: case.repository == "open-sora-plan" and "caption" in case.expected,
        _run_video(golden_video.run_forward),
        golden_video.stated_tolerances,
    ),
    "wf_vae": Kind(
        lambda case: case.repository == "open-sora-plan" and "video" in case.expected,
        _run_video(golden_video.run_autoencoder),
        golden_video.stated_tolerances,
    ),
    "wf_vae_parts": Kind(
        lambda case: case.repository == "open-sora-plan" and "of" in case.settings,
        _run_video(golden_video.run_parts),
        lambda case: dict.fromkeys(case.expected, 1e-4),
    ),
    "wf_vae_wavelets": Kind(
        lambda case: case.repository == "open-sora-plan" and "ramp" in case.expected,
        _run_video(golden_video.run_wavelets),
        lambda case: dict.fromkeys(case.expected, case.number("tolerance")),
    ),
}
"""The kinds of cases by name; the first that matches runs a case."""


# --- the command


def case_names(directory: Path) -> list[str]:
    """Every NAME.json with a NAME.safetensors, but for the weights.

    Raises:
        UserError: there is no such directory, or no case in it.
    """
    stems = sorted(path.stem for path in directory.glob("*.json") if path.with_suffix(".safetensors").exists())
    names = [stem for stem in stems if stem != "weights"]
    if not names:
        raise UserError(f"{directory}: no case (NAME.json beside NAME.safetensors) there; see docs/goldens.md")
    return names


def check_case(directory: Path, name: str) -> dict[str, Any]:
    """Run one case: its kind, whether it passed, and largest error and tolerance by quantity.

    Raises:
        Unsupported: no kind matches, or the kind cannot run it.
        UserError: a file is damaged or lacks a field.
    """
    case = Case(directory, name)
    kind = next((kind for kind in KINDS if KINDS[kind].matches(case)), None)
    if kind is None:
        raise Unsupported(f"no kind of case ({', '.join(KINDS)}) matches its source, {case.settings.get('source')!r}")
    quantities, tolerances = {}, KINDS[kind].tolerances
    allowed = tolerances(case) if callable(tolerances) else tolerances
    for quantity, error in KINDS[kind].run(directory, name).items():
        tolerance = allowed.get(quantity, 0.0)
        largest_error = error if math.isfinite(error) else None  # JSON has no NaN
        quantities[quantity] = {"error": largest_error, "tolerance": tolerance, "passed": error <= tolerance}
    return {"kind": kind, "passed": all(entry["passed"] for entry in quantities.values()), "quantities": quantities}


def check(directory: Path, names: Sequence[str] = ()) -> dict[str, Any]:
    """Run the cases of a directory, or some of them by name.

    Returns:
        JSON-able: `passed`, `cases` (see `check_case`) and `skipped` (the reason, by name).

    Raises:
        UserError: no such case, a damaged file, or nothing that could be compared.
    """
    known, cases, skipped = case_names(directory), {}, {}
    if unknown := set(names) - set(known):
        raise UserError(f"{directory}: no case {min(unknown)!r}; cases: {', '.join(known)}")
    for name in names or known:
        try:
            cases[name] = check_case(directory, name)
        except Unsupported as reason:
            skipped[name] = str(reason)
    if not cases:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise UserError(f"{directory}: nothing could be compared; {reasons}")
    return {"passed": all(case["passed"] for case in cases.values()), "cases": cases, "skipped": skipped}
