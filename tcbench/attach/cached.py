"""Caching methods on pipelines of diffusers' own, on and off.

Between calls nothing of the pipeline is changed but its class, a subclass of the same name whose `__call__` puts a
`Call` in the place of the transformer's forward and takes it away again, whatever happens. So the state of a method
begins and ends with a call, and the pipeline can be moved, saved, given another scheduler or another transformer.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from tcbench.artefacts import load_artefacts
from tcbench.attach.call import Call
from tcbench.attach.pipelines import PIPELINES, Arguments, Habits
from tcbench.attach.served import adapter_of
from tcbench.attach.summary import Summary
from tcbench.errors import UserError
from tcbench.guidance import Unguided
from tcbench.method import Artefacts, Method, Run, refuse_lacking
from tcbench.models.adapter import Adapter
from tcbench.record.records import TRAINED, Trained
from tcbench.registry import make_method
from tcbench.shapes import ModelShape
from tcbench.watch.checking import values_unchecked

_ON = "_tcbench_cached"
"""The attribute of a pipeline that has a method on it."""


def enable_cache(pipe: Any, method: str | Method, *, artefacts: str | Path | None = None, **options: Any) -> "Cached":
    """Put a caching method on a diffusers pipeline, whose own call stays as it is.

    Samples of a call are numbered from 0, with seed 0, where a method draws at random.

    Args:
        pipe: a DiTPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline, FluxPipeline or WanPipeline
            (`tcbench.attach.pipelines.PIPELINES`).
        method: a method's name (`tcbench methods`) or a `Method`.
        artefacts: the folder of what was trained for it, with its artefacts.json; they belong to one number of steps.
        options: of the method, if it is given by name.

    Returns:
        what says what a call did (`Cached.summary`) and, as a context manager, takes the method off again.

    Raises:
        UserError: the pipeline is unknown, has a method on it already or has a transformer that tcbench does not serve
            (`attach.served`); the method or an option is unknown; artefacts are missing or another method's. In a call:
            its steps are not those of the artefacts; its images have another size than the transformer's own; the
            method misbehaves.
    """
    habits = _habits(pipe)
    if _ON in vars(pipe):
        raise UserError(
            f"{type(pipe).__name__}: has {_cached(pipe).method.label} on it; call tcbench.disable_cache first"
        )
    if isinstance(method, str):
        method = make_method(method, options)
    elif options:
        raise UserError(f"{method.name}: is given with its options; leave out {', '.join(options)}")
    cached = Cached(pipe, habits, method, None if artefacts is None else Path(artefacts))
    setattr(pipe, _ON, cached)
    pipe.__class__ = _with_method(type(pipe))
    return cached


def disable_cache(pipe: Any) -> None:
    """Take the method off a pipeline; its calls are bit for bit what they were before.

    Raises:
        UserError: there is none on it.
    """
    if _ON not in vars(pipe):
        raise UserError(f"{type(pipe).__name__}: has no method on it; tcbench.enable_cache puts one there")
    delattr(pipe, _ON)
    pipe.__class__ = type(pipe).__base__


class Cached:
    """A method on a pipeline: what `enable_cache` returns.

    Attributes:
        pipe, method: the two.
    """

    def __init__(self, pipe: Any, habits: Habits, method: Method, folder: Path | None) -> None:
        self.pipe, self.method = pipe, method
        self._habits, self._folder = habits, folder
        adapter = adapter_of(pipe.transformer)  # refused now rather than at the first call
        self._log = _log_of(folder, method, adapter.shape)
        self._last: Call | None = None
        self._running = False
        self._loaded: tuple[Any, ...] = ()  # what for, and what was loaded
        self._checked = False  # whether a call was finished while values were checked

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of the pipeline takes along; it reads what was trained again."""
        return vars(self) | {"_loaded": (), "_last": None}

    def __enter__(self) -> "Cached":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        if vars(self.pipe).get(_ON) is self:
            disable_cache(self.pipe)

    def summary(self) -> Summary:
        """What the last call computed and held; print it.

        Raises:
            UserError: there was no call since the method was put on, or the last one did not finish.
        """
        if self._last is None:
            raise UserError(f"{self.method.name}: the pipeline was not called since the method was put on it")
        if self._last.summary is None:
            raise UserError(f"{self.method.name}: the pipeline's last call did not take all its steps; call it again")
        return self._last.summary

    @contextmanager
    def call(self, called: Arguments) -> Iterator[None]:
        """Run the pipeline's own call inside, with these arguments.

        Raises:
            UserError: it is running already.
        """
        if self._running:
            raise UserError(f"{type(self.pipe).__name__}: is called within its own call; call it afterwards")
        transformer = self.pipe.transformer
        artefacts, adapter = self._trained(adapter_of(transformer))
        nfe = self._log.get("nfe") if self._log else None
        self._last = call = Call(self.pipe, self._habits, self.method, artefacts, adapter, called, nfe)
        self._running = True
        transformer.forward = call
        try:
            with values_unchecked(self._checked and adapter.device.type != "cpu"):  # reading them waits for a GPU
                yield
            self._checked = True
        finally:
            del transformer.forward
            self._running = False

    def _trained(self, adapter: Adapter) -> tuple[Artefacts, Adapter]:
        """What was trained, and the adapter with it; read again where the transformer is another or has moved."""
        if self._folder is None:
            return Artefacts(), adapter
        what_for = adapter.model, adapter.device, adapter.dtype
        if not self._loaded or self._loaded[0] != what_for:
            self._loaded = what_for, load_artefacts(self._folder, adapter)
            refuse_lacking(self.method, self._loaded[1][0])
        return self._loaded[1]


def _habits(pipe: Any) -> Habits:
    """Those of the pipeline whose call runs, which a subclass may inherit."""
    name = getattr(type(pipe).__call__, "__qualname__", "").partition(".")[0] if callable(pipe) else ""
    if name not in PIPELINES or isinstance(pipe, nn.Module):
        raise UserError(f"{type(pipe).__name__}: no pipeline that tcbench knows; known: {', '.join(PIPELINES)}")
    return PIPELINES[name]


def _cached(pipe: Any) -> Cached:
    return vars(pipe)[_ON]


def _log_of(folder: Path | None, method: Method, shape: ModelShape) -> Trained | None:
    """What training wrote of itself, if the method, with its options, is trained.

    Raises:
        UserError: artefacts are missing, not readable or of another method.
    """
    if folder is None:
        if _trains(method, shape):
            raise UserError(f"{method.name}: is trained; give artefacts=, the folder with its artefacts.json")
        refuse_lacking(method, Artefacts())
        return None
    log = TRAINED.read(folder / "artefacts.json")
    if (trained := log.get("settings", {}).get("method", method.name)) != method.name:
        raise UserError(f"{folder}: was trained for {trained}, not for {method.name}; give that method, or its folder")
    return log


def _trains(method: Method, shape: ModelShape) -> bool:
    """Whether a method, with its options, declares training; one that must know the steps for it does."""
    try:
        return method.trains and bool(method.training(Run(shape, (0,), Unguided(), torch.arange(0))))
    except UserError:
        return True


def _with_method(plain: type) -> type:
    """A pipeline's class with a call that the method on it sees; its name is the same, so that it saves as it was."""

    @wraps(plain.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(plain.__call__).bind(self, *args, **kwargs)
        bound.apply_defaults()
        with _cached(self).call(bound.arguments):
            return plain.__call__(self, *args, **kwargs)

    return type(plain.__name__, (plain,), {"__call__": __call__, "__module__": plain.__module__})
