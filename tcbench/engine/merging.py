"""Tokens merged before a part and its output given back to all of them (`tcbench.plan.Merged`)."""

import torch
from torch import Tensor

from tcbench.engine.cache import take_tokens
from tcbench.models.adapter import Adapter, Gated
from tcbench.plan import Merged, Site


def merge(h_RND: Tensor, merged: Merged, text: int = 0) -> Tensor:
    """The mean of every group's tokens, behind the `text` tokens at the head of a joint stream: [R, text + K, D]."""
    image = h_RND[:, text:]
    rows, count = len(image), merged.count
    place = torch.arange(rows, device=image.device)[:, None].expand_as(merged.group_RN), merged.group_RN
    # not scatter_reduce, whose sums come in another order every time on a GPU
    sums = image.new_zeros(rows, count, image.shape[2]).index_put(place, image, accumulate=True)
    sizes = image.new_zeros(rows, count).index_put(place, image.new_ones(()), accumulate=True)
    return torch.cat([h_RND[:, :text], sums / sizes.unsqueeze(2)], dim=1)


def unmerge(value_RKD: Tensor, merged: Merged, text: int = 0) -> Tensor:
    """Every token's value, which is its group's: [R, text + N, D]."""
    return torch.cat([value_RKD[:, :text], take_tokens(value_RKD[:, text:], merged.group_RN)], dim=1)


def part_of_groups(adapter: Adapter, site: Site, merged: Merged, h_RND: Tensor, gated: Gated) -> Tensor:
    """A part of merged tokens for all of them, before its gate, by the model's own layers: [R, N, D].

    Args:
        h_RND: the part's input for all tokens.
    """
    text, module, index = adapter.shape.joint_text, adapter.blocks[site.block], merged.index_RK
    h = merge(h_RND, merged, text)
    match adapter.shape.kind(site):
        case "pointwise":
            value = adapter.pointwise(module, h)
        case "cross":
            value = adapter.cross(module, adapter.text_queries(module, h), gated)
        case "mix":
            if text:
                head = torch.arange(text, device=index.device).expand(len(index), -1)
                index = torch.cat([head, index + text], dim=1)
            queries, (keys, values) = adapter.queries(module, h, index), adapter.keys_values(module, h, index)
            value = adapter.mix(module, h, queries, keys, values, index, index)
    return unmerge(value, merged, text)
