"""RoIAlign on a CPU, as a sum over the cells of a map.

RoIAlign is linear in the map, and its weights are the same for all channels. torchvision's, on a
CPU, works the weights out again for each channel and runs on one core: pooling takes half of a
training step of Faster R-CNN. Here the weights are worked out once, and the sum over cells is
torch's embedding bag.

N: images, C: channels, H, W: height and width of a level, R: regions, B: bins along an axis,
S: samples of a bin along an axis, K: cells along an axis that a bin takes from.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from detectron2.layers import ROIAlign
from torch import Tensor, nn

from .passes import replaced_forward

__all__ = ["pooled_over_cells", "roi_align"]

# Regions whose weights are worked out at once, which bounds what a single one of unusual shape
# makes the others take.
_REGIONS = 256


@contextmanager
def pooled_over_cells(student: nn.Module) -> Iterator[None]:
    """The student's pooling layers compute by :func:`roi_align` where that is quicker: on a CPU."""
    with ExitStack() as stack:
        for layer in student.modules():
            if type(layer) is ROIAlign:
                stack.enter_context(replaced_forward(layer, _quicker(layer)))
        yield


def _quicker(layer: ROIAlign) -> Callable[[Tensor, Tensor], Tensor]:
    forward = layer.forward

    def pool(maps: Tensor, regions: Tensor) -> Tensor:
        if maps.device.type != "cpu":
            # Detectron2 gives the regions the maps' precision, and bfloat16's has 4 pixels at 512.
            wide = _in_single(maps)
            return forward(wide, regions.to(wide.dtype)).to(maps.dtype)
        return roi_align(
            maps,
            regions,
            output_size=layer.output_size,
            spatial_scale=layer.spatial_scale,
            sampling_ratio=layer.sampling_ratio,
            aligned=layer.aligned,
        )

    return pool


def _in_single(maps: Tensor) -> Tensor:
    """Half precision as single; what is wider stays as it is."""
    return maps if maps.dtype == torch.float64 else maps.float()


def roi_align(
    maps: Tensor,
    regions: Tensor,
    *,
    output_size: int | tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Mean of bilinear samples in each bin of each region (Mask R-CNN, 1703.06870).

    The function is :func:`torchvision.ops.roi_align`; results differ by rounding.

    Args:
        maps: (N, C, H, W). Sums over maps of half precision are in single, as torchvision's.
        regions: (R, 5), index of the image and x1 y1 x2 y2 in pixels.
        output_size: bins (rows, columns) of a region, or one number for both.
        spatial_scale: cells per pixel.
        sampling_ratio: samples of a bin along each axis; 0 for one in each begun cell.
        aligned: whether pixel centres lie at half-integer positions.

    Returns:
        (R, C, rows, columns), in the precision of the maps.
    """
    rows, columns = (output_size,) * 2 if isinstance(output_size, int) else output_size
    channels, height, width = maps.shape[1:]
    if not len(regions):
        return maps.new_zeros(0, channels, rows, columns) + 0 * maps.sum()  # (with its graph)
    wide = _in_single(maps)
    cells, weights, counts = [], [], []
    for part in regions.split(_REGIONS):
        images = part[:, 0].long()
        x1, y1, x2, y2 = (part[:, 1:].to(wide.dtype) * spatial_scale - 0.5 * aligned).unbind(1)
        row, of_row = _axis(y1, y2, height, rows, sampling_ratio, aligned)
        column, of_column = _axis(x1, x2, width, columns, sampling_ratio, aligned)
        # (regions, rows, columns, K of rows, K of columns)
        cell = (images[:, None, None, None, None] * height + row[:, :, None, :, None]) * width
        cell = (cell + column[:, None, :, None, :]).flatten(0, 2).flatten(1)
        weight = of_row[:, :, None, :, None] * of_column[:, None, :, None, :]
        weight = weight.flatten(0, 2).flatten(1)
        takes = weight != 0
        cells.append(cell[takes])
        weights.append(weight[takes])
        counts.append(takes.sum(1))
    counts = torch.cat(counts)
    pooled = F.embedding_bag(
        torch.cat(cells),
        wide.permute(0, 2, 3, 1).reshape(-1, channels),
        counts.cumsum(0) - counts,
        mode="sum",
        per_sample_weights=torch.cat(weights),
    )
    # Before the channels go to the front, which takes as long as there are bytes.
    pooled = pooled.to(maps.dtype).view(-1, rows, columns, channels)
    return pooled.permute(0, 3, 1, 2).contiguous()


def _axis(
    low: Tensor, high: Tensor, length: int, bins: int, sampling_ratio: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """From which cells each bin takes how much, along one axis.

    Args:
        low, high: (R,), ends of the regions in cells.
        length: cells of the axis.

    Returns:
        Cells, int64, and their weights: (R, B, K) each. Cells with the weight 0 may lie outside.
    """
    extent = high - low if aligned else (high - low).clamp(min=1)
    size = (extent / bins)[:, None, None]
    count = torch.full_like(size, sampling_ratio) if sampling_ratio > 0 else size.ceil()
    most = max(int(count.max()), 0)
    of_bin, sample = torch.arange(bins)[:, None], torch.arange(most)
    is_one = sample < count  # a region without extent may have none
    count = count.clamp(min=1)
    place = low[:, None, None] + of_bin * size + (sample + 0.5) * size / count  # (R, B, S)
    counts = is_one & (place >= -1) & (place <= length)  # none that lies far outside of the map
    place = place.clamp(0, length - 1)
    cell = place.floor()
    share = place - cell
    cell = torch.stack([cell, (cell + 1).clamp(max=length - 1)], dim=-1).long().flatten(2)
    weight = torch.stack([1 - share, share], dim=-1) * (counts / count)[..., None]
    # Neighbouring samples share cells: one weight for each.
    first = cell.amin(dim=2, keepdim=True) if most else cell.new_zeros(*cell.shape[:2], 1)
    window = int((cell - first).max()) + 1 if most else 1
    weights = weight.new_zeros(*cell.shape[:2], window)
    weights.scatter_add_(2, cell - first, weight.flatten(2).to(weights.dtype))
    return first + torch.arange(window), weights
