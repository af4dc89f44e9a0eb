"""WF-VAE (Li et al. 2024), the video autoencoder of Open-Sora-Plan v1.3: 4k + 1 frames to k + 1 latent frames and back.

A main path of residual blocks, and beside it Haar wavelets: what is low in frequency takes a short way ("energy flow").
Everything is causal in time but one upsampling of the decoder, which looks at the next latent frame. So a video may
pass in slices that bound the memory: every layer keeps the few frames that the next slice needs (`Slice`), and slices
give the same video as the whole at once. With group norm, whose statistics are the whole video's, there is one slice.

Videos and latents are [B, C, T, H, W] outside. Inside, activations are [B, T, H, W, C]: layer norm and attention work
on the last axis, and it is the layout of cuDNN's convolutions in 16 bit.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from torch import Tensor, nn

from tcbench.data import has_nan, refuse_nan
from tcbench.errors import UserError
from tcbench.models.weights import check_state, read_pickle
from tcbench.precision import Dtype, products, weights_dtype
from tcbench.record.files import read_json

SPACE, TIME = 8, 4  # pixels and frames of a latent's
GROUPS = 32
EPS = 1e-6
RGB = 3
POSITIONS = 2**13  # of latents in a slice: 8 frames of 32 x 32
WEIGHTS = "merged.ckpt"

SPACE_TIME_HAAR = (1, 2, 3), 0.3536  # the reference's constant, not 1 / sqrt(8)
SPACE_HAAR = (3, 2), 0.5
"""Axes of [B, T, H, W, C], that of the most significant bit of a subband's number first, and the filters' factor."""

BLOCKS = {
    "l1_dowmsample_block": "Downsample",
    "l1_downsample_wavelet": "HaarWaveletTransform2D",
    "l2_dowmsample_block": "Spatial2xTime2x3DDownsample",
    "l2_downsample_wavelet": "HaarWaveletTransform3D",
    "l1_upsample_block": "Upsample",
    "l1_upsample_wavelet": "InverseHaarWaveletTransform2D",
    "l2_upsample_block": "Spatial2xTime2x3DUpsample",
    "l2_upsample_wavelet": "InverseHaarWaveletTransform3D",
}
"""Fields of config.json that name parts, spelled as there, and the only parts of v1.3."""


class WFVAEConfig(BaseModel):
    """What config.json says of the network; defaults are the reference class's, which are not the values of v1.3.0."""

    model_config = ConfigDict(extra="ignore", frozen=True)  # as the reference, which warns of fields it does not know

    latent_dim: PositiveInt = 8
    base_channels: PositiveInt = 128
    encoder_num_resblocks: PositiveInt = 2
    encoder_energy_flow_hidden_size: PositiveInt = 64
    decoder_num_resblocks: PositiveInt = 2
    decoder_energy_flow_hidden_size: PositiveInt = 128
    connect_res_layer_num: PositiveInt = 1
    use_attention: bool = True
    norm_type: Literal["layernorm", "groupnorm"] = "groupnorm"
    t_interpolation: Literal["trilinear", "nearest"] = "nearest"
    scale: tuple[float, ...] = Field((0.18215,) * 8, description="latents are multiplied by it for the denoiser")
    shift: tuple[float, ...] = Field((0.0,) * 8, description="latents are lowered by it before")

    @model_validator(mode="after")
    def _check(self) -> "WFVAEConfig":
        if self.decoder_energy_flow_hidden_size != self.base_channels:
            raise ValueError("decoder_energy_flow_hidden_size is not base_channels, which v1.3's side branches need")
        if len(self.scale) != self.latent_dim or len(self.shift) != self.latent_dim:
            raise ValueError("scale and shift need latent_dim numbers each")
        if self.norm_type == "groupnorm":
            widths = [self.base_channels, 2 * self.base_channels + self.encoder_energy_flow_hidden_size]
            if any(width % GROUPS for width in widths):
                raise ValueError(f"{widths} channels are not in {GROUPS} groups")
        return self


# --- slices of a video


