"""A method that misbehaves names itself: whatever its code raises, returns or changes becomes one line with its file.

`Method` puts every hook that its subclasses define behind this guard, and what `start` returns too, so that whoever
calls a method (engine, replay, costing, training, goldens) calls it guarded. Imports no torch.
"""

import dis
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from inspect import getattr_static
from numbers import Integral
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tcbench.errors import UserError, is_full
from tcbench.plan import Plan, PlanError, Settled, Unit, described
from tcbench.trainable import Trainable
from tcbench.watch.checking import checks_values
from tcbench.watch.surroundings import kept_surroundings

if TYPE_CHECKING:
    from torch import Tensor


class Undecided(Exception):
    """A value was asked for where tensors have none: while a method is costed from shapes."""


_INSIDE = ContextVar("inside a method", default=False)


@contextmanager
def blamed(author: str, where: str = "", file: str | None = None) -> Iterator[None]:
    """Run a method's code: what it does wrong becomes one line, `author: where: what`.

    A method that calls itself (a plan its `i_steps`) is blamed once, where it was called from outside.

    Args:
        author: the method's file, as messages name it.
        where: a step or a hook.
        file: the path of that file as tracebacks have it, to say in which line.

    Raises:
        UserError: the code raised anything, a call of `sys.exit` included, or changed its surroundings. Three things
            pass as they are: `Undecided`, a GPU that is out of memory, and an interrupt from outside, as far as that
            can be told, with a note of where it came.
    """
    if _INSIDE.get():
        yield
        return
    token = _INSIDE.set(True)
    try:
        if checks_values():
            with kept_surroundings():
                yield
        else:
            yield
    except (Undecided, GeneratorExit):
        raise
    except BaseException as error:
        if _is_from_outside(error):
            error.add_note(": ".join(filter(None, (author, where))))
            raise
        raise UserError(_line(error, author, where, file)) from error
    finally:
        _INSIDE.reset(token)


def _is_from_outside(error: BaseException) -> bool:
    """Whether the method cannot be blamed: the GPU is full, or the user pressed Ctrl-C.

    A signal interrupts whatever instruction runs; an interrupt that comes from a `raise` is the code's own.
    """
    if isinstance(error, KeyboardInterrupt):
        last = list(_frames(error))[-1]
        return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] != "RAISE_VARARGS"
    return is_full(error)


def _frames(error: BaseException) -> Iterator[TracebackType]:
    frame = error.__traceback__
    while frame is not None:
        yield frame
        frame = frame.tb_next


def _line(error: BaseException, author: str, where: str, file: str | None) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    name = author.rpartition("/")[2].removesuffix(".py")
    if isinstance(error, UserError) and text.startswith((author, f"{name}:")):
        return text  # it names itself already
    said = isinstance(error, UserError | PlanError) and text
    what = text if said else f"{type(error).__name__}: {text}" if text else type(error).__name__
    if "meta tensor" in text.lower():
        what += '; while it is costed tensors have no values: say decides = "host" and read numbers with look.read'
    if what.startswith(f"{where} returned"):
        where = ""
    lines = [frame.tb_lineno for frame in _frames(error) if frame.tb_frame.f_code.co_filename == file]
    return ": ".join(filter(None, (author, where, what))) + (f" (line {lines[-1]})" if lines else "")


def author_of(method: Any) -> str:
    """The file of a method as messages name it."""
    name = getattr(type(method), "name", None)
    return f"methods/{name}.py" if isinstance(name, str) else type(method).__name__


def _calling(method: Any, where: str) -> Any:
    module = sys.modules.get(type(method).__module__)
    return blamed(author_of(method), where, getattr(module, "__file__", None))


@dataclass
class Guarded:
    """The policy of a run behind the guard: what `Method.start` returns, or any other policy of the harness.

    Attributes:
        method: who is blamed.
        policy: who plans, `method` itself if it has no state.
    """

    method: Any
    policy: Any

    def __getattr__(self, name: str) -> Any:
        """What else the policy has, for whoever records it."""
        if name.startswith("__") or name == "policy":
            raise AttributeError(name)
        return getattr(self.policy, name)

    def plan(self, look: Any) -> Plan:
        """The decisions for step `look.step`."""
        with _calling(self.method, f"step {look.step}"):
            return _plan(self.method, self.policy.plan(look))

    def choose(self, step: int, unit: Unit, choose: "Callable[[Callable[[], Tensor]], Any]", stream: Any) -> Settled:
        """What a decision that the policy deferred comes to."""
        with _calling(self.method, f"step {step}: {unit}"):
            who = choose(stream)
            if not isinstance(who, Settled):
                raise UserError(f"Deferred.choose returned {described(who)}; return ALL, NONE, Tokens, Rows or Merged")
            return who

    @contextmanager
    def executed(self, step: int) -> Iterator[None]:
        """Run a step inside: a plan that cannot be executed is the method's fault, and so is one not made."""
        try:
            yield
        except (PlanError, Undecided) as error:
            raise UserError(_line(error, author_of(self.method), f"step {step}", None)) from error

    def check_read(self) -> None:
        """Refuse that a number is read on the host by a method that says it never is.

        Raises:
            UserError: the method does not say `decides = "host"`.
        """
        if (decides := getattr(self.method, "decides", "host")) != "host":
            raise UserError(f'reads a number, but decides = "{decides}"; say decides = "host"')


