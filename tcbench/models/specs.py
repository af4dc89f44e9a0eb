"""Which denoisers exist, and their shapes: the specs of all families and the one list of models. Imports no torch.

`tcbench.models.networks` builds and loads the network of a spec.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tcbench.guidance import GUIDANCE, Guidance, GuidanceKind
from tcbench.precision import Dtype
from tcbench.shapes import BlockShape, Macs, ModelShape, cross_attention, mlp, self_attention

SPARSE_GROUPS = 4  # Open-Sora-Plan's "sparse_n"
FREQUENCIES = 256
"""Of the sinusoids that a timestep becomes, in every family."""

Shift = float | Literal["by_tokens"]
"""Of a flow's steps towards noise (`tcbench.samplers`): a number, or one that grows with an image's tokens."""

LatentsKind = Literal["sd", "wf", "wan"]
"""Stable Diffusion's or one of its kind, Open-Sora-Plan's WF-VAE, Wan 2.1's."""


class ModelSpec(BaseModel, ABC):
    """The shape of a denoiser, and where its trained weights are; every family adds to it.

    Latents are [B, *latent_shape]. The output has `out_channels`, of which the first `in_channels` are the prediction
    (eps or v) and the rest, if any, the learned variance.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    family: str
    num_blocks: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    patch_size: int = Field(default=2, gt=0)
    in_channels: int = Field(gt=0)
    out_channels: int = Field(gt=0)
    guided_channels: int = Field(gt=0, description="CFG acts on the first this-many channels of the prediction")
    guidance_kind: ClassVar[GuidanceKind] = "pair"
    solvers: ClassVar[tuple[str, ...]] = ("ddim", "dpm")
    """The solvers that take what the network predicts: eps here."""
    shift: Shift = Field(default=1.0, description="of a flow's steps towards noise")
    latents_kind: ClassVar[LatentsKind] = "sd"
    """Whose autoencoder made the latents that it was trained on."""
    reference_dtype: ClassVar[Dtype] = "tf32"
    """What the family's reference code computes in on a GPU: here DiT's `sample_ddp.py`."""
    norm_eps: float = Field(default=1e-6, gt=0)
    weights: str | None = Field(default=None, description="a file in the package's assets, or a user's path")

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_heads * self.head_dim

    def guidance(self, scale: float = 1.0) -> Guidance:
        """How the family guides."""
        return GUIDANCE[self.guidance_kind](scale, self.guided_channels)

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Of one sample: (channels, height, width), with frames after the channels for a video."""

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's or a frame's tokens."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Tokens of one sample."""

    @property
    @abstractmethod
    def shape(self) -> ModelShape:
        """What costing and planning need to know of the model."""


