"""The spec of a network that somebody else built, from its diffusers config. Imports no torch."""

from collections.abc import Callable, Mapping
from typing import Any

from tcbench.errors import UserError, did_you_mean
from tcbench.models.specs import DiTSpec, ModelSpec, PixArtSpec

Config = Mapping[str, Any]


def _of_images(name: str, config: Config, **only: Any) -> dict[str, Any]:
    """What the configs of both families say alike.

    Args:
        only: the values that other fields must have, because adapters and fused kernels take them for granted.
    """
    blocks = {"activation_fn": "gelu-approximate", "attention_bias": True, "upcast_attention": False}
    for field, value in (blocks | {"norm_elementwise_affine": False} | only).items():
        if config[field] != value:
            raise UserError(f"{name}: {field} is {config[field]!r} in its config; tcbench serves {value!r} alone")
    channels = config["in_channels"]
    return {
        "name": name,
        "num_blocks": config["num_layers"],
        "num_heads": config["num_attention_heads"],
        "head_dim": config["attention_head_dim"],
        "patch_size": config["patch_size"],
        "in_channels": channels,
        "out_channels": config["out_channels"] or channels,
        "guided_channels": channels,  # diffusers' pipelines guide all of them
        "sample_size": config["sample_size"],
        "norm_eps": config["norm_eps"],
    }


def _dit(name: str, config: Config) -> DiTSpec:
    return DiTSpec(num_classes=config["num_embeds_ada_norm"], **_of_images(name, config))


def _pixart(name: str, config: Config) -> PixArtSpec:
    if config["caption_channels"] is None:
        raise UserError(f"{name}: its config has no caption_channels; tcbench serves those that project captions alone")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    sized = config["use_additional_conditions"]
    return PixArtSpec(
        caption_channels=config["caption_channels"],
        caption_tokens=120,  # what PixArtAlphaPipeline pads its captions to, unless it is told otherwise
        null_caption=False,  # diffusers' conversion drops it
        sized=config["sample_size"] == 128 if sized is None else sized,
        **_of_images(name, config, cross_attention_dim=width, attention_type="default"),
    )


TRANSFORMERS: dict[str, Callable[[str, Config], ModelSpec]] = {
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
}
"""(name, config) -> the spec, by the name of diffusers' class."""


def spec_of(transformer: Any) -> ModelSpec:
    """The spec of a diffusers transformer, read from its `config`; its weights are not looked at.

    `make_adapter(transformer, spec_of(transformer))` is the network as the engine sees it, with the numerics that it
    has in diffusers. Two fields are what diffusers' pipelines make of them, and are changed by `spec.model_copy`:
    guidance acts on all channels, and captions have 120 tokens.

    Raises:
        UserError: tcbench knows no adapter for its class, or its config asks for what the adapter does not compute.
    """
    name = type(transformer).__name__
    if name not in TRANSFORMERS:
        raise UserError(f"{name}: no transformer that tcbench has an adapter for; {did_you_mean(name, TRANSFORMERS)}")
    return TRANSFORMERS[name](name, transformer.config)
