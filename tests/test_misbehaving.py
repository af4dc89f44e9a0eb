"""A method that misbehaves names itself: one line, status 2, nothing written, nothing changed for what runs later."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tcbench.budget.costing import macs_of, run_of_shapes
from tcbench.cli import main
from tcbench.config.load import load_suite
from tcbench.engine.engine import Engine
from tcbench.engine.fused import FusedBlocks
from tcbench.errors import UserError
from tcbench.method import Artefacts, Method
from tcbench.outside.places import ADDED_METHODS
from tcbench.plan import Block, Decision, Plan, PlanError, Tokens
from tcbench.precision import set_products
from tcbench.record.files import read_tensors
from tcbench.registry import make_method, method_names
from tcbench.replay import Replay
from tcbench.samplers import SamplerSettings
from tcbench.sampling import Passes, denoise, initial_noise, sample_batch, start_run
from tcbench.watch.checking import check_tokens, values_unchecked
from tcbench.watch.guard import HOOKS
from tcbench.watch.surroundings import _settings, kept_surroundings

from .conftest import make_adapter
from .test_contract import small_method

MODEL, NFE, SETTINGS = "tiny-dit", 3, SamplerSettings(1.5)
KINDS = yaml.safe_load((Path(__file__).parent / "misbehaving.yaml").read_text(encoding="utf-8"))
CASES = {name: case for cases in KINDS.values() for name, case in cases.items()}
SAMPLED = [name for name, case in CASES.items() if case.get("says", case.get("sampled"))]

HEAD = '''
import gc, os, random, signal, sys
from pydantic import PositiveInt, model_validator
from tcbench.choose import *
from tcbench.errors import UserError
from tcbench.method import *
from tcbench.plan import *
from tcbench.trainable import *
from tcbench.tensors.unseen import is_unseen

FULL = every_unit([Block(block) for block in range(4)], ALL)

def some(look, index, used=None, **how):
    """Everything at the first step; then the tokens `index`, a list of one row, of block 1 in every row."""
    import torch
    if look.step == 0:
        return FULL
    rows = torch.tensor(index).expand(look.run.rows_per_sample * len(look.run.sample_index), -1)
    used = None if used is None else torch.tensor([used], dtype=torch.int32)
    return Plan({Block(1): Decision(Tokens(rows, used), **how)})

def later(look, choose, **more):
    """Everything at the first step; then a choice in block 1 that is taken when it is reached."""
    return Plan({Block(1): Decision(Deferred(choose, like=ALL, **more))}) if look.step else FULL

class Misbehaving(Method):
    name = "NAME"
    label = "NAME"
'''

BROKEN = {
    "syntax": ("def def", "SyntaxError: invalid syntax"),
    "missing": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module' (line 1)"),
    "leaves": ("import sys; sys.exit(0)", "SystemExit: 0 (line 1)"),
    "stopped": ("raise KeyboardInterrupt", "KeyboardInterrupt (line 1)"),
    "hollow": ("", "must define exactly one Method with name = 'hollow'; found 0"),
    "double": (HEAD.replace("NAME", "double") + HEAD.replace("Misbehaving", "Other"), "must define exactly one Method"),
    "misnamed": (HEAD.replace("NAME", "other"), "its Method has name = 'other'; set name = 'misnamed'"),
    "unlabelled": (HEAD.replace("NAME", "unlabelled").replace('label = "unlabelled"', ""), "set label = a text"),
    "unknobbed": (HEAD.replace("NAME", "unknobbed") + '    knob = "zzz"\n', "set knob = one of its options, or None"),
    "undecided": (HEAD.replace("NAME", "undecided") + '    decides = "never"\n', "set decides = one of ahead, device"),
    "unplain": ("import torch; torch.set_default_dtype(torch.float64)", "changes torch's default dtype"),
}
"""Files that define no method, and why."""

SUITE = """
suite: tiny
about:
  description: a tiny network with random weights
  differs: a test
  stands_for: {name: DiT-XL/2, resolution: 256}
  guidance_rule: a test