@dataclass(frozen=True)
class Slice:
    """A stretch of frames on its way through the network.

    Attributes:
        first, last: whether it begins and ends the video.
        kept: what a layer needs of the frames before, by layer, which replaces it for the slice behind.
    """

    first: bool = True
    last: bool = True
    kept: dict[nn.Module, Tensor] = field(default_factory=dict)

    def continued(self, layer: nn.Module, x: Tensor, copies: int) -> Tensor:
        """Frames with what `layer` kept in front of them, or copies of the video's first frame."""
        front = x[:, :1].expand(-1, copies, -1, -1, -1) if self.first else self.kept.pop(layer)
        return torch.cat([front, x], dim=1)

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        """Remember frames for the slice behind; a copy, so that nothing else stays in memory."""
        if not self.last:
            self.kept[layer] = frames.clone()


def _slices(length: int, step: int | None) -> Iterator[tuple[slice, Slice]]:
    """Stretches of `step` latent frames, the first with one more; of all without `step`."""
    kept: dict[nn.Module, Tensor] = {}
    starts = [0, *range(step + 1, length, step)] if step else [0]
    for start, stop in zip(starts, [*starts[1:], length], strict=True):
        yield slice(start, stop), Slice(start == 0, stop == length, kept)


# --- layers: (activations [B, T, H, W, C], slice) -> activations


class FrameConv(nn.Conv2d):
    """A convolution of every frame by itself."""

    def forward(self, x: Tensor, part: Slice) -> Tensor:  # type: ignore[override]
        """Convolve."""
        frames = super().forward(x.flatten(0, 1).permute(0, 3, 1, 2))
        return frames.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


class CausalConv(nn.Module):
    """A convolution that sees no later frame; copies of the first frame stand before it."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, (0, padding, padding))

    def forward(self, x: Tensor, part: Slice) -> Tensor:
        """Convolve."""
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        if kernel == 1:
            return F.linear(x, self.conv.weight.flatten(1), self.conv.bias)
        x = part.continued(self, x, kernel - 1)
        out = self.conv(x.movedim(-1, 1)).movedim(1, -1)
        part.keep(self, x[:, stride * out.shape[1] :])
        return out


def pointwise(in_channels: int, out_channels: int) -> CausalConv:
    """A product of the channels."""
    return CausalConv(in_channels, out_channels, kernel=1, padding=0)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of every position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        return self.norm(x)


class GroupNorm(nn.GroupNorm):
    """Group norm over frames, height and width, too."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


Norm = Callable[[int], nn.Module]
NORMS: dict[str, Norm] = {"layernorm": ChannelNorm, "groupnorm": GroupNorm}


class ResidualBlock(nn.Module):
    """Two times norm, SiLU and causal convolution, added to the input."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm, conv: Any = CausalConv) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(in_channels), norm(out_channels)
        self.conv1 = conv(in_channels, out_channels, 3, padding=1)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = pointwise(in_channels, out_channels)

    def forward(self, x: Tensor, part: Slice) -> Tensor:
        """Compute the block."""
        h = self.conv1(F.silu(self.norm1(x), inplace=True), part)
        h = self.conv2(F.silu(self.norm2(h), inplace=True), part)
        return h.add_(self.nin_shortcut(x, part) if hasattr(self, "nin_shortcut") else x)


class FrameResidualBlock(ResidualBlock):
    """A residual block of every frame by itself, of as many channels as come in."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__(channels, channels, norm, FrameConv)

    def forward(self, x: Tensor, part: Slice) -> Tensor:
        """Compute the block; frames stand on the batch's axis, so that group norm, too, is by frame."""
        frames = super().forward(x.flatten(0, 1).unsqueeze(1), part)
        return frames.squeeze(1).unflatten(0, x.shape[:2])


class Attention(nn.Module):
    """Self-attention of one head among the positions of every frame, added to the input."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (pointwise(channels, channels) for _ in range(4))

    def forward(self, x: Tensor, part: Slice) -> Tensor:
        """Compute the block."""
        h = self.norm(x)
        q, k, v = (of(h, part).flatten(2, 3).flatten(0, 1).unsqueeze(1) for of in (self.q, self.k, self.v))
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).view(x.shape), part)


class Downsample(nn.Module):
    """Halves the sides, and the frames if its convolution is causal."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, part: Slice) -> Tensor:
        """Pad right and bottom, then convolve."""
        return self.conv(F.pad(x, (0, 0, 0, 1, 0, 1)), part)


