"""Images larger than a model can take in at once: cut into overlapping tiles, put together without seams."""

import math

import torch

OVERLAP = 0.25  # share of a tile's side over which two neighbours fade into each other, at the least


def tile_boxes(height, width, tile=None):
    """(top, left, bottom, right) of every tile, of equal size and evenly spaced; one box without `tile`."""
    if tile is None:
        return [(0, 0, height, width)]
    high, wide = min(tile, height), min(tile, width)
    return [(y, x, y + high, x + wide) for y in starts(height, tile) for x in starts(width, tile)]


def starts(side, tile):
    overlap = int(tile * OVERLAP)
    count = max(1, math.ceil((side - overlap) / (tile - overlap)))
    return [round(i * (side - tile) / (count - 1)) for i in range(count)] if count > 1 else [0]


def stitch(maps, boxes, size):
    """Logits of each tile [P, h, w] -> logits of the whole [P, H, W], a weighted mean where tiles overlap."""
    if len(maps) == 1:
        return maps[0]
    total = maps[0].new_zeros(len(maps[0]), *size)  # [P, H, W]
    weight = maps[0].new_zeros(size)
    for logits, (top, left, bottom, right) in zip(maps, boxes, strict=True):
        fade = fade_in(bottom - top, logits)[:, None] * fade_in(right - left, logits)  # [h, w]
        total[:, top:bottom, left:right] += logits * fade
        weight[top:bottom, left:right] += fade
    return total / weight


def fade_in(side, like):
    """Weights [side] that rise from each border, so that a tile has next to no say where it ends."""
    from_border = torch.arange(side, device=like.device, dtype=like.dtype) + 0.5
    return (torch.minimum(from_border, side - from_border) / (side * OVERLAP)).clamp(max=1)