def guarded(policy: Any) -> Guarded:
    """A policy behind the guard; one that is already stays as it is."""
    return policy if isinstance(policy, Guarded) else Guarded(policy, policy)


# --- what hooks return


def _plan(method: Any, value: Any) -> Plan:
    if not isinstance(value, Plan):
        raise UserError(f"plan returned {described(value)}; return a Plan")
    return value


def _policy(method: Any, value: Any) -> Guarded:
    if not callable(getattr(value, "plan", None)):
        raise UserError(f"start returned {described(value)}; return an object with a plan(look)")
    return value if isinstance(value, Guarded) else Guarded(method, value)


def _number_of_steps(method: Any, value: Any) -> int:
    if not isinstance(value, int | Integral) or int(value) < 1:
        raise UserError(f"sampled_steps returned {described(value)}; return a number of steps, 1 or more")
    return int(value)


def _steps(method: Any, value: Any) -> Any:
    numbers: list[Any] = list(value) if isinstance(value, Collection) else [None]
    whole = all(isinstance(step, Integral) and int(step) >= 0 for step in numbers)
    if not whole or numbers != sorted(set(numbers)):
        raise UserError(f"i_steps returned {described(value)}; return a tuple of steps in sampling order, from 0")
    return value


def _options(method: Any, value: Any) -> Any:
    fields = type(method).model_fields
    if not isinstance(value, dict) or not all(name in fields for name in value):
        raise UserError(f"implied returned {described(value)}; return a dict of its options' values by name")
    return value


def _tuple_of(hook: str, kind: Any, what: str) -> Callable[[Any, Any], Any]:
    def check(method: Any, value: Any) -> Any:
        if not isinstance(value, tuple) or not all(isinstance(each, kind) for each in value):
            raise UserError(f"{hook} returned {described(value)}; return a tuple of {what}")
        return value

    return check


def _outcomes(method: Any, value: Any) -> Any:
    if not _tuple_of("outcomes", Plan, "plans")(method, value):
        raise UserError("outcomes returned no plan; return those that the step is decided between")
    return value


def _reason(hook: str) -> Callable[[Any, Any], Any]:
    def check(method: Any, value: Any) -> Any:
        if not isinstance(value, str | None):
            raise UserError(f"{hook} returned {described(value)}; return a text or None")
        return value

    return check


HOOKS: dict[str, Callable[[Any, Any], Any]] = {
    "sampled_steps": _number_of_steps,
    "start": _policy,
    "i_steps": _steps,
    "implied": _options,
    "plan": _plan,
    "outcomes": _outcomes,
    "training": _tuple_of("training", Trainable, "declarations of tcbench.trainable"),
    "files": _tuple_of("files", str, "paths"),
    "lacks": _reason("lacks"),
    "macs_depend_on": _reason("macs_depend_on"),
}
"""What a method may define, and what makes of its value what callers get, or refuses it."""


def guard_hooks(cls: type) -> None:
    """Put the hooks of a class of methods behind the guard."""
    for name, checked in HOOKS.items():
        raw = getattr_static(cls, name)
        if not hasattr(raw, "__guarded__"):
            setattr(cls, name, _hook(name, raw, checked))


def _hook(name: str, raw: Any, checked: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def hook(self: Any, *arguments: Any, **named: Any) -> Any:
        with _calling(self, _where(name, [*arguments, *named.values()])):
            return checked(self, raw.__get__(self, type(self))(*arguments, **named))

    hook.__guarded__ = True  # type: ignore[attr-defined]
    return wraps(raw)(hook) if callable(raw) else hook


def _where(hook: str, arguments: list[Any]) -> str:
    """The step, where a hook is about one."""
    if hook == "plan":
        return f"step {arguments[0].step}"
    return f"step {arguments[1]}" if hook == "outcomes" else hook