def _enlarge(x: Tensor, mode: str) -> Tensor:
    frames = F.interpolate(x.flatten(0, 1).permute(0, 3, 1, 2), scale_factor=2.0, mode=mode)
    return frames.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


class Upsample(nn.Module):
    """Doubles the sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = FrameConv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, part: Slice) -> Tensor:
        """Repeat, then convolve."""
        return self.conv(_enlarge(x, "nearest"), part)


class SpaceTimeUpsample(nn.Module):
    """Doubles the sides, and all frames but the video's first, of which the others see nothing until they are enlarged.

    Linear in time, a frame's second half waits for the next frame: until its slice comes, or the video ends.
    """

    def __init__(self, channels: int, in_time: str) -> None:
        super().__init__()
        self.in_time = in_time
        self.conv = CausalConv(channels, channels)

    def forward(self, x: Tensor, part: Slice) -> Tensor:
        """Interpolate, then convolve."""
        rest = x[:, part.first :]
        if rest.shape[1]:
            rest = rest.repeat_interleave(2, dim=1) if self.in_time == "nearest" else self._between(rest, part)
        return self.conv(_enlarge(torch.cat([x[:, : part.first], rest], dim=1), "bilinear"), part)

    def _between(self, x: Tensor, part: Slice) -> Tensor:
        """Frames at a quarter and three quarters between neighbours; before the first and after the last, copies."""
        known = part.continued(self, x, 1)
        part.keep(self, x[:, -1:])
        if part.last:
            known = torch.cat([known, x[:, -1:]], dim=1)
        pairs = [torch.lerp(known[:, :-1], known[:, 1:], place) for place in (0.25, 0.75)]
        between = torch.stack(pairs, dim=2).flatten(1, 2)
        return between[:, int(part.first) : between.shape[1] - int(part.last)]


class Haar(nn.Module):
    """Sums and differences (earlier minus later) of neighbours: [..., C] to [..., 2^axes C], subbands one by one."""

    def __init__(self, axes: tuple[int, ...], factor: float) -> None:
        super().__init__()
        self.axes, self.factor = axes, factor

    def forward(self, x: Tensor, part: Slice) -> Tensor:
        """Transform; in time, a copy stands before the first frame."""
        if part.first and 1 in self.axes:
            x = torch.cat([x[:, :1], x], dim=1)
        for axis in reversed(self.axes):
            earlier, later = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
            x = torch.cat([earlier + later, earlier - later], dim=-1)
        return x * self.factor


class InverseHaar(Haar):
    """Neighbours from their sums and differences."""

    def forward(self, x: Tensor, part: Slice) -> Tensor:
        """Transform back; in time, without the first frame, which is `Haar`'s copy."""
        for axis in self.axes:
            total, difference = x.chunk(2, dim=-1)
            x = torch.stack([total + difference, total - difference], dim=axis + 1).flatten(axis, axis + 1)
        return self.factor * (x[:, 1:] if part.first and 1 in self.axes else x)


class Chain(nn.ModuleList):
    """Layers one after the other."""

    def forward(self, x: Tensor, part: Slice) -> Tensor:
        """Compute them."""
        for layer in self:
            x = layer(x, part)
        return x


# --- the network


def _middle(channels_in: int, channels: int, channels_out: int, norm: Norm, attention: bool) -> Chain:
    between = [Attention(channels, norm)] if attention else []
    return Chain([ResidualBlock(channels_in, channels, norm), *between, ResidualBlock(channels, channels_out, norm)])