model: {name: digits-dit, weights: random}
data: {name: digits}
sampler: {guidance_scale: 1.5}
samples: {count: 2, batch_size: 1, traced: 2}
scoring: {metrics: [mae]}
show: {figure: {nfe: 3, columns: 2}, tables: {}}
latency: {batch_size: 1, warmup: 0, repeats: 1}
rows:
  uncached: {method: uncached, nfe: 3}
  good: {method: fora, nfe: 3}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of methods that misbehave."""
    folder = tmp_path_factory.mktemp("methods")
    for name in CASES:
        (folder / f"{name}.py").write_text(source(name))
    return folder


@pytest.fixture(autouse=True)
def added(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADDED_METHODS, str(files))


def settings() -> dict[str, object]:
    return {name: setting.read() for name, setting in _settings().items()}


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder of its own; what a method changes is set again when it is refused."""
    monkeypatch.chdir(tmp_path)
    set_products("fp32")  # as stages do for a suite without TF32
    before = settings()
    yield
    assert settings() == before


def source(name: str) -> str:
    case = CASES[name]
    plan = "def plan(self, look):\n" + indent(case["plan"], "    ") if "plan" in case else ""
    return HEAD.replace("NAME", name) + indent(case.get("body", plan), "    ")


def line_of(name: str, when: str = "sampled") -> str | None:
    """The beginning of the line that a case must end in, if any."""
    says = CASES[name].get("says", CASES[name].get(when))
    return says if says is None or says.startswith(f"{name}:") else f"methods/{name}.py: {says}"


def sample(name: str) -> Tensor:
    """The contract tests' way, on weights of its own."""
    return sample_batch(make_adapter(MODEL), make_method(name, {}), NFE, SETTINGS, torch.arange(2)).image


# --- one line each


@pytest.mark.parametrize("name", CASES)
def test_costed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    says = line_of(name, "costed")
    status = main(["macs", "--model", MODEL, "--method", name, "--nfe", str(NFE)])
    captured = capsys.readouterr()
    if says is None:
        assert status == 0 and not captured.err
    else:
        assert status == 2 and captured.err.startswith(f"tcbench: {says}"), captured.err
        assert captured.err.count("\n") == 1


@pytest.mark.parametrize("name", CASES)
def test_sampled(name: str) -> None:
    says = line_of(name)
    if says is None:
        assert sample(name).isfinite().all()
        return
    with pytest.raises(UserError) as caught:
        sample(name)
    text = str(caught.value)
    assert text.startswith(says) and "\n" not in text


@pytest.mark.parametrize("name", [name for name in KINDS["tokens"] if name in SAMPLED])
def test_tokens_on_the_fused_path(name: str) -> None:
    """The engine refuses them before kernels see them."""
    adapter, index = make_adapter(MODEL), torch.arange(2)
    with torch.inference_mode(), pytest.raises(UserError) as caught:
        method = make_method(name, {})
        sampler, run = start_run(adapter, method, NFE, SETTINGS, index, Artefacts())
        passes = Passes(adapter, run, method.start, partial(FusedBlocks, backend="torch"))
        list(denoise(passes, sampler, initial_noise(adapter, 0, index), index))
    assert str(caught.value).startswith(str(line_of(name)))


def test_half_a_pair_of_numpys_normal_numbers_is_noticed_and_given_back() -> None:
    """Which is drawn from what the generator left, and leaves the generator as it was."""
    before = np.random.get_state()
    np.random.seed(1)
    expected = np.random.randn(4)
    np.random.seed(1)
    for number in expected:
        with pytest.raises(UserError, match="numpy's random generator"), kept_surroundings():
            assert np.random.randn() == number
        with kept_surroundings():
            pass
        assert np.random.randn() == number
    np.random.set_state(before)


@pytest.mark.parametrize("name", ["divides", "exits", "twice", "threads", "weights", "latent"])
def test_replayed(name: str) -> None:
    with pytest.raises(UserError) as caught:
        Replay(make_adapter(MODEL), make_method(name, {}), NFE, SETTINGS, torch.arange(2), path="plain")
    assert str(caught.value).startswith(str(line_of(name)))


