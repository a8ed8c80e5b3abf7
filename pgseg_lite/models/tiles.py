"""Images larger than a model can take in at once: cut into overlapping tiles, put together without seams."""

import math
from collections import namedtuple

import torch
from torch import nn

from ..errors import SettingsError
from .base import SegmentationOutput, as_batch, check_prompts
from .lite import to_pixel_values

OVERLAP = 0.25  # share of a tile's side over which two neighbours fade into each other, at the least

# Per image of the batch its views (the image, or its tiles), where they lie, and the image's size.
ImageFeatures = namedtuple("ImageFeatures", "views boxes size")


def check_tile(tile):
    if tile is not None and tile < 32:
        raise SettingsError(f"tile is {tile}; a tile must have at least 32 pixels a side")


class TiledSegmenter(nn.Module):
    """What text-prompted models with large images have in common: views are encoded once and asked with K phrasings.

    A model brings `text` (a TextTower), `tile`, `options` (its others), `device` and two methods:
    encode_view(pixel_values [1, 3, h, w] in -1..1) -> whatever `ask` reads
    ask(view, text_features [K, ...], size) -> mask logits [K, *size], presence logits [K]
    """

    @torch.no_grad()
    def encode_image(self, images):
        """uint8 images -> their features; a large one tile by tile when `tile` is set."""
        pixels = torch.from_numpy(as_batch(images)).permute(0, 3, 1, 2)  # [B, 3, H, W]
        size = tuple(pixels.shape[-2:])
        boxes = tile_boxes(*size, self.tile)
        tiles = [[image[None, :, y0:y1, x0:x1] for y0, x0, y1, x1 in boxes] for image in pixels]
        views = [[self.encode_view(to_pixel_values(tile.to(self.device))) for tile in of_one] for of_one in tiles]
        return ImageFeatures(views, boxes, size)

    def encode_text(self, prompts):
        """Phrasings -> the features of their text tower [K, ...], embedded once."""
        return self.text.encode(check_prompts(prompts), self.device)

    def answering(self):
        """The options that decide an answer."""
        return {**self.options, "tile": self.tile, "truncate": self.text.truncate}

    def decode(self, image_features, text_features):
        """Every image with every phrasing, view by view, put together. text_features [K, ...], or [B, K, ...]."""
        views, boxes, size = image_features
        if text_features.ndim == self.text.dimensions:
            text_features = text_features.expand(len(views), *text_features.shape)
        sizes = [(bottom - top, right - left) for top, left, bottom, right in boxes]
        masks, presence = [], []
        for tiles, text in zip(views, text_features, strict=True):
            asked = [self.ask(view, text, side) for view, side in zip(tiles, sizes, strict=True)]
            masks.append(stitch([logits for logits, _ in asked], boxes, size))  # [K, H, W]
            presence.append(torch.stack([there for _, there in asked]).amax(0))  # [K], in any tile
        return SegmentationOutput(torch.stack(masks), torch.stack(presence))

    @torch.inference_mode()
    def predict(self, image, prompts):
        """Masks for one image [H, W, 3] or several, for every phrasing."""
        self.eval()
        text_features = self.encode_text(prompts)  # first: a phrasing that is too long is refused at once
        return self.decode(self.encode_image(image), text_features)


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