class Encoder(nn.Module):
    """Video [B, T, H, W, 3] to mean and log variance [B, T / 4, H / 8, W / 8, 2 latent_dim]."""

    def __init__(self, config: WFVAEConfig) -> None:
        super().__init__()
        c, side, norm = config.base_channels, config.encoder_energy_flow_hidden_size, NORMS[config.norm_type]
        repeats = range(config.encoder_num_resblocks)
        self.wavelet_in, self.wavelet_l2 = Haar(*SPACE_TIME_HAAR), Haar(*SPACE_TIME_HAAR)
        self.wavelet_l1 = Haar(*SPACE_HAAR)
        self.connect_l1 = FrameConv(4 * RGB, side, 3, padding=1)
        self.connect_l2 = FrameConv(8 * RGB, side, 3, padding=1)
        self.down1 = Chain(
            [
                FrameConv(8 * RGB, c, 3, padding=1),
                *(FrameResidualBlock(c, norm) for _ in repeats),
                Downsample(FrameConv(c, c, 3, stride=2)),
            ]
        )
        self.down2 = Chain(
            [
                FrameConv(c + side, 2 * c, 3, padding=1),
                *(ResidualBlock(2 * c, 2 * c, norm) for _ in repeats),
                Downsample(CausalConv(2 * c, 2 * c, stride=2, padding=0)),
            ]
        )
        self.mid = _middle(2 * c + side, 4 * c, 4 * c, norm, config.use_attention)
        self.norm_out = norm(4 * c)
        self.conv_out = CausalConv(4 * c, 2 * config.latent_dim)

    def forward(self, video: Tensor, part: Slice) -> Tensor:
        """Encode a slice: 4k frames, or 4k + 1 if it is the first."""
        subbands = self.wavelet_in(video, part)
        low = self.wavelet_l1(subbands[..., :RGB], part)
        lowest = self.wavelet_l2(low[..., :RGB], part)
        x = torch.cat([self.down1(subbands, part), self.connect_l1(low, part)], dim=-1)
        x = torch.cat([self.down2(x, part), self.connect_l2(lowest, part)], dim=-1)
        return self.conv_out(F.silu(self.norm_out(self.mid(x, part)), inplace=True), part)


class Decoder(nn.Module):
    """Latents [B, t, h, w, latent_dim] to video [B, 4 (t - 1) + 1, 8h, 8w, 3]."""

    def __init__(self, config: WFVAEConfig) -> None:
        super().__init__()
        c, norm, more = config.base_channels, NORMS[config.norm_type], range(config.decoder_num_resblocks - 1)
        self.conv_in = CausalConv(config.latent_dim, 4 * c)
        self.mid = _middle(4 * c, 4 * c, 5 * c, norm, config.use_attention)
        self.up2 = Chain(
            [
                *(ResidualBlock(4 * c, 4 * c, norm) for _ in range(config.decoder_num_resblocks)),
                SpaceTimeUpsample(4 * c, config.t_interpolation),
                ResidualBlock(4 * c, 5 * c, norm),
            ]
        )
        self.up1 = Chain(
            [
                ResidualBlock(4 * c, 2 * c, norm),
                *(ResidualBlock(2 * c, 2 * c, norm) for _ in more),
                Upsample(2 * c),
                ResidualBlock(2 * c, 2 * c, norm),
            ]
        )
        self.layer = Chain([ResidualBlock(2 * c, c, norm), ResidualBlock(c, c, norm)])
        repeats = range(config.connect_res_layer_num)
        self.connect_l2, self.connect_l1 = (
            Chain([*(ResidualBlock(c, c, norm) for _ in repeats), FrameConv(c, bands * RGB, 3, padding=1)])
            for bands in (8, 4)
        )
        self.wavelet_l2, self.wavelet_out = InverseHaar(*SPACE_TIME_HAAR), InverseHaar(*SPACE_TIME_HAAR)
        self.wavelet_l1 = InverseHaar(*SPACE_HAAR)
        self.norm_out = norm(c)
        self.conv_out = FrameConv(c, 8 * RGB, 3, padding=1)
        self.split = [4 * c, c]  # main path and side branch

    def forward(self, z: Tensor, part: Slice) -> Tensor:
        """Decode a slice of two latent frames or more if it is the first but not the only one, else of any number."""
        x, side = self.mid(self.conv_in(z, part), part).split(self.split, dim=-1)
        lowest = self.wavelet_l2(self.connect_l2(side, part), part)
        x, side = self.up2(x, part).split(self.split, dim=-1)
        low = self.connect_l1(side, part)
        low[..., :RGB] += self._due(lowest, low.shape[1], part)
        subbands = self.wavelet_l1(low, part)
        x = self.layer(self.up1(x, part), part)
        x = self.conv_out(F.silu(self.norm_out(x), inplace=True), part)
        x[..., :RGB] += subbands
        return self.wavelet_out(x, part)

    def _due(self, lowest: Tensor, frames: int, part: Slice) -> Tensor:
        """As many frames as the main path is through with: the upsampling there holds one back until the next slice."""
        lowest = part.continued(self, lowest, 0)
        part.keep(self, lowest[:, frames:])
        return lowest[:, :frames]


