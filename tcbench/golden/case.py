"""A golden case on disk: its settings, the reference's tensors, and the model that made them (docs/goldens.md)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcbench.errors import UserError
from tcbench.golden.weights import read_weights
from tcbench.models.adapter import Adapter, Prompt, Text
from tcbench.models.networks import fill_transformer, make_adapter
from tcbench.models.specs import MODELS, DiTSpec, PixArtSpec
from tcbench.record.files import read_json, read_tensors

Settings = Mapping[str, Any]

PIXART_NAMES = {"eps_guided": "eps", "timesteps_continuous_model_input": "timesteps"}


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


def _image_sizes(config: Settings) -> dict[str, Any]:
    """What the arguments of both references' classes call alike."""
    return {
        "name": "golden",
        "num_blocks": config["depth"],
        "num_heads": config["num_heads"],
        "head_dim": config["hidden_size"] // config["num_heads"],
        "sample_size": config["input_size"],
        "patch_size": config["patch_size"],
        "in_channels": config["in_channels"],
    }


def _spec(config: Settings) -> DiTSpec:
    """The shape of a DiT from the arguments of the reference's class."""
    return DiTSpec(
        **_image_sizes(config),
        out_channels=config["in_channels"] * (2 if config["learn_sigma"] else 1),
        num_classes=config["num_classes"],
        guided_channels=3,  # fixed in the reference's forward_with_cfg
    )


def _pixart_spec(config: Settings) -> PixArtSpec:
    """The shape of a PixArt-alpha from the arguments of the reference's class."""
    return PixArtSpec(
        **_image_sizes(config),
        out_channels=2 * config["in_channels"],
        guided_channels=config["in_channels"],
        caption_channels=config["caption_channels"],
        caption_tokens=config["model_max_length"],
    )