class ImageSpec(ModelSpec):
    """A model of square images."""

    sample_size: int = Field(gt=0, description="side of the latent, in latent pixels")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        side = self.sample_size // self.patch_size
        return side, side

    @property
    def num_tokens(self) -> int:
        """Tokens of one sample."""
        return self.grid[0] * self.grid[1]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(channels, height, width)."""
        return (self.in_channels, self.sample_size, self.sample_size)


class VideoSpec(ModelSpec):
    """A model of videos; time is not patched."""

    sample_frames: int = Field(gt=0, description="latent frames")
    sample_height: int = Field(gt=0, description="of the latent, in latent pixels")
    sample_width: int = Field(gt=0, description="of the latent, in latent pixels")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of a frame's tokens."""
        return self.sample_height // self.patch_size, self.sample_width // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of one sample."""
        return self.sample_frames * self.grid[0] * self.grid[1]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(channels, frames, height, width)."""
        return (self.in_channels, self.sample_frames, self.sample_height, self.sample_width)


class DiTSpec(ImageSpec):
    """A DiT; the null label is `num_classes`."""

    family: Literal["dit"] = "dit"
    num_classes: int = Field(gt=0)

    @property
    def shape(self) -> ModelShape:
        """Blocks of self-attention and MLP, each with a modulation of its own."""
        width, tokens = self.width, self.num_tokens
        patch_in, patch_out = (channels * self.patch_size**2 for channels in (self.in_channels, self.out_channels))
        block = BlockShape((self_attention(width), mlp(width, 4 * width)), modulation=Macs(6 * width**2))
        return ModelShape(
            blocks=(block,) * self.num_blocks,
            num_tokens=tokens,
            width=width,
            grid=self.grid,
            latent_shape=self.latent_shape,
            output_shape=(self.out_channels, *self.latent_shape[1:]),
            outer=Macs(
                # patch convolution, timestep MLP, final modulation, final linear
                matmul=patch_in * width * tokens
                + FREQUENCIES * width
                + width**2
                + 2 * width**2
                + patch_out * width * tokens,
                norm_elements=width * tokens,
            ),
        )


Padding = Literal["masked", "encoded", "zeroed"]
"""Of captions: nobody looks at it; text encoder and denoiser look at it as at any token; the encoder does not, its
states are zeros, and the denoiser looks at them."""


class TextSpec(ModelSpec):
    """A model that reads captions of `caption_tokens` states with `caption_channels` channels each."""

    padding: ClassVar[Padding] = "masked"
    reference_dtype: ClassVar[Dtype] = "fp16"  # PixArt-alpha's and Open-Sora-Plan's code alike
    caption_channels: int = Field(gt=0)
    caption_tokens: int = Field(gt=0)
    null_caption: bool = Field(default=True, description="whether a null caption is part of the weights")

    def text_shape(self, frames: int, groups: Sequence[int]) -> ModelShape:
        """The shape of what PixArt-alpha and Open-Sora-Plan have in common.

        Args:
            groups: by block, into how many groups the tokens of its self-attention fall apart.
        """
        width, tokens, text = self.width, self.num_tokens, self.caption_tokens
        patch_in, patch_out = (channels * self.patch_size**2 for channels in (self.in_channels, self.out_channels))
        projection = text * (self.caption_channels * width + width**2)
        cross = cross_attention(width, text)
        return ModelShape(
            blocks=tuple(BlockShape((self_attention(width, count), cross, mlp(width, 4 * width))) for count in groups),
            num_tokens=tokens,
            width=width,
            grid=self.grid,
            latent_shape=self.latent_shape,
            output_shape=(self.out_channels, *self.latent_shape[1:]),
            frames=frames,
            # caption projection, keys and values of all blocks; the paper's count has them in every step instead
            once=Macs(once := projection + self.num_blocks * cross.text_macs, repeated=-once),
            outer=Macs(
                # patch convolution, timestep MLP, adaLN-single, final linear
                matmul=patch_in * width * tokens
                + FREQUENCIES * width
                + width**2
                + 6 * width**2
                + patch_out * width * tokens,
                norm_elements=width * tokens,
                repeated=projection,
            ),
        )


class PixArtSpec(ImageSpec, TextSpec):
    """A PixArt-alpha; `sized` ones (1024-MS) are also told the image's size and aspect ratio."""

    family: Literal["pixart"] = "pixart"
    sized: bool = False

    @property
    def shape(self) -> ModelShape:
        """Blocks of self-attention, cross-attention and MLP."""
        shape = self.text_shape(frames=1, groups=(1,) * self.num_blocks)
        if not self.sized:
            return shape
        third = self.width // 3  # height, width and aspect ratio are embedded in a third of the channels each
        return replace(shape, outer=shape.outer + Macs(3 * (FREQUENCIES * third + third**2)))