# --- rows after it


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A suite of a good row and one for every method that misbehaves."""
    path = tmp_path / "tiny.yaml"
    rows = [name for name in SAMPLED if name not in ("options_exit", "sampled_steps_raise") and "sampled_" not in name]
    path.write_text(SUITE + "".join(f"  {name}: {{method: {name}, nfe: 3}}\n" for name in rows))
    return path


@pytest.mark.parametrize("name", ["exits", "interrupts", "none", "twice", *KINDS["changes"]])
def test_a_row_is_refused_and_writes_nothing(name: str, suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(suite), "--rows", name, "good"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"tcbench: {line_of(name)}")
    assert not list(suite.parent.glob("results/**/*.safetensors"))


@pytest.mark.parametrize("name", [name for name in KINDS["changes"] if "weight" not in name])
def test_a_good_row_after_it_is_as_if_alone(name: str, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same process; whoever changes weights is refused by name, and the process with it."""
    alone = sample_batch(tiny, make_method("fora", {}), NFE, SETTINGS, torch.arange(2))
    with pytest.raises(UserError):
        sample_batch(tiny, make_method(name, {}), NFE, SETTINGS, torch.arange(2))
    after = sample_batch(tiny, make_method("fora", {}), NFE, SETTINGS, torch.arange(2))
    assert torch.equal(alone.image, after.image) and torch.equal(alone.xt, after.xt)


def test_two_good_rows_in_one_job_are_as_alone(suite: Path) -> None:
    assert main(["sample", str(suite), "--rows", "uncached", "good"]) == 0
    together = [read_tensors(load_suite(suite)["good"].shard(number))[0] for number in range(2)]
    for path in suite.parent.glob("results/**/samples/good/*"):
        path.unlink()
    assert main(["sample", str(suite), "--rows", "good"]) == 0
    for number, tensors in enumerate(together):
        again = read_tensors(load_suite(suite)["good"].shard(number))[0]
        assert all(torch.equal(tensors[key], again[key]) for key in tensors)


# --- files that do not load


@pytest.fixture
def broken(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (text, _) in BROKEN.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv(ADDED_METHODS, f"{files}{os.pathsep}{tmp_path}")


@pytest.mark.usefixtures("broken")
def test_a_broken_file_breaks_no_other_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["macs", "--model", MODEL, "--method", "fora", "--nfe", "4"]) == 0
    capsys.readouterr()
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in method_names():
        (line,) = [line for line in lines if line.startswith((f"{name} (knob", f"{name}: broken: "))]
        assert (f"{name}: broken" in line) == (name in BROKEN)
        if name in BROKEN:
            assert f"{name}.py: {BROKEN[name][1]}" in line


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_says_why(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["methods", name], ["macs", "--model", MODEL, "--method", name, "--nfe", "4"]):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("tcbench: ") and captured.err.count("\n") == 1 and not captured.out
        assert f"{name}.py: {BROKEN[name][1]}" in captured.err


# --- what is not the method's fault, and what is not looked at


def test_ctrl_c_inside_a_plan_is_an_interrupt() -> None:
    class Slow(Method):
        name = "slow"
        label = "slow"

        def plan(self, look: object) -> Plan:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(10**6):
                random.random  # noqa: B018 (something to interrupt)
            return Plan()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            macs_of(MODEL, Slow(), NFE)
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught.value.__notes__ == ["methods/slow.py: step 0"]  # said by the command line


def test_a_full_gpu_is_not_the_methods_fault() -> None:
    class Large(Method):
        name = "large"
        label = "large"

        def plan(self, look: object) -> Plan:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        macs_of(MODEL, Large(), NFE)


