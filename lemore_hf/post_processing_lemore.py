# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""From logits to label maps of any size, without the upsampled scores in memory (our own method)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Elements that the working arrays hold at once: large enough to hide the cost of a call, small enough to stay in the
# processor's cache.
_BLOCK_ELEMENTS = 1 << 20


def segment_logits(logits: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """
    The best class of each pixel of the bilinearly upsampled logits.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_labels, height, width)`):
            Scores in any precision. Of a single label, class 1 is where its score is above 0.
        sizes (`Sequence[tuple[int, int]]`): `(height, width)` of each item's label map.

    Returns:
        `list[torch.Tensor]`: an int64 label map for each item.

    Raises:
        `ValueError`: for logits that are not finite.
    """
    _check_finite(logits)
    return [_segment(item, size) for item, size in zip(logits, sizes, strict=True)]


def resize_scores(scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """`(C, h, w)` → float32 `(C, H, W)`, bilinear."""
    scores = scores.float()
    if tuple(scores.shape[-2:]) == size:
        return scores
    return F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]


def _check_finite(logits: torch.Tensor) -> None:
    # Minimum and maximum show what is not finite without an array of the logits' size.
    finite = [torch.stack(torch.aminmax(item)).isfinite().all() for item in logits]
    for index, is_finite in enumerate(torch.stack(finite).tolist() if finite else []):
        if not is_finite:
            raise ValueError(
                f"The logits of batch item {index} are not finite (NaN or infinity), so that no class is the best: look "
                "at the pixel values, or at training that diverged or overflowed float16."
            )


def _segment(scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The int64 label map `(H, W)` of the scores `(C, h, w)` of one item."""
    if len(scores) == 1:
        # sigmoid(x) > 0.5 exactly where x > 0: the second of the two classes 0 and x wins.
        scores = torch.cat([torch.zeros_like(scores), scores])
    if len(scores) * size[0] * size[1] <= max(scores.numel(), _BLOCK_ELEMENTS):
        return resize_scores(scores, size).argmax(dim=0)  # no larger than the logits, or than a block would be
    return _upsampled_argmax(scores, size)


def _upsampled_argmax(scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The best class of each pixel of the bilinearly upsampled scores, without upsampling them all.

    The pixels between four neighbouring scores form a cell, in which a class lies between the least and the greatest of
    its four corners. A class whose greatest corner is below another's least one cannot win there, which leaves one
    class in most cells: theirs, for all their pixels. In the others, at borders, the few that can win are interpolated.

    Args:
        scores: finite, `(C, h, w)`.
        size: `(H, W)`.

    Returns:
        int64 labels, `(H, W)`.
    """
    rows, columns = (
        _Axis.of(length, target, scores.device) for length, target in zip(scores.shape[1:], size, strict=True)
    )
    # (C, h, w) → (h + 2, w + 2, C): the classes of a place side by side, the border repeated around
    scores = scores.permute(1, 2, 0).float()
    scores = scores[rows.corners][:, columns.corners].contiguous()
    labels = torch.empty(size, dtype=torch.int64, device=scores.device)
    row_elements = max(scores[0].numel(), columns.weights.numel() * rows.weights.shape[1])
    step = max(1, _BLOCK_ELEMENTS // row_elements)
    for start in range(0, len(rows.weights), step):
        _label_cell_rows(scores, rows, columns, range(start, min(start + step, len(rows.weights))), labels)
    return labels


@dataclass(frozen=True)
class _Axis:
    """Where each of `target` pixels lies along one axis of `length` scores.

    A cell spans two neighbouring scores; the first and the last of the `length + 1` cells repeat the border. Positions
    and rounding are those of `torch.nn.functional.interpolate`.

    Args:
        corners: the scores that the cells lie between, with the border repeated, `(length + 2,)`.
        cells: the cell of each pixel, rising, `(target,)`.
        has_pixels: whether a cell has any, which not every one does when shrinking, `(length + 1,)`.
        ends: for each cell, how many pixels it and those before it have.
        pixels: the pixels in each cell, `(length + 1, most pixels in a cell)`; the last one again where a cell has
            fewer, and meaningless where it has none.
        weights: of the second corner at each of these pixels, of the same shape.
    """

    corners: torch.Tensor
    cells: torch.Tensor
    has_pixels: torch.Tensor
    ends: list[int]
    pixels: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, length: int, target: int, device: torch.device) -> _Axis:
        # On the CPU, whatever `torch.set_default_device` says: a GPU would be waited for.
        scale = torch.tensor(length, dtype=torch.float32, device="cpu") / target
        position = (torch.arange(target, dtype=torch.float32, device="cpu") + 0.5) * scale - 0.5
        below = position.floor()
        cells = below.long() + 1
        counts = torch.bincount(cells, minlength=length + 1)
        ends = counts.cumsum(0)
        pixels = (ends - counts)[:, None] + torch.arange(int(counts.max()), device="cpu")
        pixels = pixels.minimum(ends[:, None] - 1).clamp(min=0)
        corners = torch.arange(-1, length + 1, device="cpu").clamp(0, length - 1)
        weights = (position - below)[pixels]
        return cls(
            corners.to(device),
            cells.to(device),
            (counts > 0).to(device),
            ends.tolist(),
            pixels.to(device),
            weights.to(device),
        )


def _label_cell_rows(scores: torch.Tensor, rows: _Axis, columns: _Axis, block: range, labels: torch.Tensor) -> None:
    """Writes the labels of a block of cell rows into `labels` `(H, W)`, from the scores `(h + 2, w + 2, C)`."""
    first, last = rows.ends[block.start - 1] if block.start else 0, rows.ends[block.stop - 1]
    if first == last:
        return
    corners = scores[block.start : block.stop + 1]
    lowest = torch.minimum(corners[:-1], corners[1:])
    lowest = torch.minimum(lowest[:, :-1], lowest[:, 1:])
    highest = torch.maximum(corners[:-1], corners[1:])
    highest = torch.maximum(highest[:, :-1], highest[:, 1:])
    bound, winner = lowest.max(dim=2)  # (cell rows, cell columns)
    can_win = highest >= bound[..., None]

    row_index = rows.cells[first:last] - block.start
    torch.index_select(winner[:, columns.cells], 0, row_index, out=labels[first:last])
    contested = (can_win.sum(dim=2) > 1) & rows.has_pixels[block.start : block.stop, None] & columns.has_pixels
    _label_contested(scores, rows, columns, contested, can_win[contested], block.start, labels)


def _label_contested(
    scores: torch.Tensor,
    rows: _Axis,
    columns: _Axis,
    contested: torch.Tensor,
    can_win: torch.Tensor,
    first_row: int,
    labels: torch.Tensor,
) -> None:
    """Writes the labels of the cells where several classes can win.

    Args:
        contested: which cells these are, `(cell rows, cell columns)`, the first of row `first_row`.
        can_win: which classes can win there, `(cells, C)`.
    """
    counts = can_win.sum(dim=1)
    # Cells with the most candidates first, so that those with a k-th candidate are a prefix.
    counts, order = counts.sort(descending=True)
    classes = can_win[order].nonzero()[:, 1]  # the candidates of each cell in rising order, one cell after another
    starts = counts.cumsum(0) - counts
    cell_rows, cell_columns = (index[order] for index in contested.nonzero(as_tuple=True))
    cell_rows = cell_rows + first_row
    num_columns, num_classes = scores.shape[1:]
    flat, top_left = scores.flatten(), (cell_rows * num_columns + cell_columns) * num_classes
    down, right = rows.weights[cell_rows][:, :, None], columns.weights[cell_columns]

    def interpolate(chosen: torch.Tensor) -> torch.Tensor:
        """The scores `(cells, R, Q)` of one class a cell, of the first cells."""
        index, n = top_left[: len(chosen)] + chosen, len(chosen)
        upper = torch.lerp(flat[index][:, None], flat[index + num_classes][:, None], right[:n])
        index = index + num_columns * num_classes
        lower = torch.lerp(flat[index][:, None], flat[index + num_classes][:, None], right[:n])
        return torch.lerp(upper[:, None], lower[:, None], down[:n])

    chosen = classes[starts]
    best, winner = interpolate(chosen), chosen[:, None, None].expand(-1, down.shape[1], right.shape[1]).contiguous()
    fewer = torch.bincount(counts, minlength=num_classes + 1).cumsum(0).tolist()
    for k in range(1, num_classes):
        remaining = len(counts) - fewer[k]
        if remaining == 0:
            break
        chosen = classes[starts[:remaining] + k]
        score = interpolate(chosen)
        better = score > best[:remaining]
        winner[:remaining] = torch.where(better, chosen[:, None, None], winner[:remaining])
        torch.maximum(best[:remaining], score, out=best[:remaining])
    # Where a cell has fewer pixels its last one is written again, with the same label.
    labels[rows.pixels[cell_rows][:, :, None], columns.pixels[cell_columns][:, None]] = winner
