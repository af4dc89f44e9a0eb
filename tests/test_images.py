"""Images of a row are read block by block, and are as one tensor of all of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcbench.metrics import deviation, images
from tcbench.metrics.images import Images, blocks
from tcbench.metrics.samples import odd_images


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_slices_are_those_of_a_tensor_in_any_order(sizes: list[int], data: st.DataObject) -> None:
    whole = torch.arange(2 * sum(sizes)).view(-1, 2)
    there = Images(whole.split(sizes))
    assert there.shape == whole.shape and len(there) == len(whole) and not there.is_floating_point()
    index = torch.tensor(data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=12)))
    first, last = sorted(data.draw(st.tuples(st.integers(0, 12), st.integers(1, 12))))
    for rows, same in ((there, whole), (there.taken(index), whole[index])):
        assert torch.equal(rows[:], same)
        if len(same[first:last]):
            assert torch.equal(rows[first:last], same[first:last])
        assert torch.equal(torch.cat([block for (block,) in blocks(rows, most=3)]), same)


def test_blocks_hold_few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "BLOCK_BYTES", 100)
    sides = torch.zeros(10, 30, dtype=torch.uint8), torch.zeros(10, 2)
    assert [tuple(map(len, pair)) for pair in blocks(*sides)] == [(3, 3), (3, 3), (3, 3), (1, 1)]
    assert len(next(blocks(torch.zeros(4, 1000)))[0]) == 1


@pytest.mark.parametrize("distance", [deviation.final_mae, deviation.psnr, deviation.ssim])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_distances_of_shards_are_those_of_one_tensor(distance, kind, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = torch.Generator().manual_seed(0)
    a, b = (torch.rand(7, 3, 16, 16, generator=drawn) * 2.2 - 1.1 for _ in range(2))
    if kind == torch.uint8:
        a, b = (((side.clamp(-1, 1) + 1) * 127.5).to(kind) for side in (a, b))
    whole = distance(a, b)
    monkeypatch.setattr(images, "BLOCK_BYTES", 3 * a[0].numel() * a.element_size())
    order = torch.tensor([3, 0, 6, 6, 1])
    torch.testing.assert_close(distance(Images(a.split([2, 5])), Images(b.split([4, 3]))), whole)
    torch.testing.assert_close(
        distance(Images(a.split([2, 5])).taken(order), Images(b.split([4, 3])).taken(order)), whole[order]
    )


def test_odd_images_are_found_across_shards() -> None:
    plain, same = torch.full((4, 1, 2, 2), 0.5), torch.rand(1, 1, 2, 2).expand(4, 1, 2, 2)
    other = torch.rand(4, 1, 2, 2)
    for found, word in ((plain, "one colour"), (same, "the same image")):
        assert word in odd_images(Images(found.split(3)), None)[0]
    assert odd_images(Images(other.split(3)), Images(plain.split(2))) == []
    assert "to the bit" in odd_images(Images(other.split(3)), Images(other.split(2)))[0]