class WFVAE(nn.Module):
    """Encoder and decoder, for inference."""

    def __init__(self, config: WFVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    @torch.no_grad()
    def encode(self, video: Tensor, at_once: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior, [B, latent_dim, (T - 1) / 4 + 1, H / 8, W / 8].

        Args:
            video: [B, 3, T, H, W] in [-1, 1]; T is 4k + 1, H and W are multiples of 8.
            at_once: latent frames of a slice; all by default.

        Raises:
            UserError: the video is of another size.
        """
        frames, *sides = video.shape[2:]
        if frames % TIME != 1 or any(side % SPACE for side in sides):
            raise UserError(
                f"a video of {frames} frames of {sides[0]}x{sides[1]}; WF-VAE encodes {TIME}k + 1 frames, and sides "
                f"that are multiples of {SPACE}"
            )
        x, parts = video.movedim(1, -1).contiguous(), []
        for where, part in _slices((frames - 1) // TIME + 1, self._step(at_once)):
            start = TIME * where.start - (TIME - 1) * (not part.first)
            parts.append(self.encoder(x[:, start : TIME * (where.stop - 1) + 1], part))
        mean, log_variance = torch.cat(parts, dim=1).movedim(-1, 1).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    @torch.no_grad()
    def decode(self, z: Tensor, at_once: int | None = None) -> Tensor:
        """Videos [B, 3, 4 (t - 1) + 1, 8h, 8w], some values beyond [-1, 1].

        Args:
            z: as `encode` gives them, [B, latent_dim, t, h, w].
            at_once: latent frames of a slice; all by default.
        """
        x = z.movedim(1, -1).contiguous()
        parts = [self.decoder(x[:, where], part) for where, part in _slices(x.shape[1], self._step(at_once))]
        return torch.cat(parts, dim=1).movedim(-1, 1)

    def _step(self, at_once: int | None) -> int | None:
        return None if self.config.norm_type == "groupnorm" else at_once


# --- files


def read_config(path: Path) -> WFVAEConfig:
    """The network's shape from a config.json.

    Raises:
        UserError: it is missing, or of another network or version.
    """
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("_class_name") != "WFVAEModel":
        raise UserError(f"{path}: not the config of a WFVAEModel; give the folder of Open-Sora-Plan v1.3's vae")
    for name, known in BLOCKS.items():
        if raw.get(name, known) != known:
            raise UserError(f"{path}: {name}: {raw[name]!r} is not {known!r}; only WF-VAE of v1.3 is run here")
    try:
        return WFVAEConfig.model_validate({name: value for name, value in raw.items() if value is not None})
    except ValidationError as error:
        problem = error.errors()[0]
        field = ": ".join([*map(str, problem["loc"]), problem["msg"].removeprefix("Value error, ")])
        raise UserError(f"{path}: {field}; get it again") from error


SAVED_UNDER = (("ema_state_dict",), ("state_dict", "gen_model"), ("state_dict",), ())
"""Where the reference's loader looks for weights: averaged ones, its trainer's, other trainers', the file itself."""


def weights_in(saved: Any, path: Path) -> dict[str, Tensor]:
    """The network's tensors in what was read from `path`; the wavelets' filters in some files are constants here.

    Raises:
        UserError: there is something else.
    """
    state = next((found for keys in SAVED_UNDER if (found := _inside(saved, keys))), None)
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: not a checkpoint of WF-VAE; give the merged.ckpt of Open-Sora-Plan v1.3's vae")
    tensors = {name.replace("module.", ""): value for name, value in state.items() if isinstance(value, Tensor)}
    ours = re.compile(r"(en|de)coder\.(?!(inverse_)?wavelet_trans?form_)")
    return {name: tensor for name, tensor in tensors.items() if ours.match(name)}


def _inside(saved: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        saved = saved.get(key) if isinstance(saved, Mapping) else None
    return saved


def build_wf_vae(
    config: WFVAEConfig,
    state: Mapping[str, Tensor] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> WFVAE:
    """The network in eval mode, with these weights or random ones."""
    with torch.device("meta" if state else "cpu"):
        model = WFVAE(config)
    if state:
        model.load_state_dict(state, assign=True)
    model.to(device, dtype).requires_grad_(False)
    for weight in model.parameters():  # as the activations, or every call would copy them
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim)
        if layout:
            weight.data = weight.data.contiguous(memory_format=layout)
    return model.eval()


def load_wf_vae(folder: Path, device: torch.device | str, dtype: torch.dtype) -> WFVAE:
    """The network of a folder with config.json and merged.ckpt; nothing in the files is executed.

    Raises:
        UserError: a file is missing, damaged or another network's.
    """
    config, path = folder / "config.json", folder / WEIGHTS
    if lacking := [file.name for file in (config, path) if not file.exists()]:
        raise UserError(f"{folder}: no WF-VAE there ({lacking[0]} is missing); download its whole folder")
    settings, state = read_config(config), weights_in(read_pickle(path), path)
    with torch.device("meta"):
        check_state(state, WFVAE(settings), "WF-VAE", path)
    return build_wf_vae(settings, state, device=device, dtype=dtype)


# --- what stands behind the denoiser


class VideoAutoencoder:
    """WF-VAE of a folder, as the denoiser's latents and videos of bytes need it.

    Args:
        dtype: what it computes in; the reference takes `fp16`.

    Attributes:
        channels: of a latent.

    Raises:
        UserError: as `load_wf_vae`.
    """

    def __init__(self, folder: Path, device: torch.device | str, dtype: Dtype = "fp32") -> None:
        self.device, self.products, self.dtype = torch.device(device), dtype, weights_dtype(dtype)
        self.vae = load_wf_vae(folder, self.device, self.dtype)
        self.channels = self.vae.config.latent_dim
        self.scale, self.shift = (
            torch.tensor(by_channel, device=self.device)[:, None, None, None]
            for by_channel in (self.vae.config.scale, self.vae.config.shift)
        )

    def encode(self, videos: Tensor, noise: Tensor) -> Tensor:
        """Scaled latents drawn from the posterior, float32 [n, C, t, h, w] on the CPU.

        Args:
            videos: [n, 3, T, H, W] in [-1, 1].
            noise: standard normal, of the latents' shape.
        """
        latents = []
        for video, draw in zip(videos.split(1), noise.split(1), strict=True):
            pixels = video.to(self.device, self.dtype)
            with products(self.products):
                mean, log_variance = (part.float() for part in self.vae.encode(pixels, _at_once(noise)))
            z = mean + torch.exp(log_variance / 2) * draw.to(self.device)
            latents.append(((z - self.shift) * self.scale).cpu())
        return torch.cat(latents)

    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Videos of scaled latents [n, C, t, h, w], and which of them hold NaN; nothing waits for the device.

        Returns:
            uint8 [n, 3, T, H, W] and bool [n], on the autoencoder's device
        """
        z = (latents.to(self.device) / self.scale + self.shift).to(self.dtype)
        videos, broken = [], []
        with products(self.products):
            for video in z.split(1):
                decoded = self.vae.decode(video, _at_once(z))
                videos.append(_cut_off(decoded))
                broken.append(has_nan(decoded))
        return torch.cat(videos), torch.cat(broken)


def _at_once(latents: Tensor) -> int:
    """Latent frames of a slice."""
    height, width = latents.shape[-2:]
    return max(1, POSITIONS // (height * width))


def to_bytes(videos: Tensor) -> Tensor:
    """Videos in [-1, 1] (values outside are clamped) as uint8, cut off as the reference does and not rounded.

    Raises:
        UserError: a video holds NaN.
    """
    refuse_nan(has_nan(videos))
    return _cut_off(videos)


def _cut_off(videos: Tensor) -> Tensor:
    return ((videos.float() / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