@pytest.mark.parametrize("implied", ["all", {"zzz": 1}], ids=["text", "unknown"])
def test_implied_options_are_options(implied: Any) -> None:
    class Odd(Method):
        name = "odd"
        label = "odd"

        def implied(self, run: object) -> Any:
            return implied

    with pytest.raises(UserError, match=r"methods/odd.py: implied returned .*; return a dict of its options"):
        Odd().implied(run_of_shapes(MODEL, NFE))


def test_every_hook_of_a_method_is_known() -> None:
    """What a method may override is guarded: a hook that is added must be listed."""
    own = {name for name, value in vars(Method).items() if callable(value) and not name.startswith(("_", "model_"))}
    assert own == set(HOOKS)


@pytest.mark.parametrize("used", [None, 0, 2])
def test_columns_that_do_not_count_may_hold_anything(used: int | None) -> None:
    index_RK = torch.tensor([[4, 5, 99, 99], [1, 0, -1, 0]])
    tokens = Tokens(index_RK, None if used is None else torch.tensor([used], dtype=torch.int32))
    plan = Plan({Block(0): Decision(tokens)})
    if used is None:
        with pytest.raises(PlanError, match="does not exist"):
            check_tokens(plan, 2, 64, index_RK.device)
    else:
        check_tokens(plan, 2, 64, index_RK.device)


@pytest.mark.parametrize("seed", range(20))
def test_tokens_are_refused_where_they_are_wrong_and_only_there(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows, tokens = int(generator.integers(1, 5)), int(generator.integers(4, 40))
    count = int(generator.integers(2, tokens + 1))
    index = np.stack([generator.permutation(tokens)[:count] for _ in range(rows)])
    right = Plan({Block(0): Decision(Tokens(torch.tensor(index)))})
    check_tokens(right, rows, tokens, torch.device("cpu"))
    row, column, other = int(generator.integers(rows)), *map(int, generator.permutation(count)[:2])
    for value, says in ((index[row, other], "twice"), (tokens, "does not exist"), (-1, "does not exist")):
        wrong = index.copy()
        wrong[row, column] = value
        plan = Plan({Block(1): Decision(Tokens(torch.tensor(wrong))), **right.decisions})
        with pytest.raises(PlanError, match=f"block 1: .*{says}"):
            check_tokens(plan, rows, tokens, torch.device("cpu"))
        with values_unchecked():
            check_tokens(plan, rows, tokens, torch.device("cpu"))


class Reads(TorchDispatchMode):
    """Counts the operations for which the host would wait on a GPU."""

    names = ("is_nonzero", "item", "_local_scalar_dense", "equal")
    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket in [getattr(torch.ops.aten, name) for name in self.names]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["fora", "toca", "random_tokens", "tome", "no_tokens"])
@pytest.mark.parametrize("checked", [True, False])
def test_nothing_is_read_for_checks_after_the_first_batch(name: str, checked: bool, tiny) -> None:
    method, index = small_method(name, {}), torch.arange(2)
    sampler, run = start_run(tiny, method, NFE, SETTINGS, index, Artefacts())
    with torch.inference_mode(), values_unchecked(not checked), Reads() as reads:
        passes = Passes(tiny, run, method.start)
        list(denoise(passes, sampler, initial_noise(tiny, 0, index), index))
    assert (reads.count > 0) == (checked and name not in ("fora", "no_tokens"))


def test_nothing_public_of_a_look_leads_to_the_engine(tiny) -> None:
    seen = []

    class Curious(Method):
        name = "curious"
        label = "curious"

        def plan(self, look: object) -> Plan:
            seen.append(look)
            return Plan()

    sample_batch(tiny, Curious(), NFE, SETTINGS, torch.arange(1))
    public = {name for name in vars(seen[0]) if not name.startswith("_")}
    assert public == {"run", "step"} and not any(isinstance(vars(seen[0])[name], Engine) for name in public)


def test_a_method_with_no_tensors_to_spend_imports_no_torch(files: Path) -> None:
    code = "import sys; from tcbench.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    arguments = ["macs", "--model", MODEL, "--method", "divides", "--nfe", "3", "--methods", str(files)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "methods/divides.py: step 1: ZeroDivisionError" in done.stderr
