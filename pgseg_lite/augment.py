"""Training views of a sample: geometry that moves image and masks together, and stain that moves alone."""

import numpy as np
from PIL import Image

# Optical densities of haematoxylin, eosin and residual, one row each (Ruifrok and Johnston, 2001).
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
STAINS = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
UNMIX = np.linalg.inv(STAINS)
MOST = 31  # masks of one view: they travel together, as the bits of one 32-bit image
DENSITY = -np.log((np.arange(256) + 1) / 256).astype(np.float32)  # of each 8-bit value


def augment(image, masks, size, rng):
    """A random view: image uint8 [H, W, 3], masks bool [G, H, W] -> [size, size, 3], [G, size, size].

    Rotation, flip and a zoom of 0.75 to 1.33 about a random point; beyond the border the tissue is mirrored.
    """
    assert len(masks) <= MOST
    height, width = image.shape[:2]
    angle, zoom, mirror = rng.uniform(0, 2 * np.pi), 2 ** rng.uniform(-0.41, 0.41), rng.choice((-1, 1))
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    # Output pixel -> input pixel, about a centre that keeps most of the view inside the image.
    margin = [min(size / 2 / zoom, side / 2) for side in (width, height)]
    centre = [rng.uniform(m, side - m) for m, side in zip(margin, (width, height), strict=True)]
    matrix = np.array([[cos * mirror, -sin], [sin * mirror, cos]])
    offset = np.array(centre) - matrix @ [size / 2, size / 2]

    reach = int(np.ceil(size / zoom * np.sqrt(0.5)))  # the view's half diagonal in input pixels
    left, top = (int(c) - reach - 2 for c in centre)
    right, bottom = left + 2 * reach + 4, top + 2 * reach + 4
    columns, rows = mirrored(left, right, width), mirrored(top, bottom, height)
    offset -= [left, top]
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    bits = (masks[:, rows][:, :, columns] * (1 << np.arange(len(masks)))[:, None, None]).sum(0).astype(np.int32)

    def warp(array, resample):
        picture = Image.fromarray(array)
        return np.asarray(picture.transform((size, size), Image.Transform.AFFINE, coefficients, resample))

    image = warp(np.ascontiguousarray(image[rows][:, columns]), Image.Resampling.BILINEAR)
    bits = warp(bits, Image.Resampling.NEAREST)
    return vary_stain(image, rng), (bits >> np.arange(len(masks))[:, None, None] & 1).astype(bool)


def mirrored(start, stop, side):
    """Indices start..stop folded back into 0..side-1 at both borders."""
    index = np.abs(np.arange(start, stop)) % (2 * side)
    return np.where(index < side, index, 2 * side - 1 - index)


def vary_stain(image, rng):
    """More or less of each stain, a slightly other hue of each, and another brightness."""
    amounts = np.diag(rng.uniform(0.7, 1.3, 3)) + rng.normal(0, 0.03, (3, 3))
    mix = (UNMIX @ amounts @ STAINS).astype(np.float32)  # density -> density
    density = DENSITY[image] @ mix + np.float32(rng.uniform(-0.05, 0.05))
    return (256 * np.exp(-density) - 1).clip(0, 255).astype(np.uint8)
