"""Random small rotations, scalings and shifts."""

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class Affine(BaseModel):
    """Bounds of a random affine map, drawn uniformly and independently for each image; all 0 leaves images alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rotation: float = Field(default=0.0, ge=0, description="degrees, either way")
    scale: float = Field(default=0.0, ge=0, lt=1, description="relative enlargement or reduction")
    shift: float = Field(default=0.0, ge=0, description="pixels, either way, in x and in y")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Map images [B, C, H, W] in [-1, 1], with -1, the background, coming in from outside."""
        if self == Affine():
            return images

        def uniform(bound: float) -> Tensor:
            draw = torch.rand(len(images), generator=generator, device=images.device)
            return bound * (2 * draw - 1)

        angle, zoom = torch.deg2rad(uniform(self.rotation)), 1 + uniform(self.scale)
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        pixel = 2 / images.shape[-1]  # affine_grid's unit is half the image's side
        rows = [cos, -sin, uniform(self.shift * pixel), sin, cos, uniform(self.shift * pixel)]
        grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
        moved = F.grid_sample(images + 1, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
        return (moved - 1).clamp(-1, 1)
