"""DiT (Peebles & Xie 2023): class-conditional, adaLN-Zero, the class label and the timestep in one vector.

The network is diffusers' `DiTTransformer2DModel` brought to the numerics of the reference (facebookresearch/DiT), from
which the stock class differs in two silent ways: its sinusoid frequencies (`downscale_freq_shift` 1 instead of 0) and
the epsilon of the pre-MLP LayerNorm (1e-5 instead of 1e-6). Its per-block timestep/label embedders, equal copies in
every official conversion, are one shared module here.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from tcbench.errors import UserError
from tcbench.models.adapter import Adapter, Family, Modulation, TransformerBlock
from tcbench.models.layers import unpatchify, xavier_uniform
from tcbench.models.specs import DiTSpec
from tcbench.models.weights import divides

_EMBEDDER = "transformer_blocks.0.norm1.emb"  # where the shared embedder lives in a state dict


class DiTAdapter(Adapter):
    """Block-wise access to a DiT; the prompt is class labels, which are the context as they are."""

    spec: DiTSpec
    fuses = True

    def unread(self) -> str:
        """An embedder of timestep and label that is not the first block's; in official conversions all are equal."""
        first = self.blocks[0].norm1.emb
        for number, block in enumerate(self.blocks):
            emb = block.norm1.emb
            if emb is not first and not all(map(torch.equal, emb.parameters(), first.parameters())):
                return (
                    f"transformer_blocks.{number}.norm1.emb differs from block 0's; tcbench serves one for all blocks"
                )
        return ""

    def drop(self, prompt: Tensor, where_R: Tensor) -> Tensor:
        """Labels, the null label where `where_R`."""
        return prompt.masked_fill(where_R.to(prompt.device), self.spec.num_classes)

    def prepare(self, prompt: Tensor) -> Tensor:
        """The labels."""
        return prompt

    def condition(self, timestep_R: Tensor, context: Tensor) -> Tensor:
        """Timestep plus label embedding, [R, D]; computed once because all blocks share one embedder."""
        labels = context.repeat(len(timestep_R) // len(context))
        return self.blocks[0].norm1.emb(timestep_R, labels, hidden_dtype=self.dtype)

    def plain(self, latent: Tensor, timestep_R: Tensor, prompt: Tensor) -> Tensor:
        """The model's own forward: [R, out_channels, H, W]."""
        return self.model(latent, timestep_R, class_labels=prompt).sample

    def embed(self, latent: Tensor, context: Tensor) -> Tensor:
        """Patches with positions, [R, N, D]."""
        return self.model.pos_embed(latent)

    def modulation(self, block: TransformerBlock, condition: Tensor) -> dict[str, Modulation]:
        """adaLN-Zero's shift, scale and gate by part."""
        parts = block.norm1.linear(block.norm1.silu(condition))[:, None].chunk(6, dim=2)
        return {"attn": Modulation(*parts[:3]), "mlp": Modulation(*parts[3:])}

    def norm(self, block: TransformerBlock, part: str) -> nn.Module:
        """The LayerNorm before a part."""
        return block.norm1.norm if part == "attn" else block.norm3

    def copy_of_block(self, number: int) -> TransformerBlock:
        """A block without the model's embedder, which `condition` has applied."""
        block = super().copy_of_block(number)
        block.norm1.emb = None
        return block

    def final_modulation(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(shift, scale) before the final layer."""
        shift, scale = self.model.proj_out_1(F.silu(condition))[:, None].chunk(2, dim=2)
        return shift, scale

    def final_layer(self, h_RND: Tensor) -> Tensor:
        """The final linear layer and un-patching: [R, out_channels, H, W]."""
        return unpatchify(self.model.proj_out_2(h_RND), self.spec.grid, self.spec.patch_size)


def _skeleton(spec: DiTSpec) -> DiTTransformer2DModel:
    """The network with its parameters on meta and its position embedding computed."""
    with init_empty_weights():
        model = DiTTransformer2DModel(
            num_attention_heads=spec.num_heads,
            attention_head_dim=spec.head_dim,
            in_channels=spec.in_channels,
            out_channels=spec.out_channels,
            num_layers=spec.num_blocks,
            attention_bias=True,
            sample_size=spec.sample_size,
            patch_size=spec.patch_size,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=spec.num_classes,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
            norm_eps=spec.norm_eps,
        )
    embedder = model.transformer_blocks[0].norm1.emb
    embedder.time_proj.downscale_freq_shift = 0
    # every block would drop labels independently; training drops them once, outside, to the null label
    embedder.class_embedder.dropout_prob = 0.0
    for block in model.transformer_blocks:
        block.norm1.emb = embedder
    return model.eval()


def _initial_value(name: str, shape: torch.Size, generator: torch.Generator, zero_init: bool) -> Tensor:
    """The reference's `initialize_weights`; without `zero_init`, every layer shows in the output."""

    def normal(std: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device) * std

    if name.startswith(("proj_out_1.", "proj_out_2.")) or ".norm1.linear." in name:
        return torch.zeros(shape) if zero_init else normal(0.05)
    if name.endswith("bias"):
        return torch.zeros(shape) if zero_init else normal(0.02)
    if "class_embedder" in name:
        return normal(0.02 if zero_init else 0.7)
    if "timestep_embedder" in name:
        return normal(0.02 if zero_init else 0.07)
    # the reference initialises q, k and v as one matrix
    matrices = 3 if ".attn1.to_" in name and ".to_out." not in name else 1
    return xavier_uniform(shape, generator, matrices)


_REFERENCE_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": f"{_EMBEDDER}.timestep_embedder.linear_1",
    "t_embedder.mlp.2": f"{_EMBEDDER}.timestep_embedder.linear_2",
    "y_embedder.embedding_table": f"{_EMBEDDER}.class_embedder.embedding_table",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_REFERENCE_BLOCK_NAMES = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}


def from_reference_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of the reference DiT repository to diffusers' layout, embedder once, under block 0.

    `attn.qkv` is split in thirds. `pos_embed` is dropped: it is fixed, and diffusers recomputes it. Unknown
    names stay as they are, for the loader to report.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, _, kind = key.rpartition(".")  # kind: weight or bias
        if module.startswith("blocks."):
            index, _, inner = module.removeprefix("blocks.").partition(".")
            block = f"transformer_blocks.{index}"
            if inner == "attn.qkv" and divides(tensor, 3):
                for name, part in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{block}.attn1.to_{name}.{kind}"] = part
            else:
                names = [block, _REFERENCE_BLOCK_NAMES.get(inner, inner), kind]
                renamed[".".join(name for name in names if name)] = tensor
        elif key != "pos_embed":
            renamed[f"{_REFERENCE_NAMES.get(module, module)}.{kind}"] = tensor
    return renamed


def _to_diffusers(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    return _without_copies(from_reference_layout(state) if "x_embedder.proj.weight" in state else state, path)


def _without_copies(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Keep one of the equal embedders of an official conversion, and drop its fixed position embedding."""
    kept: dict[str, Tensor] = {}
    for key, tensor in state.items():
        head, marker, tail = key.partition(".norm1.emb.")
        if not marker or head == "transformer_blocks.0":
            kept[key] = tensor
        elif not torch.equal(tensor, state.get(f"{_EMBEDDER}.{tail}", tensor.new_empty(0))):
            raise UserError(f"{path}: {key} differs from block 0's; only checkpoints with one embedder are supported")
    kept.pop("pos_embed.pos_embed", None)
    return kept


FAMILY = Family(DiTAdapter, _skeleton, _initial_value, _to_diffusers)