class OpenSoraPlanSpec(VideoSpec, TextSpec):
    """An Open-Sora-Plan; blocks but the `dense_blocks` attend sparsely."""

    family: Literal["open_sora_plan"] = "open_sora_plan"
    latents_kind: ClassVar[LatentsKind] = "wf"
    solvers: ClassVar[tuple[str, ...]] = ("euler_ancestral",)  # which predicts v
    dense_blocks: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> "OpenSoraPlanSpec":
        if self.num_tokens % SPARSE_GROUPS**2:
            raise ValueError(f"{self.num_tokens} tokens; skiparse attention needs a multiple of {SPARSE_GROUPS**2}")
        if self.head_dim % 6:
            raise ValueError(f"head_dim {self.head_dim}; three rotary axes need a multiple of 6")
        return self

    @property
    def shape(self) -> ModelShape:
        """Blocks of self-attention, in groups where they are sparse, cross-attention and MLP."""
        groups = [1 if block in self.dense_blocks else SPARSE_GROUPS for block in range(self.num_blocks)]
        return self.text_shape(self.sample_frames, groups)


class FluxSpec(TextSpec):
    """A FLUX.1: the first `double_blocks` blocks have weights of their own for the text, and the others are parallel.

    Attributes:
        axes: how many channels of a head are turned to each of a token's three positions; of images the first is 0.
        pooled_channels: of the vector that sums a caption up.
        reads_guidance: whether it was distilled to read the guidance scale (dev), or needs none (schnell).
    """

    family: Literal["flux"] = "flux"
    padding: ClassVar[Padding] = "encoded"
    solvers: ClassVar[tuple[str, ...]] = ("flow",)
    reference_dtype: ClassVar[Dtype] = "bf16"
    null_caption: bool = False
    sample_height: int = Field(gt=0, description="of the latent, in latent pixels")
    sample_width: int = Field(gt=0, description="of the latent, in latent pixels")
    double_blocks: int = Field(ge=0)
    pooled_channels: int = Field(gt=0)
    axes: tuple[int, int, int]
    reads_guidance: bool = True

    @model_validator(mode="after")
    def _check(self) -> "FluxSpec":
        if sum(self.axes) != self.head_dim:
            raise ValueError(f"axes {self.axes} turn {sum(self.axes)} channels, and head_dim is {self.head_dim}")
        if self.double_blocks > self.num_blocks:
            raise ValueError(f"double_blocks {self.double_blocks}, and there are {self.num_blocks} blocks")
        return self

    def guidance(self, scale: float = 1.0) -> Guidance:
        """By the network itself, in one pass, or none."""
        return GUIDANCE["distilled" if self.reads_guidance else "none"](scale, self.guided_channels)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.sample_height // self.patch_size, self.sample_width // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of one sample's image."""
        return self.grid[0] * self.grid[1]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(channels, height, width), before patches become channels."""
        return (self.in_channels, self.sample_height, self.sample_width)

    @property
    def shape(self) -> ModelShape:
        """Blocks of joint self-attention and MLP; the double ones modulate text and image apart."""
        width, tokens = self.width, self.num_tokens
        parts = (self_attention(width), mlp(width, 4 * width))
        double = BlockShape(parts, modulation=Macs(2 * 6 * width**2))
        single = BlockShape(parts, modulation=Macs(3 * width**2), parallel=True)
        ends = (self.in_channels + self.out_channels) * self.patch_size**2 * width * tokens
        # timestep, pooled caption and, where it is read, guidance scale have an MLP each; then the last modulation
        scalars = (1 + self.reads_guidance) * (FREQUENCIES * width + width**2)
        conditioning = scalars + self.pooled_channels * width + width**2 + 2 * width**2
        return ModelShape(
            blocks=(double,) * self.double_blocks + (single,) * (self.num_blocks - self.double_blocks),
            num_tokens=tokens,
            width=width,
            grid=self.grid,
            latent_shape=self.latent_shape,
            output_shape=(self.out_channels, *self.latent_shape[1:]),
            joint_text=self.caption_tokens,
            outer=Macs(ends + conditioning, width * tokens),
            once=Macs(self.caption_tokens * self.caption_channels * width),
        )


class WanSpec(VideoSpec, TextSpec):
    """A Wan 2.1 that makes videos of texts; guidance has a pass for each half."""

    family: Literal["wan"] = "wan"
    padding: ClassVar[Padding] = "zeroed"
    latents_kind: ClassVar[LatentsKind] = "wan"
    guidance_kind: ClassVar[GuidanceKind] = "two_passes"
    solvers: ClassVar[tuple[str, ...]] = ("flow", "flow_unipc")
    reference_dtype: ClassVar[Dtype] = "bf16"
    null_caption: bool = False
    mlp_width: int = Field(gt=0, description="channels between the MLP's two layers")

    @property
    def shape(self) -> ModelShape:
        """Blocks of self-attention, cross-attention behind a LayerNorm, and MLP."""
        width, tokens, text = self.width, self.num_tokens, self.caption_tokens
        cross = cross_attention(width, text, normed=True)
        block = BlockShape((self_attention(width), cross, mlp(width, self.mlp_width)))
        ends = (self.in_channels + self.out_channels) * self.patch_size**2 * width * tokens
        return ModelShape(
            blocks=(block,) * self.num_blocks,
            num_tokens=tokens,
            width=width,
            grid=self.grid,
            latent_shape=self.latent_shape,
            output_shape=(self.out_channels, *self.latent_shape[1:]),
            frames=self.sample_frames,
            outer=Macs(ends + FREQUENCIES * width + width**2 + 6 * width**2, width * tokens),
            once=Macs(text * (self.caption_channels * width + width**2) + self.num_blocks * cross.text_macs),
        )


def _flux(name: str, caption_tokens: int, reads_guidance: bool) -> FluxSpec:
    return FluxSpec(  # 1024 x 1024 pixels
        name=name,
        num_blocks=57,
        double_blocks=19,
        num_heads=24,
        head_dim=128,
        sample_height=128,
        sample_width=128,
        in_channels=16,
        out_channels=16,
        guided_channels=16,
        caption_channels=4096,
        caption_tokens=caption_tokens,
        pooled_channels=768,
        axes=(16, 56, 56),
        reads_guidance=reads_guidance,
        shift="by_tokens" if reads_guidance else 1.0,
    )


def _wan_1_3b(name: str, frames: int) -> WanSpec:
    return WanSpec(  # 480 x 832 pixels
        name=name,
        num_blocks=30,
        num_heads=12,
        head_dim=128,
        sample_frames=1 + (frames - 1) // 4,
        sample_height=60,
        sample_width=104,
        in_channels=16,
        out_channels=16,
        guided_channels=16,
        caption_channels=4096,
        caption_tokens=512,
        mlp_width=8960,
        shift=3.0,
    )


def _dit_xl_2(resolution: int) -> DiTSpec:
    return DiTSpec(
        name=f"dit-xl-2-{resolution}",
        num_blocks=28,
        num_heads=16,
        head_dim=72,
        sample_size=resolution // 8,
        in_channels=4,
        out_channels=8,
        num_classes=1000,
        guided_channels=3,
    )


def _pixart_xl_2(resolution: int) -> PixArtSpec:
    return PixArtSpec(
        name=f"pixart-{resolution}",
        num_blocks=28,
        num_heads=16,
        head_dim=72,
        sample_size=resolution // 8,
        in_channels=4,
        out_channels=8,
        guided_channels=4,
        caption_channels=4096,
        caption_tokens=120,
        sized=resolution == 1024,
    )


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        DiTSpec(
            name="digits-dit",
            num_blocks=14,
            num_heads=4,
            head_dim=16,
            sample_size=16,
            in_channels=1,
            out_channels=1,
            num_classes=10,
            guided_channels=1,
            weights="digits/denoiser.safetensors",
        ),
        DiTSpec(  # as deep as DiT-XL/2 and with as many tokens, so that shares of a step's MACs are the paper's
            name="fashion-dit",
            num_blocks=28,
            num_heads=3,
            head_dim=64,
            sample_size=32,
            in_channels=1,
            out_channels=1,
            num_classes=10,
            guided_channels=1,
        ),
        DiTSpec(  # the same for colours
            name="cifar10-dit",
            num_blocks=28,
            num_heads=3,
            head_dim=64,
            sample_size=32,
            in_channels=3,
            out_channels=3,
            num_classes=10,
            guided_channels=3,
        ),
        PixArtSpec(
            name="scenes-pixart",
            num_blocks=14,
            num_heads=4,
            head_dim=16,
            sample_size=24,
            in_channels=1,
            out_channels=1,
            guided_channels=1,
            caption_channels=64,
            caption_tokens=16,
            weights="scenes/denoiser.safetensors",
        ),
        OpenSoraPlanSpec(
            name="moving-osp",
            num_blocks=16,
            num_heads=3,
            head_dim=24,
            sample_frames=5,
            sample_height=16,
            sample_width=16,
            in_channels=1,
            out_channels=1,
            guided_channels=1,
            caption_channels=64,
            caption_tokens=16,
            dense_blocks=(0, 1, 14, 15),
            weights="moving/denoiser.safetensors",
        ),
        _dit_xl_2(256),
        _dit_xl_2(512),
        _pixart_xl_2(256),
        _pixart_xl_2(1024),
        OpenSoraPlanSpec(  # v1.3.0, 93 frames of 256 x 256
            name="osp-93x256",
            num_blocks=32,
            num_heads=24,
            head_dim=96,
            sample_frames=24,
            sample_height=32,
            sample_width=32,
            in_channels=8,
            out_channels=8,
            guided_channels=8,
            caption_channels=4096,
            caption_tokens=512,
            dense_blocks=(0, 1, 30, 31),
            null_caption=False,
        ),
        _flux("flux-dev", caption_tokens=512, reads_guidance=True),
        _flux("flux-schnell", caption_tokens=256, reads_guidance=False),
        _wan_1_3b("wan-1.3b", frames=81),
        _wan_1_3b("wan-1.3b-17x480", frames=17),
        DiTSpec(
            name="tiny-dit",
            num_blocks=4,
            num_heads=4,
            head_dim=24,
            sample_size=16,
            in_channels=4,
            out_channels=8,
            num_classes=10,
            guided_channels=3,
        ),
        PixArtSpec(
            name="tiny-pixart",
            num_blocks=4,
            num_heads=4,
            head_dim=24,
            sample_size=16,
            in_channels=4,
            out_channels=8,
            guided_channels=4,
            caption_channels=32,
            caption_tokens=12,
        ),
        OpenSoraPlanSpec(
            name="tiny-osp",
            num_blocks=4,
            num_heads=4,
            head_dim=24,
            sample_frames=2,
            sample_height=16,
            sample_width=8,
            in_channels=4,
            out_channels=4,
            guided_channels=4,
            caption_channels=32,
            caption_tokens=12,
            dense_blocks=(0, 3),
        ),
        FluxSpec(
            name="tiny-flux",
            num_blocks=3,
            double_blocks=1,
            num_heads=2,
            head_dim=24,
            sample_height=16,
            sample_width=16,
            in_channels=4,
            out_channels=4,
            guided_channels=4,
            caption_channels=32,
            caption_tokens=6,
            pooled_channels=20,
            axes=(8, 8, 8),
            shift="by_tokens",
        ),
        WanSpec(
            name="tiny-wan",
            num_blocks=3,
            num_heads=2,
            head_dim=24,
            sample_frames=2,
            sample_height=8,
            sample_width=8,
            in_channels=4,
            out_channels=4,
            guided_channels=4,
            caption_channels=32,
            caption_tokens=12,
            mlp_width=140,
            shift=3.0,
        ),
    )
}
"""The known models by name."""
